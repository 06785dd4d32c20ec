# SPDX-License-Identifier: Apache-2.0
"""Local retrieval: the distance of every query patch to its best match at nearly the same place of each reference.

There are four ways with one result:

- :func:`match_shifts` is the definition: a running maximum over shifts. It runs anywhere and exports.
- :func:`match_cells` is for CPUs: matrix products of cache-sized pieces.
- :func:`match_everywhere` is for a window that covers the map. Where those of both scales do, for parts that lie
  anywhere, :func:`anomalib_cpr.coarse_to_fine.match_coarse_to_fine` takes its place.
- :func:`anomalib_cpr.fused_matching.match_fused` is for GPUs, on request: one Triton kernel.
"""

import itertools
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .quantisation import is_traced, restore, unpack
from .worker_threads import run_in_threads

PIECE = 1024  # query cells that are compared with a whole reference at a time in exported graphs
CHUNK_BYTES = 6_000_000  # rows of all references that are held at a time; of the order of a CPU's last cache
STEPS = 10  # in which the references of a query are matched in exported graphs and on GPUs
STEP_BYTES = 256_000_000
LEAST_ROWS = 3  # of these; with fewer, most of what is read belongs to the rows above and below

# A window of so many cells is the whole map, of images of up to 2,000 pixels.
WHOLE_MAP = 999


