# SPDX-License-Identifier: Apache-2.0
"""Loss of the metric heads: normal patches of one place attract, all others repel.

Source: CPR (arXiv 2308.06748), section III-C; the weight stands inside the cube as in the authors' code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .bilinear import read_cells
from .pairs import PatchPairs

POSITIVE_MARGIN = 0.8
NEGATIVE_MARGIN = 0.2
EXPONENT = 3


def contrast(similarity: Tensor, weights: Tensor, *, attract: bool) -> Tensor:
    """Weighted hinge on cosine similarity, averaged over the pairs that have a weight.

    Args:
        similarity (Tensor): Cosine similarities, any shape.
        weights (Tensor): Same shape; 0 marks padding.
        attract (bool): Pull together up to 0.8, or push apart down to -0.2.

    Returns:
        Tensor: Scalar; 0 where no pair has a weight.
    """
    hinge = F.relu(POSITIVE_MARGIN - similarity) if attract else F.relu(similarity + NEGATIVE_MARGIN)
    return (weights * hinge).pow(EXPONENT).sum() / (weights > 0).sum().clamp_min(1)


def remote_weights(query_features: Tensor, reference_features: Tensor, pairs: PatchPairs) -> Tensor:
    """Weights of the remote negatives: pairs that already look alike count less.

    Args:
        query_features (Tensor): Frozen features of shape ``(batch, channels, height, width)``.
        reference_features (Tensor): Same shape.
        pairs (PatchPairs): Positions.

    Returns:
        Tensor: Of shape ``(batch, count)``: squared distances of the features, scaled to a mean of 1 per image.
    """
    remote = slice(pairs.count, 2 * pairs.count)
    with torch.no_grad():
        cells, weights = (part[:, remote] for part in pairs.cells(*query_features.shape[-2:]))
        batch = len(query_features)
        query = read_cells(query_features, cells[:batch], weights[:batch])
        reference = read_cells(reference_features, cells[batch:], weights[batch:])
        valid = pairs.valid[:, remote].float()
        distance = (query - reference).square().sum(1) * valid
        return distance / (distance.sum(1, keepdim=True) + 1e-7) * valid.sum(1, keepdim=True)


def metric_loss(query: Tensor, reference: Tensor, pairs: PatchPairs, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of one scale.

    Args:
        query (Tensor): Descriptors at the query positions, ``(batch, channels, 3 * count)``.
        reference (Tensor): Descriptors at the reference positions, same shape.
        pairs (PatchPairs): Which of them are real.
        weights (Tensor): Weights of the remote negatives, ``(batch, count)``.

    Returns:
        tuple[Tensor, Tensor]: Loss of the positives and of the negatives.
    """
    similarity = F.cosine_similarity(query.float(), reference.float(), dim=1, eps=1e-8)
    positive, negative = similarity.split([pairs.count, 2 * pairs.count], dim=1)
    valid = pairs.valid.float()
    negative_weights = torch.cat([weights, valid[:, 2 * pairs.count :]], dim=1)
    return (
        contrast(positive, valid[:, : pairs.count], attract=True),
        contrast(negative, negative_weights, attract=False),
    )
