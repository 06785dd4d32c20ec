# SPDX-License-Identifier: Apache-2.0
import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch

from anomalib_cpr import recorded_backbone
from anomalib_cpr.feature_extractor import FeatureExtractor
from anomalib_cpr.recorded_backbone import RecordedBackbone, record
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
    assert (
        "cannot be recorded as a CUDA graph (RuntimeError: operation not permitted when stream is capturing)"
        in caplog.text
    )


@pytest.mark.parametrize(("kept", "is_recorded"), [(200, True), (201, False)])
def test_a_recording_leaves_most_of_the_memory(pretend_gpu, kept, is_recorded):
    backbone = small_backbone()
    pretend_gpu(lambda *_: "recorded", 50, 50 + kept)
    found = record(backbone, SHAPE, torch.device("cuda"), nullcontext())
    assert found == ("recorded" if is_recorded else backbone)


def test_a_recording_warms_up_and_is_replayed(monkeypatch):
    """With stand-ins for streams and graphs: the order of calls, and that nothing but the replay computes."""
    calls = []

    class Stream:
        def __init__(self, *_):
            self.wait_stream = lambda _: calls.append("wait")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def graph(recorded, capture_error_mode):
        assert isinstance(recorded, Graph)
        assert capture_error_mode == "thread_local"
        calls.append("begin")
        yield
        calls.append("end")

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    small = small_backbone()
    backbone = RecordedBackbone(
        lambda images: calls.append("compute") or small(images), torch.randn(SHAPE), nullcontext()
    )
    assert calls == ["wait", *3 * ["compute"], "wait", "begin", "compute", "end"]
    calls.clear()
    caches = torch.is_autocast_cache_enabled()
    backbone(torch.randn(SHAPE))
    assert calls == ["replay"]
    assert torch.is_autocast_cache_enabled() == caches
    calls.clear()
    images = torch.randn(2, *SHAPE[1:])
    for found, expected in zip(backbone(images), small(images), strict=True):
        assert torch.equal(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(SHAPE))
    assert calls == ["compute", "compute"], "another shape, another precision"


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
