# SPDX-License-Identifier: Apache-2.0
"""Synthetic anomalies: noise-shaped patches of foreign texture, or of the image's own structure in disorder.

Or, which the paper does not have, of the image itself in other colours or moved.
Choices are made on the CPU, all else is computed on the device of the images, for all of them at once.
Source: CPR (arXiv 2308.06748), section IV, and DRAEM (arXiv 2108.07610), section 3.3, with the values of CPR's code.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .anomaly_sources import AnomalySource, ProceduralTextures, TextureFolder
from .appearance import change_appearance, recolour, rotate
from .augmentation import hand_over
from .components import keep_components

LARGEST_EXPONENT = 5
THRESHOLD = 0.5
LARGEST_ROTATION = 90.0
# At 320x320 pixels nine tries of ten succeed without a foreground, three of four on a screw (9 % of the image). After
# so many failures the object is too small to be hit.
MAXIMUM_TRIES = 50
FOREGROUND_THRESHOLD = 0.5
TILES = 16
DISPLACEMENT = (1 / 80, 1 / 8)  # of the longer side; 4 to 40 pixels of 320


class SyntheticAnomalyGenerator(nn.Module):
    """Puts anomalies on good images and tells where.

    Args:
        source_path (str | Path | None): Folder of texture images (e.g. DTD). None uses built-in textures.
        anomaly_probability (float): Share of images that get an anomaly, 0..1.
        structure_probability (float): Share of anomalies made of the image in disorder instead of a texture, 0..1; the
            paper uses 0.5 for objects and 0 for textures.
        blend (tuple[float, float]): Range of the opacity of an anomaly, 0..1.
        minimum_area (float): Smallest connected part of an anomaly, as a share of the image area, 0..1.
        recoloured (float): Share of anomalies that are neither, but the image itself in other colours, 0..1. The paper
            has none.
        displaced (float): Share of anomalies that are neither, but the image itself, moved, 0..1. The paper has none.

    Raises:
        ValueError: If a value is out of range, or the folder holds no images.
        FileNotFoundError: If there is no such folder.

    Note:
        CPR (arXiv 2308.06748), section IV. The authors save 12,000 images per category before training, as JPEG, with
        noise of compression around every anomaly; here each training step draws its own.
    """

    def __init__(
        self,
        source_path: str | Path | None = None,
        anomaly_probability: float = 0.9,
        structure_probability: float = 0.5,
        blend: tuple[float, float] = (0.5, 1.0),
        minimum_area: float = 0.001,
        recoloured: float = 0.0,
        displaced: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("anomaly_probability", anomaly_probability),
            ("structure_probability", structure_probability),
            ("minimum_area", minimum_area),
            ("recoloured", recoloured),
            ("displaced", displaced),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"Invalid {name}={value}; expected a number in 0..1.")
        if recoloured + displaced > 1:
            raise ValueError(f"recoloured={recoloured} and displaced={displaced} are shares; their sum is above 1.")
        if len(blend) != 2 or not 0 <= blend[0] <= blend[1] <= 1:
            raise ValueError(f"Invalid blend={blend}; expected two numbers in 0..1, the smaller one first.")
        self.anomaly_probability = anomaly_probability
        self.structure_probability = structure_probability
        self.blend = (float(blend[0]), float(blend[1]))
        self.minimum_area = minimum_area
        self.recoloured, self.displaced = recoloured, displaced
        self.textures: AnomalySource = ProceduralTextures() if source_path is None else TextureFolder(source_path)

    @torch.no_grad()
    def forward(self, images: Tensor, foreground: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Put anomalies on most of the images.

        Args:
            images (Tensor): Good images, RGB in 0..1, ``(batch, 3, height, width)``.
            foreground (Tensor | None): Probability of the object, 0..1, ``(batch, 1, any height, any width)``. Each
                part of an anomaly touches the object. None: the object fills the image.
            generator (torch.Generator): On the CPU; every choice comes from it.

        Returns:
            tuple[Tensor, Tensor]: The images, of the same shape, and the masks of what was changed, bool,
                ``(batch, 1, height, width)``. An image stays normal, with an empty mask, by chance or where no anomaly
                finds an object to touch.
        """
        batch, _, height, width = images.shape
        chance, kind, opacity = torch.rand((3, batch), generator=generator)
        masks = draw_masks(
            chance < self.anomaly_probability,
            None if foreground is None else _resized_foreground(foreground, (height, width)),
            (height, width),
            self.minimum_area,
            generator,
            images.device,
        )
        chosen = masks.flatten(1).any(1).cpu().nonzero().flatten()
        where = hand_over(chosen, images.device)
        if not len(chosen):
            return images.clone(), masks

        good = images[where]
        sources = self._draw_sources(good, kind[chosen] < self.structure_probability, generator)
        opacity = self.blend[0] + (self.blend[1] - self.blend[0]) * opacity[chosen]
        images = images.clone()
        images[where] = blend(good, sources, masks[where], hand_over(opacity, images.device))
        return images, masks

    def _draw_sources(self, images: Tensor, structure: Tensor, generator: torch.Generator) -> Tensor:
        """What the anomalies are made of; ``structure`` (``(batch,)``, CPU): the image in disorder, not a texture."""
        recoloured = displaced = torch.zeros_like(structure)
        if self.recoloured or self.displaced:  # asked first, so that the paper's anomalies stay the same, bit for bit
            chance = torch.rand(len(images), generator=generator)
            recoloured = chance < self.recoloured
            displaced = ~recoloured & (chance < self.recoloured + self.displaced)
        others = ~recoloured & ~displaced
        sources = torch.empty_like(images)
        for chosen, draw in (
            (others & ~structure, self._draw_textures),
            (others & structure, disorder),
            (recoloured, recolour),
            (displaced, displace),
        ):
            if chosen.any():
                where = hand_over(chosen.nonzero().flatten(), images.device)
                sources[where] = draw(images[where], generator)
        return sources

    def _draw_textures(self, images: Tensor, generator: torch.Generator) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        return self.textures.sample(len(images), size, generator, images.device).to(images.dtype)


