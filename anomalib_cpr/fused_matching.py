# SPDX-License-Identifier: Apache-2.0
"""Local retrieval on a GPU as one Triton kernel: gather and matching without any temporary.

Optional: without Triton, or on a CPU, :mod:`anomalib_cpr.matching` does the same. Triton's interpreter
(``TRITON_INTERPRET=1``) runs the kernel on a CPU, which is how it is tested where there is no GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 16  # query cells of a program; their descriptors stay in the innermost cache while references pass by
CHANNELS = 128  # at most so many channels at a time


@triton.jit
def _match_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202 - Triton's language
    query,  # noqa: ANN001 - (batch, height, width, channels)
    gallery,  # noqa: ANN001 - (gallery, height, width, channels), or half as many channels where PACKED
    scales,  # noqa: ANN001 - (gallery, height, width), or anything where HAS_SCALES is false
    references,  # noqa: ANN001 - (batch, k)
    best,  # noqa: ANN001 - (batch, k, height, width)
    k,  # noqa: ANN001
    height,  # noqa: ANN001
    width,  # noqa: ANN001
    channels,  # noqa: ANN001
    RADIUS: tl.constexpr,  # noqa: N803 - as Triton writes constants
    HAS_SCALES: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803 - two channels of 4 bits per byte
    CELLS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
):
    image = tl.program_id(1)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    row, column = cell // width, cell % width
    channel = tl.arange(0, CHANNELS)
    stored = (channels + 1) // 2 if PACKED else channels  # numbers of a descriptor in the gallery
    inside_image = cell < height * width
    own = (image.to(tl.int64) * height * width + cell)[:, None] * channels
    for index in range(k):
        largest = tl.full((CELLS,), -2.0, tl.float32)
        reference = tl.load(references + image * k + index)
        for down in tl.static_range(-RADIUS, RADIUS + 1):
            for right in tl.static_range(-RADIUS, RADIUS + 1):
                other_row, other_column = row + down, column + right
                inside = inside_image & (other_row >= 0) & (other_row < height)
                inside = inside & (other_column >= 0) & (other_column < width)
                other_cell = reference * height * width + other_row * width + other_column
                similarity = tl.zeros((CELLS,), tl.float32)
                square = tl.zeros((CELLS,), tl.float32)
                for first in range(0, stored, CHANNELS):
                    offset = (first + channel)[None, :]
                    mask = inside[:, None] & (offset < stored)
                    theirs = tl.load(gallery + other_cell[:, None] * stored + offset, mask=mask, other=0)
                    ours = tl.load(query + own + offset, mask=mask, other=0).to(tl.float32)
                    if PACKED:
                        # In two's complement. An upper half that no channel has is 0, as what is outside the image.
                        both = theirs.to(tl.int32)
                        lower = (((both & 15) ^ 8) - 8).to(tl.float32)
                        upper = (((both >> 4) ^ 8) - 8).to(tl.float32)
                        mask &= offset + stored < channels
                        ours_upper = tl.load(query + own + offset + stored, mask=mask, other=0)
                        similarity += tl.sum(ours * lower + ours_upper.to(tl.float32) * upper, 1)
                        square += tl.sum(lower * lower + upper * upper, 1)
                    else:
                        similarity += tl.sum(ours * theirs.to(tl.float32), 1)
                if PACKED:
                    similarity /= tl.sqrt(tl.maximum(square, 1e-12))
                if HAS_SCALES:
                    similarity *= tl.load(scales + other_cell, mask=inside, other=0)
                largest = tl.maximum(largest, tl.where(inside, similarity, -2.0))
        tl.store(best + (image.to(tl.int64) * k + index) * height * width + cell, largest, mask=inside_image)


def match_fused(
    query: Tensor, gallery: Tensor, references: Tensor, window: int, scales: Tensor | None = None
) -> Tensor:
    """Largest cosine over the window for each reference, in one kernel.

    Args:
        query (Tensor): Unit descriptors of shape ``(batch, channels, height, width)``.
        gallery (Tensor): Unit descriptors of shape ``(gallery, channels, height, width)``, channels last in memory, as
            the reference bank holds them; float32, float16, int8, or two channels per byte in uint8.
        references (Tensor): Indices into the gallery, of shape ``(batch, k)``.
        window (int): Side of the window in cells, odd.
        scales (Tensor | None): Factors of an int8 gallery, of shape ``(gallery, 1, height, width)``.

    Returns:
        Tensor: Similarities of shape ``(batch, k, height, width)``, float32.

    Raises:
        ValueError: If the gallery is not channels last: making it so would copy the whole bank at each inference.
    """
    held = gallery.permute(0, 2, 3, 1)
    if not held.is_contiguous():
        raise ValueError(
            "The fused matching needs a gallery in channels_last memory format, as ReferenceBank holds it."
        )
    batch, channels, height, width = query.shape
    best = query.new_empty(batch, references.shape[1], height, width, dtype=torch.float32)
    grid = (triton.cdiv(height * width, CELLS), batch)
    _match_kernel[grid](
        query.detach().permute(0, 2, 3, 1).contiguous(),
        held,
        held if scales is None else scales.contiguous(),
        references.contiguous(),
        best,
        references.shape[1],
        height,
        width,
        channels,
        RADIUS=window // 2,
        HAS_SCALES=scales is not None,
        PACKED=gallery.dtype == torch.uint8,
        CELLS=CELLS,
        CHANNELS=min(CHANNELS, triton.next_power_of_2(held.shape[-1])),
    )
    return best
