"""Windows, or the whole map: the evidence and the decision."""

import math
import statistics

import pytest
import torch
from test_torch_model import make_model

from anomalib_cpr.training_images import TrainingImages
from anomalib_cpr.window_choice import ASKED_IMAGES, candidates, choose, compare_windows, separation

WHOLE = (999, 999)


@pytest.mark.parametrize(
    ("good", "anomalous"), [([0.1, 0.2, 0.4], [0.3, 0.2, 0.9]), ([0.5, 0.1], [0.4, 0.1]), ([0.0, 1.0], [0.0, 1.0])]
)
def test_separation(good, anomalous):
    mean = sum(b - a for a, b in zip(good, anomalous, strict=True)) / len(good)
    assert separation(torch.tensor(good), torch.tensor(anomalous)) == pytest.approx(
        mean / statistics.stdev(good), rel=1e-5
    )


def test_separation_of_identical_images_is_finite():
    assert math.isfinite(separation(torch.full((3,), 0.1), torch.full((3,), 0.2)))


@pytest.mark.parametrize(
    ("windows", "size", "generous"),
    [
        ((3, 1), (320, 320), (17, 9)),
        ((3, 1), (160, 64), (9, 5)),
        ((3, 1), (32, 32), (3, 1)),
        ((7, 5), (64, 64), (7, 5)),
    ],
)
def test_candidates(windows, size, generous):
    assert candidates(windows, size) == [windows, generous, WHOLE]


@pytest.mark.parametrize(
    ("usual", "generous", "whole", "chosen"),
    [
        (16.0, 17.7, 22.1, WHOLE),
        (2.0, 1.0, 2.0, WHOLE),
        (2.0, 1.0, 1.9, (3, 1)),
        (1.0, 4.5, 4.1, (3, 1)),  # neither the best nor what lies between
    ],
)
def test_choice(usual, generous, whole, chosen):
    assert choose({(3, 1): usual, (9, 5): generous, WHOLE: whole}) == chosen


class Square:
    """Paints a square, except on the images that are told."""

    def __init__(self, spared=()):
        self.spared, self.calls, self.foregrounds = spared, 0, []

    def __call__(self, images, foreground, generator):
        del generator
        self.foregrounds.append(foreground)
        self.calls += 1
        mask = torch.zeros(1, 1, *images.shape[-2:], dtype=torch.bool)
        if self.calls - 1 in self.spared:
            return images.clone(), mask
        mask[..., 8:24, 16:40] = True
        return torch.where(mask, 1 - images, images), mask


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spared", [(), (1, 3)])
def test_evidence_is_what_forward_says_with_these_references(images, spared):
    """One model per image, whose bank holds nothing but the references of that image."""
    neighbours = torch.tensor([[1, 2], [2, 0], [4, 1], [0, 4], [3, 2]])
    model = make_model(images, k=2).train()
    options = [(3, 1), (5, 3), WHOLE]
    paint = Square(spared)
    found = compare_windows(model, TrainingImages(images, None), neighbours, paint, torch.Generator(), options)
    assert model.training
    assert list(found) == options
    assert all(foreground.shape == (1, 1, 16, 24) for foreground in paint.foregrounds)

    scores = {windows: [] for windows in options}
    for index in sorted({0, 1, 2, 3, 4} - set(spared)):
        pair = torch.cat([images[index : index + 1], Square()(images[index : index + 1], None, None)[0]])
        for windows in options:
            alone = make_model(images[neighbours[index]], k=2, window_sizes=windows)
            scores[windows].append(alone(pair).pred_score)
    for windows in options:
        assert found[windows] == pytest.approx(separation(*torch.stack(scores[windows]).T), rel=1e-3)


def test_no_anomaly_no_evidence(images):
    model = make_model(images, k=2)
    spared = Square(spared=range(5))
    neighbours = torch.tensor([[1], [0], [0], [0], [0]])
    assert compare_windows(model, TrainingImages(images, None), neighbours, spared, torch.Generator(), [(3, 1)]) == {}


def test_at_most_so_many_images_are_asked(images):
    many = images[:1].repeat(60, 1, 1, 1)
    paint = Square()
    neighbours = torch.ones(60, 1, dtype=torch.long)
    compare_windows(make_model(images), TrainingImages(many, None), neighbours, paint, torch.Generator(), [(1, 1)])
    assert paint.calls == ASKED_IMAGES
