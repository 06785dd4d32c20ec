# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.outline import follow_edges, guided_filter, largest_within, lower_skirts


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow_follow_edges(anomaly_map, image):
    """One square after another, by least squares; then one pixel after another."""
    height, width = anomaly_map.shape
    brightness = image.mean(0)
    brightness = brightness - brightness.mean()
    penalty = 0.03 * (brightness**2).mean() + 1e-6
    padded_map, padded_image = (np.pad(each, 4, mode="reflect") for each in (anomaly_map, brightness))
    lines = np.zeros((height // 4, width // 4, 2))
    for row in range(height // 4):
        for column in range(width // 4):
            square = slice(4 * row, 4 * row + 12), slice(4 * column, 4 * column + 12)
            x, y = padded_image[square].ravel(), padded_map[square].ravel()
            # Ridge regression: as if one more sample asked for a slope of 0.
            matrix = np.vstack([np.stack([x, np.ones(144)], 1), [np.sqrt(144 * penalty), 0]])
            lines[row, column] = np.linalg.lstsq(matrix, np.append(y, 0), rcond=None)[0]
    lines = cv2.resize(lines, (width, height), interpolation=cv2.INTER_LINEAR)
    followed = (lines[..., 0] * brightness + lines[..., 1]).clip(0, 1)
    result = np.zeros_like(followed)
    for row in range(height):
        for column in range(width):
            around = followed[max(0, row - 4) : row + 5, max(0, column - 4) : column + 5]
            value = followed[row, column]
            result[row, column] = value * np.sqrt(value / max(around.max(), 1e-6))
    return result


@pytest.mark.parametrize("size", [(48, 64), (8, 16)])
def test_equals_a_slow_one(size):
    cells = torch.rand(2, 1, size[0] // 4, size[1] // 4, generator=seeded())
    maps = F.interpolate(cells, size, mode="bilinear").double()
    images = torch.randn(2, 3, *size, generator=seeded(1)).double()
    expected = [slow_follow_edges(m[0].numpy(), i.numpy()) for m, i in zip(maps, images, strict=True)]
    # The function computes with float32 images.
    torch.testing.assert_close(
        follow_edges(maps.float(), images)[:, 0].double(), torch.from_numpy(np.stack(expected)), atol=1e-4, rtol=0
    )


def test_an_anomaly_ends_where_the_image_has_an_edge():
    """Not half-way down the ramp from an anomalous cell to a normal one."""
    images = torch.zeros(1, 3, 64, 64)
    images[..., 30:] = 1
    cells = torch.zeros(1, 1, 16, 16)
    cells[..., :8] = 0.6
    ramp = F.interpolate(cells, (64, 64), mode="bilinear")
    row = follow_edges(ramp, images)[0, 0, 32]
    assert ramp[0, 0, 32, 28:32].tolist() == pytest.approx([0.6, 0.6, 0.525, 0.375])
    assert row[29] > 0.55
    assert row[30] < 0.15


def test_without_edges_the_map_stays_a_smooth_one():
    cells = torch.rand(1, 1, 12, 12, generator=seeded())
    ramp = F.interpolate(cells, (48, 48), mode="bilinear")
    flat = guided_filter(ramp, torch.full((1, 3, 48, 48), 0.7))
    means = F.avg_pool2d(F.pad(ramp, (4,) * 4, mode="reflect"), 12, 4)
    torch.testing.assert_close(flat, F.interpolate(means, (48, 48), mode="bilinear"), atol=1e-5, rtol=0)


def test_neither_lamp_nor_normalisation_matter():
    maps = F.interpolate(torch.rand(1, 1, 12, 12, generator=seeded()), (48, 48), mode="bilinear")
    images = torch.rand(1, 3, 48, 48, generator=seeded(1))
    expected = follow_edges(maps, images)
    for changed in (images * 4.4 - 2, 255 * images, 0.1 * images + 0.5, 1 - images):
        torch.testing.assert_close(follow_edges(maps, changed), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_an_even_map_stays_what_it_is(value):
    images = torch.rand(2, 3, 32, 40, generator=seeded())
    maps = torch.full((2, 1, 32, 40), value)
    torch.testing.assert_close(follow_edges(maps, images), maps, atol=1e-4, rtol=0)


def test_stays_in_0_to_1_whatever_the_image():
    maps = (torch.rand(4, 1, 64, 64, generator=seeded()) > 0.5).float()
    images = 100 * torch.randn(4, 3, 64, 64, generator=seeded(1)) ** 3
    result = follow_edges(maps, images)
    assert result.isfinite().all()
    assert result.min() >= 0
    assert result.max() <= 1


def test_skirts_become_lower_and_peaks_do_not():
    anomaly_map = torch.zeros(1, 1, 40, 40)
    anomaly_map[..., 10, 10], anomaly_map[..., 10, 13], anomaly_map[..., 30, 30] = 0.8, 0.2, 0.2
    result = lower_skirts(anomaly_map)
    assert result[0, 0, 10, 10].item() == pytest.approx(0.8)
    assert result[0, 0, 10, 13].item() == pytest.approx(0.1), "0.2 times the root of a quarter"
    assert result[0, 0, 30, 30].item() == pytest.approx(0.2), "a faint one with nothing around"
    assert (result <= anomaly_map).all()


def test_a_batch_is_as_its_images():
    maps, images = torch.rand(5, 1, 32, 32, generator=seeded()), torch.rand(5, 3, 32, 32, generator=seeded(1))
    alone = [follow_edges(maps[i : i + 1], images[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(follow_edges(maps, images), torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize("reach", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (40, 24)])
def test_largest_within_is_that_of_pooling(size, reach):
    maps = torch.randn(2, 3, *size, generator=seeded())
    maps[0, 0, 0, 0] = torch.nan
    side = 2 * reach + 1
    expected = F.max_pool2d(maps, side, stride=1, padding=reach)
    torch.testing.assert_close(largest_within(maps, reach), expected, atol=0, rtol=0, equal_nan=True)
