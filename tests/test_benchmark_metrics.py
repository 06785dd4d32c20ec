"""Quality metrics against slow references, on scores of any range."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import v2

from anomalib_cpr.benchmark_metrics import (
    RARITIES,
    per_region_overlap,
    quality,
    ranking_quality,
    rarity_scale,
    resize_masks,
    to_full_frame,
)


def slow_ranking(scores, labels):
    """AUROC by counting pairs, AP and F1max by going through all thresholds."""
    positives, negatives = scores[labels], scores[~labels]
    wins = (positives[:, None] > negatives[None]).sum() + 0.5 * (positives[:, None] == negatives[None]).sum()
    ap = f1 = last = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        precision, recall = labels[called].mean(), labels[called].sum() / labels.sum()
        ap += (recall - last) * precision
        last = recall
        f1 = max(f1, 2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return {"AUROC": wins / (len(positives) * len(negatives)), "AP": ap, "F1max": f1}


def slow_overlap(maps, masks, limit=0.3):
    """Mean overlap of the regions at every threshold, integrated over the false positive rate by trapezia."""
    regions = []
    for index, mask in enumerate(masks):
        labelled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labelled == number) for number in range(1, count + 1)]
    rates, overlaps = [0.0], [0.0]
    for threshold in sorted(set(maps.flatten().tolist()), reverse=True):
        called = maps >= threshold
        rates.append((called & ~masks).sum() / (~masks).sum())
        overlaps.append(np.mean([called[index][region].mean() for index, region in regions]))
    grid = np.unique([*[rate for rate in rates if rate < limit], limit])
    # Where a threshold moves only the overlap, the upper end of the step counts, as for the lower one of the next.
    area = 0.0
    for left, right, low, high in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        if left >= limit:
            break
        end = min(right, limit)
        top = low + (high - low) * ((end - left) / (right - left) if right > left else 0.0)
        area += (end - left) * (low + top) / 2
    assert len(grid)
    return area / limit


@pytest.mark.parametrize("scale", [1.0, 1e4, -5.0], ids=["plain", "large: a sigmoid would tie them", "below zero"])
@pytest.mark.parametrize("ties", [False, True])
def test_ranking_quality(scale, ties):
    rng = np.random.default_rng(3)
    labels = rng.random(60) < 0.3
    scores = rng.normal(size=60) + labels
    scores = np.round(scores) if ties else scores
    scores = scores * abs(scale) + (scale if scale < 0 else 100.0)
    found = ranking_quality(torch.tensor(scores, dtype=torch.float32), torch.tensor(labels))
    expected = slow_ranking(scores.astype(np.float32), labels)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_class_has_no_ranking(labels):
    assert set(ranking_quality(torch.tensor([0.1, 0.2]), torch.tensor(labels)).values()) == {None}


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 3 scores are not finite"):
        ranking_quality(torch.tensor([0.1, float("nan"), 1.0]), torch.tensor([True, False, True]))


def test_per_region_overlap():
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 12, 12), bool)
    masks[0, 2:4, 2:8], masks[0, 8:11, 8:11], masks[1, 0:2, 0:2] = True, True, True
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32) * 50 - 20
    found = per_region_overlap(torch.tensor(maps), torch.tensor(masks))
    assert found == pytest.approx(slow_overlap(maps, masks), abs=1e-5)
    assert per_region_overlap(torch.tensor(maps), torch.zeros_like(torch.tensor(masks))) is None


def test_quality_without_masks_or_maps_says_none():
    scores, labels = torch.tensor([0.1, 0.9]), torch.tensor([False, True])
    found = quality(scores, labels, None, None)
    assert found["image_AUROC"] == 1.0
    assert [found[name] for name in ("pixel_AUROC", "pixel_AP", "pixel_F1max", "AUPRO")] == [None] * 4


def test_a_centre_crop_is_undone_and_what_was_cut_off_is_normal():
    transform = v2.Compose([v2.Resize((8, 8)), v2.CenterCrop((4, 4)), v2.Normalize([0.5] * 3, [0.5] * 3)])
    maps = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    full = to_full_frame(maps, transform)
    assert full.shape == (1, 1, 8, 8)
    torch.testing.assert_close(full[:, :, 2:6, 2:6], maps)
    assert float(full.sum()) == float(maps.sum()) + (64 - 16) * 1.0
    # A map at half the resolution of the crop keeps its place.
    assert to_full_frame(maps[:, :, :2, :2], transform).shape == (1, 1, 4, 4)
    # Nothing was cropped.
    assert to_full_frame(maps, v2.Resize((8, 8))) is maps
    assert to_full_frame(maps, None) is maps


def test_masks_count_where_more_than_half_is_defective():
    mask = torch.zeros(1, 4, 4)
    mask[0, :2, :2] = 1
    mask[0, 3, 3] = 1
    assert resize_masks(mask, (2, 2)).tolist() == [[[True, False], [False, False]]]


def test_rarity_scale_holds_quantiles_of_good_images_only():
    maps = torch.stack([torch.arange(1000.0).view(25, 40), torch.full((25, 40), 1e6)])
    scale = rarity_scale(maps, torch.tensor([False, True]))
    values = dict(zip(RARITIES, scale, strict=True))
    assert values[0] == 0.0
    assert values[1] == pytest.approx(900, abs=1)
    assert values[2] == pytest.approx(990, abs=1)
    assert values[5] == 999.0
    assert rarity_scale(maps, torch.tensor([True, True])) == []
