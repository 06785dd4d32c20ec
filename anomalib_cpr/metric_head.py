# SPDX-License-Identifier: Apache-2.0
"""Local metric head: turns frozen features into descriptors in which normal patches of the same place agree.

Source: CPR (arXiv 2308.06748), section III-C, with the layout of the authors' code. Modules are named as in their
checkpoints, so that these load without renaming: ``{0, 1, 3, 4}`` inside a head, ``branch0 ... branch3`` inside the
inception block.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.inception import BasicConv2d

from .bilinear import read_cells

HIDDEN_CHANNELS = 192
BLOCK_CHANNELS = 256


class InceptionBlock(nn.Module):
    """Four branches of 64 channels: 1x1 | 1x1 then 3x3 | 1x1 | average of 3x3 then 1x1.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output, a quarter from each branch.
    """

    def __init__(self, in_channels: int = HIDDEN_CHANNELS, out_channels: int = BLOCK_CHANNELS) -> None:
        super().__init__()
        branch, narrow = out_channels // 4, in_channels // 4
        self.branch0 = BasicConv2d(in_channels, branch, kernel_size=1)
        self.branch1 = nn.Sequential(
            BasicConv2d(in_channels, narrow, kernel_size=1), BasicConv2d(narrow, branch, kernel_size=3, padding=1)
        )
        self.branch2 = nn.Sequential(BasicConv2d(in_channels, branch, kernel_size=1))
        self.branch3 = nn.Sequential(
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            BasicConv2d(in_channels, branch, kernel_size=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Concatenate the branches: ``(batch, in, height, width)`` to ``(batch, out, height, width)``."""
        return torch.cat(self.branches(features), 1)

    def branches(self, features: Tensor) -> list[Tensor]:
        """Each branch, a quarter of the output's channels.

        Args:
            features (Tensor): Of shape ``(batch, in_channels, height, width)``.

        Returns:
            list[Tensor]: ``(batch, out_channels / 4, height, width)`` each.
        """
        # The average and the 1x1 convolution without bias commute; behind it there are a third of the channels.
        average, projection = cast("nn.AvgPool2d", self.branch3[0]), cast("BasicConv2d", self.branch3[1])
        averaged = F.relu(projection.bn(average(projection.conv(features))), inplace=True)
        return [self.branch0(features), self.branch1(features), self.branch2(features), averaged]


