import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr import matching
from anomalib_cpr.matching import match, match_cells, match_shifts
from anomalib_cpr.quantisation import pack, quantise, restore


def slow_match(query, gallery, references, window):
    """Every cell, every reference, every shift, one by one."""
    batch, _, height, width = query.shape
    result = torch.empty(batch, references.shape[1], height, width)
    for image in range(batch):
        for row in range(height):
            for column in range(width):
                for rank, reference in enumerate(references[image].tolist()):
                    best = -2.0
                    for down in range(-(window // 2), window // 2 + 1):
                        for right in range(-(window // 2), window // 2 + 1):
                            y, x = row + down, column + right
                            if 0 <= y < height and 0 <= x < width:
                                dot = float(query[image, :, row, column] @ gallery[reference, :, y, x])
                                best = max(best, dot)
                    result[image, rank, row, column] = 1 - best
    return result


@pytest.mark.parametrize("way", [match_cells, match_shifts])
@pytest.mark.parametrize("chunk_bytes", [1, 1_000, 8_000_000])
@pytest.mark.parametrize(
    ("height", "width", "window", "k"),
    [(5, 5, 3, 2), (4, 7, 1, 3), (3, 6, 5, 1), (1, 1, 3, 2), (2, 3, 7, 2), (9, 8, 3, 4), (11, 6, 5, 2)],
)
def test_smallest_distance_over_the_window_for_each_reference(height, width, window, k, chunk_bytes, way, monkeypatch):
    monkeypatch.setattr(matching, "CHUNK_BYTES", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(2, 8, height, width, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(4, 8, height, width, generator=generator), dim=1)
    references = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(2)])
    expected = slow_match(query, gallery, references, window)
    assert torch.allclose(1 - way(query, gallery, references, window), expected, atol=1e-6)
    assert torch.allclose(match(query, gallery, references, window), expected, atol=1e-6)


@pytest.mark.parametrize(("steps", "step_bytes"), [(1, 10**9), (2, 10**9), (3, 10**9), (1, 2 * 4 * 2 * 8 * 30), (1, 1)])
def test_a_few_of_many_references_at_a_time(steps, step_bytes, monkeypatch):
    monkeypatch.setattr(matching, "STEPS", steps)
    monkeypatch.setattr(matching, "STEP_BYTES", step_bytes)
    generator = torch.Generator().manual_seed(3)
    query = F.normalize(torch.randn(2, 8, 5, 6, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(7, 8, 5, 6, generator=generator), dim=1)
    references = torch.stack([torch.randperm(7, generator=generator)[:5] for _ in range(2)])
    expected = slow_match(query, gallery, references, 3)
    assert torch.allclose(1 - match_shifts(query, gallery, references, 3), expected, atol=1e-6)


@pytest.mark.parametrize("way", [match_cells, match_shifts])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("channels", [8, 9])
def test_coarse_galleries(channels, dtype, layout, way):
    """Compared as the numbers that they stand for, wherever they lie."""
    generator = torch.Generator().manual_seed(5)
    query = F.normalize(torch.randn(2, channels, 6, 7, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(4, channels, 6, 7, generator=generator), dim=1)
    references = torch.tensor([[3, 0, 1], [2, 1, 3]])
    stored, scales = {"float16": lambda g: (g.half(), None), "int8": quantise, "int4": lambda g: (pack(g), None)}[
        dtype
    ](gallery)
    numbers = restore(stored, scales, channels)
    result = way(query, stored.contiguous(memory_format=layout), references, 3, scales)
    assert torch.allclose(1 - result, slow_match(query, numbers, references, 3), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize(("scales", "packed"), [(None, False), (torch.rand(3, 1, 6, 6), False), (None, True)])
def test_an_export_follows_its_references(scales, packed, steps, monkeypatch):
    """Exported with one choice of references, run with another."""
    monkeypatch.setattr(matching, "STEPS", steps)
    generator = torch.Generator().manual_seed(6)
    query, gallery = torch.randn(2, 2, 8, 6, 6, generator=generator)
    gallery = torch.cat([gallery, query[:1]])
    gallery = pack(gallery) if packed else gallery

    class Matching(torch.nn.Module):
        def forward(self, query, references):
            return match(query, gallery, references, 3, scales)

    first, second = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 0], [0, 0]])
    exported = torch.export.export(Matching(), (query, first)).module()
    assert torch.allclose(exported(query, second), Matching()(query, second), atol=1e-5)
    assert not torch.allclose(exported(query, first), exported(query, second), atol=1e-2)


def test_an_image_matches_itself_perfectly():
    descriptors = F.normalize(torch.randn(3, 16, 9, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    distance = match(descriptors, descriptors, torch.arange(3)[:, None], 3)
    assert distance.min() >= 0
    assert distance.max() < 1e-6


def test_batch_size_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    query = F.normalize(torch.randn(8, 16, 10, 12, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(5, 16, 10, 12, generator=generator), dim=1)
    references = torch.randint(5, (8, 3), generator=generator)
    whole = match(query, gallery, references, 3)
    single = torch.cat([match(query[i : i + 1], gallery, references[i : i + 1], 3) for i in range(8)])
    assert torch.equal(whole, single)


@pytest.mark.parametrize("window", [3, 11])  # 11: rows of the last thread have nothing five rows below them
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_nothing(threads, window, monkeypatch):
    generator = torch.Generator().manual_seed(7)
    query = F.normalize(torch.randn(2, 16, 7, 12, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(5, 16, 7, 12, generator=generator), dim=1)
    references = torch.randint(5, (2, 3), generator=generator)
    results = []
    for count in (1, threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append([match(query, stored, references, window) for stored in (gallery, pack(gallery))])
    assert all(map(torch.equal, *results))
    assert torch.allclose(results[0][0], slow_match(query, gallery, references, window), atol=1e-6)


def test_no_references():
    with pytest.raises(ValueError, match="k must be at least 1"):
        match(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3), torch.empty(1, 0, dtype=torch.long), 3)


@pytest.mark.parametrize("piece", [1, 5, 1024])
def test_a_window_over_the_whole_map(piece, monkeypatch):
    """Parts that lie anywhere: the same as a window so wide that every cell is in it."""
    monkeypatch.setattr(matching, "PIECE", piece)
    monkeypatch.setattr(matching, "CHUNK_BYTES", piece * 4 * 2 * 4 * 6)
    generator = torch.Generator().manual_seed(6)
    query = F.normalize(torch.randn(2, 8, 4, 6, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(4, 8, 4, 6, generator=generator), dim=1)
    references = torch.tensor([[3, 0, 1], [2, 1, 3]])
    for window in (11, 999):
        result = match(query, gallery, references, window)
        assert torch.allclose(result, slow_match(query, gallery, references, 11), atol=1e-6)
        for stored, scales in (quantise(gallery), (pack(gallery), None)):
            result = match(query, stored, references, window, scales)
            numbers = restore(stored, scales, 8)
            assert torch.allclose(result, slow_match(query, numbers, references, 11), atol=1e-6)
    exported = torch.export.export(_Everywhere(), (query, gallery, references)).module()
    assert torch.allclose(exported(query, gallery, references), slow_match(query, gallery, references, 11), atol=1e-6)


class _Everywhere(torch.nn.Module):
    def forward(self, query, gallery, references):
        return match(query, gallery, references, 999)


def test_the_triton_kernel_is_not_asked_for_a_gallery_elsewhere():
    """A bank that stays in main memory."""
    query = F.normalize(torch.rand(1, 4, 3, 3, device="meta"), dim=1)
    gallery = F.normalize(torch.rand(2, 4, 3, 3, device="meta"), dim=1)
    assert match(query, gallery, torch.zeros(1, 1, dtype=torch.long, device="meta"), 3).shape == (1, 1, 3, 3)
    own = F.normalize(torch.rand(1, 4, 3, 3), dim=1)
    with pytest.raises(RuntimeError, match="meta"):  # of match_shifts, not of Triton
        match(own, gallery, torch.zeros(1, 1, dtype=torch.long), 3, fused=True)
