# SPDX-License-Identifier: Apache-2.0
"""Drawn parts repeat, their masks are honest, and they are not solved by a mean image."""

import cv2
import numpy as np
import pytest

from anomalib_cpr.drawing import DEFECTS, VISIBLE, draw, least_area

KINDS = [(category, defect) for category, defects in DEFECTS.items() for defect in defects]
SIZE = 96


@pytest.mark.parametrize("category", DEFECTS)
def test_a_part_depends_on_its_arguments_only(category):
    defect = DEFECTS[category][0]
    first = [draw(category, defect, index, size=SIZE) for index in (0, 1)]
    draw(category, "good", 7, size=SIZE)
    again = [draw(category, defect, index, size=SIZE) for index in (1, 0)][::-1]
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("category", DEFECTS)
def test_every_part_is_another_one(category):
    parts = [
        draw(category, size=SIZE),
        draw(category, index=1, size=SIZE),
        draw(category, split="train", size=SIZE),
        draw(category, DEFECTS[category][0], size=SIZE),
        draw(category, seed=1, size=SIZE),
    ]
    images = [part.clean.astype(float) for part in parts]
    # Half of a level is far below the sensor's noise: two photographs of the same part differ by more.
    assert all(np.abs(a - b).mean() > 0.5 for i, a in enumerate(images) for b in images[:i])


@pytest.mark.parametrize("size", [64, 100, 256])
@pytest.mark.parametrize(("category", "defect"), KINDS)
def test_masks_are_where_the_defect_is(category, defect, size):
    image, mask, clean = draw(category, defect, 2, size=size)
    assert (image.shape, image.dtype, clean.shape) == ((size, size, 3), np.uint8, (size, size, 3))
    assert (mask.shape, mask.dtype) == ((size, size), np.uint8)
    assert set(np.unique(mask)) == {0, 255}
    assert least_area(category) <= (mask > 0).mean() < 0.2

    difference = np.abs(image.astype(int) - clean).max(axis=2)
    # The sensor's noise grows with the square root of the brightness, hence a few levels more than VISIBLE.
    assert difference[mask == 0].max() <= 255 * VISIBLE + 4
    assert np.median(difference[mask > 0]) > 255 * VISIBLE * 0.75


@pytest.mark.parametrize("category", DEFECTS)
def test_good_parts_are_clean(category):
    image, mask, clean = draw(category, size=SIZE)
    assert not mask.any()
    assert np.array_equal(image, clean)
    assert 40 < image.mean() < 200
    assert np.mean((image == 0) | (image == 255)) < 0.02, "neither under- nor overexposed"


@pytest.mark.parametrize("category", DEFECTS)
def test_a_part_looks_the_same_at_every_size(category):
    large, small = draw(category, "good", 3, size=256).image, draw(category, "good", 3, size=128).image
    shrunk = cv2.resize(large, (128, 128), interpolation=cv2.INTER_AREA)
    # Light that is reflected by edges depends a little on the size of the pixels.
    assert np.abs(shrunk.astype(int) - small).mean() < 12


@pytest.mark.parametrize("category", DEFECTS)
def test_a_mean_image_does_not_solve_it(category):
    train = [draw(category, index=index, split="train", size=SIZE).image for index in range(40)]
    good = [draw(category, index=index, size=SIZE).image for index in range(12)]
    bad = [draw(category, defect, index, size=SIZE).image for defect in DEFECTS[category] for index in range(6)]
    for blur in (0.3, 1.0):  # pixels; the first changes almost nothing
        mean = np.mean([smooth(image, blur) for image in train], axis=0)
        deviation = np.std([smooth(image, blur) for image in train], axis=0) + 2

        def score(image, blur=blur, mean=mean, deviation=deviation):
            return (np.abs(smooth(image, blur) - mean) / deviation).max()

        # For comparison: a score that knows the defects reaches 1.
        assert auroc([score(image) for image in bad], [score(image) for image in good]) < 0.85


@pytest.mark.parametrize(("category", "count"), [("loose_brackets", 2), ("loose_gears", 3)])
def test_loose_parts_lie_anywhere_and_apart(category, count):
    where = np.zeros((128, 128))
    for index in range(40):
        clean = draw(category, index=index, size=128).clean.astype(float)
        unlike = np.abs(clean - np.median(clean, axis=(0, 1))).max(axis=2) > 40
        _, _, stats, _ = cv2.connectedComponentsWithStats(unlike.astype(np.uint8))
        areas = stats[1:, cv2.CC_STAT_AREA]
        assert np.count_nonzero(areas > 400) == count
        where += unlike
    assert (where > 0).mean() > 0.65, "not in the corners, where they would not fit"
    assert where.max() < 30


def test_a_defect_concerns_one_of_the_loose_parts():
    for index in range(8):
        mask = draw("loose_brackets", "scratch", index, size=128).mask
        rows, columns = np.nonzero(mask)
        assert max(np.ptp(rows), np.ptp(columns)) < 122 * 0.46 / 2


def smooth(image, deviation):
    return cv2.GaussianBlur(image.astype(np.float32), (0, 0), deviation)


def auroc(positive, negative):
    """Share of the pairs that are in the right order."""
    difference = np.subtract.outer(positive, negative)
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "screw"}, "Invalid category='screw'; expected one of bracket, gear, fabric, pills, loose_"),
        ({"category": "gear", "defect": "dent"}, "Invalid defect='dent' of 'gear'; expected one of good, broken_tooth"),
        ({"category": "gear", "index": -1}, "Invalid index=-1"),
        ({"category": "gear", "size": 63}, "Invalid image_size=63; parts are drawn with 64 pixels or more"),
        ({"category": "gear", "seed": -1}, "Invalid seed=-1"),
    ],
)
def test_errors_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
