import sys

import numpy as np
import pytest
import torch
from conftest import TINY_BACKBONE
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from anomalib_cpr.foreground import border_and_centre
from anomalib_cpr.preparation import cluster_centres, collect_samples, describe_globally, estimate_foreground
from anomalib_cpr.torch_model import CprModel


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CprModel(**TINY_BACKBONE, descriptor_channels=8).eval()


def disc_images(count=6, size=64):
    """A bright square on a dark ground, with noise."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.1 - 1
    images[:, :, size // 4 : -size // 4, size // 4 : -size // 4] += 3
    return images


def test_samples_come_from_where_they_should(model):
    images = disc_images()
    samples = collect_samples(model, images.split(4), len(images), seed=0)
    features = model.feature_extractor(images)[0]
    ring, inner_ring, centre = border_and_centre(*features.shape[-2:])
    masks = {"anywhere": torch.ones_like(ring), "ring": ring, "inner_ring": inner_ring, "centre": centre}
    for name, mask in masks.items():
        everything = {tuple(row) for row in features.permute(0, 2, 3, 1)[:, mask].flatten(0, 1).tolist()}
        own = {tuple(row) for row in samples[name].tolist()}
        assert own == everything, "small data are taken whole"


def test_samples_are_limited_and_repeat(model):
    images = disc_images()
    first, second = (collect_samples(model, images.split(size), 6, seed=3, samples=50) for size in (4, 4))
    for name in first:
        assert first[name].shape == (50, 32)
        assert np.array_equal(first[name], second[name])
    other = collect_samples(model, images.split(4), 6, seed=4, samples=50)
    assert not np.array_equal(first["anywhere"], other["anywhere"])


@pytest.mark.parametrize("backend", ["sklearn", "faiss"])
def test_cluster_centres_find_the_clusters(backend):
    if backend == "faiss":
        pytest.importorskip("faiss", reason="faiss is an extra: pip install 'anomalib-cpr[faiss]'")
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=300)
    features = (labels[:, None] * 10 + rng.normal(size=(300, 5))).astype(np.float32)
    centres = cluster_centres(features, 3, 0, backend)
    found = np.linalg.norm(features[:, None] - centres, axis=2).argmin(1)
    assert adjusted_rand_score(labels, found) == 1
    assert np.array_equal(centres, cluster_centres(features, 3, 0, backend))


@pytest.mark.parametrize("clusters", [2, 12])
def test_restarts_side_by_side_are_as_good_as_scikit_learn_s_and_repeat(clusters):
    features = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    features[:, 0] += 5 * np.random.default_rng(1).integers(0, clusters, 3000)

    def inertia(centres):
        return np.square(features[:, None] - centres).sum(-1).min(1).sum()

    expected = KMeans(clusters, n_init=10, random_state=5).fit(features).inertia_
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(cluster_centres(features, clusters, 5))
    finally:
        torch.set_num_threads(threads)
    assert inertia(found[0]) == pytest.approx(expected, rel=1e-4)
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_missing_faiss_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"anomalib-cpr\[faiss\]"):
        cluster_centres(np.zeros((5, 2), np.float32), 2, 0, "faiss")


def test_foreground_finds_the_object(model):
    images = disc_images()
    samples = collect_samples(model, images.split(4), len(images), seed=0)
    discriminant = estimate_foreground(samples, seed=0)
    model.foreground_estimator.set_discriminant(discriminant)
    foreground = model.foreground_estimator(model.feature_extractor(images)[0])
    assert foreground[:, 0, 6:10, 6:10].mean() > 0.7
    assert foreground[:, 0, :2].mean() < 0.3
    model.foreground_estimator.disable()


def test_constant_images_have_no_foreground(model):
    samples = collect_samples(model, [torch.zeros(2, 3, 64, 64)], 2, seed=0)
    samples = {name: np.zeros_like(values) for name, values in samples.items()}
    assert estimate_foreground(samples, seed=0) is None


def test_describe_globally_fills_the_bank_in_order(model):
    images = disc_images(5)
    with torch.no_grad():
        model.global_retriever.codebook.copy_(torch.randn(12, 32))
    describe_globally(model, images.split(2))
    features = model.feature_extractor(images)[0]
    assert torch.allclose(model.bank.histograms, model.global_retriever(features), atol=1e-6)
    assert model.bank.foregrounds.shape == (5, 1, 16, 16)
