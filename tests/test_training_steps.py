import math

import pytest
import torch

from anomalib_cpr.training_steps import StepLoader, learning_rate_factor, plan_steps, step_generator


@pytest.mark.parametrize(
    ("max_epochs", "max_steps", "accumulate", "expected"),
    [
        # nothing given: the default number of steps in one epoch
        (1000, -1, 1, (500, 500, 1, True)),
        (1000, -1, 4, (2000, 500, 1, True)),
        # steps given
        (-1, 30, 1, (30, 30, None, True)),
        (1000, 30, 2, (60, 30, None, True)),
        # epochs given: 10 images in batches of 4 are 3 batches
        (5, -1, 1, (3, 15, None, False)),
        (5, -1, 2, (3, 10, None, False)),
        (1, -1, 1, (3, 3, None, False)),
        (5, 7, 1, (3, 7, None, False)),
        # only a time limit
        (-1, -1, 1, (500, None, None, False)),
    ],
)
def test_any_limit_of_the_user_wins(max_epochs, max_steps, accumulate, expected):
    plan = plan_steps(
        max_epochs=max_epochs, max_steps=max_steps, accumulate=accumulate, images=10, batch_size=4, default_steps=500
    )
    assert (plan.batches_per_epoch, plan.steps, plan.epochs, plan.single_epoch) == expected


def test_loader_is_as_long_as_it_says():
    loader = StepLoader(lambda: 3)
    assert len(loader) == len(list(loader)) == 3


def test_steps_draw_different_numbers_and_always_the_same():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**63 - 1, 0, 10**9, 0)]
    draws = [torch.rand(4, generator=step_generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    assert draws == [torch.rand(4, generator=step_generator(*key)).tolist() for key in keys]


def test_cosine():
    factors = [learning_rate_factor(step, 200, "cosine", 20) for step in range(201)]
    assert factors[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert factors[20] == 1
    assert factors[110] == pytest.approx(0.5)
    assert factors[200] == pytest.approx(0, abs=1e-12)
    assert factors[65] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_and_unknown_end():
    assert learning_rate_factor(10**6, 200, "constant", 20) == 1
    assert learning_rate_factor(10**6, None, "cosine", 20) == 1
    assert learning_rate_factor(0, None, "cosine", 20) == pytest.approx(1 / 21)


def test_warm_up_is_at_most_a_tenth():
    assert learning_rate_factor(3, 30, "cosine", 20) == 1
