"""How many references, in windows or over the whole map: the evidence and the decision."""

import math
import statistics

import pytest
import torch
from test_torch_model import make_model

from anomalib_cpr.matching_choice import (
    ASKED_IMAGES,
    Evidence,
    Matching,
    candidates,
    choose,
    compare_matchings,
    evidence_of,
    is_anywhere,
    is_clearly_better,
    steps_ahead,
)
from anomalib_cpr.training_images import TrainingImages, with_turned_copies

WINDOWS, WHOLE = (3, 1), (999, 999)


@pytest.mark.parametrize(
    ("good", "anomalous"), [([0.1, 0.2, 0.4], [0.3, 0.2, 0.9]), ([0.5, 0.1], [0.4, 0.1]), ([0.0, 1.0], [0.0, 1.0])]
)
def test_evidence(good, anomalous):
    added = sum(b - a for a, b in zip(good, anomalous, strict=True)) / len(good)
    found = evidence_of(torch.tensor(good), torch.tensor(anomalous))
    assert found.contrast == pytest.approx(added / statistics.mean(good), abs=1e-6)
    assert found.separation == pytest.approx(added / statistics.stdev(good), abs=1e-6)


def test_evidence_of_images_that_are_their_references_is_finite():
    found = evidence_of(torch.zeros(3), torch.full((3,), 0.2))
    assert math.isfinite(found.contrast)
    assert math.isfinite(found.separation)


@pytest.mark.parametrize(
    ("k", "available", "more", "whole", "in_windows", "anywhere"),
    [
        (10, 319, True, False, [10, 20, 40, 80], []),
        (10, 59, True, False, [10, 20, 40, 59], []),
        (10, 40, True, False, [10, 20, 40], []),
        (10, 11, True, False, [10, 11], []),
        (10, 10, True, False, [10], []),
        (10, 319, False, True, [10], [10]),
        (10, 319, True, True, [10, 20, 40, 80], [10, 20, 40]),
        (10, 30, True, True, [10, 20, 30], [10, 20, 30]),
        (50, 319, True, True, [50, 80], [50]),
        (3, 5, True, True, [3, 5], [3, 5]),
        (30, 319, False, False, [30], []),
    ],
)
def test_candidates(k, available, more, whole, in_windows, anywhere):
    found = candidates(Matching(k, WINDOWS), available, more_references=more, whole_map=whole)
    assert found == [Matching(one, WINDOWS) for one in in_windows] + [Matching(one, WHOLE) for one in anywhere]


