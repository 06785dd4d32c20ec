"""Runs the kernel in Triton's interpreter, in a process of its own: the variable counts when Triton is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.matching import match, match_shifts
from anomalib_cpr.quantisation import pack, quantise

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CASES = [  # height, width, channels, window, k, type of the gallery
    (5, 7, 16, 3, 2, "float32"),
    (4, 4, 16, 1, 3, "float16"),
    (3, 6, 24, 5, 2, "int8"),  # channels that are no power of 2
    (1, 2, 8, 3, 1, "int8"),  # a window larger than the map
    (4, 5, 200, 3, 2, "float32"),  # channels in two parts, the second not full
    (3, 6, 24, 5, 2, "int4"),
    (2, 3, 9, 3, 1, "int4"),  # half a byte that stands for no channel
    (2, 2, 300, 3, 2, "int4"),
]


def inputs(height, width, channels, k, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(height)
    query = F.normalize(torch.randn(2, channels, height, width, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(4, channels, height, width, generator=generator), dim=1)
    references = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(2)])
    if dtype == "int8":
        held, scales = quantise(gallery)
    else:
        held, scales = pack(gallery) if dtype == "int4" else gallery.to(getattr(torch, dtype)), None
    held = held.contiguous(memory_format=torch.channels_last)
    return [None if t is None else t.to(device) for t in (query, held, references, scales)]


def compare(device):
    from anomalib_cpr.fused_matching import match_fused

    for height, width, channels, window, k, dtype in CASES:
        query, gallery, references, scales = inputs(height, width, channels, k, dtype, device)
        expected = match_shifts(query, gallery, references, window, scales)
        result = match_fused(query, gallery, references, window, scales)
        assert torch.allclose(result, expected, atol=1e-5), (height, width, channels, window, k, dtype)
        distances = match(query, gallery, references, window, scales, fused=True)
        assert torch.allclose(distances, match(query, gallery, references, window, scales), atol=1e-5)


def test_kernel_equals_the_definition():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted" in done.stderr:
        pytest.skip("the interpreter of this triton (3.6, of torch 2.10) does not work with numpy 2.4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all cases agree" in done.stdout


@pytest.mark.gpu
def test_kernel_equals_the_definition_on_a_gpu():
    compare("cuda")


def test_gallery_in_another_layout_is_refused():
    from anomalib_cpr.fused_matching import match_fused

    query, gallery, references, _ = inputs(4, 4, 8, 2, "float32")
    with pytest.raises(ValueError, match="channels_last"):
        match_fused(query, gallery.contiguous(), references, 3)


if __name__ == "__main__":
    compare("cpu")
    print("all cases agree")
