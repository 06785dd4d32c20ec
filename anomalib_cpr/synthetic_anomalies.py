# SPDX-License-Identifier: Apache-2.0
"""Synthetic anomalies: noise-shaped patches of foreign texture, or of the image's own structure in disorder.

Noise and looks are computed on the device of the images; which parts of the noise stay is decided on the CPU, where
OpenCV finds connected components. Source: CPR (arXiv 2308.06748), section IV, and DRAEM (arXiv 2108.07610), section
3.3, with the values of CPR's code.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import v2

from .anomaly_sources import AnomalySource, ProceduralTextures, TextureFolder

LARGEST_EXPONENT = 5
THRESHOLD = 0.5
LARGEST_ROTATION = 90.0
# At 320x320 pixels nine tries of ten succeed without a foreground, three of four on a screw (9 % of the image). After
# so many failures the object is too small to be hit.
MAXIMUM_TRIES = 50
FOREGROUND_THRESHOLD = 0.5
TILES = 16
OPERATIONS_PER_IMAGE = 3


class SyntheticAnomalyGenerator(nn.Module):
    """Puts anomalies on good images and tells where.

    Args:
        source_path (str | Path | None): Folder of texture images (e.g. DTD). None uses built-in textures.
        anomaly_probability (float): Share of images that get an anomaly, 0..1.
        structure_probability (float): Share of anomalies made of the image itself instead of a texture, 0..1; the paper
            uses 0.5 for objects and 0 for textures.
        blend (tuple[float, float]): Range of the opacity of an anomaly, 0..1.
        minimum_area (float): Smallest connected part of an anomaly, as a share of the image area, 0..1.

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
    ) -> None:
        super().__init__()
        for name, value in (
            ("anomaly_probability", anomaly_probability),
            ("structure_probability", structure_probability),
            ("minimum_area", minimum_area),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"Invalid {name}={value}; expected a number in 0..1.")
        if len(blend) != 2 or not 0 <= blend[0] <= blend[1] <= 1:
            raise ValueError(f"Invalid blend={blend}; expected two numbers in 0..1, the smaller one first.")
        self.anomaly_probability = anomaly_probability
        self.structure_probability = structure_probability
        self.blend = (float(blend[0]), float(blend[1]))
        self.minimum_area = minimum_area
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
        chosen = masks.flatten(1).any(1).nonzero().flatten()
        where, masks = chosen.to(images.device), masks.to(images.device)
        if not len(chosen):
            return images.clone(), masks

        good = images[where]
        sources = self._draw_sources(good, kind[chosen] < self.structure_probability, generator)
        opacity = self.blend[0] + (self.blend[1] - self.blend[0]) * opacity[chosen]
        images = images.clone()
        images[where] = blend(good, sources, masks[where], opacity.to(images.device))
        return images, masks

    def _draw_sources(self, images: Tensor, structure: Tensor, generator: torch.Generator) -> Tensor:
        """Textures, or the images in disorder where ``structure`` (``(batch,)``, CPU) says so."""
        size = (images.shape[-2], images.shape[-1])
        sources = torch.empty_like(images)
        chosen = structure.logical_not().nonzero().flatten()
        if len(chosen):
            textures = self.textures.sample(len(chosen), size, generator, images.device)
            sources[chosen.to(images.device)] = textures.to(images.dtype)
        chosen = structure.nonzero().flatten()
        if len(chosen):
            changed = change_appearance(images[chosen.to(images.device)], generator)
            order = torch.rand((len(chosen), TILES * TILES), generator=generator).argsort(1)
            sources[chosen.to(images.device)] = shuffle_tiles(changed, order.to(images.device))
        return sources


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
        foreground (Tensor | None): Where the object is, bool, ``(batch, height, width)``, on the CPU; None: everywhere.
        size (tuple[int, int]): Height and width in pixels.
        minimum_area (float): Smallest connected part, as a share of the image area.
        generator (torch.Generator): On the CPU; every choice comes from it.
        device (torch.device | None): Computes the noise; None means the CPU.

    Returns:
        Tensor: Bool, ``(batch, 1, height, width)``, on the CPU; empty where there should be none, or after
            50 tries in vain.
    """
    masks = torch.zeros((len(anomalous), 1, *size), dtype=torch.bool)
    if foreground is not None:
        anomalous = anomalous & foreground.flatten(1).any(1)
    pending = anomalous.nonzero().flatten().tolist()
    for _ in range(MAXIMUM_TRIES):
        if not pending:
            break
        candidates = (draw_noise(len(pending), size, generator, device) > THRESHOLD).cpu().numpy()
        for index, candidate in zip(pending, candidates, strict=True):
            kept = keep_components(candidate, None if foreground is None else foreground[index].numpy(), minimum_area)
            masks[index, 0] = torch.from_numpy(kept)
        pending = [index for index in pending if not masks[index].any()]
    return masks


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
    return rotate(perlin_noise(angles.to(device), cells.to(device), max(size)), degrees.to(device), size)


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


def rotate(maps: Tensor, degrees: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn maps around their centre and cut out the middle; outside there is 0.

    Args:
        maps (Tensor): Of shape ``(count, side, side)``.
        degrees (Tensor): Angles, ``(count,)``; positive ones turn counterclockwise.
        size (tuple[int, int]): Height and width of the middle, in pixels.

    Returns:
        Tensor: Bilinear, ``(count, height, width)``.
    """
    side = maps.shape[-1]
    cosine, sine = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    down, right = size[0] / side, size[1] / side
    zero = torch.zeros_like(cosine)
    matrix = torch.stack([cosine * right, -sine * down, zero, sine * right, cosine * down, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(maps), 1, *size], align_corners=False)
    return F.grid_sample(maps[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def keep_components(mask: np.ndarray, foreground: np.ndarray | None, minimum_area: float) -> np.ndarray:
    """Drop the parts of a mask that are too small or lie off the object.

    Args:
        mask (np.ndarray): Bool, ``(height, width)``. Pixels that touch at a corner are connected.
        foreground (np.ndarray | None): Where the object is, bool, same shape; None: everywhere. A part that touches the
            object is kept whole.
        minimum_area (float): Smallest part to keep, as a share of the image area.

    Returns:
        np.ndarray: Bool, ``(height, width)``.
    """
    # Of OpenCV's algorithms, which all find the same parts, this one takes a third of the default's time.
    count, labels, stats, _ = cv2.connectedComponentsWithStatsWithAlgorithm(
        mask.astype(np.uint8), 8, cv2.CV_32S, cv2.CCL_GRANA
    )
    keep = stats[:, cv2.CC_STAT_AREA] >= minimum_area * mask.size
    if foreground is not None:
        keep &= np.bincount(labels[foreground], minlength=count) > 0
    keep[0] = False  # label 0 is what lies outside the mask
    return keep[labels]


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


def change_appearance(
    images: Tensor, generator: torch.Generator, operations: "Sequence[Operation] | None" = None
) -> Tensor:
    """Apply to each image three different operations out of ten, in random order.

    Args:
        images (Tensor): RGB in 0..1, ``(batch, 3, height, width)``.
        generator (torch.Generator): On the CPU; every choice comes from it.
        operations (Sequence[Operation] | None): To choose from; None means :data:`OPERATIONS`.

    Returns:
        Tensor: Same shape, in 0..1.
    """
    available = OPERATIONS if operations is None else operations
    chosen = torch.rand((len(images), len(available)), generator=generator).argsort(1)[:, :OPERATIONS_PER_IMAGE]
    strengths = torch.rand((len(images), OPERATIONS_PER_IMAGE, 3), generator=generator)
    changed = []
    for image, which, values in zip(images, chosen.tolist(), strengths.tolist(), strict=True):
        for operation, strength in zip(which, values, strict=True):
            image = available[operation](image, strength).clamp(0, 1)  # noqa: PLW2901 - one operation after another
        changed.append(image)
    return torch.stack(changed)


# An operation takes an image (3, height, width) in 0..1 and three numbers in 0..1 that set its strength.
Operation = Callable[[Tensor, list[float]], Tensor]


def add_saturation(image: Tensor, change: float) -> Tensor:
    """Add to the saturation of the HSV colour space; hue and value stay. Grey counts as red of saturation 0.

    Args:
        image (Tensor): RGB in 0..1, ``(3, height, width)``.
        change (float): In -1..1; the sum is clamped to 0..1.

    Returns:
        Tensor: Same shape, in 0..1.
    """
    tiny = torch.finfo(image.dtype).tiny
    lowest, highest = image.aminmax(dim=0, keepdim=True)
    chroma = highest - lowest
    # In HSV a colour is value * (1 - saturation * direction), where the direction depends on the hue alone.
    red = image.new_tensor([0.0, 1.0, 1.0])[:, None, None]
    direction = torch.where(chroma > 0, (highest - image) / chroma.clamp_min(tiny), red)
    saturation = (chroma / highest.clamp_min(tiny) + change).clamp(0, 1)
    return highest * (1 - saturation * direction)


def _gamma(image: Tensor, strength: list[float]) -> Tensor:
    exponents = [0.5 * 4**value for value in strength]  # 0.5..2, per channel
    return image ** image.new_tensor(exponents)[:, None, None]


def _brightness(image: Tensor, strength: list[float]) -> Tensor:
    return image * (0.8 + 0.4 * strength[0]) + (2 * strength[1] - 1) * 30 / 255


def _sharpness(image: Tensor, strength: list[float]) -> Tensor:
    return v2.functional.adjust_sharpness(image, 3 * strength[0])  # below 1 blurs, above 1 sharpens


def _hue_and_saturation(image: Tensor, strength: list[float]) -> Tensor:
    # A factor on the saturation would leave grey images as they are; DRAEM adds to it.
    image = add_saturation(image, (2 * strength[0] - 1) * 50 / 255)
    return v2.functional.adjust_hue(image, (2 * strength[1] - 1) * 50 / 255)


def _solarise(image: Tensor, strength: list[float]) -> Tensor:
    return v2.functional.solarize(image, (32 + 96 * strength[0]) / 255)


def _posterise(image: Tensor, strength: list[float]) -> Tensor:
    return v2.functional.posterize(image, 1 + int(5 * strength[0]))


def _invert(image: Tensor, strength: list[float]) -> Tensor:
    del strength
    return 1 - image


def _autocontrast(image: Tensor, strength: list[float]) -> Tensor:
    del strength
    return v2.functional.autocontrast(image)


def _equalise(image: Tensor, strength: list[float]) -> Tensor:
    del strength
    return v2.functional.equalize(image)


def _turn(image: Tensor, strength: list[float]) -> Tensor:
    return v2.functional.rotate(image, 90 * strength[0] - 45, v2.InterpolationMode.BILINEAR)


OPERATIONS: tuple[Operation, ...] = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_and_saturation,
    _solarise,
    _posterise,
    _invert,
    _autocontrast,
    _equalise,
    _turn,
)


def _resized_foreground(foreground: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the object is, bool, ``(batch, height, width)``, on the CPU, where the components are found."""
    return (F.interpolate(foreground.float(), size, mode="bilinear") > FOREGROUND_THRESHOLD)[:, 0].cpu()
