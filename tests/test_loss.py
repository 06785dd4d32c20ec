import math

import pytest
import torch

from anomalib_cpr.loss import contrast, metric_loss, remote_weights
from anomalib_cpr.pairs import PatchPairs


def cosine(a, b):
    return float(a @ b) / max(1e-12, math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    count = 6
    pairs = PatchPairs(
        query=torch.rand(2, 3 * count, 2, generator=generator) * 1.6 - 0.8,
        reference=torch.rand(2, 3 * count, 2, generator=generator) * 1.6 - 0.8,
        valid=torch.rand(2, 3 * count, generator=generator) > 0.3,
        count=count,
    )
    query, reference = (torch.randn(2, 5, 3 * count, generator=generator) for _ in range(2))
    return pairs, query, reference, generator


def test_against_a_loop(example):
    pairs, query, reference, generator = example
    weights = torch.rand(2, 6, generator=generator) * pairs.valid[:, 6:12]
    positive, negative = [], []
    for image in range(2):
        for index in range(18):
            similarity = cosine(query[image, :, index], reference[image, :, index])
            if index < 6 and pairs.valid[image, index]:
                positive.append(max(0, 0.8 - similarity) ** 3)
            elif 6 <= index < 12 and weights[image, index - 6] > 0:
                negative.append((float(weights[image, index - 6]) * max(0, similarity + 0.2)) ** 3)
            elif index >= 12 and pairs.valid[image, index]:
                negative.append(max(0, similarity + 0.2) ** 3)
    got_positive, got_negative = metric_loss(query, reference, pairs, weights)
    assert got_positive.item() == pytest.approx(sum(positive) / len(positive), rel=1e-4)
    assert got_negative.item() == pytest.approx(sum(negative) / len(negative), rel=1e-4)


def test_remote_weights_have_mean_1_and_follow_the_frozen_features(example):
    pairs, _, _, generator = example
    query, reference = (torch.randn(2, 4, 9, 9, generator=generator) for _ in range(2))
    weights = remote_weights(query, reference, pairs)
    valid = pairs.valid[:, 6:12]
    assert torch.equal(weights > 0, valid)
    for image in range(2):
        assert weights[image][valid[image]].mean().item() == pytest.approx(1, rel=1e-4)
    assert remote_weights(query, query, PatchPairs(pairs.query, pairs.query, pairs.valid, 6)).abs().max() == 0


@pytest.mark.parametrize("attract", [True, False])
def test_nothing_to_compare_costs_nothing(attract):
    similarity = torch.rand(2, 3, requires_grad=True)
    loss = contrast(similarity, torch.zeros(2, 3), attract=attract)
    loss.backward()
    assert loss == 0
    assert similarity.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("similarity", "attract", "expected"), [(0.8, True, 0), (0.3, True, 0.125), (-0.2, False, 0), (0.3, False, 0.125)]
)
def test_margins(similarity, attract, expected):
    assert contrast(torch.tensor([similarity]), torch.ones(1), attract=attract).item() == pytest.approx(
        expected, abs=1e-6
    )