class MetricHead(nn.Sequential):
    """Projection of one feature scale into the learned metric space.

    Args:
        in_channels (int): Channels of the frozen features.
        descriptor_channels (int): Channels of the descriptors.
    """

    def __init__(self, in_channels: int, descriptor_channels: int = 384) -> None:
        super().__init__(
            nn.Conv2d(in_channels, HIDDEN_CHANNELS, 1),
            nn.BatchNorm2d(HIDDEN_CHANNELS),
            nn.ReLU(inplace=True),
            InceptionBlock(HIDDEN_CHANNELS, BLOCK_CHANNELS),
            nn.Conv2d(BLOCK_CHANNELS, descriptor_channels, 1),
        )

    def describe(self, features: Tensor) -> Tensor:
        """Descriptors of unit length, as inference compares them.

        Args:
            features (Tensor): Frozen features of shape ``(batch, in_channels, height, width)``.

        Returns:
            Tensor: Descriptors of shape ``(batch, descriptor_channels, height, width)``, float32.
        """
        return to_unit_length((self(features) if self.training else self._folded(features)).float())

    def _folded(self, features: Tensor) -> Tensor:
        """The layers with fixed batch normalisation, in half the time.

        Batch normalisation is folded into the convolutions, which takes microseconds and so is done anew each time:
        nothing can be outdated. The average commutes with the 1x1 convolution after it, so that 64 channels are
        averaged in place of 192, and two branches of one shape are one convolution.
        """
        block, last = cast("InceptionBlock", self[3]), cast("nn.Conv2d", self[4])
        weight, bias = _fold(cast("nn.Conv2d", self[0]), cast("nn.BatchNorm2d", self[1]))
        hidden = F.conv2d(features, weight, bias).relu_()
        narrow, wide = (_fold(layer.conv, layer.bn) for layer in cast("Any", block.branch1))
        pooled_weight, pooled_bias = _fold(cast("Any", block.branch3[1]).conv, cast("Any", block.branch3[1]).bn)
        twins = [_fold(layer.conv, layer.bn) for layer in cast("list[Any]", [block.branch0, block.branch2[0]])]
        weight, bias = (torch.cat(parts) for parts in zip(*twins, strict=True))
        branch0, branch2 = F.conv2d(hidden, weight, bias).relu_().chunk(2, dim=1)
        branch1 = F.conv2d(F.conv2d(hidden, *narrow).relu_(), *wide, padding=1).relu_()
        branch3 = F.avg_pool2d(F.conv2d(hidden, pooled_weight), 3, 1, 1, count_include_pad=False)
        branch3 = (branch3 + pooled_bias[:, None, None]).relu_()
        return F.conv2d(torch.cat([branch0, branch1, branch2, branch3], 1), last.weight, last.bias)

    @property
    def is_untrained(self) -> bool:
        """Whether no batch was ever seen, in a training or by :meth:`centre`."""
        return int(cast("Tensor", cast("nn.BatchNorm2d", self[1]).num_batches_tracked)) == 0

    @torch.no_grad()
    def centre(self, features: Tensor) -> None:
        """Start from descriptors whose mean over some images is 0.

        Random layers behind ReLUs give descriptors that all point the same way. Every cosine is then near 1, positives
        have no loss, and the first steps only push everything apart, at the cost of what the frozen features know.

        Args:
            features (Tensor): Frozen features of good images, ``(batch, in_channels, height, width)``.
        """
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        was_training = self.training
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average: statistics of exactly these images
        try:
            mean = self.train()(features).mean((0, 2, 3))
        finally:
            self.train(was_training)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        cast("Tensor", cast("nn.Conv2d", self[-1]).bias).sub_(mean)

    def describe_at(self, features: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        """Descriptors read bilinearly, without their length normalised, as training compares them.

        The last layer is linear, so it commutes with bilinear reading: it is evaluated at the positions only, which
        saves a third of the head's work. Its bias is weighted by the share of the reading that lies inside the image.

        Args:
            features (Tensor): Frozen features of shape ``(batch, in_channels, height, width)``.
            cells (Tensor): Where, from :func:`.bilinear.bilinear_cells`, ``(batch, count, 4)``.
            weights (Tensor): From the same.

        Returns:
            Tensor: Descriptors of shape ``(batch, descriptor_channels, count)``.
        """
        block, last = cast("InceptionBlock", self[3]), cast("nn.Conv2d", self[4])
        # Read branch by branch: all of them side by side would be the largest map of a training.
        branches = block.branches(self[2](self[1](self[0](features))))
        hidden = torch.cat([read_cells(branch, cells, weights) for branch in branches], 1)
        weight, bias = last.weight.flatten(1), cast("Tensor", last.bias)[:, None]
        return torch.matmul(weight, hidden) + bias * weights.sum(-1)[:, None]


def to_unit_length(descriptors: Tensor) -> Tensor:
    """Divide descriptors by their length.

    Args:
        descriptors (Tensor): Of shape ``(batch, channels, height, width)``.

    Returns:
        Tensor: Unit vectors, or next to nothing where there was next to nothing.
    """
    # Not F.normalize: OpenVINO rewrites its division, and forgets on the way that it may not be rounded.
    return descriptors * descriptors.square().sum(1, keepdim=True).clamp(min=1e-16).pow(-0.5)


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch normalisation after it."""
    mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
    factor = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = norm.bias - mean * factor
    if convolution.bias is not None:
        bias = bias + convolution.bias * factor
    return convolution.weight * factor[:, None, None, None], bias
