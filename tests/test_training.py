import pytest
import torch

from anomalib_cpr.feature_extractor import FeatureExtractor
from anomalib_cpr.synthetic_anomalies import SyntheticAnomalyGenerator
from anomalib_cpr.training import (
    TrainingData,
    draw_image_pairs,
    frozen_features,
    step_precision,
    training_autocast,
)
from anomalib_cpr.training_images import TrainingImages

CPU = torch.device("cpu")


def test_features_of_a_step_are_those_of_inference():
    """Only memory layout and batching differ."""
    torch.manual_seed(0)

    class Model:
        feature_extractor = FeatureExtractor("test_resnet", ["layer1", "layer2"])

    images = torch.randn(3, 3, 48, 64)
    fast, plain = frozen_features(Model, images), Model.feature_extractor(images)
    for first, second in zip(fast, plain, strict=True):
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("float32", {"avx512_bf16": True}, "float32"),
        ("bfloat16", {}, "bfloat16"),
        ("auto", {"avx512_bf16": True}, "bfloat16"),
        ("auto", {"amx_bf16": True}, "bfloat16"),
        ("auto", {"avx512_f": True, "avx512_bf16": False}, "float32"),  # bfloat16 would be emulated
        ("auto", {}, "float32"),
    ],
)
def test_precision_is_what_the_processor_computes_with(monkeypatch, precision, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert step_precision(precision, CPU) == expected
    with training_autocast(precision, CPU):
        assert torch.is_autocast_enabled("cpu") == (expected == "bfloat16")


def test_precision_of_the_trainer_stays():
    with torch.autocast("cpu", torch.float16), training_autocast("bfloat16", CPU):
        assert torch.get_autocast_dtype("cpu") == torch.float16


def test_eight_bit_training_shows_levels_of_image_files():
    images = torch.rand(4, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    neighbours = torch.tensor([[1], [0], [3], [2]])
    drawn = {}
    for eight_bit in (True, False):
        data = TrainingData(TrainingImages(images, None), neighbours, "object", eight_bit=eight_bit)
        generator = torch.Generator().manual_seed(0)
        drawn[eight_bit] = draw_image_pairs(data, torch.ones(4, 1, 8, 12), SyntheticAnomalyGenerator(), 4, generator)
    for name in ("queries", "references"):
        levels = 255 * getattr(drawn[True], name)
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        exact = 255 * getattr(drawn[False], name)
        assert not torch.allclose(exact, exact.round(), atol=1e-2)
    assert torch.equal(drawn[True].anomalies, drawn[False].anomalies), "the same is drawn"
