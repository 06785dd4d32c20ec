# SPDX-License-Identifier: Apache-2.0
import logging
from contextlib import nullcontext

import pytest
import torch

from anomalib_cpr import recorded_backbone
from anomalib_cpr.feature_extractor import FeatureExtractor
from anomalib_cpr.recorded_backbone import record
from anomalib_cpr.training import training_autocast

SHAPE = (4, 3, 64, 96)


def small_backbone():
    torch.manual_seed(0)
    return FeatureExtractor("test_resnet", ["layer1", "layer2"])


def test_on_a_cpu_nothing_is_recorded():
    backbone = small_backbone()
    assert record(backbone, SHAPE, torch.device("cpu"), nullcontext()) is backbone


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Enough of a GPU with 1000 bytes for what surrounds the recording; takes what is reserved before and after."""

    def pretend(recording, *reserved):
        readings = iter(reserved)
        monkeypatch.setattr(recorded_backbone, "available_bytes", lambda _: 1000)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: next(readings))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
        monkeypatch.setattr(recorded_backbone, "RecordedBackbone", recording)

    return pretend


def test_what_cannot_be_recorded_is_computed_as_ever_and_said(pretend_gpu, caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    backbone = small_backbone()
    pretend_gpu(refuse, 0)
    with caplog.at_level(logging.WARNING):
        assert record(backbone, SHAPE, torch.device("cuda"), nullcontext()) is backbone
    assert "cannot be recorded as a CUDA graph (operation not permitted when stream is capturing)" in caplog.text


@pytest.mark.parametrize(("kept", "is_recorded"), [(200, True), (201, False)])
def test_a_recording_leaves_most_of_the_memory(pretend_gpu, kept, is_recorded):
    backbone = small_backbone()
    pretend_gpu(lambda *_: "recorded", 50, 50 + kept)
    found = record(backbone, SHAPE, torch.device("cuda"), nullcontext())
    assert found == ("recorded" if is_recorded else backbone)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recorded_backbone_gives_the_same(precision):
    device = torch.device("cuda")
    backbone = small_backbone().to(device)
    recorded = record(backbone, SHAPE, device, training_autocast(precision, device))
    assert recorded is not backbone
    others = [
        (SHAPE, precision),
        ((2, *SHAPE[1:]), precision),  # another shape
        (SHAPE, "bfloat16" if precision == "float32" else "float32"),  # another precision
        (SHAPE, precision),
    ]
    for shape, other in others:
        images = torch.randn(shape, device=device)
        with training_autocast(other, device):
            expected, found = backbone(images), recorded(images)
        for first, second in zip(found, expected, strict=True):
            assert first.dtype == second.dtype
            assert torch.equal(first, second), (shape, other)