@pytest.mark.parametrize(
    ("windows", "anywhere", "expected"),
    [
        ({10: (1.0, 5), 20: (1.5, 5), 40: (1.4, 5)}, {}, 20),
        ({10: (1.0, 5), 20: (1.1, 5), 40: (1.2, 5)}, {}, 10),  # not clearly better
        ({10: (1.0, 5), 20: (1.3, 5), 40: (1.5, 5)}, {}, 40),
        ({10: (1.0, 5), 20: (1.35, 5), 40: (1.4, 5)}, {}, 20),  # almost as good with half of them
        ({10: (1.0, 5), 20: (1.2, 5), 40: (1.3, 5)}, {}, 40),  # almost as good, but not clearly better than 10
        ({10: (2.0, 5), 20: (0.1, 5)}, {}, 10),
        ({10: (0.0, 0), 20: (0.0, 0)}, {}, 10),
        ({10: (-0.1, -1), 20: (-0.2, -2)}, {}, 10),
        ({10: (-0.1, -1), 20: (-0.05, -1), 40: (0.06, 0.07)}, {}, 10),  # heads that tell nothing apart
        ({10: (-0.1, -1), 20: (0.5, 0)}, {}, 20),
        # By separation: a gear at 320 px, two drawings, at 160 px; a bracket, a fabric and tablets (results/separation)
        ({10: (1.19, 4.1), 20: (1.38, 7.8), 40: (1.15, 9.5), 59: (1.02, 10.0)}, {}, 40),
        ({10: (1.43, 5.3), 20: (1.52, 13.4), 40: (1.34, 13.8), 59: (1.20, 11.5)}, {}, 20),
        ({10: (1.26, 5.0), 20: (1.57, 7.3), 40: (1.73, 10.4), 59: (1.85, 13.6)}, {10: (0.76, 3.4)}, 59),
        ({10: (1.72, 12.4), 20: (1.86, 14.3), 40: (1.92, 13.9), 59: (1.96, 13.7)}, {}, 10),
        ({10: (0.43, 7.9), 20: (0.45, 7.4), 40: (0.47, 7.9), 59: (0.48, 7.8)}, {10: (0.36, 4.8)}, 10),
        ({10: (1.11, 15.5), 20: (1.29, 17.8), 40: (1.48, 16.1), 59: (1.59, 15.4)}, {10: (1.32, 17.3)}, 59),
        # Screw: what is clearly better by one, but clearly worse by the other
        ({10: (1.51, 8.3), 20: (1.49, 8.2), 40: (1.30, 8.7), 80: (1.07, 12.7)}, {}, 10),
        # Over the whole map: loose gears and brackets
        ({10: (0.59, 4.3), 40: (0.75, 4.7), 59: (0.73, 4.6)}, {10: (1.10, 7.9), 40: (1.39, 8.1)}, "40 anywhere"),
        ({10: (0.32, 2.0), 40: (0.48, 3.6), 59: (0.46, 3.5)}, {10: (0.98, 5.0), 40: (1.46, 12.5)}, "40 anywhere"),
        # `loose_brackets`; a fabric at 320 px, whose whole map had 0.78: not better than 59 references in windows
        ({10: (0.51, 6.5), 20: (0.53, 6.9), 40: (0.53, 6.7)}, {10: (0.73, 7.1), 40: (1.05, 8.2)}, "40 anywhere"),
        ({10: (0.64, 7.3), 20: (0.69, 7.3), 40: (0.73, 7.2), 59: (0.74, 6.8)}, {10: (0.81, 7.4)}, 10),
        ({10: (1.0, 5)}, {10: (1.4, 4)}, "10 anywhere"),
        ({10: (1.0, 5)}, {10: (1.4, 3)}, 10),  # clearly worse by the other
        ({10: (1.0, 5), 20: (1.2, 5)}, {10: (1.4, 5)}, 10),  # not clearly better than windows with another number
        ({10: (1.0, 5), 20: (1.5, 5)}, {10: (1.6, 8)}, "10 anywhere"),  # by separation
        ({10: (1.0, 5), 20: (1.5, 5)}, {10: (1.6, 7)}, 20),
        ({10: (1.0, 5)}, {10: (2.0, 10), 20: (2.05, 10.2), 40: (2.1, 10.5)}, "10 anywhere"),
    ],
)
def test_choice(windows, anywhere, expected):
    found = {Matching(k, WINDOWS): Evidence(*values) for k, values in windows.items()}
    found |= {Matching(k, WHOLE): Evidence(*values) for k, values in anywhere.items()}
    k, _, where = str(expected).partition(" ")
    assert choose(found) == Matching(int(k), WHOLE if where else WINDOWS)


@pytest.mark.parametrize(
    ("windows", "anywhere"), [((3, 1), False), ((999, 1), False), ((3, 999), False), ((999, 999), True)]
)
def test_what_is_anywhere(windows, anywhere):
    assert is_anywhere(windows) is anywhere


@pytest.mark.parametrize(
    ("one", "other", "expected", "clearly"),
    [
        ((1.2501, 1), (1, 1), (1, 0), True),
        ((1.24, 1.49), (1, 1), (0.964, 0.983), False),
        ((0.9, 9), (0.9, 4), (0, 2), True),
        ((0.7999, 9), (1, 4), (-1, 2), False),
        ((1, 1), (1.25, 1.5), (-1, -1), False),
        ((0.05, 0.15), (0, -1), (0, 2.71), True),  # of next to nothing, not endlessly much
    ],
)
def test_steps_ahead(one, other, expected, clearly):
    assert steps_ahead(Evidence(*one), Evidence(*other)) == pytest.approx(expected, abs=0.001)
    assert is_clearly_better(Evidence(*one), Evidence(*other)) is clearly


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
        assert found[option] == pytest.approx(evidence_of(*torch.stack(scores[option]).T), rel=1e-3)


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
    assert found[options[1]] == pytest.approx(evidence_of(*torch.stack(scores).T), rel=1e-3)


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
