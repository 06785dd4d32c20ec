# SPDX-License-Identifier: Apache-2.0
"""K-means on a GPU: Lloyd's iterations of all restarts at once."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

# Those of scikit-learn's KMeans.
MOST_ITERATIONS = 300
TOLERANCE = 1e-4


def refine(features: Tensor, starts: Tensor) -> Tensor | None:
    """What scikit-learn's ``KMeans(init=start, n_init=1)`` makes of the best of several starts, but for rounding.

    Args:
        features (Tensor): Of shape ``(count, channels)``. In double precision assignments are all but certain to be
            those of exact arithmetic.
        starts (Tensor): First centres, ``(restarts, clusters, channels)``, of the same type.

    Returns:
        Tensor | None: Centres with the least sum of squared distances, ``(clusters, channels)``; None where a cluster
            has lost all its features, for which scikit-learn knows what to do.
    """
    restarts, clusters, _ = starts.shape
    settled_at = TOLERANCE * features.var(0, unbiased=False).mean()
    centres, labels = starts, torch.full((len(features), restarts), -1, device=features.device)
    moving = torch.ones(restarts, dtype=torch.bool, device=features.device)
    for _ in range(MOST_ITERATIONS):
        nearest = _half_distances(features, centres).argmin(2)
        members = F.one_hot(nearest, clusters).to(features)
        sizes = members.sum(0)
        if not bool(sizes[moving].all()):
            return None
        means = torch.einsum("frc,fd->rcd", members, features) / sizes[..., None].clamp_min(1)
        shift = (means - centres).square().sum((1, 2))
        same = (nearest == labels).all(0)
        centres, labels = torch.where(moving[:, None, None], means, centres), nearest
        moving &= ~same & (shift > settled_at)
        if not bool(moving.any()):
            break
    spread = _half_distances(features, centres).amin(2).sum(0)
    return centres[spread.argmin()]


def _half_distances(features: Tensor, centres: Tensor) -> Tensor:
    """Half the squared distance minus what all centres share, ``(count, restarts, clusters)``."""
    products = features @ centres.flatten(0, 1).T
    return (centres.square().sum(2).flatten() / 2 - products).unflatten(1, centres.shape[:2])
