import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.relative import lower_the_rest
from anomalib_cpr.scoring import Scorer
from anomalib_cpr.unaligned import average_neighbours, distance_to_several, fuse_plainer, to_several_references


def slow_unaligned(distances, size, relative):
    """In numpy: distances (k, height_i, width_i) of two scales, and of colours, of one image."""
    scales = []
    for level, scale in enumerate(distances):
        whole = scale.mean((1, 2)).argsort()[: 10 if level else None]
        mean = np.sort(scale[whole], axis=0)[:5].mean(0)
        halved = mean / 2
        factor = 1 / np.sqrt(1 + halved.mean() / 0.01) if relative and level < 2 else 1
        cells = torch.from_numpy(halved * factor)[None, None]
        scales.append(F.interpolate(cells, distances[0].shape[-2:], mode="bilinear").numpy())
    fused = np.minimum(sum(scale**4 for scale in scales) / 2, 1) ** 0.25
    return F.interpolate(torch.from_numpy(fused), size, mode="bilinear")


@pytest.mark.parametrize("size", [(5, 7), (1, 4), (1, 1)])
def test_neighbours_are_averaged(size):
    given = F.normalize(torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(1)), dim=1)
    expected = np.zeros(given.shape)
    for image, descriptors in enumerate(given.double().numpy()):
        for row, column in np.ndindex(size):
            around = descriptors[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            total = around.sum((1, 2))
            expected[image, :, row, column] = total / np.linalg.norm(total)
    np.testing.assert_allclose(average_neighbours(given).numpy(), expected, atol=1e-6)


def test_neighbours_that_cancel_out_are_no_direction():
    given = torch.zeros(1, 2, 1, 2)
    given[0, 0] = torch.tensor([1.0, -1.0])
    assert torch.equal(average_neighbours(given), torch.zeros(1, 2, 1, 2))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("k", [1, 4, 5, 10, 11, 40])
@pytest.mark.parametrize("layout", ["references first", "references last"])
@pytest.mark.parametrize("coloured", [0, 1.2, 4])
def test_map_and_score(k, relative, layout, coloured):
    generator = torch.Generator().manual_seed(0)
    height, width = size = (64, 80)
    distances = [0.6 * torch.rand(2, k, height // stride, width // stride, generator=generator) for stride in (4, 8)]
    if coloured:
        distances.append((coloured * torch.rand(2, min(k, 10), 8, 10, generator=generator)).clamp_max(2))
    foregrounds = torch.rand(2, 3, height // 4, width // 4, generator=generator)
    given = distances
    if layout == "references last":  # as they lie in memory after matching on a CPU
        given = [one.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for one in distances]
    scorer = Scorer()
    anomaly_map, score = scorer(given, foregrounds, size, relative=relative, unaligned=True)
    images = [[scale[image].double().numpy() for scale in distances] for image in range(2)]
    fused = torch.cat([slow_unaligned(image, size, relative) for image in images]).float()
    largest = F.interpolate(foregrounds, size, mode="bilinear").amax(1, keepdim=True)
    expected = scorer.blur(fused * largest)
    hottest = expected.flatten(1).sort(descending=True).values[:, : round(512 / 320**2 * height * width)]
    torch.testing.assert_close(score, hottest.mean(1), atol=1e-5, rtol=0)
    if relative:
        expected = lower_the_rest(expected)
    torch.testing.assert_close(anomaly_map, expected, atol=1e-5, rtol=0)


def test_one_near_reference_among_many_does_not_clear_a_patch():
    distances = torch.full((1, 20, 4, 4), 0.4)
    distances[:, 7, 2, 2] = 0.0
    assert distance_to_several(distances)[0, 0, 2, 2] == pytest.approx(0.32)
    distances[:, 3:8, 2, 2] = 0.0
    assert distance_to_several(distances)[0, 0, 2, 2] == 0


def test_a_patch_that_only_ill_fitting_references_have_is_cleared_at_the_fine_scale_alone():
    scales = [torch.full((2, 20, side, side), 0.2) for side in (8, 4)]
    for scale in scales:
        scale[:, 10:] = 0.6  # another lamp, under which
        scale[:, 10:, 2, 2] = 0.0  # this looks right
    scales[1][1, 10:] = 0.1  # of the second image all of them fit
    scales[1][1, 10:, 2, 2] = 0.0
    fine, coarse = to_several_references(scales)
    assert fine[:, 0, 2, 2].tolist() == [0, 0]
    assert coarse[:, 0, 2, 2].tolist() == pytest.approx([0.2, 0])
    assert (coarse[0] == 0.2).all()
    assert coarse[1, 0, 0, 0] == pytest.approx(0.1)


@pytest.mark.parametrize("seen_by", [0, 1])
def test_a_defect_that_one_scale_sees_is_more_than_the_mean(seen_by):
    scales = [torch.full((1, 1, 8, 8), 0.1), torch.full((1, 1, 4, 4), 0.1)]
    scales[seen_by] = torch.full_like(scales[seen_by], 0.5)
    fused = fuse_plainer(scales, (32, 32))
    expected = ((0.25**4 + 0.05**4) / 2) ** 0.25
    assert 0.2 < expected < 0.25, "the mean is 0.15"
    torch.testing.assert_close(fused, torch.full_like(fused, expected))


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1e-4, 0.5e-4), (2.0, 1.0)])
def test_equal_scales_keep_their_value(value, expected):
    scales = [torch.full((1, 1, 8, 8), value), torch.full((1, 1, 4, 4), value)]
    torch.testing.assert_close(fuse_plainer(scales, (32, 32)), torch.full((1, 1, 32, 32), expected), atol=0, rtol=1e-5)


def test_the_order_of_references_and_the_batch_change_nothing():
    generator = torch.Generator().manual_seed(2)
    distances = [torch.rand(4, 29, side, side, generator=generator) for side in (24, 12)]
    whole = to_several_references(distances)
    for level, flipped in enumerate(to_several_references([one.flip(1) for one in distances])):
        torch.testing.assert_close(flipped, whole[level])
    for image in range(4):
        for level, one in enumerate(to_several_references([scale[image : image + 1] for scale in distances])):
            assert torch.equal(one, whole[level][image : image + 1])
