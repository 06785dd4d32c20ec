# SPDX-License-Identifier: Apache-2.0
"""Do parts lie where their references have them? Decided from good images alone.

CPR compares a patch with nearly the same place of similar images, which is what makes it precise where parts are
aligned, or where among many images some lie alike. Loose parts, each of which may lie or be turned in any way, have no
such images: a good patch then finds its match elsewhere, and not in its window.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .matching import WHOLE_MAP, match

SURVEYED_IMAGES = 12
SURVEYED_REFERENCES = 5
# Of each map the largest values count, as in an image's score; most of a map is background that matches anywhere.
LARGEST_SHARE = 0.02
# A tenth of the image each way: far beyond what alignment leaves.
GENEROUS_SHARE = 0.1
# Of DenseNet-201 at 160 and 320 pixels: loose drawn tablets 2.3 to 2.5 and 2.0; aligned parts 1.03 and 1.06, turned
# ones 1.04 and 1.06, a texture 1.13 and 1.33, MVTec AD screw 1.05 at 320. Random features tell less: 2.3 against 1.7.
LOOSE_ABOVE = 1.8
# Parts that come turned as well find little more anywhere than nearby: loose gears 1.19, brackets 1.33, screws 1.50. Up
# to this nothing is loose, and the whole map, which takes long to compare, is not worth asking for.
MAYBE_LOOSE_ABOVE = 1.1


def surveyed(neighbours: Tensor, images: int = SURVEYED_IMAGES) -> tuple[list[int], Tensor]:
    """Choose images to look at.

    Args:
        neighbours (Tensor): Indices of the references of each image, the most similar first, ``(images, k)``.
        images (int): How many to look at, if there are so many.

    Returns:
        tuple[list[int], Tensor]: Images, spread over the data, and their references, ``(surveyed, references)``.
    """
    chosen = spread(len(neighbours), images)
    return chosen.tolist(), neighbours[chosen, :SURVEYED_REFERENCES]


def spread(count: int, most: int) -> Tensor:
    """Choose at most so many of some images, at equal distances.

    Args:
        count (int): How many there are.
        most (int): How many to choose, if there are so many.

    Returns:
        Tensor: Indices in ascending order, on the CPU.
    """
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def generous_window(cells: int) -> int:
    """Side of a window, in cells, that reaches a tenth of the map each way.

    Args:
        cells (int): Longer side of the map.

    Returns:
        int: An odd number.
    """
    return 2 * round(GENEROUS_SHARE * cells) + 1


def looseness(queries: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """How much farther good patches are from their best match within a tenth of the image than from that of anywhere.

    Args:
        queries (Sequence[Tensor]): Frozen features of good images, ``(channels, height, width)`` each.
        references (Sequence[Tensor]): Of the references of each, ``(references, channels, height, width)`` each.

    Returns:
        float: Ratio of the mean of the largest distances, 1 or more: 1 where position tells everything.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    for query, gallery in zip(queries, references, strict=True):
        own, others = F.normalize(query.float(), dim=0)[None], F.normalize(gallery.float(), dim=1)
        every = torch.arange(len(others), device=others.device)[None]
        for place, window in enumerate((generous_window(max(query.shape[1:])), WHOLE_MAP)):
            distances = match(own, others, every, window).amin(1).flatten()
            count = max(1, round(LARGEST_SHARE * len(distances)))
            totals[place] += distances.topk(count).values.mean().cpu().double()
    # Identical images have no distances at all.
    return float((totals[0] + 1e-6) / (totals[1] + 1e-6))
