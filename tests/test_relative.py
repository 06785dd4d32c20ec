# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from anomalib_cpr.relative import lower_the_rest, share_that_counts
from anomalib_cpr.scoring import Scorer


@pytest.mark.parametrize(("mean", "share"), [(0.0, 1.0), (0.03, 0.5), (0.09, 0.1**0.5), (0.99, 0.1)])
def test_the_farther_the_image_the_less_its_distances_count(mean, share):
    distances = mean * 2 * torch.eye(2).expand(3, 1, 2, 2)
    assert share_that_counts(distances).shape == (3, 1, 1, 1)
    torch.testing.assert_close(share_that_counts(distances), torch.full((3, 1, 1, 1), share))


def test_what_is_not_the_plainest_is_lowered_and_the_plainest_is_not():
    maps = torch.tensor([[[0.8, 0.05], [0.0, 0.4]], [[0.05, 0.05], [0.05, 0.05]], [[0.0, 0.0], [0.0, 0.0]]])[:, None]
    result = lower_the_rest(maps)
    torch.testing.assert_close(result[0, 0], torch.tensor([[0.8, 0.025], [0.0, 0.4 * 0.5**0.25]]))
    assert torch.equal(result[1:], maps[1:]), "an even map, and one of zeros"


def distances(seed=0, raised=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [raised + 0.2 * torch.rand(2, 3, side, side, generator=generator) for side in (20, 10)]


def test_within_an_image_no_order_changes():
    foregrounds = torch.ones(2, 1, 20, 20)
    absolute, scores = Scorer()(distances(), foregrounds, (80, 80))
    relative, less = Scorer()(distances(), foregrounds, (80, 80), relative=True)
    in_order = relative.flatten(1).gather(1, absolute.flatten(1).argsort())
    assert (in_order.diff() > -1e-7).all()
    assert (less < scores).all()


def test_an_image_that_is_far_as_a_whole_is_less_anomalous_than_a_defect_of_that_distance():
    foregrounds = torch.ones(2, 1, 20, 20)
    defect = distances()
    for scale in defect:
        scale[..., :6, :6] += 0.3
    scores = [Scorer()(each, foregrounds, (80, 80), relative=True)[1] for each in (distances(), distances(raised=0.3))]
    found = Scorer()(defect, foregrounds, (80, 80), relative=True)[1]
    alike = Scorer()(defect, foregrounds, (80, 80))[1] - Scorer()(distances(raised=0.3), foregrounds, (80, 80))[1]
    assert (alike < 0.01).all(), "absolute distances do not tell them apart"
    assert (found > 1.3 * scores[1]).all()
    assert (scores[1] > scores[0]).all(), "but it is farther than a good one"


def test_a_background_counts_as_well():
    """It says what the lamp does, and a defect does not reach it."""
    near, far = distances(), distances()
    for scale in far:
        scale[..., scale.shape[-1] // 2 :] += 0.5
    foregrounds = torch.zeros(2, 1, 20, 20)
    foregrounds[..., :8] = 1
    scores = [Scorer()(each, foregrounds, (80, 80), relative=True)[1] for each in (near, far)]
    assert (scores[1] < scores[0]).all()
