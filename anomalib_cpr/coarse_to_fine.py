# SPDX-License-Identifier: Apache-2.0
"""Matching of parts that lie anywhere, from coarse to fine.

A patch of stride 8 is searched for over the whole of each reference. Where it was found, and nowhere else, its four
cells of stride 4 are searched for. So the scales agree on what a patch is matched with, and the fine one, whose search
over the whole map is sixteen times the work of the coarse one's, costs little. The idea is that of every search in a
pyramid: P. Anandan, "A Computational Framework and an Algorithm for the Measurement of Visual Motion", IJCV 2, 1989.
CPR (arXiv 2308.06748) has no such parts and compares each scale at its own place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .matching import PIECE, chunk_bytes, covers, match, stored_references
from .quantisation import is_traced

# Rows and columns of stride 4 around the four cells of a match, which lies there to the nearest cell of stride 8 only.
# Chosen on drawn loose brackets and tablets (results/coarse_to_fine.json): the latter lose without.
MARGIN = 1


def match_scales(
    queries: Sequence[Tensor],
    galleries: Sequence[Tensor],
    references: Tensor,
    windows: Sequence[int],
    scales: Sequence[Tensor | None],
    *,
    fused: bool = False,
) -> list[Tensor]:
    """Smallest cosine distance of each cell, for each reference: in a window of each scale, or from coarse to fine.

    The latter where both windows cover their map.

    Args:
        queries (Sequence[Tensor]): Unit descriptors of strides 4 and 8, ``(batch, channels, height_i, width_i)``.
        galleries (Sequence[Tensor]): Those of all images, ``(gallery, channels, height_i, width_i)``.
        references (Tensor): Indices into the gallery, ``(batch, k)``.
        windows (Sequence[int]): Sides in cells, odd.
        scales (Sequence[Tensor | None]): Factors of int8 galleries.
        fused (bool): See :func:`anomalib_cpr.matching.match`, as for the rest.

    Returns:
        list[Tensor]: Distances in 0..2, ``(batch, k, height_i, width_i)``.

    Raises:
        ValueError: If there are no references.
    """
    if all(covers(window, query) for window, query in zip(windows, queries, strict=True)):
        return match_coarse_to_fine(queries, galleries, references, scales)
    return [
        match(query, gallery, references, window, factors, fused=fused)
        for query, gallery, window, factors in zip(queries, galleries, windows, scales, strict=True)
    ]


def match_coarse_to_fine(
    queries: Sequence[Tensor], galleries: Sequence[Tensor], references: Tensor, scales: Sequence[Tensor | None]
) -> list[Tensor]:
    """Smallest cosine distance of stride 8 over each reference, and of stride 4 around the place where that is.

    Args:
        queries (Sequence[Tensor]): See :func:`match_scales`, as for the other arguments. The finer map has twice as
            many rows and columns.
        galleries (Sequence[Tensor]): Descriptors of all images.
        references (Tensor): Indices.
        scales (Sequence[Tensor | None]): Factors of int8 galleries.

    Returns:
        list[Tensor]: Distances in 0..2, ``(batch, k, height_i, width_i)``.

    Raises:
        ValueError: If there are no references.
    """
    if references.shape[1] == 0:
        raise ValueError("No references to match with: k must be at least 1.")
    fine, coarse = queries
    height, width = coarse.shape[-2:]
    around = cells_around(height, width).to(coarse.device)
    step = _cells_at_a_time(coarse, around.shape[1])
    pieces = list(
        zip(
            coarse.flatten(2).transpose(1, 2).split(step, dim=1),  # (batch, cells, channels)
            _children(fine).split(step, dim=1),  # (batch, cells, 4, channels)
            strict=True,
        )
    )
    fine_maps, coarse_maps = [], []
    for chosen in references.split(1, dim=1):
        fine_reference, coarse_reference = (
            stored_references(gallery, factors, chosen.to(gallery.device), query)[:, 0]
            for gallery, factors, query in zip(galleries, scales, queries, strict=True)
        )
        found = [_match_piece(*piece, fine_reference, coarse_reference, around) for piece in pieces]
        children, parents = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
        fine_maps.append(F.pixel_shuffle(children.transpose(1, 2).unflatten(2, (height, width)), 2))
        coarse_maps.append(parents.unflatten(1, (1, height, width)))
    return [1 - torch.cat(maps, dim=1).clamp(-1, 1) for maps in (fine_maps, coarse_maps)]


def _match_piece(
    own: Tensor, own_children: Tensor, fine: Tensor, coarse: Tensor, around: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest similarities of some cells and their children on one reference per query.

    Args:
        own (Tensor): Cells of stride 8, ``(batch, cells, channels)``.
        own_children (Tensor): Those of stride 4 that they cover, ``(batch, cells, 4, channels)``.
        fine (Tensor): The references at stride 4, ``(batch, channels, 2 * height, 2 * width)``.
        coarse (Tensor): The same at stride 8, ``(batch, channels, height, width)``.
        around (Tensor): Of :func:`cells_around`.

    Returns:
        tuple[Tensor, Tensor]: Of the children, ``(batch, cells, 4)``, and of the cells, ``(batch, cells)``.
    """
    batch, channels = coarse.shape[:2]
    similarity, place = largest(torch.bmm(own, coarse.flatten(2)).unflatten(2, coarse.shape[2:]))
    # The references of a batch lie one after another, so that a single index finds a cell.
    cells = fine.permute(0, 2, 3, 1).reshape(-1, channels)
    firsts = torch.arange(batch, device=fine.device)[:, None, None] * (fine.shape[2] * fine.shape[3])
    window = cells.index_select(0, (around[place] + firsts).flatten()).unflatten(0, (-1, around.shape[1]))
    best = torch.bmm(own_children.flatten(0, 1), window.transpose(1, 2)).amax(2)
    return best.unflatten(0, (batch, -1)), similarity


