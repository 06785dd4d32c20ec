# SPDX-License-Identifier: Apache-2.0
"""Coherent matching: neighbouring patches agree on the references that they are matched with.

The paper lets each patch take the nearest of all references, whatever its neighbours took. So a missing piece finds its
like: background where there should be a thread, on whichever reference has its thread elsewhere. Where neighbours
agree, such a reference helps less, since it does not fit around the gap.

Source: not of CPR; stereo vision aggregates the costs of its candidates over a window before the cheapest wins
(Scharstein and Szeliski, "A Taxonomy and Evaluation of Dense Two-Frame Stereo Correspondence Algorithms", IJCV 47,
2002, doi 10.1023/A:1014573219977, section 3.2).
"""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# Chosen on drawn parts (results/coherence.json). Wider neighbourhoods, and agreement alone, gave a turned gear less.
NEIGHBOURHOOD = 0.1
TEMPERATURE = 0.02
AGREEMENT = 0.5


def coherent_distance(distances: Tensor) -> Tensor:
    """Mean of the distance of each cell to its nearest reference, and of that to those that fit its neighbourhood.

    A reference fits as well as the mean distance is small in a square around the cell, a tenth of the image wide. Those
    that fit nearly as well count nearly as much, so that the map has no seams where the best of them changes.

    Args:
        distances (Tensor): Cosine distances to each reference, 0..2, ``(batch, k, height, width)``.

    Returns:
        Tensor: In 0..2, nowhere less than the smallest over the references, ``(batch, 1, height, width)``.
    """
    around = distances
    for axis, cells in enumerate(distances.shape[-2:]):  # along one axis, then along the other: less work
        reach = round(NEIGHBOURHOOD * cells / 2)
        side, border = ([1, 1], [0, 0])
        side[axis], border[axis] = 2 * reach + 1, reach
        around = F.avg_pool2d(around, side, stride=1, padding=border, count_include_pad=False)
    weights = (around / -TEMPERATURE).softmax(dim=1)
    agreed = (weights * distances).sum(1, keepdim=True)
    nearest = distances.amin(1, keepdim=True)
    # Not torch.lerp: OpenVINO rewrites its subtractions, and forgets on the way that they may not be rounded.
    return nearest + AGREEMENT * (agreed - nearest)
