import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.outline import follow_edges
from anomalib_cpr.scoring import Scorer, largest_foreground


def slow_score(distances, foregrounds, size, sigma=4):
    """OpenCV's blur and numpy's sort, one image at a time."""
    height, width = size
    fused = (distances[0] + F.interpolate(distances[1], distances[0].shape[-2:], mode="bilinear")) / 4
    largest = torch.stack([F.interpolate(one[:, None], size, mode="bilinear") for one in foregrounds.unbind(1)]).amax(0)
    pixels = F.interpolate(fused, size, mode="bilinear") * largest
    maps = [
        cv2.GaussianBlur(image[0].numpy(), (8 * sigma + 1,) * 2, sigma, borderType=cv2.BORDER_REFLECT_101)
        for image in pixels
    ]
    scores = [np.sort(image.ravel())[-max(1, round(height * width / 200)) :].mean() for image in maps]
    return torch.from_numpy(np.stack(maps))[:, None], torch.tensor(np.array(scores))


@pytest.mark.parametrize("sigma", [4, 2])
@pytest.mark.parametrize("size", [(80, 80), (72, 120), (40, 48)])
def test_map_and_score(size, sigma):
    generator = torch.Generator().manual_seed(0)
    height, width = size
    distances = [2 * torch.rand(2, 1, height // stride, width // stride, generator=generator) for stride in (4, 8)]
    foregrounds = torch.rand(2, 3, height // 4, width // 4, generator=generator)
    expected_map, expected_score = slow_score(distances, foregrounds, size, sigma)
    anomaly_map, score = Scorer(sigma=sigma)(distances, foregrounds, size)
    assert torch.allclose(anomaly_map, expected_map, atol=1e-5)
    assert torch.allclose(score, expected_score.float(), atol=1e-5)


def test_a_map_that_follows_the_image_has_the_same_scores():
    generator = torch.Generator().manual_seed(0)
    distances = [2 * torch.rand(2, 1, side, side, generator=generator) for side in (16, 8)]
    foregrounds, images = torch.ones(2, 1, 16, 16), torch.rand(2, 3, 64, 64, generator=generator)
    smooth, scores = Scorer()(distances, foregrounds, (64, 64))
    followed, same = Scorer()(distances, foregrounds, (64, 64), images)
    assert torch.equal(scores, same)
    assert (followed - smooth).abs().mean() > 0.01
    cells = (distances[0] + F.interpolate(distances[1], (16, 16), mode="bilinear")) / 4
    expected = follow_edges(F.interpolate(cells, (64, 64), mode="bilinear"), images)
    torch.testing.assert_close(followed, expected)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (2.0, 1.0)])
def test_extreme_distances_stay_in_0_to_1(value, expected):
    distances = [torch.full((1, 1, 20, 20), value), torch.full((1, 1, 10, 10), value)]
    anomaly_map, score = Scorer()(distances, torch.ones(1, 1, 20, 20), (80, 80))
    assert torch.allclose(anomaly_map, torch.full_like(anomaly_map, expected), atol=1e-6)
    assert score.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_no_blur_of_that_width(sigma):
    with pytest.raises(ValueError, match="blur_sigma"):
        Scorer(sigma=sigma)


def test_background_is_not_anomalous():
    distances = [torch.full((1, 1, 20, 20), 2.0), torch.full((1, 1, 10, 10), 2.0)]
    anomaly_map, score = Scorer()(distances, torch.zeros(1, 1, 20, 20), (80, 80))
    assert anomaly_map.max() == 0
    assert score == 0


def test_image_smaller_than_the_blur():
    anomaly_map, score = Scorer()([torch.ones(1, 1, 2, 4), torch.ones(1, 1, 1, 2)], torch.ones(1, 1, 2, 4), (8, 16))
    assert anomaly_map.shape == (1, 1, 8, 16)
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_largest_foreground_of_many_references(count):
    foregrounds = torch.rand(2, count, 6, 10, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(foregrounds, (48, 80), mode="bilinear").amax(1, keepdim=True)
    assert torch.equal(largest_foreground(foregrounds, (48, 80)), expected)