def largest(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each map, and where it is.

    First of each row, then among the rows: an index costs torch twenty times what a value does on a CPU.

    Args:
        similarity (Tensor): Of shape ``(batch, cells, height, width)``.

    Returns:
        tuple[Tensor, Tensor]: Values, and indices into the flattened map, both ``(batch, cells)``.
    """
    width = similarity.shape[3]
    row = similarity.amax(3).argmax(2)
    best, column = similarity.gather(2, row[:, :, None, None].expand(-1, -1, 1, width))[:, :, 0].max(2)
    return best, row * width + column


def cells_around(height: int, width: int) -> Tensor:
    """Cells of stride 4 that a match of stride 8 is refined among: its own four and those around them.

    Args:
        height (int): Rows of stride 8.
        width (int): Columns.

    Returns:
        Tensor: Indices into the finer map, row by row, ``(height * width, 16)``. Beyond the edge of the map the
            nearest cells stand in, and so come twice.
    """
    reach = torch.arange(-MARGIN, 2 + MARGIN)
    rows = (2 * torch.arange(height)[:, None] + reach).clamp(0, 2 * height - 1)
    columns = (2 * torch.arange(width)[:, None] + reach).clamp(0, 2 * width - 1)
    indices = rows[:, None, :, None] * (2 * width) + columns[None, :, None, :]
    return indices.reshape(height * width, -1)


def _children(fine: Tensor) -> Tensor:
    """The four cells of stride 4 that each of stride 8 covers: ``(batch, cells, 4, channels)``."""
    channels = fine.shape[1]
    return F.pixel_unshuffle(fine, 2).unflatten(1, (channels, 4)).flatten(3).permute(0, 3, 2, 1).contiguous()


def _cells_at_a_time(coarse: Tensor, around: int) -> int:
    """Cells of stride 8 whose similarities and whose windows of stride 4 fit into what is held at a time."""
    if is_traced():  # the size of a batch is then not known
        return PIECE
    batch, channels, height, width = coarse.shape
    return max(1, chunk_bytes(coarse) // (coarse.element_size() * batch * (height * width + around * channels)))
