# SPDX-License-Identifier: Apache-2.0
"""Local retrieval: the distance of every query patch to its best match at nearly the same place of the references."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def match(query: Tensor, gallery: Tensor, references: Tensor, window: int, scales: Tensor | None = None) -> Tensor:
    """Smallest cosine distance over references and window.

    A running maximum over references and shifts: at no time is there a temporary larger than one reference per query.
    Positions outside the image never match.

    Args:
        query (Tensor): Unit descriptors of shape ``(batch, channels, height, width)``.
        gallery (Tensor): Unit descriptors of shape ``(gallery, channels, height, width)``, in any type, on any device:
            only those of the references are moved and converted.
        references (Tensor): Indices into the gallery, of shape ``(batch, k)``.
        window (int): Side of the window in cells, odd.
        scales (Tensor | None): Factors of an int8 gallery, of shape ``(gallery, 1, height, width)``.

    Returns:
        Tensor: Distances in 0..2, of shape ``(batch, 1, height, width)``.

    Note:
        CPR (arXiv 2308.06748), section III-C: 3x3 at stride 4, 1x1 at stride 8.
    """
    height, width = query.shape[-2:]
    shifts = [(down, right) for down in _shifts(window, height) for right in _shifts(window, width)]
    best: Tensor | None = None
    references = references.to(gallery.device)
    for k in range(references.shape[1]):
        # In this order: gathered first, then moved and converted, so that a large bank is never touched as a whole.
        reference = gallery[references[:, k]].to(query.device).float()
        if scales is not None:
            reference = reference * scales[references[:, k]].to(query.device)
        for down, right in shifts:
            similarity = _shifted_similarity(query, reference, down, right, height, width)
            best = similarity if best is None else torch.maximum(best, similarity)
    if best is None:
        raise ValueError("No references to match with: k must be at least 1.")
    # Rounding may push a perfect match a little above 1.
    return (1 - best[:, None]).clamp(0, 2)


def _shifts(window: int, side: int) -> range:
    """Shifts of a window, as far as they leave something of the map."""
    radius = min(window // 2, side - 1)
    return range(-radius, radius + 1)


def _shifted_similarity(query: Tensor, reference: Tensor, down: int, right: int, height: int, width: int) -> Tensor:
    """Cosine of each query cell with the reference cell ``down`` rows below and ``right`` columns beside it."""
    top, bottom, left, end = max(0, -down), height - max(0, down), max(0, -right), width - max(0, right)
    own = query[:, :, top:bottom, left:end]
    other = reference[:, :, top + down : bottom + down, left + right : end + right]
    similarity = (own * other).sum(1)
    if down == 0 and right == 0:
        return similarity
    return F.pad(similarity, (left, width - end, top, height - bottom), value=-2.0)
