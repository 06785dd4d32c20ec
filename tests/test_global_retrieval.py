import math

import pytest
import torch

from anomalib_cpr import global_retrieval
from anomalib_cpr.global_retrieval import (
    GlobalRetriever,
    assign_words,
    block_histograms,
    histogram_distance,
    nearest_of_many,
    representatives,
    roots_of,
)


def test_each_cell_takes_its_nearest_word():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 4, 6, generator=generator)
    codebook = torch.randn(7, 5, generator=generator)
    words = assign_words(features, codebook)
    for image in range(2):
        for row in range(4):
            for column in range(6):
                distances = [float(((features[image, :, row, column] - word) ** 2).sum()) for word in codebook]
                assert int(words[image, row, column]) == distances.index(min(distances))


def test_equal_words_resolve_to_the_first():
    assert assign_words(torch.ones(1, 3, 2, 2), torch.ones(4, 3)).eq(0).all()


def slow_histograms(words, word_count, blocks):
    """Count cell by cell; padding stands before the first cell and belongs to no word."""
    height, width = words.shape[-2:]
    tall, wide = math.ceil(height / blocks), math.ceil(width / blocks)
    pad_rows, pad_columns = tall * blocks - height, wide * blocks - width
    result = torch.zeros(len(words), blocks * blocks, word_count)
    for image in range(len(words)):
        for row in range(height):
            for column in range(width):
                block = (row + pad_rows) // tall * blocks + (column + pad_columns) // wide
                result[image, block, words[image, row, column]] += 1 / (tall * wide)
    return result


@pytest.mark.parametrize(
    ("height", "width", "blocks"), [(10, 10, 5), (8, 12, 5), (5, 5, 5), (7, 9, 2), (6, 4, 1), (11, 5, 3)]
)
def test_block_histograms(height, width, blocks):
    words = torch.randint(4, (2, height, width), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(block_histograms(words, 4, blocks), slow_histograms(words, 4, blocks), atol=1e-6)


def test_image_smaller_than_the_grid():
    with pytest.raises(ValueError, match=r"4x9 cells.*5x5 blocks.*at least 20 pixels"):
        block_histograms(torch.zeros(1, 4, 9, dtype=torch.long), 3, 5)


def slow_distance(query, reference, keep):
    divergences = []
    for q, r in zip(query.tolist(), reference.tolist(), strict=True):
        divergences.append(sum((a + 1e-8) * math.log((a + 1e-8) / (b + 1e-8)) for a, b in zip(q, r, strict=True)))
    return sum(sorted(divergences)[: max(1, int(len(divergences) * keep))])


@pytest.mark.parametrize("blocks", [1, 4, 25])
def test_distance_leaves_out_the_worst_blocks(blocks):
    generator = torch.Generator().manual_seed(2)
    query = torch.rand(3, blocks, 6, generator=generator)
    gallery = torch.rand(4, blocks, 6, generator=generator)
    query, gallery = query / query.sum(-1, keepdim=True), gallery / gallery.sum(-1, keepdim=True)
    gallery[0, 0, 0] = 0  # a word that the reference does not have at all
    distances = histogram_distance(query, gallery)
    for i in range(3):
        for j in range(4):
            assert float(distances[i, j]) == pytest.approx(slow_distance(query[i], gallery[j], 0.8), rel=1e-4, abs=1e-5)


def test_nearest_orders_excludes_self_and_stops_at_the_gallery():
    histograms = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(3))
    histograms = histograms / histograms.sum(-1, keepdim=True)
    everyone = GlobalRetriever.nearest(histograms, histograms, 100)
    assert everyone.shape == (6, 6)
    assert everyone[:, 0].tolist() == list(range(6))
    others = GlobalRetriever.nearest(histograms, histograms, 100, exclude_self=True)
    assert others.shape == (6, 5)
    assert all(image not in row for image, row in enumerate(others.tolist()))
    assert others.tolist() == everyone[:, 1:].tolist()


def slow_representatives(gallery, count):
    """Farthest first, from the image nearest to the mean."""

    def distance(query, reference):
        return slow_distance(query, reference, 0.8)

    mean = gallery.mean(0)
    chosen = [min(range(len(gallery)), key=lambda i: distance(gallery[i], mean))]
    while len(chosen) < count:
        left = [i for i in range(len(gallery)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance(gallery[i], gallery[j]) for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12, 20])
def test_representatives(count):
    gallery = torch.rand(12, 4, 5, generator=torch.Generator().manual_seed(4))
    gallery = gallery / gallery.sum(-1, keepdim=True)
    assert representatives(gallery, count).tolist() == slow_representatives(gallery, min(count, 12))


