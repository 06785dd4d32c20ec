"""Matching from coarse to fine: against loops over cells."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr import coarse_to_fine, matching
from anomalib_cpr.coarse_to_fine import cells_around, largest, match_coarse_to_fine, match_scales
from anomalib_cpr.matching import match
from anomalib_cpr.quantisation import pack, quantise, restore

REFERENCES = torch.tensor([[3, 0, 1], [2, 1, 3]])


def make(height, width, count, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2 * height, 2 * width), (height, width)]
    return [F.normalize(torch.randn(count, channels, *size, generator=generator), dim=1) for size in sizes]


def slow(queries, galleries, references):
    """For each cell of stride 8 the best one; for its four children the best of the 4x4 cells around that one's."""
    (fine, coarse), (fine_gallery, coarse_gallery) = queries, galleries
    height, width = coarse.shape[-2:]
    found = [torch.full((*references.shape, *query.shape[-2:]), 9.0) for query in queries]
    for image, chosen in enumerate(references.tolist()):
        for rank, reference in enumerate(chosen):
            for y in range(height):
                for x in range(width):
                    similarity = torch.einsum("c,chw->hw", coarse[image, :, y, x], coarse_gallery[reference])
                    found[1][image, rank, y, x] = 1 - similarity.max()
                    down, right = divmod(int(similarity.argmax()), width)
                    rows = slice(max(0, 2 * down - 1), 2 * down + 3)
                    columns = slice(max(0, 2 * right - 1), 2 * right + 3)
                    window = fine_gallery[reference, :, rows, columns]
                    for v in (2 * y, 2 * y + 1):
                        for u in (2 * x, 2 * x + 1):
                            best = torch.einsum("c,chw->hw", fine[image, :, v, u], window).max()
                            found[0][image, rank, v, u] = 1 - best
    return found


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 2), (1, 3), (1, 1)])
@pytest.mark.parametrize("chunk", [1, 1500, 10_000_000])
def test_as_by_loops(height, width, chunk, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK_BYTES", chunk)
    queries, galleries = make(height, width, 2, seed=1), make(height, width, 4)
    found = match_coarse_to_fine(queries, galleries, REFERENCES, (None, None))
    assert_same(found, slow(queries, galleries, REFERENCES))
    for index in (0, 1):
        alone = match_coarse_to_fine(
            [one[index : index + 1] for one in queries], galleries, REFERENCES[[index]], (None, None)
        )
        assert_same(alone, [one[index : index + 1] for one in found])


def test_banks_of_few_bits():
    queries, galleries = make(3, 4, 2, seed=1), make(3, 4, 4)
    numbers, factors = zip(*(quantise(gallery) for gallery in galleries), strict=True)
    restored = [restore(number, factor, 8) for number, factor in zip(numbers, factors, strict=True)]
    assert_same(match_coarse_to_fine(queries, numbers, REFERENCES, factors), slow(queries, restored, REFERENCES))
    packed = [pack(gallery) for gallery in galleries]
    restored = [restore(gallery, None, 8) for gallery in packed]
    assert_same(match_coarse_to_fine(queries, packed, REFERENCES, (None, None)), slow(queries, restored, REFERENCES))


class _CoarseToFine(torch.nn.Module):
    def forward(self, fine, coarse, fine_gallery, coarse_gallery, references):
        return match_coarse_to_fine((fine, coarse), (fine_gallery, coarse_gallery), references, (None, None))


@pytest.mark.parametrize("piece", [5, 1024])
def test_exported(piece, monkeypatch):
    monkeypatch.setattr(coarse_to_fine, "PIECE", piece)
    queries, galleries = make(3, 4, 2, seed=1), make(3, 4, 4)
    exported = torch.export.export(_CoarseToFine(), (*queries, *galleries, REFERENCES)).module()
    assert_same(exported(*queries, *galleries, REFERENCES), slow(queries, galleries, REFERENCES))


@pytest.mark.parametrize(
    ("windows", "coarse_first"),
    [((999, 999), True), ((999, 7), True), ((999, 1), False), ((3, 999), False), ((3, 1), False), ((13, 999), False)],
)
def test_where_both_windows_cover_the_map(windows, coarse_first):
    queries, galleries = make(3, 4, 2, seed=1), make(3, 4, 4)
    found = match_scales(queries, galleries, REFERENCES, windows, (None, None))
    if coarse_first:
        expected = slow(queries, galleries, REFERENCES)
    else:
        expected = [match(*one, REFERENCES, window) for *one, window in zip(queries, galleries, windows, strict=True)]
    assert_same(found, expected)


def test_what_is_farther_than_over_the_whole_map_and_nearer_than_chance():
    """A part that was moved as a whole is found at both scales."""
    fine, coarse = make(5, 5, 1)
    moved = [fine.roll((4, 2), (2, 3)), coarse.roll((2, 1), (2, 3))]
    reference = torch.zeros(1, 1, dtype=torch.long)
    for distance in match_coarse_to_fine(moved, [fine, coarse], reference, (None, None)):
        assert distance.abs().max() < 1e-6
    other = make(5, 5, 1, seed=2)
    found = match_coarse_to_fine(other, [fine, coarse], reference, (None, None))
    assert (found[0] >= match(other[0], fine, reference, 999) - 1e-6).all()
    torch.testing.assert_close(found[1], match(other[1], coarse, reference, 999))


def test_cells_at_the_edges():
    around = cells_around(2, 3)
    assert around.shape == (6, 16)
    corner = {row * 6 + column for row in range(3) for column in range(3)}
    assert set(around[0].tolist()) == corner
    assert set(around[4].tolist()) == {row * 6 + column for row in (1, 2, 3) for column in (1, 2, 3, 4)}
    assert set(around[5].tolist()) == {row * 6 + column for row in (1, 2, 3) for column in (3, 4, 5)}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 1, 7)])
def test_the_largest_and_its_place(shape):
    values = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)).float()  # with equals
    found, place = largest(values)
    assert torch.equal(found, values.flatten(2).amax(2))
    assert torch.equal(place, values.flatten(2).argmax(2))


def test_no_references():
    queries, galleries = make(2, 2, 1), make(2, 2, 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        match_coarse_to_fine(queries, galleries, torch.empty(1, 0, dtype=torch.long), (None, None))


def test_what_a_gpu_holds_at_a_time():
    """Its step is larger, and is that of a whole batch."""
    coarse = torch.empty(64, 64, 40, 40, device="meta")
    assert coarse_to_fine._cells_at_a_time(coarse, 16) == matching.STEP_BYTES // (4 * 64 * (1600 + 16 * 64))
