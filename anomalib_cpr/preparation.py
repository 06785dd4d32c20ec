# SPDX-License-Identifier: Apache-2.0
"""What is learned from the training images before the first step: codebook, foreground, histograms."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from threadpoolctl import threadpool_limits
from torch import Tensor

from .feature_extractor import STRIDES
from .foreground import Discriminant, border_and_centre, fit_discriminant
from .k_means import refine
from .torch_model import CprModel

SAMPLES = 50_000
RESTARTS = 10

ClusteringBackend = Literal["sklearn", "faiss"]


def collect_samples(
    model: CprModel, batches: Iterable[Tensor], count: int, seed: int, samples: int = SAMPLES
) -> dict[str, np.ndarray]:
    """Random features F1 of the training images: from everywhere, from the border and from the middle.

    Args:
        model (CprModel): Gives the features.
        batches (Iterable[Tensor]): Normalised images, ``(batch, 3, height, width)`` each.
        count (int): Number of images.
        seed (int): Of the choice.
        samples (int): At most so many features of each.

    Returns:
        dict[str, np.ndarray]: Keys ``anywhere``, ``ring``, ``inner_ring`` and ``centre``, each ``(count, channels)``,
            in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[Tensor]] = {"anywhere": [], "ring": [], "inner_ring": [], "centre": []}
    for images in batches:
        with torch.no_grad():
            features = model.feature_extractor.finest(images).float().permute(0, 2, 3, 1).cpu()
        ring, inner_ring, centre = border_and_centre(*features.shape[1:3])
        masks = {"anywhere": torch.ones_like(ring), "ring": ring, "inner_ring": inner_ring, "centre": centre}
        for name, mask in masks.items():
            cells = mask.flatten().nonzero()[:, 0]
            per_image = min(len(cells), -(-samples // count))
            for image in features.flatten(1, 2):
                chosen[name].append(image[cells[torch.randperm(len(cells), generator=generator)[:per_image]]])
    result = {}
    for name, parts in chosen.items():
        everything = torch.cat(parts)
        result[name] = everything[torch.randperm(len(everything), generator=generator)[:samples]].numpy()
    return result


def cluster_centres(
    features: np.ndarray,
    clusters: int,
    seed: int,
    backend: ClusteringBackend = "sklearn",
    device: torch.device | None = None,
) -> np.ndarray:
    """K-means with 10 restarts, as the authors run it.

    Args:
        features (np.ndarray): Of shape ``(count, channels)``.
        clusters (int): Number of centres.
        seed (int): Of the restarts.
        backend (Literal["sklearn", "faiss"]): Library. They differ in how they start, and so in the centres.
        device (torch.device | None): On a CUDA device, what scikit-learn starts is computed there, with the same
            centres but for rounding. None means the CPU.

    Returns:
        np.ndarray: Centres of shape ``(clusters, channels)``. Where there are fewer distinct features than clusters,
            centres repeat.

    Raises:
        ImportError: If faiss is asked for and not installed.
    """
    threads = torch.get_num_threads()  # asked here, because the limit holds for torch as well
    # One thread: sums of several threads are added in the order in which they finish, so that two runs would differ in
    # the last bits, and with them, in rare cases, everything that is retrieved.
    with threadpool_limits(limits=1):
        if backend == "faiss":
            return _faiss_centres(features, clusters, seed)
        return _sklearn_centres(features, clusters, seed, threads, device)


def _sklearn_centres(
    features: np.ndarray, clusters: int, seed: int, threads: int, device: torch.device | None = None
) -> np.ndarray:
    """What ``KMeans(clusters, n_init=10)`` does, but for its restarts side by side, each in one thread."""
    mean = features.mean(axis=0)
    centred = features - mean
    random = np.random.RandomState(seed % 2**32)
    starts = [kmeans_plusplus(centred, clusters, random_state=random)[0] for _ in range(RESTARTS)]

    if device is not None and device.type == "cuda":
        best = refine(*(torch.from_numpy(array).to(device, torch.float64) for array in (centred, np.stack(starts))))
        if best is not None:
            return (best.cpu().numpy() + mean).astype(np.float32)

    def refine_one(start: np.ndarray) -> KMeans:
        with threadpool_limits(limits=1, user_api="openmp"):  # OpenMP's limit is each thread's own
            return KMeans(clusters, init=start, n_init=1).fit(centred)

    with ThreadPoolExecutor(min(RESTARTS, threads)) as pool:
        least = min(pool.map(refine_one, starts), key=lambda found: found.inertia_)
    return (least.cluster_centers_ + mean).astype(np.float32)


def _faiss_centres(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    try:
        # Here and not above: faiss is an extra, and on macOS its OpenMP library clashes with torch's.
        import faiss  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "clustering_backend='faiss' needs faiss, which is not installed: pip install 'anomalib-cpr[faiss]', or "
            "leave it at 'sklearn'."
        ) from error
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        # By default faiss looks at 256 features per centre; here at all of them, as long as scikit-learn would.
        means = faiss.Kmeans(
            features.shape[1],
            clusters,
            niter=100,
            nredo=RESTARTS,
            seed=seed % 2**31,
            min_points_per_centroid=1,
            max_points_per_centroid=len(features),
        )
        means.train(np.ascontiguousarray(features, dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    return np.array(means.centroids, dtype=np.float32)


def estimate_foreground(
    samples: dict[str, np.ndarray],
    seed: int,
    backend: ClusteringBackend = "sklearn",
    device: torch.device | None = None,
) -> Discriminant | None:
    """Learn to tell foreground from background.

    Args:
        samples (dict[str, np.ndarray]): From :func:`collect_samples`.
        seed (int): Of the clustering.
        backend (Literal["sklearn", "faiss"]): Of the clustering.
        device (torch.device | None): Of the clustering.

    Returns:
        Discriminant | None: None if the border of the images looks like their middle.
    """
    if np.ptp(samples["anywhere"], axis=0).max() == 0:
        return None
    with threadpool_limits(limits=1):
        return fit_discriminant(
            samples["ring"],
            samples["inner_ring"],
            samples["centre"],
            samples["anywhere"],
            cluster_centres(samples["anywhere"], 2, seed, backend, device),
        )


@torch.no_grad()
def describe_globally(
    model: CprModel, batches: Iterable[Tensor], rank: int = 0, ranks: int = 1
) -> list[tuple[int, int, int]]:
    """Write histograms and foreground maps of the training images into the model's bank.

    Args:
        model (CprModel): With codebook and foreground estimator fitted.
        batches (Iterable[Tensor]): Normalised images, ``(batch, 3, height, width)`` each.
        rank (int): Of this process.
        ranks (int): Number of processes. Each describes the batches whose turn it is, and leaves the others open.

    Returns:
        list[tuple[int, int, int]]: For each batch: its first image, the one after its last, and the rank that
            describes it.
    """
    histograms, foregrounds = [], []
    spans: list[tuple[int, int, int]] = []
    for images in batches:
        start = spans[-1][1] if spans else 0
        spans.append((start, start + len(images), len(spans) % ranks))
        if spans[-1][2] == rank:
            features = model.feature_extractor.finest(images).float()
            histograms.append(model.global_retriever(features))
            foregrounds.append(model.foreground_estimator(features))
        else:
            cells = [side // STRIDES[0] for side in images.shape[-2:]]
            histograms.append(images.new_empty(len(images), *model.bank.histograms.shape[1:]))
            foregrounds.append(images.new_empty(len(images), 1, *cells))
    model.bank.histograms = torch.cat(histograms)
    model.bank.foregrounds = torch.cat(foregrounds)
    return spans
