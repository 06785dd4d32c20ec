# SPDX-License-Identifier: Apache-2.0
"""Outlines: let an anomaly map follow the edges of the image, and end where anomalies do.

A map has one value per cell of 4 pixels, and cells know of an anomaly before they touch it, since features see wide. So
every anomaly has a skirt of false alarms around it. CPR's paper leaves it; but the image shows where things end.

Source: the guided filter (He, Sun, Tang, "Guided Image Filtering", TPAMI 35, 2013, doi 10.1109/TPAMI.2012.213), at the
stride of the cells as in "Fast Guided Filter" (arXiv 1505.00996). The second step is this project's.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .feature_extractor import STRIDES
from .quantisation import is_traced

# Chosen on drawn parts of 320 pixels (results/outlines.json): sides of 8 and 16 pixels, and 0.01, gave as much or up to
# 1.5 points less of pixel AP, as did reaches of 2 and 8 pixels.
SIDE = 12
SMOOTHNESS = 0.03
REACH = 4


def follow_edges(anomaly_map: Tensor, images: Tensor) -> Tensor:
    """Outline anomalies by the image.

    Args:
        anomaly_map (Tensor): In 0..1, before any smoothing, ``(batch, 1, height, width)``, both divisible by 4.
        images (Tensor): In any linear scale of colours, ``(batch, channels, height, width)``.

    Returns:
        Tensor: In 0..1, shape of the map.
    """
    return lower_skirts(guided_filter(anomaly_map, images))


def guided_filter(anomaly_map: Tensor, images: Tensor) -> Tensor:
    """Explain the map, in each square of 12 pixels, as a linear function of the brightness.

    Where a square holds an edge, the map gets it too; where it holds none, the map becomes its mean. What counts as an
    edge is measured by the contrast of the whole image, so that lamp and normalisation make no difference.

    Args:
        anomaly_map (Tensor): See :func:`follow_edges`.
        images (Tensor): The same.

    Returns:
        Tensor: In 0..1, shape of the map.
    """
    brightness = images.float().mean(1, keepdim=True)
    brightness = brightness - brightness.mean((2, 3), keepdim=True)
    contrast = brightness.square().mean((2, 3), keepdim=True)
    products = torch.cat([brightness, anomaly_map, brightness * anomaly_map, brightness.square()], dim=1)
    stride = STRIDES[0]
    border = (SIDE - stride) // 2
    # Of each cell, then of cells: an eighth of the additions of squares that overlap.
    cells = F.avg_pool2d(F.pad(products, (border,) * 4, mode="reflect"), stride)
    means = F.avg_pool2d(cells, SIDE // stride, stride=1)
    bright, mapped, product, square = means.split(1, dim=1)
    slope = (product - bright * mapped) / (square - bright.square() + SMOOTHNESS * contrast + 1e-6)
    lines = torch.cat([slope, mapped - slope * bright], dim=1)
    slope, offset = F.interpolate(lines, anomaly_map.shape[-2:], mode="bilinear").split(1, dim=1)
    return (slope * brightness + offset).clamp(0, 1)


def lower_skirts(anomaly_map: Tensor) -> Tensor:
    """Multiply each pixel by the root of its share of the largest value within 4 pixels.

    The skirt of a plain anomaly may be as high as a faint anomaly. A faint one is the largest value around and keeps
    its height, a skirt has a higher neighbour.

    Args:
        anomaly_map (Tensor): Not negative, ``(batch, 1, height, width)``.

    Returns:
        Tensor: Same shape, nowhere higher.
    """
    return anomaly_map * (anomaly_map / largest_within(anomaly_map, REACH).clamp_min(1e-6)).sqrt()


def largest_within(maps: Tensor, reach: int) -> Tensor:
    """Largest value within so many pixels along rows and columns.

    Args:
        maps (Tensor): Of shape ``(batch, channels, height, width)``.
        reach (int): In pixels.

    Returns:
        Tensor: Same shape.
    """
    side = 2 * reach + 1  # along one axis, then along the other: less work than a square
    if maps.device.type == "cpu" and not is_traced():  # where pooling compares one number after the other
        return _running_maximum(_running_maximum(maps, side, -1), side, -2)
    wide = F.max_pool2d(maps, (1, side), stride=1, padding=(0, reach))
    return F.max_pool2d(wide, (side, 1), stride=1, padding=(reach, 0))


def _running_maximum(maps: Tensor, side: int, axis: int) -> Tensor:
    """Largest of so many neighbours, an odd number, by doubling: of 1, 2, 4, 8 and then 9."""
    length, reach = maps.shape[axis], side // 2
    found = F.pad(maps, (reach, reach) if axis == -1 else (0, 0, reach, reach), value=-torch.inf)
    covered = 1
    while covered < side:
        further = min(covered, side - covered)
        room = length + side - covered - further
        found = torch.maximum(found.narrow(axis, 0, room), found.narrow(axis, further, room))
        covered += further
    return found
