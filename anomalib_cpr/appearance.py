# SPDX-License-Identifier: Apache-2.0
"""Changes of the look of whole images: what synthetic anomalies of an image's own structure are made from.

Source: DRAEM (arXiv 2108.07610), section 3.3, which CPR (arXiv 2308.06748, section IV) follows, with the values of
CPR's code. Other colours alone are this project's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import v2

from .augmentation import hand_over

OPERATIONS_PER_IMAGE = 3

# Takes images (count, 3, height, width) in 0..1 and for each three numbers in 0..1 that set its strength, (count, 3).
Operation = Callable[[Tensor, Tensor], Tensor]


def change_appearance(
    images: Tensor, generator: torch.Generator, operations: Sequence[Operation] | None = None
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
    strengths = hand_over(strengths, images.device).to(images.dtype)
    for turn in range(OPERATIONS_PER_IMAGE):
        # Images of one operation are changed together: on a GPU the number of calls is what takes time.
        kinds, order = chosen[:, turn].sort(stable=True)
        kinds, sizes = kinds.unique_consecutive(return_counts=True)
        where, parts = hand_over(order, images.device), sizes.tolist()
        groups = zip(kinds.tolist(), images[where].split(parts), strengths[where, turn].split(parts), strict=True)
        changed = [available[kind](group, strength).clamp(0, 1) for kind, group, strength in groups]
        images = torch.cat(changed)[hand_over(order.argsort(), images.device)]
    return images


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change the colours of each image, from hardly to plainly, and nothing of its structure.

    Args:
        images (Tensor): RGB in 0..1, ``(batch, 3, height, width)``.
        generator (torch.Generator): On the CPU; every choice comes from it.

    Returns:
        Tensor: Same shape, in 0..1.
    """
    return change_appearance(images, generator, COLOUR_OPERATIONS)


def change_hue_and_saturation(images: Tensor, hue: Tensor, saturation: Tensor) -> Tensor:
    """Add to hue and saturation of the HSV colour space; the value stays. Grey counts as red of saturation 0.

    Args:
        images (Tensor): RGB in 0..1, ``(count, 3, height, width)``.
        hue (Tensor): Change of the hue, in turns, ``(count,)``.
        saturation (Tensor): Change of the saturation, in -1..1, ``(count,)``; the sum is clamped to 0..1.

    Returns:
        Tensor: Same shape, in 0..1.
    """
    tiny = torch.finfo(images.dtype).tiny
    lowest, highest = images.aminmax(dim=1, keepdim=True)
    chroma = highest - lowest
    red, green, blue = (images / chroma.clamp_min(tiny)).split(1, dim=1)
    # In sixths of a turn. Of equal channels the first one counts, as in Python's colorsys.
    sixths = torch.where(images[:, 1:2] == highest, 2 + blue - red, 4 + red - green)
    sixths = torch.where(images[:, :1] == highest, green - blue, sixths) * (chroma > 0)
    # A channel is value * (1 - saturation * direction), where the direction depends on how far its own hue is.
    own = images.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    far = (own + sixths + 6 * hue.view(-1, 1, 1, 1)).remainder(6)
    direction = torch.minimum(far, 4 - far).clamp_(0, 1)
    saturated = (chroma / highest.clamp_min(tiny) + saturation.view(-1, 1, 1, 1)).clamp_(0, 1)
    return highest * (1 - saturated * direction)


def rotate(images: Tensor, degrees: Tensor, size: tuple[int, int], outside: str = "zeros") -> Tensor:
    """Turn images around their centre and cut out the middle.

    Args:
        images (Tensor): Of shape ``(count, channels, any height, any width)``.
        degrees (Tensor): Angles, ``(count,)``; positive ones turn counterclockwise.
        size (tuple[int, int]): Height and width of the middle, in pixels.
        outside (str): What comes in at the corners: "zeros", or "reflection", the image mirrored at its edges.

    Returns:
        Tensor: Bilinear, ``(count, channels, height, width)``.
    """
    height, width = images.shape[-2:]
    cosine, sine = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    zero = torch.zeros_like(cosine)
    # From the place in the middle to that in the image, both in -1..1.
    across = [cosine * (size[1] / width), -sine * (size[0] / width), zero]
    down = [sine * (size[1] / height), cosine * (size[0] / height), zero]
    matrix = torch.stack(across + down, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(images), 1, *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=outside, align_corners=False)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _gamma(images: Tensor, strength: Tensor) -> Tensor:
    return images ** (0.5 * 4**strength)[:, :, None, None]  # 0.5..2, per channel


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    factor, offset = 0.8 + 0.4 * strength[:, 0], (2 * strength[:, 1] - 1) * 30 / 255
    return images * _per_image(factor) + _per_image(offset)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    blurred = v2.functional.adjust_sharpness(images, 0.0)
    return torch.lerp(blurred, images, _per_image(3 * strength[:, 0]))  # below 1 blurs, above 1 sharpens


def _hue_and_saturation(images: Tensor, strength: Tensor) -> Tensor:
    # A factor on the saturation would leave grey images as they are; DRAEM adds to it.
    change = (2 * strength - 1) * 50 / 255
    return change_hue_and_saturation(images, hue=change[:, 1], saturation=change[:, 0])


def _solarise(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where(images < _per_image((32 + 96 * strength[:, 0]) / 255), images, 1 - images)


def _posterise(images: Tensor, strength: Tensor) -> Tensor:
    levels = _per_image(2 ** (1 + (5 * strength[:, 0]).floor()))
    return torch.minimum((images * levels).floor(), levels - 1) / levels


def _invert(images: Tensor, strength: Tensor) -> Tensor:
    del strength
    return 1 - images


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    del strength
    return v2.functional.autocontrast(images)


def _equalise(images: Tensor, strength: Tensor) -> Tensor:
    del strength
    return v2.functional.equalize(images)


def _turn(images: Tensor, strength: Tensor) -> Tensor:
    return rotate(images, 90 * strength[:, 0] - 45, (images.shape[-2], images.shape[-1]))


PHOTOMETRIC_OPERATIONS: tuple[Operation, ...] = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_and_saturation,
    _solarise,
    _posterise,
    _invert,
    _autocontrast,
    _equalise,
)
OPERATIONS: tuple[Operation, ...] = (*PHOTOMETRIC_OPERATIONS, _turn)
COLOUR_OPERATIONS: tuple[Operation, ...] = (_gamma, _brightness, _hue_and_saturation)
