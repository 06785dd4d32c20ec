# SPDX-License-Identifier: Apache-2.0
"""The first two blocks of a frozen DenseNet on a CPU, in three quarters of the time.

Each layer of a DenseNet normalises all that came before it, for a convolution of 1x1. On a CPU these passes over
memory, and the concatenations, take a quarter of the time. Frozen, most of them can go:

- With a factor s above 0, ``relu(s x + t) = s max(x, -t / s) + t``; below 0 it is the minimum. So normalisation and
  ReLU are one comparison with a bound per channel, and s and t go into the convolution behind it.
- The normalisation behind a convolution goes into its weights.
- Layers write into one map side by side, from which the next reads: nothing is concatenated.
- The convolution of the transition and its average commute.

Results differ in rounding only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.densenet import DenseBlock
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

STEM = ("conv0", "norm0", "pool0")
PARTS = (*STEM, "denseblock1", "transition1", "denseblock2")


class Bounds(NamedTuple):
    """Normalisation and ReLU without their factor and offset.

    Attributes:
        low (Tensor): Per channel, ``(channels, 1, 1)``.
        high (Tensor | None): The same; None if all are infinite.
    """

    low: Tensor
    high: Tensor | None

    def apply(self, maps: Tensor) -> Tensor:
        """Bound maps of shape ``(1, channels, height, width)``."""
        return torch.maximum(maps, self.low) if self.high is None else torch.clamp(maps, self.low, self.high)


class Convolution(NamedTuple):
    """Weight and bias."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """What is left of a dense layer."""

    bounds: Bounds
    narrow: Convolution
    wide: Convolution


class FoldedDenseNet:
    """A frozen timm DenseNet up to its second block.

    Args:
        network (nn.Module): Of timm, ``features_only``, in evaluation mode, on a CPU. Later changes of it are not seen.
        dtype (torch.dtype): float32 or bfloat16.

    Raises:
        ValueError: If it is no DenseNet of the plain kind: see :func:`can_fold`.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        if not can_fold(network):
            raise ValueError(f"{type(network).__name__} is no DenseNet up to its second block.")
        self.dtype = dtype
        part = _parts(network)
        factor, offset = _affine(part["norm0"])
        self.stem = self._store(part["conv0"].weight * factor[:, None, None, None], offset)
        self.blocks = [[self._layer(layer) for layer in part[name].values()] for name in ("denseblock1", "denseblock2")]
        self.between = self._transition(part["transition1"])

    def __call__(self, images: Tensor, last: int = 2) -> list[Tensor]:
        """Feature maps.

        Args:
            images (Tensor): Normalised images of shape ``(batch, 3, height, width)``.
            last (int): 1 for F1 alone.

        Returns:
            list[Tensor]: F1 and F2, in the type of the weights, channels last in memory.
        """
        batch, _, height, width = images.shape
        found = [
            torch.empty(
                (batch, _channels(layers), height // stride, width // stride),
                dtype=self.dtype,
                device=images.device,
                memory_format=torch.channels_last,
            )
            for layers, stride in zip(self.blocks[:last], (4, 8), strict=False)
        ]
        # One image at a time stays in the processor's cache.
        for index, image in enumerate(images.to(self.dtype).split(1)):
            maps = F.conv2d(image, *self.stem, stride=2, padding=3).relu_()
            maps = F.max_pool2d(maps, 3, stride=2, padding=1)
            for block, target in zip(self.blocks, found, strict=False):
                if block is self.blocks[1]:
                    bounds, convolution = self.between
                    maps = F.conv2d(F.avg_pool2d(bounds.apply(maps), 2), *convolution)
                maps = _dense_block(block, maps, target[index : index + 1])
        return found

    def _store(self, weight: Tensor, bias: Tensor | None) -> Convolution:
        weight = weight.detach().to(self.dtype).contiguous(memory_format=torch.channels_last)
        return Convolution(weight, None if bias is None else bias.detach().to(self.dtype))

    def _layer(self, layer: Any) -> Layer:  # noqa: ANN401 - modules of timm, whose parts have no types
        bounds, weight, bias = self._behind(layer.norm1, layer.conv1)
        factor, offset = _affine(layer.norm2)
        narrow = self._store(weight * factor[:, None, None, None], bias * factor + offset)
        return Layer(bounds, narrow, self._store(layer.conv2.weight, None))

    def _transition(self, transition: Any) -> tuple[Bounds, Convolution]:  # noqa: ANN401
        bounds, weight, bias = self._behind(transition.norm, transition.conv)
        return bounds, self._store(weight, bias)

    def _behind(self, norm: Any, convolution: nn.Conv2d) -> tuple[Bounds, Tensor, Tensor]:  # noqa: ANN401
        """Bounds, and a 1x1 convolution that does the rest of the normalisation before it."""
        factor, offset = _affine(norm)
        edge, infinite = -offset / factor, torch.full_like(factor, torch.inf)
        low = torch.where(factor > 0, edge, -infinite)
        high = torch.where(factor < 0, edge, infinite)
        nothing = factor == 0  # such a channel is the same everywhere
        low, high = low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)
        bounds = Bounds(
            low.to(self.dtype)[:, None, None], None if (factor > 0).all() else high.to(self.dtype)[:, None, None]
        )
        bias = convolution.weight[:, :, 0, 0] @ torch.where(nothing, offset.relu(), offset)
        return bounds, convolution.weight * factor[:, None, None], bias


def can_fold(network: nn.Module) -> bool:
    """Whether a network is a timm DenseNet up to its second block, with the usual stem, activation and pooling.

    Args:
        network (nn.Module): Of timm, ``features_only``.

    Returns:
        bool: Whether :class:`FoldedDenseNet` takes it.
    """
    part = _parts(network)
    if tuple(part) != PARTS or not all(isinstance(part[name], DenseBlock) for name in ("denseblock1", "denseblock2")):
        return False
    layers = [layer for name in ("denseblock1", "denseblock2") for layer in part[name].values()]
    norms = [part["norm0"], part["transition1"].norm]
    norms += [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
    return (
        all(isinstance(norm.act, nn.ReLU) and isinstance(norm, nn.BatchNorm2d) for norm in norms)
        and isinstance(part["pool0"], nn.MaxPool2d)
        and isinstance(part["transition1"].pool, nn.AvgPool2d)
        and part["conv0"].kernel_size == (7, 7)
    )


def _parts(network: nn.Module) -> dict[str, Any]:
    return {name.removeprefix("features_"): part for name, part in network.named_children()}


def _affine(norm: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Factor and offset per channel of a frozen batch normalisation."""
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return factor, norm.bias - norm.running_mean * factor


def _channels(layers: Sequence[Layer]) -> int:
    return len(layers[-1].bounds.low) + len(layers[-1].wide.weight)


def _dense_block(layers: Sequence[Layer], maps: Tensor, target: Tensor) -> Tensor:
    """Fill the target, of one image: the maps, and beside them what each layer makes of all before it."""
    done = maps.shape[1]
    target[:, :done] = maps
    for bounds, narrow, wide in layers:
        hidden = F.conv2d(bounds.apply(target[:, :done]), *narrow).relu_()
        new = F.conv2d(hidden, *wide, padding=1)
        target[:, done : done + new.shape[1]] = new
        done += new.shape[1]
    return target
