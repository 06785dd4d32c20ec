"""What holds for every size, option and damage, on examples that hypothesis draws."""

import io

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from conftest import TINY_BACKBONE, draw
from PIL import Image

from anomalib_cpr.checkpoint_check import CODEBOOK, check_file
from anomalib_cpr.global_retrieval import block_histograms, histogram_distance, representatives, smallest
from anomalib_cpr.image_files import examine
from anomalib_cpr.preparation import describe_globally
from anomalib_cpr.quantisation import quantise
from anomalib_cpr.torch_model import CprModel

hypothesis = pytest.importorskip("hypothesis", reason="properties are tested with hypothesis: pip install hypothesis")
from hypothesis import strategies as st  # noqa: E402

few = hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
more = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


@st.composite
def set_ups(draw_one):
    """A configuration, the size of the images, the numbers of references and of queries, and a seed."""
    blocks = draw_one(st.integers(1, 5))
    configuration = {
        "descriptor_channels": draw_one(st.integers(1, 9)),
        "k": draw_one(st.integers(1, 8)),
        "window_sizes": [draw_one(st.sampled_from([1, 3, 5, 999])), draw_one(st.sampled_from([1, 3]))],
        "codebook_size": draw_one(st.integers(2, 12)),
        "blocks": blocks,
        "bank_dtype": draw_one(st.sampled_from(["float32", "float16", "int8", "int4"])),
        "max_references": draw_one(st.sampled_from([None, 1, 3])),
    }
    size = [8 * draw_one(st.integers(-(-blocks // 2), 12)) for _ in range(2)]
    return configuration, size, draw_one(st.integers(2, 6)), draw_one(st.integers(1, 4)), draw_one(seeds)


def fit(set_up):
    """A model with random weights, the random images that it remembers, and queries."""
    configuration, size, references, batch, seed = set_up
    torch.manual_seed(seed)
    model = CprModel(**TINY_BACKBONE, **configuration).eval()
    with torch.no_grad():
        model.global_retriever.codebook.normal_()
        model.foreground_estimator.projection.weight.normal_(0, 0.2)
        model.foreground_estimator.projection.bias.fill_(0.5)
    images = torch.randn(references, 3, *size)
    describe_globally(model, images.split(2))
    model.remember(images.split(2))
    return model, images, torch.randn(batch, 3, *size)


@few
@hypothesis.given(set_ups())
def test_any_configuration(set_up):
    configuration, *_, seed = set_up
    model, images, queries = fit(set_up)
    result = model(queries)
    # As large as the image, finite, in range.
    assert result.anomaly_map.shape == (len(queries), 1, *queries.shape[-2:])
    assert result.pred_score.shape == (len(queries),)
    assert result.anomaly_map.isfinite().all()
    assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1
    model.follow_edges = model.coherent_matching = model.relative_to_image = False
    smooth = model(queries)
    remembered = model(images)
    model.follow_edges = model.coherent_matching = True
    assert torch.equal(smooth.pred_score, model(queries).pred_score)
    model.relative_to_image = True
    assert (result.pred_score <= smooth.pred_score).all()
    assert (smooth.pred_score <= smooth.anomaly_map.flatten(1).amax(1) + 1e-6).all()
    # Each image by itself, and in any order.
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed))
    permuted = model(queries[order])
    assert torch.allclose(permuted.anomaly_map, result.anomaly_map[order], atol=1e-5)
    assert torch.allclose(permuted.pred_score, result.pred_score[order], atol=1e-5)
    alone = [model(query[None]) for query in queries]
    assert torch.allclose(torch.cat([one.anomaly_map for one in alone]), result.anomaly_map, atol=1e-5)
    assert torch.allclose(torch.cat([one.pred_score for one in alone]), result.pred_score, atol=1e-5)
    # What it remembers and compares with is found, up to the rounding of the bank.
    if configuration["max_references"] is None and configuration["k"] >= len(images):
        tolerance = {"float32": 1e-5, "float16": 2e-3, "int8": 2e-2, "int4": 0.2}[configuration["bank_dtype"]]
        assert remembered.anomaly_map.max() <= tolerance
        assert model(images).pred_score.max() <= tolerance
    # Saved and loaded, it is the same to the last bit.
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = CprModel(**TINY_BACKBONE, **configuration).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(queries).anomaly_map, model(queries).anomaly_map)


@few
@hypothesis.given(set_ups(), st.sampled_from([float("nan"), float("inf"), -float("inf")]), seeds)
def test_pixels_without_a_value(set_up, value, seed):
    model, _, queries = fit(set_up)
    chance = torch.rand(queries.shape, generator=torch.Generator().manual_seed(seed))
    missing = chance < 0.01
    result = model(torch.where(missing, value, queries))
    assert result.anomaly_map.isfinite().all()
    assert (result.anomaly_map[missing.any(1, keepdim=True)] == 1).all()
    assert torch.equal(result.pred_score == 1, missing.flatten(1).any(1))


@more
@hypothesis.given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6), st.integers(1, 9), seeds)
def test_histograms_count_every_cell_once(height, width, blocks, words, seed):
    hypothesis.assume(min(height, width) >= blocks)
    word_map = torch.randint(words, (2, height, width), generator=torch.Generator().manual_seed(seed))
    histograms = block_histograms(word_map, words, blocks)
    cells = -(-height // blocks) * -(-width // blocks)
    for index, one in enumerate(histograms):
        counts = torch.bincount(word_map[index].flatten(), minlength=words)
        assert torch.allclose(one.sum(0) * cells, counts.float(), atol=1e-3)
    distances = histogram_distance(histograms, histograms)
    assert distances.isfinite().all()
    assert (distances > -1e-4).all()
    assert (distances.diagonal().abs() < 1e-4).all()


@more
@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), seeds)
def test_smallest_is_a_stable_sort(gallery, k, values, seed):
    """With few different values there are many ties."""
    k = min(k, gallery)
    distances = torch.randint(values, (3, gallery), generator=torch.Generator().manual_seed(seed)).float()
    found = smallest(distances, k)
    for row, indices in zip(distances, found, strict=True):
        assert set(indices.tolist()) == set(np.argsort(row.numpy(), kind="stable")[:k].tolist())


