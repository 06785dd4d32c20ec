"""Colours as a third scale: what they are, and how far they are from those of references."""

import numpy as np
import pytest
import torch

from anomalib_cpr.colours import as_stored, colours_of, distance_to_colours

MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def normalised(images):
    """Images in 0..1, as the pre-processor passes them on."""
    mean, deviation = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (MEAN, DEVIATION))
    return (images - mean) / deviation


@pytest.mark.parametrize("size", [(8, 8), (8, 32), (40, 24)])
def test_colours_are_those_of_neighbourhoods_over_that_of_the_image(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = colours_of(normalised(images))
    height, width = size[0] // 8, size[1] // 8
    assert found.shape == (2, 3, height, width)
    for image, colours in zip(images.double().numpy(), found, strict=True):
        for row, column in np.ndindex(height, width):
            top, left = 8 * max(0, row - 1), 8 * max(0, column - 1)
            around = image[:, top : 8 * (row + 2), left : 8 * (column + 2)]
            expected = around.mean((1, 2)) / image.mean((1, 2)) - 1
            np.testing.assert_allclose(colours[:, row, column], expected, atol=1e-5)


def test_another_lamp_changes_no_colour_and_another_dye_does():
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lamp = torch.tensor([0.9, 0.7, 0.5])[:, None, None]
    before = colours_of(normalised(images))
    torch.testing.assert_close(colours_of(normalised(images * lamp)), before, atol=1e-5, rtol=0)
    images[..., 24:40, 24:40] *= lamp
    change = (colours_of(normalised(images)) - before).abs().amax((0, 1))
    assert change[3:5, 3:5].min() > 5 * change[0].max()


@pytest.mark.parametrize("value", [0.0, 0.001])
def test_a_dark_image_has_hardly_any_colours(value):
    images = torch.full((1, 3, 16, 16), value)
    images[..., :8, :8] += 0.001
    found = colours_of(normalised(images))
    assert found.isfinite().all()
    assert (found.amax() - found.amin()) <= 0.051, "a thousandth, of the two hundredths that are dark"


def test_distances_are_those_to_the_nearest_colour_anywhere():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(count, 3, 5, 7, generator=generator) * 0.3 for count in (2, 6))
    references = torch.tensor([[5, 0, 3], [1, 1, 4]])
    found = distance_to_colours(as_stored(queries), as_stored(gallery), references)
    for image, own in enumerate(references):
        for rank, reference in enumerate(own):
            there = gallery[reference].flatten(1).T
            for row, column in np.ndindex(5, 7):
                expected = (there - queries[image, :, row, column]).norm(dim=1).min()
                assert found[image, rank, row, column].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_colour_that_is_there_has_no_distance():
    colours = as_stored(torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    moved = colours.flip(2, 3)
    assert distance_to_colours(moved, colours, torch.tensor([[0], [1], [2]])).max() < 1e-3
