# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from scipy import ndimage

from anomalib_cpr.components import keep_all_at_once, keep_components, keep_one_by_one, label_components

BOTH_WAYS = pytest.mark.parametrize("keep", [keep_one_by_one, keep_all_at_once])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(mask, foreground, minimum_area):
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    kept = np.zeros_like(mask)
    for label in range(1, count + 1):
        part = labels == label
        if part.sum() >= minimum_area * mask.size and (foreground is None or (part & foreground).any()):
            kept |= part
    return kept


def spiral(side):
    """One line, as long as a part of this size can be."""
    mask = torch.zeros(side, side, dtype=torch.bool)
    row, column, down, right = 0, 0, 0, 1
    mask[0, 0] = True
    for length in [side - 1, *(step for step in range(side - 1, 0, -2) for _ in range(2))]:
        for _ in range(length):
            row, column = row + down, column + right
            mask[row, column] = True
        down, right = right, -down
    return mask


@BOTH_WAYS
@pytest.mark.parametrize("minimum_area", [0.0, 0.002, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("with_foreground", [True, False])
def test_components_equal_those_of_scipy(keep, minimum_area, with_foreground):
    density = torch.tensor([0.0, 0.3, 0.45, 0.6, 1.0])[:, None, None]
    masks = torch.rand((5, 37, 53), generator=seeded()) < density
    foreground = torch.rand((5, 37, 53), generator=seeded(1)) < 0.02 if with_foreground else None
    kept = keep(masks, foreground, minimum_area)
    assert kept.dtype == torch.bool
    for index, mask in enumerate(masks.numpy()):
        own = None if foreground is None else foreground[index].numpy()
        np.testing.assert_array_equal(kept[index].numpy(), reference(mask, own, minimum_area))


@BOTH_WAYS
def test_components_are_kept_whole(keep):
    masks = torch.zeros(1, 10, 10, dtype=torch.bool)
    masks[0, 2, 1:9] = True
    masks[0, 7, 1:9] = True
    foreground = torch.zeros(1, 10, 10, dtype=torch.bool)
    foreground[0, 2, 8] = True
    kept = keep(masks, foreground, 0.0)
    assert kept[0, 2, 1:9].all()
    assert kept.sum() == 8


@BOTH_WAYS
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 7), (2, 7, 1)])
def test_components_of_thin_images(keep, shape):
    masks = torch.ones(shape, dtype=torch.bool)
    assert keep(masks, None, 1.0).all()
    assert not keep(~masks, None, 0.0).any()


def test_a_part_has_its_largest_index_as_its_label():
    masks = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]]) > 0
    labels = label_components(masks).view(masks.shape)
    assert labels.tolist() == [
        [[6, 0, 0, 4], [0, 6, 0, 0], [0, 0, 0, 12]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [12, 12, 12, 12]],
    ]


def test_a_part_that_winds_keeps_together(monkeypatch):
    """In far fewer passes than the part is long (841 pixels)."""
    passes = []
    pool = torch.nn.functional.max_pool2d
    monkeypatch.setattr(
        torch.nn.functional, "max_pool2d", lambda *args, **kwargs: passes.append(1) or pool(*args, **kwargs)
    )
    mask = spiral(41)
    kept = keep_all_at_once(mask[None], None, mask.float().mean().item())
    assert torch.equal(kept[0], mask)
    assert len(passes) < 15


def test_on_a_cpu_opencv_does_it(monkeypatch):
    monkeypatch.setattr("anomalib_cpr.components.label_components", None)
    assert keep_components(torch.ones(1, 4, 4, dtype=torch.bool), None, 0.5).all()


@pytest.mark.gpu
def test_gpu_keeps_the_same():
    masks = torch.rand((8, 320, 320), generator=seeded()) < torch.linspace(0.3, 0.6, 8)[:, None, None]
    foreground = torch.rand((8, 320, 320), generator=seeded(1)) < 0.01
    kept = keep_components(masks.cuda(), foreground.cuda(), 0.001)
    assert torch.equal(kept.cpu(), keep_components(masks, foreground, 0.001))
