"""How many references, in windows or over the whole map: the evidence and the decision."""

import math

import pytest
import torch
from test_torch_model import make_model

from anomalib_cpr.matching_choice import (
    ASKED_IMAGES,
    Matching,
    candidates,
    choose,
    compare_matchings,
    contrast_of_anomalies,
    is_anywhere,
    is_clearly_better,
    more_anywhere,
)
from anomalib_cpr.training_images import TrainingImages, with_turned_copies

WINDOWS, WHOLE = (3, 1), (999, 999)


@pytest.mark.parametrize(
    ("good", "anomalous"), [([0.1, 0.2, 0.4], [0.3, 0.2, 0.9]), ([0.5, 0.1], [0.4, 0.1]), ([0.0, 1.0], [0.0, 1.0])]
)
def test_contrast(good, anomalous):
    added = sum(b - a for a, b in zip(good, anomalous, strict=True))
    assert contrast_of_anomalies(torch.tensor(good), torch.tensor(anomalous)) == pytest.approx(
        added / sum(good), abs=1e-6
    )


def test_contrast_of_images_that_are_their_references_is_finite():
    assert math.isfinite(contrast_of_anomalies(torch.zeros(3), torch.full((3,), 0.2)))


@pytest.mark.parametrize(
    ("k", "available", "more", "whole", "expected"),
    [
        (10, 319, True, False, [10, 20, 40, 80]),
        (10, 59, True, False, [10, 20, 40, 59]),
        (10, 40, True, False, [10, 20, 40]),
        (10, 11, True, False, [10, 11]),
        (10, 10, True, False, [10]),
        (10, 319, False, True, [10, None]),
        (10, 30, True, True, [10, 20, 30, None]),
        (30, 319, False, False, [30]),
    ],
)
def test_candidates(k, available, more, whole, expected):
    found = candidates(Matching(k, WINDOWS), available, more_references=more, whole_map=whole)
    assert found == [Matching(k, WHOLE) if one is None else Matching(one, WINDOWS) for one in expected]


@pytest.mark.parametrize(
    ("contrasts", "expected"),
    [
        ({10: 1.0, 20: 1.5, 40: 1.4}, 20),
        ({10: 1.0, 20: 1.1, 40: 1.2}, 10),  # not clearly better
        ({10: 1.0, 20: 1.2, 40: 1.5}, 40),
        ({10: 2.0, 20: 0.1}, 10),
        ({10: 0.0, 20: 0.0}, 10),
        ({10: -0.1, 20: -0.2}, 10),
        ({10: -0.1, 20: -0.05, 40: 0.06}, 10),  # heads that tell nothing apart
        ({10: -0.1, 20: 0.5}, 20),
    ],
)
def test_choice(contrasts, expected):
    assert choose({Matching(k, WINDOWS): value for k, value in contrasts.items()}) == Matching(expected, WINDOWS)


@pytest.mark.parametrize(
    ("k", "available", "expected"),
    [(10, 319, [20, 40]), (10, 30, [20, 30]), (10, 11, [11]), (10, 10, []), (50, 319, []), (3, 5, [5])],
)
def test_more_references_over_the_whole_map(k, available, expected):
    assert more_anywhere(Matching(k, WHOLE), available) == [Matching(one, WHOLE) for one in expected]


@pytest.mark.parametrize(
    ("windows", "anywhere"), [((3, 1), False), ((999, 1), False), ((3, 999), False), ((999, 999), True)]
)
def test_what_is_anywhere(windows, anywhere):
    assert is_anywhere(Matching(10, windows)) is anywhere


@pytest.mark.parametrize(("usual", "other", "better"), [(1, 1.25, True), (1, 1.24, False), (0, 0.05, False)])
def test_what_is_clearly_better(usual, other, better):
    assert is_clearly_better(Matching(10, WHOLE), {Matching(10, WINDOWS): usual, Matching(10, WHOLE): other}) is better


def test_a_matching_in_words():
    assert str(Matching(20, (5, 3))) == "20 references in windows of [5, 3]"
    assert str(Matching(10, WHOLE)) == "10 references over the whole map"


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
        return torch.where(mask, torch.ones_like(images), images), mask


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("spared", "rotations", "bank_dtype"),
    [((), (), "float32"), ((1, 3), (), "int8"), ((), (), "int4"), ((0,), (180.0,), "float32")],
)
def test_evidence_is_what_forward_says_of_a_bank_without_the_image(images, spared, rotations, bank_dtype):
    """One model per image, with all photographs but its own in the bank."""
    photographs = with_turned_copies(TrainingImages(images, None), rotations)
    copies = photographs.copies
    model = make_model(photographs.images, bank_dtype=bank_dtype).train()
    options = [Matching(1, (3, 1)), Matching(3, (3, 1)), Matching(99, (3, 1)), Matching(2, (5, 3)), Matching(2, WHOLE)]
    paint = Square(spared)
    everything = torch.arange(len(photographs))
    found = compare_matchings(model, photographs, everything, paint, torch.Generator(), options)
    assert model.training
    assert list(found) == options
    assert all(foreground.shape == (1, 1, 16, 24) for foreground in paint.foregrounds)

    scores = {option: [] for option in options}
    for index in sorted(set(range(len(photographs))) - set(spared)):
        image = photographs.images[index : index + 1]
        pair = torch.cat([image, Square()(image, None, None)[0]])
        others = photographs.images[everything // copies != index // copies]
        alone = make_model(others, bank_dtype=bank_dtype)
        for option in options:
            alone.k, alone.window_sizes = option
            scores[option].append(alone(pair).pred_score)
    for option in options:
        assert found[option] == pytest.approx(contrast_of_anomalies(*torch.stack(scores[option]).T), rel=1e-3)


def test_only_what_the_bank_holds_is_a_reference(images):
    options = [Matching(1, (3, 1)), Matching(2, (3, 1))]
    in_bank = torch.tensor([0, 3])
    model = make_model(images[in_bank])
    found = compare_matchings(model, TrainingImages(images, None), in_bank, Square(), torch.Generator(), options)
    scores = []
    for index in range(len(images)):
        pair = torch.cat([images[index : index + 1], Square()(images[index : index + 1], None, None)[0]])
        others = [image for image in in_bank.tolist() if image != index]
        scores.append(make_model(images[others], k=2)(pair).pred_score)
    assert found[options[1]] == pytest.approx(contrast_of_anomalies(*torch.stack(scores).T), rel=1e-3)


def test_no_anomaly_no_evidence(images):
    model, spared = make_model(images), Square(spared=range(5))
    options = [Matching(1, WINDOWS), Matching(2, WINDOWS)]
    found = compare_matchings(model, TrainingImages(images, None), torch.arange(5), spared, torch.Generator(), options)
    assert found == {}


def test_at_most_so_many_images_are_asked(images):
    many, paint = images[:1].repeat(60, 1, 1, 1), Square()
    model = make_model(many)
    compare_matchings(
        model, TrainingImages(many, None), torch.arange(60), paint, torch.Generator(), [Matching(2, (1, 1))]
    )
    assert paint.calls == ASKED_IMAGES
