"""The evidence that parts lie anywhere."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.alignment import LOOSE_ABOVE, looseness, surveyed


def slow_looseness(queries, references):
    """Cell by cell: the nearest of all cells, and of those at most a tenth of the image away."""
    near_sum = all_sum = 0.0
    for query, gallery in zip(queries, references, strict=True):
        _, height, width = query.shape
        own, others = F.normalize(query, dim=0), F.normalize(gallery, dim=1)
        radius = round(0.1 * max(height, width))
        near, everywhere = np.zeros((height, width)), np.zeros((height, width))
        for y, x in np.ndindex(height, width):
            distances = 1 - torch.einsum("c,kchw->khw", own[:, y, x], others).amax(0)
            everywhere[y, x] = distances.min()
            near[y, x] = distances[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].min()
        count = max(1, round(0.02 * near.size))
        near_sum += np.sort(near.ravel())[-count:].mean()
        all_sum += np.sort(everywhere.ravel())[-count:].mean()
    return near_sum / all_sum


@pytest.mark.parametrize("size", [(20, 20), (12, 30)])
def test_looseness_is_what_the_definition_says(size):
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randn(6, *size, generator=generator) for _ in range(2)]
    references = [torch.randn(3, 6, *size, generator=generator) for _ in range(2)]
    assert looseness(queries, references) == pytest.approx(slow_looseness(queries, references), rel=1e-3)


def scene(generator, loose):
    """Ten unlike things on a plain ground, at their own places or dealt out anew, and a little noise."""
    things = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(10, generator=generator) if loose else torch.arange(10)
    features = torch.ones(16, 20, 20)
    for place, thing in enumerate(order.tolist()):
        y, x = 2 + 4 * (place // 5) * 2, 2 + 3 * (place % 5)
        features[:, y : y + 2, x : x + 2] = things[thing][:, None, None]
    return features + 0.1 * torch.randn(16, 20, 20, generator=generator)


@pytest.mark.parametrize("loose", [False, True])
def test_loose_parts_are_told_from_aligned_ones(loose):
    generator = torch.Generator().manual_seed(2)
    queries = [scene(generator, loose) for _ in range(4)]
    references = [torch.stack([scene(generator, loose) for _ in range(3)]) for _ in range(4)]
    assert (looseness(queries, references) > LOOSE_ABOVE) == loose


def test_identical_images_are_aligned():
    same = torch.rand(8, 20, 20)
    assert looseness([same], [same[None]]) == pytest.approx(1, abs=0.2)


def test_surveyed_images_are_spread_over_the_data():
    neighbours = torch.arange(100 * 10).view(100, 10)
    chosen, references = surveyed(neighbours)
    assert (len(chosen), chosen[0], chosen[-1]) == (12, 0, 99)
    assert torch.equal(references, neighbours[chosen, :5])
    few = surveyed(torch.tensor([[1], [0]]))
    assert (few[0], few[1].tolist()) == ([0, 1], [[1], [0]])
