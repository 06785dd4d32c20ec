import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.quantisation import pack, packed_channels, quantise, restore, unpack


def unit_vectors(channels, *shape):
    generator = torch.Generator().manual_seed(channels)
    return F.normalize(torch.randn(2, channels, *shape, generator=generator), dim=1)


@pytest.mark.parametrize("channels", [1, 16, 384])
def test_eight_bits_keep_length_and_direction(channels):
    descriptors = unit_vectors(channels, 5, 7)
    integers, scales = quantise(descriptors)
    assert integers.dtype == torch.int8
    restored = restore(integers, scales, channels).double()
    assert torch.allclose(restored.norm(dim=1), torch.ones(2, 5, 7, dtype=torch.double), atol=1e-6)
    # Half a step of max / 127 per component, which random errors of all components rarely reach together.
    assert (1 - (restored * descriptors).sum(1)).abs().max() < 1e-4


def plain_four_bits(descriptor):
    """One descriptor, one component at a time: the integers that bend it least, and the bytes that hold them."""
    best, nearest = None, -2
    for step in (1.0, 0.9, 0.8):
        integers = [round(value * 7 / step / max(abs(descriptor))) for value in descriptor]
        integers = [min(7, max(-7, integer)) for integer in integers]
        cosine = sum(i * v for i, v in zip(integers, descriptor, strict=True)) / np.linalg.norm(integers)
        if cosine > nearest + 1e-9:
            best, nearest = integers, cosine
    half = (len(best) + 1) // 2
    upper = best[half:] + [0] * (2 * half - len(best))
    return best, [low % 16 + 16 * (high % 16) for low, high in zip(best[:half], upper, strict=True)]


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 61])
def test_four_bits_against_plain_arithmetic(channels):
    descriptors = unit_vectors(channels, 3, 4)
    packed = pack(descriptors)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, packed_channels(channels), 3, 4)
    for place in np.ndindex(2, 3, 4):
        image, row, column = place
        integers, stored = plain_four_bits(descriptors[image, :, row, column].double().numpy())
        assert packed[image, :, row, column].tolist() == stored
        halves = torch.cat(unpack(packed), 1)[image, :channels, row, column]
        assert (halves / 16).tolist() == integers
        restored = restore(packed, None, channels)[image, :, row, column].numpy()
        assert np.allclose(restored, np.array(integers) / np.linalg.norm(integers), atol=1e-6)


@pytest.mark.parametrize(("channels", "limit"), [(1, 1e-6), (16, 0.02), (64, 0.016), (384, 0.02)])
def test_four_bits_bend_little(channels, limit):
    """Uniform rounding errors of a step of max / 7 would bend by channels / 24 * (max / 7)^2, near 0.006."""
    descriptors = unit_vectors(channels, 40, 40)
    cosine = (restore(pack(descriptors), None, channels) * descriptors).sum(1)
    assert (1 - cosine).max() < limit
    assert (1 - cosine).mean() < 0.007


def test_all_bytes_unpack_to_what_they_hold():
    lower, upper = unpack(torch.arange(256, dtype=torch.uint8))
    assert lower.tolist() == [16 * ((byte % 16 + 8) % 16 - 8) for byte in range(256)]
    assert upper.tolist() == [16 * ((byte // 16 + 8) % 16 - 8) for byte in range(256)]


class Unpack(torch.nn.Module):
    def forward(self, packed):
        return unpack(packed)


def test_a_recorded_graph_unpacks_the_same():
    packed = torch.arange(256, dtype=torch.uint8)
    exported = torch.export.export(Unpack(), (packed,)).module()(packed)
    for recorded, plain in zip(exported, unpack(packed), strict=True):
        assert recorded.dtype == torch.float32
        assert torch.equal(recorded, plain.float())


@pytest.mark.parametrize("channels", [4, 5])
def test_a_zero_descriptor_stays_zero(channels):
    zero = torch.zeros(1, channels, 1, 1)
    assert restore(*quantise(zero), channels).eq(0).all()
    assert restore(pack(zero), None, channels).eq(0).all()
