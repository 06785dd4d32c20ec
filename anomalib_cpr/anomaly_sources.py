# SPDX-License-Identifier: Apache-2.0
"""What synthetic anomalies are painted with: textures from a folder such as DTD, or drawn on the spot.

Source: DRAEM (arXiv 2108.07610), section 3.3, which CPR (arXiv 2308.06748, section IV) follows.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .augmentation import device_generator, hand_over

TEXTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
# At 320x320 pixels room for 873 textures. DTD has 5640; what does not fit is decoded again.
CACHE_BYTES = 256 * 2**20


class AnomalySource(Protocol):
    """Anything that gives textures."""

    def sample(self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw textures.

        Args:
            count (int): Number of textures.
            size (tuple[int, int]): Height and width in pixels.
            generator (torch.Generator): On the CPU; every choice comes from it.
            device (torch.device): Where the textures are wanted.

        Returns:
            Tensor: RGB in 0..1, ``(count, 3, height, width)``.
        """


class TextureFolder:
    """Texture images of a folder, found recursively, resized to the image as the authors do.

    Args:
        path (str | Path): Folder, for example the ``images`` folder of DTD.
        cache_bytes (int): Memory for decoded textures, in bytes; the least recently used ones are dropped.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no images.
    """

    def __init__(self, path: str | Path, cache_bytes: int = CACHE_BYTES) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"Texture folder {self.path} does not exist or is not a folder. Give a folder of texture images such "
                f"as DTD, or None for the built-in textures."
            )
        # Sorted, because the order in which a file system lists files differs between machines.
        self.files = sorted(
            (
                file
                for file in self.path.rglob("*")
                if file.suffix.lower() in TEXTURE_SUFFIXES and not file.name.startswith(".") and file.is_file()
            ),
            key=lambda file: file.relative_to(self.path).as_posix(),
        )
        if not self.files:
            raise ValueError(
                f"Texture folder {self.path} holds no images ({', '.join(sorted(TEXTURE_SUFFIXES))}). Give a folder of "
                f"texture images such as DTD, or None for the built-in textures."
            )
        self._cache: OrderedDict[tuple[int, tuple[int, int]], Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._held_bytes = 0

    def sample(self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw textures, with replacement.

        Args:
            count (int): Number of textures.
            size (tuple[int, int]): Height and width in pixels.
            generator (torch.Generator): On the CPU; every choice comes from it.
            device (torch.device): Where the textures are wanted.

        Returns:
            Tensor: RGB in 0..1, ``(count, 3, height, width)``.

        Raises:
            OSError: If a drawn file cannot be read.
        """
        chosen = torch.randint(len(self.files), (count,), generator=generator).tolist()
        textures = [self._load(index, size) for index in chosen]
        if not textures:
            return torch.empty((0, 3, *size), device=device)
        return hand_over(torch.stack(textures), device).float().div_(255)

    def _load(self, index: int, size: tuple[int, int]) -> Tensor:
        """Texture of shape ``(3, height, width)``, uint8, from memory or from its file."""
        key = (index, size)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        texture = read_texture(self.files[index], size)
        self._cache[key] = texture
        self._held_bytes += texture.nbytes
        while self._held_bytes > self._cache_bytes:
            self._held_bytes -= self._cache.popitem(last=False)[1].nbytes
        return texture


def read_texture(file: Path, size: tuple[int, int]) -> Tensor:
    """Read an image file and resize it, bilinear and without regard to its aspect ratio.

    Args:
        file (Path): Image file of any format that OpenCV reads.
        size (tuple[int, int]): Height and width in pixels.

    Returns:
        Tensor: RGB of shape ``(3, height, width)``, uint8.

    Raises:
        OSError: If the file is missing or is not an image.
    """
    # Read by NumPy, because cv2.imread knows no paths beyond ASCII on Windows.
    content = np.fromfile(file, dtype=np.uint8)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    except cv2.error:
        image = None
    if image is None:
        raise OSError(f"Texture image {file} cannot be read as an image. Remove or replace the file.")
    image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))


class ProceduralTextures:
    """Textures drawn by formula, for those who have no texture images at hand.

    Each is a pattern (noise, stripes, checks, weave, spots, cells, cracks or marble) of random scale, direction,
    distortion and hardness, between two random colours, under coloured noise.
    """

    def sample(self, count: int, size: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw textures.

        Args:
            count (int): Number of textures.
            size (tuple[int, int]): Height and width in pixels.
            generator (torch.Generator): On the CPU; every choice comes from it.
            device (torch.device): Where the textures are wanted.

        Returns:
            Tensor: RGB in 0..1, ``(count, 3, height, width)``.
        """
        if count == 0:
            return torch.empty((0, 3, *size), device=device)
        kinds = torch.randint(len(PATTERNS), (count,), generator=generator)
        generator = device_generator(generator, device)
        slope, coarseness, turn, stretch, warp, hardness, strength, hue_share = _uniform(
            (8, count, 1, 1), generator, device
        )
        noise = fractal_noise(size, 0.2 + slope[..., None], generator, device)

        # From 3 to 40 periods over the shorter side, in a random direction, bent by smooth noise.
        periods = 3 * (40 / 3) ** coarseness
        u, v = _plane(size, turn, periods, periods * 2 ** (stretch - 0.5), device)
        bend = F.interpolate(_uniform((count, 2, 5, 5), generator, device) - 0.5, size, mode="bicubic")
        u, v = torch.addcmul(u, bend[:, 0], 4 * warp**2), torch.addcmul(v, bend[:, 1], 4 * warp**2)

        pattern = torch.empty((count, *size), device=device)
        for kind, draw in enumerate(PATTERNS):
            chosen = (kinds == kind).nonzero().flatten()
            if len(chosen):
                where = hand_over(chosen, device)
                pattern[where] = draw(u[where], v[where], noise[where, 0], generator)
        # -1..1, from soft to nearly two-valued.
        hardness = 8**hardness
        pattern = (hardness * pattern).tanh_().div_(hardness.tanh())[:, None]

        first, second = _colour_pairs(count, generator, device)
        textures = torch.addcmul((first + second) / 2, pattern, (second - first) / 2)
        # Most things vary more in brightness than in colour.
        noise = torch.lerp(noise[:, :1], noise, hue_share[..., None] ** 2)
        return textures.addcmul_(noise, 0.02 + 0.15 * strength[..., None] ** 2).clamp_(0, 1)


def fractal_noise(size: tuple[int, int], slope: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    """Coloured noise on all scales from the whole image down to single pixels.

    Args:
        size (tuple[int, int]): Height and width in pixels.
        slope (Tensor): How much stronger each scale is than the next finer one, as a power of two,
            ``(count, 1, 1, 1)``. 0 is grain, 1 is clouds.
        generator (torch.Generator): On the device.
        device (torch.device): Where the noise is wanted.

    Returns:
        Tensor: Of shape ``(count, 3, height, width)``, with a mean of 0 and a variance of 1 per image.
    """
    count = len(slope)
    octaves = max(1, int(math.log2(max(size))) - 1)
    noise = torch.zeros((count, 3, 1, 1), device=device)
    # From coarse to fine, so that all scales together cost little more than the finest.
    for octave in reversed(range(octaves)):
        cells = (max(1, size[0] >> octave), max(1, size[1] >> octave))
        noise = F.interpolate(noise, cells, mode="bilinear")
        noise = torch.addcmul(noise, _uniform(noise.shape, generator, device) - 0.5, 2 ** (octave * slope))
    centred = noise - noise.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def cellular_distances(u: Tensor, v: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to scattered points, one per unit cell of a jittered grid (Worley noise).

    Args:
        u (Tensor): First coordinate, ``(count, height, width)``.
        v (Tensor): Second coordinate, same shape.
        generator (torch.Generator): On the device of the coordinates.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Distance to the nearest point, distance to the second nearest, and a value in
            0..1 that belongs to the nearest; each of the shape of the coordinates.
    """
    count, side = len(u), 64
    # The grid repeats after 64 cells; textures have fewer.
    offset_u, offset_v, values = _uniform((3, count, side * side), generator, u.device)
    column, row = u.floor(), v.floor()
    first, second = torch.full_like(u, 9.0), torch.full_like(u, 9.0)
    value = torch.zeros_like(u)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            cell = ((row + down).long() % side * side + (column + right).long() % side).flatten(1)
            to_u = column + right + offset_u.gather(1, cell).view_as(u) - u
            to_v = row + down + offset_v.gather(1, cell).view_as(v) - v
            distance = torch.hypot(to_u, to_v)
            nearer = distance < first
            second = torch.minimum(second, torch.maximum(first, distance))
            value = torch.where(nearer, values.gather(1, cell).view_as(u), value)
            first = torch.minimum(first, distance)
    return first, second, value


Pattern = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


def _stripes(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del v, noise, generator
    return (2 * math.pi * u).sin()


def _checks(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del noise, generator
    return 1.5 * (math.pi * u).sin() * (math.pi * v).sin()


def _weave(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del noise, generator
    # Threads cross over and under each other: which is on top alternates like the squares of a chessboard.
    over = (u.floor() + v.floor()).remainder(2) < 1
    return 2 * torch.where(over, (math.pi * u).sin().abs(), (math.pi * v).sin().abs()) - 1


def _clouds(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del u, v, generator
    return noise / 2


def _marble(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del v, generator
    return (u + 2 * noise).sin()


def _spots(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del noise
    nearest, _, value = cellular_distances(u / 2, v / 2, generator)
    return 4 * (0.15 + 0.25 * value - nearest)


def _cells(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del noise
    return 2 * cellular_distances(u / 2, v / 2, generator)[2] - 1


def _cracks(u: Tensor, v: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
    del noise
    nearest, second, _ = cellular_distances(u / 2, v / 2, generator)
    return 6 * (second - nearest) - 1


PATTERNS: tuple[Pattern, ...] = (_stripes, _checks, _weave, _clouds, _marble, _spots, _cells, _cracks)


def _plane(
    size: tuple[int, int], turn: Tensor, rows: Tensor, columns: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Turned and scaled coordinates of the pixels, each ``(count, height, width)``; ``turn`` in half circles."""
    height, width = size
    y = torch.arange(height, device=device)[:, None] / min(size)
    x = torch.arange(width, device=device) / min(size)
    cosine, sine = (math.pi * turn).cos(), (math.pi * turn).sin()
    return columns * (cosine * x + sine * y), rows * (cosine * y - sine * x)


def _colour_pairs(count: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two random colours, ``(count, 3, 1, 1)`` each, that differ in brightness; pale ones are frequent."""
    grey, distance, first, second = _uniform((4, count, 1, 1, 1), generator, device)
    tints = 0.8 * (_uniform((2, count, 3, 1, 1), generator, device) - 0.5)
    other = (grey + 0.2 + 0.6 * distance).remainder(1)
    return (grey + first**2 * tints[0]).clamp_(0, 1), (other + second**2 * tints[1]).clamp_(0, 1)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=device)
