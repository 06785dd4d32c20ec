# SPDX-License-Identifier: Apache-2.0
"""Relative to the image: how much a distance means depends on the image that it is found in.

Distances of CPR's paper count as they are. But another lamp, or a part that lies as none of its references does, raises
those of good patches as well, and beside a plain defect many a patch looks worse than a faint defect elsewhere does.
Both concern different images only: within one, no two pixels change places. Not of CPR's paper.
"""

from torch import Tensor

# Chosen on drawn parts (results/relative.json), and no figure to be fine about: 0.001 and 0.03 did the same.
LITTLE = 0.01


def share_that_counts(distances: Tensor) -> Tensor:
    """The less, the farther an image is from its references as a whole.

    The root, so that an image that is foreign everywhere still ends with a higher score than any good one.

    Args:
        distances (Tensor): In 0..1, background included, ``(batch, 1, height, width)``.

    Returns:
        Tensor: Factor for the distances, 0.1 where everything is as foreign as can be, 1 where nothing is,
            ``(batch, 1, 1, 1)``.
    """
    # As a power: OpenVINO rewrites the division of a number, and forgets on the way that it may not be rounded.
    return (distances.mean((1, 2, 3), keepdim=True) / LITTLE + 1).pow(-0.5)


def lower_the_rest(anomaly_map: Tensor) -> Tensor:
    """Multiply each pixel by the fourth root of its share of the largest value of the image.

    What is not the plainest thing of its image is less likely to be a defect than what is.

    Args:
        anomaly_map (Tensor): Not negative, ``(batch, 1, height, width)``.

    Returns:
        Tensor: Same shape, nowhere higher, the largest value of each image as it was.
    """
    share = anomaly_map / anomaly_map.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return anomaly_map * share.sqrt().sqrt()
