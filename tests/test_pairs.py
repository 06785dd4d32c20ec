import pytest
import torch

from anomalib_cpr.bilinear import bilinear_cells
from anomalib_cpr.pairs import (
    BOUNDARY_DISTANCE,
    REMOTE_DISTANCE,
    draw_without_replacement,
    near_anomalies,
    sample_patch_pairs,
)


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


def test_near_anomalies_against_a_loop():
    masks = torch.rand((2, 1, 30, 45), generator=torch.Generator().manual_seed(0)) < 0.003
    found = near_anomalies(masks)
    reach = BOUNDARY_DISTANCE
    for image in range(2):
        for row in range(30):
            for column in range(45):
                rows = slice(max(0, row - reach), row + reach + 1)
                columns = slice(max(0, column - reach), column + reach + 1)
                assert found[image, 0, row, column] == masks[image, 0, rows, columns].any()


def near_share(pairs, mask, kind):
    x, y = to_pixels(pairs.query[0, kind], 100, 100)
    return near_anomalies(mask)[0, 0, y, x].mean().item()


def test_boundaries_are_drawn_as_often_as_asked():
    mask = torch.zeros(1, 1, 100, 100, dtype=torch.bool)
    mask[..., 40:60, 40:60] = True
    boundary, elsewhere = 36**2 - 20**2, 100**2 - 36**2
    for weight in (1, 4):
        counts = [
            near_share(
                sample_patch_pairs(
                    mask, None, torch.Generator().manual_seed(seed), remote=True, count=50, boundary_weight=weight
                ),
                mask,
                slice(0, 50),
            )
            for seed in range(200)
        ]
        expected = weight * boundary / (weight * boundary + elsewhere)
        assert sum(counts) / len(counts) == pytest.approx(expected, abs=0.015)


def test_boundaries_change_nothing_but_the_positives(masks):
    plain, other = (
        sample_patch_pairs(masks, None, torch.Generator().manual_seed(0), remote=True, count=50, boundary_weight=weight)
        for weight in (1, 4)
    )
    for kind in ("query", "reference", "valid"):
        anomalous = slice(100, 150)
        assert torch.equal(getattr(plain, kind)[:, anomalous], getattr(other, kind)[:, anomalous])
    positive = slice(0, 50)
    assert torch.equal(other.query[:, positive], other.reference[:, positive])
    assert other.valid[:, positive].all()
    x, y = to_pixels(other.query[:, positive], 64, 48)
    for image in range(3):
        assert not masks[image, 0, y[image], x[image]].any()


def test_cells_are_those_of_queries_and_references(masks):
    pairs = sample_patch_pairs(masks, None, torch.Generator().manual_seed(5), remote=True, count=10)
    for size in ((16, 12), (8, 6), (16, 12)):
        cells, weights = pairs.cells(*size)
        for positions, own in ((pairs.query, slice(0, 3)), (pairs.reference, slice(3, 6))):
            expected_cells, expected_weights = bilinear_cells(positions, *size)
            assert torch.equal(cells[own], expected_cells)
            assert torch.equal(weights[own], expected_weights)