@more
@hypothesis.given(st.integers(1, 12), st.integers(1, 15), seeds)
def test_representatives_are_different_and_in_order(gallery, count, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, (gallery, 6, 6), generator=generator)
    words[gallery // 2 :] = words[: gallery - gallery // 2].clone()  # twins
    chosen = representatives(block_histograms(words, 3, 2), count).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, gallery)
    assert all(0 <= index < gallery for index in chosen)


@more
@hypothesis.given(st.integers(1, 64), st.floats(1e-6, 1e6), seeds)
def test_8_bits_keep_length_and_direction(channels, scale, seed):
    values = torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(seed)) * scale
    unit = torch.nn.functional.normalize(values, dim=1)
    integers, factors = quantise(unit)
    restored = integers.float() * factors
    assert torch.allclose(restored.norm(dim=1), torch.ones(2, 3, 4), atol=1e-5)
    # The largest component is 127 steps, and each is off by half a step at most.
    assert ((restored * unit).sum(1) > 1 - channels * (0.5 / 127) ** 2).all()


# --- damaged files


def encoded(image_format):
    file = io.BytesIO()
    Image.fromarray(draw(np.random.default_rng(0), 24)[0]).save(file, format=image_format)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@more
@hypothesis.given(st.binary(max_size=300))
def test_any_bytes_are_no_image_and_no_error(folder, content):
    (folder / "a.png").write_bytes(content)
    assert examine(folder / "a.png").problem
    assert examine(folder / "a.png", decode=True).problem


@more
@hypothesis.given(
    st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"]), st.floats(0, 1), st.sampled_from([0, 1, 20])
)
def test_a_file_passes_if_and_only_if_anomalib_reads_it(folder, image_format, place, flipped):
    """Cut off, or with some bytes inverted; the decoder is the judge."""
    whole = encoded(image_format)
    position = int(place * len(whole))
    content = bytearray(whole if flipped else whole[:position])
    for index in range(position, min(position + flipped, len(content))):
        content[index] ^= 0xFF
    path = folder / "a.png"
    path.write_bytes(bytes(content))
    try:
        read_image(path)
        readable = True
    except Exception:
        readable = False
    assert (examine(path, decode=True).problem is None) == readable
    if not flipped:  # what is cut off is found without decoding everything
        assert (examine(path).problem is None) == readable


@few
@hypothesis.given(st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_a_damaged_checkpoint_is_refused_or_holds_the_same(folder, place, difference):
    path = folder / "x.ckpt"
    good = {"state_dict": {"a": torch.arange(300.0), CODEBOOK: torch.ones(3)}, "pytorch-lightning_version": "2.6.0"}
    torch.save(good, path)
    check_file(path)
    content = bytearray(path.read_bytes())
    position = int(place * len(content))
    path.write_bytes(bytes(content[:position]))
    with pytest.raises(ValueError, match=r"not a complete checkpoint|is damaged"):
        check_file(path)
    content[position] ^= difference
    path.write_bytes(bytes(content))
    try:
        check_file(path)
    except ValueError:
        return
    found = torch.load(path, weights_only=True)
    assert found["pytorch-lightning_version"] == "2.6.0"
    assert all(torch.equal(found["state_dict"][name], value) for name, value in good["state_dict"].items())