def match(
    query: Tensor,
    gallery: Tensor,
    references: Tensor,
    window: int,
    scales: Tensor | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """Smallest cosine distance over the window, for each reference.

    Positions outside the image never match. Not differentiable on a CPU.

    Args:
        query (Tensor): Unit descriptors of shape ``(batch, channels, height, width)``, float32.
        gallery (Tensor): Unit descriptors of shape ``(gallery, channels, height, width)``, in any type that the
            reference bank has, on any device: only those of the references are moved and converted.
        references (Tensor): Indices into the gallery, of shape ``(batch, k)``.
        window (int): Side of the window in cells, odd.
        scales (Tensor | None): Factors of an int8 gallery, of shape ``(gallery, 1, height, width)``.
        fused (bool): Use the Triton kernel. Ignored while an exporter or compiler records, where the window covers the
            map, and where the gallery is on another device.

    Returns:
        Tensor: Distances in 0..2, of shape ``(batch, k, height, width)``. The paper's is their minimum over ``k``.

    Raises:
        ValueError: If there are no references.

    Note:
        CPR (arXiv 2308.06748), section III-C: 3x3 at stride 4, 1x1 at stride 8.
    """
    if references.shape[1] == 0:
        raise ValueError("No references to match with: k must be at least 1.")
    if covers(window, query):
        similarity = match_everywhere(query, gallery, references, scales)
    elif fused and not is_traced() and gallery.device == query.device:
        from .fused_matching import match_fused  # noqa: PLC0415 - Triton is optional

        similarity = match_fused(query, gallery, references, window, scales)
    elif query.device.type == "cpu" and gallery.device.type == "cpu" and not is_traced():
        similarity = match_cells(query, gallery, references, window, scales)
    else:
        similarity = match_shifts(query, gallery, references, window, scales)
    # Rounding may push a perfect match a little above 1; what matches nowhere has -2.
    return 1 - similarity.clamp(-1, 1)


def covers(window: int, cells: Tensor) -> bool:
    """Whether a window covers the map from any of its cells.

    Args:
        window (int): Its side, in cells.
        cells (Tensor): A map, ``(..., height, width)``.

    Returns:
        bool: False for a single cell: it is compared with its own place.
    """
    return window > 1 and window // 2 >= max(cells.shape[-2:]) - 1


def match_shifts(
    query: Tensor, gallery: Tensor, references: Tensor, window: int, scales: Tensor | None = None
) -> Tensor:
    """Largest cosine over the window for each reference, as a running maximum.

    One reference per query at a time, or a few of many: each step is a part of an exported graph, which would grow out
    of bounds with them, and costs a GPU the start of some dozens of operations.

    Args:
        query (Tensor): See :func:`match`, as for the other arguments.
        gallery (Tensor): Descriptors of all images.
        references (Tensor): Indices.
        window (int): Side of the window.
        scales (Tensor | None): Factors of an int8 gallery.

    Returns:
        Tensor: Similarities of shape ``(batch, k, height, width)``.
    """
    height, width = query.shape[-2:]
    references = references.to(gallery.device)
    shifts = [(down, right) for down in _shifts(window, height) for right in _shifts(window, width)]
    nothing = query.new_full((), -2.0)
    found = []
    for chosen in references.split(_at_a_time(query, references.shape[1]), dim=1):
        some = stored_references(gallery, scales, chosen, query)
        best = nothing
        for down, right in shifts:
            best = torch.maximum(best, _shifted_similarity(query, some, down, right, height, width))
        found.append(best)
    return torch.cat(found, dim=1)


def _at_a_time(query: Tensor, k: int) -> int:
    """References of a step, so that there are ten steps, unless they took too much memory."""
    few = -(-k // STEPS)
    if few == 1 or is_traced():  # the size of a batch is then not known
        return few
    return max(1, min(few, STEP_BYTES // (query.element_size() * query.numel())))


def stored_references(gallery: Tensor, scales: Tensor | None, chosen: Tensor, query: Tensor) -> Tensor:
    """References of each query, as unit vectors on its device.

    Args:
        gallery (Tensor): Descriptors of all images, in any type that the reference bank has.
        scales (Tensor | None): Factors of an int8 gallery.
        chosen (Tensor): Indices into the gallery, on its device, ``(batch, count)``.
        query (Tensor): Descriptors of the queries, ``(batch, channels, height, width)``.

    Returns:
        Tensor: Of the type of the query, ``(batch, count, channels, height, width)``.
    """
    # In this order: gathered first, then moved and converted, so that a large bank is never touched as a whole.
    every = chosen.flatten()
    factors = None if scales is None else scales[every].to(query.device)
    return restore(gallery[every].to(query.device), factors, query.shape[1]).unflatten(0, (-1, chosen.shape[1]))


def match_everywhere(query: Tensor, gallery: Tensor, references: Tensor, scales: Tensor | None = None) -> Tensor:
    """Largest cosine over all cells of each reference: one matrix product, a piece of the query at a time.

    Args:
        query (Tensor): See :func:`match`, as for the other arguments.
        gallery (Tensor): Descriptors of all images.
        references (Tensor): Indices.
        scales (Tensor | None): Factors of an int8 gallery.

    Returns:
        Tensor: Similarities of shape ``(batch, k, height, width)``.
    """
    height, width = query.shape[-2:]
    pieces = query.flatten(2).transpose(1, 2).split(_piece(query), dim=1)
    references = references.to(gallery.device)
    found = []
    for k in range(references.shape[1]):
        cells = stored_references(gallery, scales, references[:, k : k + 1], query)[:, 0].flatten(2)
        found.append(torch.cat([torch.bmm(piece, cells).amax(2) for piece in pieces], dim=1))
    return torch.stack(found, dim=1).unflatten(2, (height, width))


def _piece(query: Tensor) -> int:
    """Cells to compare with a whole reference at a time: what a CPU's cache, or a step on a GPU, has room for."""
    if is_traced():
        return PIECE
    batch, _, height, width = query.shape
    return max(1, chunk_bytes(query) // (query.element_size() * batch * height * width))


def chunk_bytes(query: Tensor) -> int:
    """What a CPU's cache, or a step on a GPU, has room for.

    Args:
        query (Tensor): On the device in question.

    Returns:
        int: Bytes.
    """
    return CHUNK_BYTES if query.device.type == "cpu" else STEP_BYTES


def _shifts(window: int, side: int) -> range:
    """Shifts of a window, as far as they leave something of the map."""
    radius = min(window // 2, side - 1)
    return range(-radius, radius + 1)


def _shifted_similarity(query: Tensor, references: Tensor, down: int, right: int, height: int, width: int) -> Tensor:
    """Cosine of each query cell with the cells ``down`` rows below and ``right`` columns beside it, per reference."""
    top, bottom, left, end = max(0, -down), height - max(0, down), max(0, -right), width - max(0, right)
    own = query[:, :, top:bottom, left:end]
    others = references[..., top + down : bottom + down, left + right : end + right]
    similarity = (own[:, None] * others).sum(2)
    if down == 0 and right == 0:
        return similarity
    return F.pad(similarity, (left, width - end, top, height - bottom), value=-2.0)


def match_cells(
    query: Tensor, gallery: Tensor, references: Tensor, window: int, scales: Tensor | None = None
) -> Tensor:
    """Largest cosine over the window for each reference, as matrix products of cache-sized pieces.

    The descriptors of a few rows are laid out as one sequence of cells, with all K references side by side at each
    cell. What a cell is compared with in one row of its window is then one piece of memory, and all of it one product::

        query       . . 2 . .      one cell
        references  . 1 2 3 .      the window's cells, K descriptors each: a matrix of 3 K rows

    Nothing is computed in vain, and a reference is read from memory once, which is what limits the other way.

    Args:
        query (Tensor): See :func:`match`, as for the other arguments. On the CPU.
        gallery (Tensor): Descriptors of all images; those of one image should lie channels last.
        references (Tensor): Indices.
        window (int): Side of the window.
        scales (Tensor | None): Factors of an int8 gallery.

    Returns:
        Tensor: Similarities of shape ``(batch, k, height, width)``, references last in memory.
    """
    query = query.detach().permute(0, 2, 3, 1).contiguous()
    gallery = gallery.permute(0, 2, 3, 1)
    factors = None if scales is None else scales[:, 0]
    best = query.new_full((*query.shape[:3], references.shape[1]), -2.0)
    # Image by image: each has references of its own, and the batch size changes nothing.
    # Of each image a band of rows per thread: the products are too small for torch to share out.
    bands = [range(*band) for band in _bands(query.shape[1], torch.get_num_threads())]
    most = max(1, CHUNK_BYTES // (4 * query.shape[2] * query.shape[3] * LEAST_ROWS))
    run_in_threads(
        [
            partial(_match_band, image, gallery, _groups(chosen, most), window, factors, result, band)
            for image, chosen, result in zip(query, references.tolist(), best, strict=True)
            for band in bands
        ]
    )
    return best.permute(0, 3, 1, 2)


def _groups(references: list[int], most: int) -> list[list[int]]:
    """Cut a list into as few pieces of at most so many as there can be, of nearly the same length."""
    count = -(-len(references) // most)
    return [references[first:last] for first, last in _bands(len(references), count)]


def _bands(height: int, count: int) -> list[tuple[int, int]]:
    """Cut rows into bands of nearly the same height."""
    edges = [round(height * index / count) for index in range(count + 1)]
    return [(top, bottom) for top, bottom in itertools.pairwise(edges) if bottom > top]


def _match_band(
    query: Tensor,
    gallery: Tensor,
    groups: list[list[int]],
    window: int,
    factors: Tensor | None,
    best: Tensor,
    band: range,
) -> None:
    """Match rows of one query, ``(height, width, channels)``, and raise those of ``best``, ``(height, width, k)``."""
    matched = 0
    for chosen in groups:
        _match_group(query, gallery, chosen, window, factors, best[..., matched : matched + len(chosen)], band)
        matched += len(chosen)


def _match_group(
    query: Tensor,
    gallery: Tensor,
    chosen: list[int],
    window: int,
    factors: Tensor | None,
    best: Tensor,
    band: range,
) -> None:
    """The same for so many references as a chunk has room for."""
    height, width, channels = query.shape
    k = len(chosen)
    down, right = min(window // 2, height - 1), min(window // 2, width - 1)
    reach = 2 * right + 1
    rows = min(len(band), max(1, CHUNK_BYTES // (4 * width * k * channels)))
    # A chunk of rows, the rows above and below that its windows reach, and the cells before and after these. What lies
    # outside the image is compared too, and left out in the end.
    held = query.new_zeros((rows + 2 * down) * width + 2 * right, k, channels)
    packed = gallery.dtype == torch.uint8
    held_factors = None if factors is None else query.new_zeros(held.shape[:2])
    for top in range(band.start, band.stop, rows):
        bottom = min(top + rows, band.stop)
        cells = (bottom - top) * width
        first, last = max(0, top - down), min(height, bottom + down)
        begin = right + (first - top + down) * width
        inside = slice(begin, begin + (last - first) * width)
        for index, reference in enumerate(chosen):
            stored = gallery[reference, first:last].flatten(0, 1)
            if packed:
                first_half, second_half = unpack(stored)
                half = first_half.shape[1]
                held[inside, index, :half] = first_half
                held[inside, index, half:] = second_half[:, : channels - half]
            else:
                held[inside, index] = stored
            if held_factors is not None and factors is not None:
                held_factors[inside, index] = factors[reference, first:last].reshape(-1)
        if packed:
            held_factors = held.norm(dim=2).clamp_min(1e-12).reciprocal()
        own = query[top:bottom].reshape(cells, 1, channels)
        for row_shift in range(-down, down + 1):
            start = (row_shift + down) * width * k
            around = held.as_strided((cells, reach * k, channels), (k * channels, channels, 1), start * channels)
            # In this order: as (3 K, channels) x (channels, 1), MKL takes seven times as long.
            products = torch.bmm(own, around.transpose(1, 2))[:, 0]
            if held_factors is not None:
                products *= held_factors.as_strided((cells, reach * k), (k, 1), start)
            similarity = products.view(bottom - top, width, reach, k)
            upper, lower = max(top, -row_shift), min(bottom, height - row_shift)
            if upper >= lower:  # the shift leaves none of these rows on the map
                continue
            for column_shift in range(-right, right + 1):
                left, end = max(0, -column_shift), width - max(0, column_shift)
                target = best[upper:lower, left:end]
                shifted = similarity[upper - top : lower - top, left:end, column_shift + right]
                torch.maximum(target, shifted, out=target)
