# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, kmeans_plusplus

from anomalib_cpr.k_means import refine
from anomalib_cpr.preparation import cluster_centres


def scattered(clusters, seed=0):
    random = np.random.default_rng(seed)
    features = random.standard_normal((3000, 16))
    features[:, :2] += 4 * random.standard_normal((clusters, 2))[random.integers(0, clusters, 3000)]
    return features


@pytest.mark.parametrize("clusters", [1, 2, 12])
@pytest.mark.parametrize("seed", range(3))
def test_centres_are_those_of_scikit_learn(clusters, seed):
    features = scattered(clusters, seed)
    random = np.random.RandomState(seed)
    starts = [kmeans_plusplus(features, clusters, random_state=random)[0] for _ in range(4)]
    runs = [KMeans(clusters, init=start, n_init=1).fit(features) for start in starts]
    least = min(run.inertia_ for run in runs)
    # Several starts may come to the same centres in another order, and which sum is least is then rounding.
    best = [run.cluster_centers_ for run in runs if run.inertia_ <= least * (1 + 1e-12)]
    found = refine(torch.from_numpy(features), torch.from_numpy(np.stack(starts))).numpy()
    expected = min(best, key=lambda centres: np.abs(centres - found).max())
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_single_start_stops_where_scikit_learn_stops(monkeypatch):
    """Also where the centres still move, but by less than its tolerance, or after its most iterations."""
    features = np.random.default_rng(0).standard_normal((2000, 4))
    start = kmeans_plusplus(features, 8, random_state=0)[0]
    for most in (1, 5, 300):
        monkeypatch.setattr("anomalib_cpr.k_means.MOST_ITERATIONS", most)
        expected = KMeans(8, init=start, n_init=1, max_iter=most).fit(features).cluster_centers_
        found = refine(torch.from_numpy(features), torch.from_numpy(start)[None])
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_a_cluster_without_features_is_left_to_scikit_learn():
    features = torch.tensor([[0.0], [1.0], [2.0]]).double()
    assert refine(features, torch.tensor([[[0.0], [9.0]]]).double()) is None


@pytest.mark.gpu
@pytest.mark.parametrize("clusters", [2, 12])
def test_gpu_finds_the_same_centres_and_repeats(clusters):
    features = scattered(clusters).astype(np.float32)
    found, again = (cluster_centres(features, clusters, 0, device=torch.device("cuda")) for _ in range(2))
    np.testing.assert_array_equal(found, again)
    np.testing.assert_allclose(found, cluster_centres(features, clusters, 0), atol=1e-3)
