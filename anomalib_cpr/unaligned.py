# SPDX-License-Identifier: Apache-2.0
"""Unaligned matching: for textures and loose parts, where no reference shows the same thing at the same place.

There, which of many references is nearest to a patch is chance, and the least of many distances says little: several
of them say more, as k nearest neighbours do where one would be noise (Ramaswamy et al., "Efficient Algorithms for
Mining Outliers from Large Data Sets", SIGMOD 2000, doi 10.1145/342009.335437). And a defect of a colour or a coarse
structure may show at one scale only, in whose mean with the other it drowns. Neither is of CPR's paper, which takes
the nearest reference and the mean of the scales. Where parts lie alike, as the paper's do, that is better.

But among many references nearly any colour is found: a tablet of a wrong one looks like a good one under another lamp.
Fine structure needs many references to be found at all. What the coarse scale shows, a lamp and a dye among it, is the
same all over an image, so there only those references count that fit as a whole. Like re-ranking in image retrieval,
where what was retrieved is compared once more, more closely (Philbin et al., "Object Retrieval with Large Vocabularies
and Fast Spatial Matching", CVPR 2007).

A loose part, unlike a texture, also comes at any place relative to the grid of cells, and turned, so that no reference
has just this cell. What a part is like around there, an average over neighbouring cells says more of.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .feature_extractor import STRIDES
from .metric_head import to_unit_length

# Chosen on drawn tablets and fabric (results/unaligned.json), and no figure to be fine about: 3 and 8 did alike.
NEAREST = 5
# The paper's number of references. Chosen on drawn tablets, where 5 to 15 did alike (results/on_the_whole.json).
ON_THE_WHOLE = 10


def average_neighbours(descriptors: Tensor) -> Tensor:
    """Mean of each descriptor and its neighbours, 3x3 cells or those of them that the image has.

    Args:
        descriptors (Tensor): Unit vectors, ``(batch, channels, height, width)``.

    Returns:
        Tensor: Unit vectors of the same shape; 0 where the mean is.
    """
    mean = F.avg_pool2d(descriptors, 3, stride=1, padding=1, count_include_pad=False)
    return to_unit_length(mean)


def distance_to_several(distances: Tensor) -> Tensor:
    """Mean distance of each cell to the five nearest of its references, or to all where there are fewer.

    Args:
        distances (Tensor): Cosine distances to each reference, 0..2, ``(batch, k, height, width)``.

    Returns:
        Tensor: In 0..2, nowhere less than the smallest over the references, ``(batch, 1, height, width)``.
    """
    count = min(NEAREST, distances.shape[1])
    return distances.topk(count, dim=1, largest=False).values.mean(1, keepdim=True)


def ranks_on_the_whole(distances: Tensor) -> Tensor:
    """The ten references that are nearest to an image as a whole, or all where there are fewer.

    Args:
        distances (Tensor): Cosine distances to each reference, 0..2, ``(batch, k, height, width)``.

    Returns:
        Tensor: Their indices among the k, in no order, ``(batch, up to 10)``.
    """
    count = min(ON_THE_WHOLE, distances.shape[1])
    return distances.mean((2, 3)).topk(count, dim=1, largest=False, sorted=False).indices


def to_several_references(distances: Sequence[Tensor]) -> list[Tensor]:
    """Distance of each cell to several references: of all at the finest scale, of those that fit as a whole elsewhere.

    Args:
        distances (Sequence[Tensor]): Cosine distances to each reference, 0..2, of each scale, finest first, and those
            of colours, ``(batch, k, height_i, width_i)``.

    Returns:
        list[Tensor]: Of each of them, ``(batch, 1, height_i, width_i)``.
    """
    finest, *coarser = distances
    fitting = [
        distance.gather(1, ranks_on_the_whole(distance)[:, :, None, None].expand(-1, -1, *distance.shape[2:]))
        if distance.shape[1] > ON_THE_WHOLE
        else distance
        for distance in coarser
    ]
    return [distance_to_several(distance) for distance in (finest, *fitting)]


def fuse_plainer(distances: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Fourth root of the mean fourth power of the scales, halved: mostly the larger of them.

    Colours come on top: they raise distances where they differ, and do not lower them where they do not.

    Args:
        distances (Sequence[Tensor]): Cosine distances 0..2 of each scale, finest first, and distances of colours, 0 or
            more, after them, if these count, ``(batch, 1, height_i, width_i)``.
        size (tuple[int, int]): Height and width of the image, in pixels.

    Returns:
        Tensor: In 0..1, nowhere less than the mean of the scales, ``(batch, 1, height, width)``.
    """
    cells = distances[0].shape[-2:]
    # Roots of sums of squares: an exported power is computed by logarithms, and not everywhere in full precision.
    powers = [(F.interpolate(distance, cells, mode="bilinear") * 0.5).square().square() for distance in distances]
    mean = reduce(torch.add, powers) * (1 / len(STRIDES))
    if len(powers) > len(STRIDES):
        mean = mean.clamp_max(1)
    return F.interpolate(mean.sqrt().sqrt(), size, mode="bilinear")
