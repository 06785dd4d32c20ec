import numpy as np
import pytest
import torch

from anomalib_cpr.coherence import coherent_distance


def slow_coherent_distance(distances):
    """One cell at a time, in numpy: distances (k, height, width)."""
    _, height, width = distances.shape
    down, right = round(height / 20), round(width / 20)
    result = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            square = distances[:, max(0, row - down) : row + down + 1, max(0, column - right) : column + right + 1]
            fit = np.exp(-square.mean((1, 2)) / 0.02)
            agreed = (fit * distances[:, row, column]).sum() / fit.sum()
            result[row, column] = (distances[:, row, column].min() + agreed) / 2
    return result


@pytest.mark.parametrize(("k", "height", "width"), [(4, 40, 40), (3, 20, 60), (1, 30, 30), (5, 7, 8), (2, 1, 1)])
@pytest.mark.parametrize("layout", ["references first", "references last"])
def test_neighbours_agree_on_references(k, height, width, layout):
    generator = torch.Generator().manual_seed(0)
    distances = 0.3 * torch.rand(2, k, height, width, generator=generator)
    if layout == "references last":  # as they lie in memory after matching on a CPU
        distances = distances.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    result = coherent_distance(distances)
    assert result.shape == (2, 1, height, width)
    for image, found in zip(distances.double(), result, strict=True):
        np.testing.assert_allclose(found[0].numpy(), slow_coherent_distance(image.numpy()), atol=1e-5)
    assert (result >= distances.amin(1, keepdim=True) - 1e-6).all()
    assert (result <= distances.amax(1, keepdim=True) + 1e-6).all()


def test_a_gap_that_another_reference_has_elsewhere():
    """The first reference fits around the gap but not in it; the second fits nothing but the gap."""
    distances = torch.stack([torch.full((40, 40), 0.05), torch.full((40, 40), 0.4)])[None]
    distances[0, 0, 19:22, 19:22], distances[0, 1, 19:22, 19:22] = 0.5, 0.0
    assert distances.amin(1)[0, 20, 20] == 0
    assert coherent_distance(distances)[0, 0, 20, 20] > 0.2
    assert coherent_distance(distances)[0, 0, 5, 5] == pytest.approx(0.05, abs=1e-3)


def test_one_reference_has_nobody_to_agree_with():
    distances = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(coherent_distance(distances), distances)


def test_the_order_of_references_and_the_batch_change_nothing():
    distances = torch.rand(4, 5, 20, 20, generator=torch.Generator().manual_seed(2))
    whole = coherent_distance(distances)
    torch.testing.assert_close(coherent_distance(distances.flip(1)), whole)
    assert torch.equal(torch.cat([coherent_distance(one) for one in distances.split(1)]), whole)
