# SPDX-License-Identifier: Apache-2.0
"""Unit vectors in 8 or 4 bits per component.

The length of a descriptor is known to be 1, so that a rounded direction is all that is lost: every stored descriptor is
brought back to length 1 by a factor. That of 8 bits is stored, one number for hundreds of channels. At 4 bits it would
be noticed, and is computed from the integers when they are read.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

LEVELS = 7  # of 4 bits: integers -7..7
_STEPS = (1.0, 0.9, 0.8)  # where the largest component goes beyond the last level, the others err less


def is_traced() -> bool:
    """Whether an exporter or compiler is recording, for which what depends on values must not become a constant.

    Returns:
        bool: True while a graph is recorded.
    """
    return torch.compiler.is_exporting() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def quantise(descriptors: Tensor) -> tuple[Tensor, Tensor]:
    """Store unit vectors in 8 bits per component.

    One scale per descriptor: with random directions the cosine errs by 2e-4 (root mean square, 384 channels); a scale
    per channel, which the largest value of all images sets, errs by 6e-4.

    Args:
        descriptors (Tensor): Unit vectors of shape ``(batch, channels, height, width)``.

    Returns:
        tuple[Tensor, Tensor]: Integers -127..127 as int8, of the same shape, and scales of
            ``(batch, 1, height, width)``, float32; their product is the descriptor.
    """
    descriptors = descriptors.float()
    largest = descriptors.abs().amax(1, keepdim=True).clamp_min(1e-12)
    integers = (descriptors * (127 / largest)).round()
    return integers.to(torch.int8), _to_length_one(integers)


def pack(descriptors: Tensor) -> Tensor:
    """Store unit vectors in 4 bits per component, two components per byte.

    A byte holds ``channel`` in its lower and ``channel + half`` in its upper four bits, each in two's complement; of an
    odd number of channels, the last byte's upper bits stand for 0.

    Of a few steps between levels, each descriptor takes the one that bends it least: 12 % less error than with the
    largest component at the last level (64 channels), 27 % at 384.

    Args:
        descriptors (Tensor): Unit vectors of shape ``(batch, channels, height, width)``.

    Returns:
        Tensor: Bytes of shape ``(batch, ceil(channels / 2), height, width)``, uint8.
    """
    descriptors = descriptors.float()
    largest = descriptors.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, nearest = None, torch.full_like(largest, -1.0)
    for step in _STEPS:
        integers = (descriptors * (LEVELS / step / largest)).round().clamp(-LEVELS, LEVELS)
        cosine = (integers * descriptors).sum(1, keepdim=True) * _to_length_one(integers)
        best = integers if best is None else torch.where(cosine > nearest, integers, best)
        nearest = torch.maximum(cosine, nearest)
    assert best is not None  # noqa: S101 - narrows the type
    half = packed_channels(descriptors.shape[1])
    codes = F.pad(best, (0, 0, 0, 0, 0, 2 * half - descriptors.shape[1])).to(torch.int8).view(torch.uint8)
    return (codes[:, :half] & 15) | (codes[:, half:] << 4)


def packed_channels(channels: int) -> int:
    """Bytes of a descriptor in 4 bits.

    Args:
        channels (int): Of the descriptor.

    Returns:
        int: Half as many, rounded up.
    """
    return -(-channels // 2)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Descriptors in 4 bits as numbers that have their direction: 16 times the integers -7..7.

    Args:
        packed (Tensor): Bytes of :func:`pack`.

    Returns:
        tuple[Tensor, Tensor]: The first half of the channels, and the second; of the shape of the bytes. In int8, or in
            float32 while a graph is recorded, because exporters and runtimes know little of small integers.
    """
    if is_traced():
        # Products and sums alone: a runtime that writes a quotient or a difference as those may round the result.
        numbers = packed.float()
        upper = (numbers * 0.0625).floor() * 16
        return _signed(numbers * 16 + upper * -16), _signed(upper)
    return (packed << 4).view(torch.int8), (packed & 0xF0).view(torch.int8)


def _signed(numbers: Tensor) -> Tensor:
    """Numbers 0..255 as what they are in two's complement."""
    return numbers + (numbers * 2.0**-7).floor() * -256


def restore(stored: Tensor, scales: Tensor | None, channels: int) -> Tensor:
    """Unit vectors from what a bank stores.

    Args:
        stored (Tensor): ``(batch, channels, height, width)`` in float32, float16 or int8; uint8 means 4 bits, with half
            as many channels.
        scales (Tensor | None): Factors of int8, ``(batch, 1, height, width)``; None otherwise.
        channels (int): Of the descriptors.

    Returns:
        Tensor: Float32, ``(batch, channels, height, width)``.
    """
    if stored.dtype == torch.uint8:
        integers = torch.cat(unpack(stored), 1).narrow(1, 0, channels).float()
        return integers * _to_length_one(integers)
    return stored.float() if scales is None else stored.float() * scales


def _to_length_one(vectors: Tensor) -> Tensor:
    """Factors that bring vectors to length 1, ``(batch, 1, height, width)``."""
    # Not a reciprocal: OpenVINO rewrites it, and forgets on the way that it may not be rounded.
    return vectors.square().sum(1, keepdim=True).clamp_min(1e-16).pow(-0.5)
