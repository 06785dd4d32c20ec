# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.bilinear import bilinear_cells, read_at, read_cells


def test_read_at_against_a_loop():
    features = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    positions = torch.rand(1, 30, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    result = read_at(features, positions)
    for index, (x, y) in enumerate(positions[0].tolist()):
        column, row = (x + 1) / 2 * 6 - 0.5, (y + 1) / 2 * 4 - 0.5
        expected = torch.zeros(3)
        for i in range(4):
            for j in range(6):
                expected += max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * features[0, :, i, j]
        assert torch.allclose(result[0, :, index], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_equals_that_of_torch_also_beyond_the_edges(dtype):
    features = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(2)) * 2.2 - 1.1
    expected = F.grid_sample(features.float(), positions[:, :, None], align_corners=False)[..., 0]
    torch.testing.assert_close(read_at(features, positions), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(read_cells(features, *bilinear_cells(positions, 5, 7)), expected, atol=1e-5, rtol=0)
