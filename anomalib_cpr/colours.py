# SPDX-License-Identifier: Apache-2.0
"""Colours: whether every colour of an image is found anywhere on the references that fit it.

Networks that tell objects apart learn to look past colours: a dog is a dog in any light. So neither their features nor
what is learned from these tells a reddish tablet from a white one as plainly as the pixels do. The colour of a patch,
as a third and coarsest scale, says it again. It is of use where parts lie anywhere, so that what belongs to a place is
not known: a colour that belongs nowhere is then wrong. Not of CPR's paper.

Another lamp changes all colours of an image. They are therefore divided by those of the whole image, as if the world
were grey on average (Buchsbaum, "A spatial processor model for object colour perception", Journal of the Franklin
Institute 310, 1980; the division by channel is von Kries').
"""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .feature_extractor import STRIDES
from .matching import match_everywhere

# What is stored of a colour: red, green, blue, and what makes a scalar product of a distance.
COLOUR_CHANNELS = 4
DARK = 0.02  # of 0..1: of an image that is darker as a whole, colours are noise


def colours_of(images: Tensor) -> Tensor:
    """Colours of the patches of stride 8 and what is around them, 3x3 cells, in proportion to the whole image.

    Args:
        images (Tensor): Normalised with ImageNet's mean and deviation, ``(batch, 3, height, width)``.

    Returns:
        Tensor: 0 for the mean of the image, ``(batch, 3, height / 8, width / 8)``.
    """
    channels = F.avg_pool2d(images, STRIDES[-1]).unbind(1)
    # By numbers, channel by channel: a tensor of them would be copied to a GPU in each prediction.
    normalisation = zip(channels, IMAGENET_DEFAULT_STD, IMAGENET_DEFAULT_MEAN, strict=True)
    cells = torch.stack([channel * deviation + mean for channel, deviation, mean in normalisation], 1)
    # As a power: OpenVINO rewrites a division, and forgets on the way that it may not be rounded.
    lamp = cells.mean((2, 3), keepdim=True).clamp_min(DARK).pow(-1.0)
    return F.avg_pool2d(cells, 3, stride=1, padding=1, count_include_pad=False) * lamp - 1


def as_stored(colours: Tensor) -> Tensor:
    """Colours as a bank holds them: with half their square, negative, as a fourth channel.

    Args:
        colours (Tensor): Of :func:`colours_of`, ``(batch, 3, height, width)``.

    Returns:
        Tensor: ``(batch, 4, height, width)``.
    """
    return torch.cat([colours, colours.square().sum(1, keepdim=True) * -0.5], 1)


def distance_to_colours(colours: Tensor, gallery: Tensor, references: Tensor) -> Tensor:
    """Distance of each colour to the nearest one anywhere on each reference.

    Args:
        colours (Tensor): Of queries, as they are stored, ``(batch, 4, height, width)``.
        gallery (Tensor): Of all images, as they are stored, ``(gallery, 4, height, width)``.
        references (Tensor): Indices into the gallery, ``(batch, k)``.

    Returns:
        Tensor: Euclidean distances, ``(batch, k, height, width)``.
    """
    # |a - b|^2 = |a|^2 - 2 (ab - |b|^2 / 2): what is nearest has the largest product with (a, 1).
    query = torch.cat([colours[:, :3], torch.ones_like(colours[:, 3:])], 1)
    products = match_everywhere(query, gallery, references)
    return ((colours[:, 3:] + products) * -2).clamp_min(0).sqrt()