def test_representatives_of_equal_images_differ():
    assert representatives(torch.full((6, 4, 5), 0.2), 4).unique().numel() == 4


def test_representatives_cover_every_group():
    """Three kinds of images, one of them rare: each is represented."""
    kinds = torch.eye(3)[:, None].expand(3, 4, 3) * 0.9 + 0.1 / 3
    gallery = kinds[[0] * 10 + [1] * 10 + [2]]
    assert {0 if i < 10 else 1 if i < 20 else 2 for i in representatives(gallery, 3).tolist()} == {0, 1, 2}


def similar_histograms(count, defects, generator):
    """Mixtures of a few prototypes, counted in blocks of 256 cells; in some blocks a defect adds a word of its own."""
    prototypes = torch.rand(12, 25, 12, generator=torch.Generator().manual_seed(9)) ** 4
    prototypes = prototypes / prototypes.sum(-1, keepdim=True)
    first, second = torch.randint(12, (2, count), generator=generator)
    share = torch.rand(count, 1, 1, generator=generator)
    cells = torch.poisson(256 * (share * prototypes[first] + (1 - share) * prototypes[second]), generator=generator)
    histograms = cells / cells.sum(-1, keepdim=True).clamp_min(1)
    for image in range(count if defects else 0):
        blocks = torch.randperm(25, generator=generator)[:defects]
        words = torch.eye(12)[torch.randint(12, (defects,), generator=generator)]
        histograms[image, blocks] = 0.5 * histograms[image, blocks] + 0.5 * words
    return histograms


@pytest.mark.parametrize("defects", [0, 3, 6])
def test_shortlist_holds_the_true_nearest(defects):
    generator = torch.Generator().manual_seed(5)
    gallery, queries = similar_histograms(5000, 0, generator), similar_histograms(50, defects, generator)
    expected = GlobalRetriever.nearest(queries, gallery, 10)
    found = GlobalRetriever.nearest(queries, gallery, 10, roots=roots_of(gallery))
    recall = (expected[:, :, None] == found[:, None]).any(-1).float().mean()
    assert recall >= 0.999
    # The same order too, but for distances that differ by rounding.
    distances = histogram_distance(queries, gallery)
    assert torch.allclose(distances.gather(1, found), distances.gather(1, expected), rtol=1e-4, atol=1e-5)


def test_a_short_shortlist_is_one():
    """It is really used: the nearest of the shortlist, not of the gallery."""
    generator = torch.Generator().manual_seed(6)
    gallery, queries = similar_histograms(500, 0, generator), similar_histograms(20, 6, generator)
    found = nearest_of_many(queries, gallery, roots_of(gallery), 3, shortlist=3)
    overlap = roots_of(queries) @ roots_of(gallery).T
    assert torch.equal(found.sort(1).values, overlap.topk(3, dim=1).indices.sort(1).values)


def test_no_image_finds_itself_block_by_block(monkeypatch):
    histograms = similar_histograms(23, 0, torch.Generator().manual_seed(7))
    expected = GlobalRetriever.nearest(histograms, histograms, 4, exclude_self=True)
    monkeypatch.setattr(global_retrieval, "_BLOCK_BYTES", 4 * 23 * 25 * 5)
    assert torch.equal(GlobalRetriever.nearest(histograms, histograms, 4, exclude_self=True), expected)
    distances = histogram_distance(histograms, histograms)
    for image, row in enumerate(expected.tolist()):
        others = [i for i in distances[image].argsort().tolist() if i != image]
        assert torch.allclose(distances[image, row], distances[image, others[:4]])
        assert image not in row


def test_no_image_finds_a_copy_of_itself(monkeypatch):
    histograms = similar_histograms(24, 0, torch.Generator().manual_seed(9))
    distances = histogram_distance(histograms, histograms)
    for block_bytes in (10**9, 4 * 24 * 25 * 5):
        monkeypatch.setattr(global_retrieval, "_BLOCK_BYTES", block_bytes)
        found = GlobalRetriever.nearest(histograms, histograms, 4, exclude_self=True, copies=3)
        for image, row in enumerate(found.tolist()):
            others = [i for i in distances[image].argsort().tolist() if i // 3 != image // 3]
            torch.testing.assert_close(distances[image, row], distances[image, others[:4]])
            assert all(other // 3 != image // 3 for other in row)
    assert GlobalRetriever.nearest(histograms, histograms, 99, exclude_self=True, copies=3).shape == (24, 21)
