import pytest
import torch

from anomalib_cpr.pairs import REMOTE_DISTANCE, draw_without_replacement, sample_patch_pairs


def to_pixels(positions, height, width):
    x = ((positions[..., 0] + 1) / 2 * max(1, width - 1)).round().long()
    y = ((positions[..., 1] + 1) / 2 * max(1, height - 1)).round().long()
    return x, y


@pytest.fixture
def masks():
    masks = torch.zeros(3, 1, 64, 48, dtype=torch.bool)
    masks[0, 0, 10:30, 5:25] = True
    masks[1, 0, 0, :7] = True  # fewer pixels than pairs; the third has no anomaly at all
    return masks


def test_kinds_of_pairs(masks):
    pairs = sample_patch_pairs(masks, None, torch.Generator().manual_seed(0), remote=True, count=50)
    (qx, qy), (rx, ry) = to_pixels(pairs.query, 64, 48), to_pixels(pairs.reference, 64, 48)
    positive, remote, anomalous = slice(0, 50), slice(50, 100), slice(100, 150)
    assert pairs.valid[:, positive].all()
    assert pairs.valid[:, remote].all()
    assert pairs.valid[:, anomalous].sum(1).tolist() == [50, 7, 0]
    for kind in (positive, anomalous):
        assert torch.equal(pairs.query[:, kind], pairs.reference[:, kind])
    for image in range(3):
        assert not masks[image, 0, qy[image, positive], qx[image, positive]].any()
        valid = pairs.valid[image, anomalous]
        assert masks[image, 0, qy[image, anomalous][valid], qx[image, anomalous][valid]].all()
        assert not masks[image, 0, ry[image, remote], rx[image, remote]].any()
        distance = ((qx - rx)[image, remote] ** 2 + (qy - ry)[image, remote] ** 2).float().sqrt()
        assert distance.min() > REMOTE_DISTANCE
        drawn = set(zip(qx[image, positive].tolist(), qy[image, positive].tolist(), strict=True))
        assert len(drawn) == 50, "drawn without replacement"


def test_textures_have_no_remote_negatives(masks):
    pairs = sample_patch_pairs(masks, None, torch.Generator().manual_seed(0), remote=False, count=50)
    assert not pairs.valid[:, 50:100].any()


def test_pixels_are_drawn_in_proportion_to_their_weights():
    weights = torch.tensor([[1.0, 3.0, 0.0, 6.0]]).expand(20_000, -1)
    indices, valid = draw_without_replacement(weights, 2, torch.Generator().manual_seed(0))
    first = torch.bincount(indices[:, 0], minlength=4) / 20_000
    assert torch.allclose(first, torch.tensor([0.1, 0.3, 0.0, 0.6]), atol=0.02)
    # After a 6 was drawn (p .6) a 3 follows with p 3/4, and so on: the law of drawing without replacement.
    second_is_one = 0.3 * (1 / 7) + 0.6 * (1 / 4)
    assert (indices[:, 1] == 0).float().mean().item() == pytest.approx(second_is_one, abs=0.02)
    assert valid.all()


@pytest.mark.parametrize("available", [0, 1, 3])
def test_too_few_candidates_are_padded(available):
    weights = torch.zeros(2, 5)
    weights[:, :available] = 1
    indices, valid = draw_without_replacement(weights, 4, torch.Generator().manual_seed(0))
    assert valid.sum(1).tolist() == [available] * 2
    assert indices.shape == (2, 4)


def test_fewer_pixels_than_pairs():
    pairs = sample_patch_pairs(
        torch.zeros(1, 1, 8, 8, dtype=torch.bool), None, torch.Generator().manual_seed(0), remote=True
    )
    assert pairs.query.shape == (1, 900, 2)
    assert pairs.valid[0, :300].sum() == 64


def test_foreground_weights_keep_positives_on_the_object():
    weights = torch.zeros(1, 1, 40, 40)
    weights[..., 10:30, 10:30] = 1
    pairs = sample_patch_pairs(
        torch.zeros(1, 1, 40, 40, dtype=torch.bool), weights, torch.Generator().manual_seed(0), remote=True, count=100
    )
    x, y = to_pixels(pairs.query[0, :100], 40, 40)
    assert x.min() >= 10
    assert x.max() < 30
    assert y.min() >= 10
    assert y.max() < 30


def test_same_generator_state_gives_the_same_pairs(masks):
    a, b = (sample_patch_pairs(masks, None, torch.Generator().manual_seed(5), remote=True) for _ in range(2))
    assert torch.equal(a.query, b.query)
    assert torch.equal(a.reference, b.reference)
