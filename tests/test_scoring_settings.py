# SPDX-License-Identifier: Apache-2.0
import pytest

from anomalib_cpr.scoring import PAPER_SIGMA
from anomalib_cpr.scoring_settings import PAPER_SETTINGS, apply_settings, settings_of
from anomalib_cpr.torch_model import CprModel

OTHERS = {
    "k": 37,
    "window_sizes": [5, 999],
    "blur_sigma": 3.0,
    "follow_edges": True,
    "coherent_matching": False,
    "unaligned_matching": True,
    "relative_to_image": True,
}


@pytest.fixture
def model():
    return CprModel("resnet18", ("layer1", "layer2"), pre_trained=False, descriptor_channels=4)


def test_what_is_read_can_be_applied(model):
    apply_settings(model, {**OTHERS, "seed": 3})
    assert settings_of(model) == OTHERS
    assert isinstance(model.window_sizes, tuple)
    assert len(model.scorer.kernel) == 25, "the kernel is that of the blur"


def test_a_checkpoint_that_says_nothing_scores_as_the_paper(model):
    apply_settings(model, {})
    assert settings_of(model) == PAPER_SETTINGS
    assert model.scorer.sigma == PAPER_SIGMA


@pytest.mark.parametrize("name", OTHERS)
def test_what_was_given_stays(model, name):
    model.coherent_matching = False
    before = settings_of(model)
    apply_settings(model, OTHERS, given={name})
    assert settings_of(model) == {**OTHERS, name: before[name]}


@pytest.mark.parametrize("given", ["coherent_matching", "unaligned_matching"])
@pytest.mark.parametrize("read", ["coherent_matching", "unaligned_matching"])
def test_what_was_given_excludes_what_is_read(model, given, read):
    model.coherent_matching, model.unaligned_matching = given == "coherent_matching", given == "unaligned_matching"
    apply_settings(model, {read: True}, given={given})
    assert getattr(model, given)
    assert model.coherent_matching != model.unaligned_matching