def disorder(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change the look of images and put 16x16 tiles of each into random order.

    Args:
        images (Tensor): RGB in 0..1, ``(batch, 3, height, width)``.
        generator (torch.Generator): On the CPU; every choice comes from it.

    Returns:
        Tensor: Same shape, in 0..1.
    """
    changed = change_appearance(images, generator)
    order = torch.rand((len(images), TILES * TILES), generator=generator).argsort(1)
    return shuffle_tiles(changed, hand_over(order, images.device))


def displace(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image in any direction, by an eightieth to an eighth of its longer side; mirrored at the edges.

    Where it is laid over the image, lines break off, go on beside themselves, or end too early: defects of shape, with
    nothing foreign about them. CutPaste (arXiv 2104.04015) learns from the like.

    Args:
        images (Tensor): Of shape ``(batch, channels, height, width)``.
        generator (torch.Generator): On the CPU; every choice comes from it.

    Returns:
        Tensor: Same shape.
    """
    height, width = images.shape[-2:]
    turns, share = torch.rand((2, len(images)), generator=generator)
    least, most = (max(height, width) * bound for bound in DISPLACEMENT)
    distance, angle = least + (most - least) * share, 2 * math.pi * turns
    moves = torch.stack([distance * angle.sin(), distance * angle.cos()]).round().long()
    down, right = hand_over(moves, images.device)[:, :, None]
    rows = _mirrored(torch.arange(height, device=images.device) + down, height)
    columns = _mirrored(torch.arange(width, device=images.device) + right, width)
    cells = (rows[:, :, None] * width + columns[:, None]).flatten(1)
    return images.flatten(2).gather(2, cells[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def _mirrored(places: Tensor, count: int) -> Tensor:
    """Places along an axis of so many pixels, mirrored at its ends, again and again."""
    period = max(1, 2 * (count - 1))
    places = places.remainder(period)
    return torch.minimum(places, period - places)


def blend(images: Tensor, sources: Tensor, masks: Tensor, opacity: Tensor) -> Tensor:
    """Lay sources over images inside masks.

    Args:
        images (Tensor): Of shape ``(batch, 3, height, width)``.
        sources (Tensor): Same shape.
        masks (Tensor): Bool, ``(batch, 1, height, width)``.
        opacity (Tensor): Share of the source inside the mask, 0..1, ``(batch,)``.

    Returns:
        Tensor: Same shape as the images; outside the masks bit by bit the images.
    """
    return torch.where(masks, torch.lerp(images, sources, opacity.to(images).view(-1, 1, 1, 1)), images)


def draw_masks(
    anomalous: Tensor,
    foreground: Tensor | None,
    size: tuple[int, int],
    minimum_area: float,
    generator: torch.Generator,
    device: torch.device | None = None,
) -> Tensor:
    """Draw the places of anomalies; redraw where none is large enough and touches the object.

    Args:
        anomalous (Tensor): Which images get an anomaly, bool, ``(batch,)``, on the CPU.
        foreground (Tensor | None): Where the object is, bool, ``(batch, height, width)``; None: everywhere.
        size (tuple[int, int]): Height and width in pixels.
        minimum_area (float): Smallest connected part, as a share of the image area.
        generator (torch.Generator): On the CPU; every choice comes from it.
        device (torch.device | None): That of the foreground, where all is computed; None means the CPU.

    Returns:
        Tensor: Bool, ``(batch, 1, height, width)``, on the device; empty where there should be none, or after
            50 tries in vain.
    """
    masks = torch.zeros((len(anomalous), *size), dtype=torch.bool, device=device)
    if foreground is not None:
        anomalous = anomalous & foreground.flatten(1).any(1).cpu()
    pending = anomalous.nonzero().flatten()
    for _ in range(MAXIMUM_TRIES):
        if not len(pending):
            break
        where = hand_over(pending, masks.device)
        candidates = draw_noise(len(pending), size, generator, device) > THRESHOLD
        masks[where] = keep_components(candidates, None if foreground is None else foreground[where], minimum_area)
        pending = pending[~masks[where].flatten(1).any(1).cpu()]
    return masks[:, None]


def draw_noise(
    count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device | None = None
) -> Tensor:
    """Draw Perlin noise of random scale per axis, turned by a random angle.

    Args:
        count (int): Number of maps.
        size (tuple[int, int]): Height and width in pixels. Maps that are not square are cut from square ones.
        generator (torch.Generator): On the CPU; every choice comes from it.
        device (torch.device | None): Computes the maps; None means the CPU.

    Returns:
        Tensor: About -1..1, ``(count, height, width)``, on the device; 0 where the turned square does not reach.
    """
    lattice = 2**LARGEST_EXPONENT + 1
    cells = 2 ** torch.randint(LARGEST_EXPONENT + 1, (count, 2), generator=generator)
    angles = 2 * math.pi * torch.rand((count, lattice, lattice), generator=generator)
    degrees = LARGEST_ROTATION * (2 * torch.rand(count, generator=generator) - 1)
    device = angles.device if device is None else device
    noise = perlin_noise(hand_over(angles, device), hand_over(cells, device), max(size))
    return rotate(noise[:, None], hand_over(degrees, device), size)[:, 0]


def perlin_noise(angles: Tensor, cells: Tensor, side: int) -> Tensor:
    """Gradient noise on a square, with the quintic fade ``6t^5 - 15t^4 + 10t^3``, times √2.

    A pixel hears only the four lattice points around it, with weights that are a product of one along each axis. So
    the sum over the lattice is a product of matrices: pixels x lattice, lattice x lattice, lattice x pixels.

    Args:
        angles (Tensor): Directions of the unit gradients at the lattice points, in radians,
            ``(count, lattice, lattice)``; of each map the first ``cells + 1`` of each axis are used.
        cells (Tensor): Cells along height and width, ``(count, 2)``, each less than ``lattice``.
        side (int): Pixels.

    Returns:
        Tensor: In -1..1, ``(count, side, side)``. The first pixel lies on the first lattice point.
    """
    points = torch.arange(angles.shape[-1], dtype=angles.dtype, device=angles.device)
    position = torch.arange(side, dtype=angles.dtype, device=angles.device) / side
    # (axis, count, pixel, lattice point): the way from the lattice point, and how much it counts.
    way = cells.T[:, :, None, None] * position[:, None] - points
    near = (1 - way.abs()).clamp_min_(0)
    weight = near**3 * (near * (6 * near - 15) + 10)
    lean = weight * way
    across = torch.cat([angles.cos() @ lean[1].mT, angles.sin() @ weight[1].mT], dim=1)
    return math.sqrt(2) * (torch.cat([weight[0], lean[0]], dim=2) @ across)


def shuffle_tiles(images: Tensor, order: Tensor) -> Tensor:
    """Cut images into a grid of tiles and put these back in another order.

    Where the grid does not divide the sides, the images are first enlarged to the next size that it divides, and the
    result is cropped.

    Args:
        images (Tensor): Of shape ``(batch, channels, height, width)``.
        order (Tensor): Which tile comes to each place, row by row, ``(batch, tiles * tiles)``: a permutation per image.

    Returns:
        Tensor: Same shape as the images.
    """
    batch, channels, height, width = images.shape
    tiles = math.isqrt(order.shape[1])
    rows, columns = -(-height // tiles), -(-width // tiles)
    if (rows * tiles, columns * tiles) != (height, width):
        images = F.interpolate(images, (rows * tiles, columns * tiles), mode="bilinear")
    cut = images.reshape(batch, channels, tiles, rows, tiles, columns).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled = cut[torch.arange(batch, device=images.device)[:, None], order]
    whole = shuffled.unflatten(1, (tiles, tiles)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    return whole[..., :height, :width]


def _resized_foreground(foreground: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the object is, bool, ``(batch, height, width)``."""
    return (F.interpolate(foreground.float(), size, mode="bilinear") > FOREGROUND_THRESHOLD)[:, 0]
