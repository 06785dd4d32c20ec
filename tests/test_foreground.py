import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from anomalib_cpr.foreground import ForegroundEstimator, border_and_centre, fit_discriminant, sharpen


@pytest.mark.parametrize(
    ("height", "width", "ring_rows", "ring_columns"), [(80, 80, 3, 3), (16, 40, 1, 1), (5, 160, 1, 6)]
)
def test_border_and_centre(height, width, ring_rows, ring_columns):
    ring, inner_ring, centre = border_and_centre(height, width)
    for row in range(height):
        for column in range(width):
            near_border, nearly = (
                min(row, height - 1 - row) < n * ring_rows or min(column, width - 1 - column) < n * ring_columns
                for n in (1, 2)
            )
            in_centre = int(0.3 * height) <= row < int(0.7 * height) and int(0.3 * width) <= column < int(0.7 * width)
            assert ring[row, column] == near_border
            assert inner_ring[row, column] == (nearly and not near_border)
            assert centre[row, column] == in_centre


@pytest.fixture
def features():
    """Background around 0, object around 3; a fifth of the border shows the object, a third of the middle does not."""
    rng = np.random.default_rng(0)
    background, thing = (rng.normal(mean, 1, (600, 4)).astype(np.float32) for mean in (0, 3))
    return {
        "ring": np.concatenate([background[:400], thing[:100]]),
        "inner_ring": np.concatenate([background[:300], thing[:100]]),
        "centre": np.concatenate([thing[:400], background[:200]]),
        "sample": np.concatenate([background, thing]),
        "centres": np.array([[3.0] * 4, [0.0] * 4], np.float32),
    }


def test_discriminant_separates_and_fills_0_to_1(features):
    discriminant = fit_discriminant(**features)
    value = features["sample"] @ discriminant.weight.numpy() + discriminant.bias
    assert np.percentile(value, 1) == pytest.approx(0, abs=1e-4)
    assert np.percentile(value, 99) == pytest.approx(1, abs=1e-4)
    assert (value[:600] < 0.5).mean() > 0.97
    assert (value[600:] > 0.5).mean() > 0.97
    assert discriminant.ring_background == pytest.approx(0.75, abs=0.02)
    assert discriminant.centre_background == pytest.approx(1 / 3, abs=0.02)


def test_direction_is_fishers(features):
    """Fisher's direction by its formula: inverse within-class scatter times difference of means."""
    discriminant = fit_discriminant(**features)
    distance = [np.linalg.norm(features["ring"] - c, axis=1) for c in features["centres"]]
    background = features["ring"][distance[1] < distance[0]]
    distance = [np.linalg.norm(features["centre"] - c, axis=1) for c in features["centres"]]
    foreground = features["centre"][distance[0] < distance[1]]
    count = min(len(background), len(foreground))
    classes = [background[:count], foreground[:count]]
    scatter = sum(np.cov(c.T, bias=True) for c in classes)
    direction = np.linalg.solve(scatter, classes[1].mean(0) - classes[0].mean(0))
    cosine = direction @ discriminant.weight.numpy() / np.linalg.norm(direction) / discriminant.weight.norm().item()
    assert cosine == pytest.approx(1, abs=1e-4)


def test_border_like_the_middle_gives_no_discriminant(features):
    features["centre"] = features["ring"][:100]
    assert fit_discriminant(**features) is None


def test_sharpen_against_scipy():
    foreground = torch.rand(2, 1, 50, 60, generator=torch.Generator().manual_seed(0))
    smooth = foreground.double().numpy()
    for axis in (2, 3):
        smooth = gaussian_filter1d(smooth, 50 / 25, axis=axis, mode="nearest")
    expected = 1 / (1 + np.exp(5 - 10 * smooth))
    assert torch.allclose(sharpen(foreground).double(), torch.from_numpy(expected), atol=1e-5)


def test_estimator_is_one_until_it_learned(features):
    estimator = ForegroundEstimator(4)
    assert torch.equal(estimator(torch.randn(2, 4, 3, 5)), torch.ones(2, 1, 3, 5))
    discriminant = fit_discriminant(**features)
    estimator.set_discriminant(discriminant)
    cells = torch.from_numpy(features["sample"]).T[None, :, :, None]
    expected = (features["sample"] @ discriminant.weight.numpy() + discriminant.bias).clip(0, 1)
    assert np.allclose(estimator(cells)[0, 0, :, 0].numpy(), expected, atol=1e-5)
    estimator.disable()
    assert estimator(cells).eq(1).all()
