# SPDX-License-Identifier: Apache-2.0
"""The picture of an explanation, and the visualizer that draws it during ``anomalib test``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .explain import (
    PATCHES,
    Explanation,
    HotPatch,
    foreground_in_use,
)
from .feature_extractor import STRIDES
from .gallery_pictures import ReferencePicture
from .pictures import MARKS, SHARE_COLOURS, bare, new_figure, outline, save, show_colours, show_map, show_words, style
from .pictures import word_colours as colours_of_words

CAUSES = {
    "background": "outside the part",
    "colour": "a colour found on no reference",
    "references": "references unlike the image",
    "usual": "about what good parts show here",
    "unmatched": "found on no reference",
}
LEGEND = (
    "Numbered squares: where the map peaks, and the best match on a reference (full line: stride 4, dotted: stride 8; "
    "'gives 9 %': so many patches match best there).\n"
    "Dots: cosine distance of the patch to each reference (filled: stride 4, open: stride 8, ringed: the match).  "
    "Grey band: distances that the references themselves show at this place."
)
# Side of the square that is shown enlarged, as a share of the image.
CROP = 0.16
SHOWN_REFERENCES = 10


def draw_explanation(
    explanation: Explanation,
    colours: Tensor,
    pictures: Sequence[ReferencePicture],
    *,
    codebook: Tensor | None = None,
    title: str = "",
    mask: Tensor | None = None,
    threshold: float | None = None,
) -> Figure:
    """Draw an explanation.

    Args:
        explanation (Explanation): From :func:`anomalib_cpr.explain.explain`.
        colours (Tensor): The query in 0..1, ``(3, height, width)``.
        pictures (Sequence[ReferencePicture]): Of its references, in order.
        codebook (Tensor | None): Visual words; gives words that are alike colours that are alike.
        title (str): Name of the image.
        mask (Tensor | None): True mask, bool, ``(height, width)``.
        threshold (float | None): Of the raw map, outlined in it.

    Returns:
        Figure: The picture.
    """
    with style():
        figure = new_figure(14, 11.2)
        parts = figure.add_gridspec(
            4, 1, height_ratios=[4.1, 2.1, 1.25, 2.0], left=0.015, right=0.973, top=0.925, bottom=0.06, hspace=0.25
        )
        words = colours_of_words(codebook if codebook is not None else torch.eye(int(explanation.words.max()) + 1))
        shown = shown_references(explanation)
        query, references = _draw_search(figure, parts[0], explanation, colours, pictures, mask, shown)
        _draw_maps(figure, parts[1], explanation, colours, mask, threshold)
        _draw_words(figure, parts[2], explanation, pictures, words, shown)
        _draw_patches(figure, parts[3], explanation, colours, pictures)
        _draw_lines(figure, query, references, explanation)
        head = f"{title}     image score {explanation.score:.3f}"
        if threshold is not None:
            peak = float(explanation.anomaly_map.max())
            head += f"     map peaks at {peak:.3f}, threshold {threshold:.3f}"
        figure.text(0.015, 0.972, head, fontsize=13, weight="bold", va="center")
        figure.text(0.015, 0.016, LEGEND, fontsize=7.5, color="#444444", va="center")
        figure.text(0.015, 0.95, _summary(explanation, pictures), fontsize=9.5, color="#444444", va="center")
    return figure


def save_explanation(
    explanation: Explanation,
    colours: Tensor,
    pictures: Sequence[ReferencePicture],
    file: Path,
    **options: Any,  # noqa: ANN401
) -> None:
    """Draw an explanation into a file; the options are those of :func:`draw_explanation`."""
    save(draw_explanation(explanation, colours, pictures, **options), file)


def shown_references(explanation: Explanation) -> list[int]:
    """References that there is room for: those that hot patches match, and the most similar ones.

    Args:
        explanation (Explanation): From :func:`anomalib_cpr.explain.explain`.

    Returns:
        list[int]: Their ranks, from 0, in order.
    """
    matched = {scale.reference for patch in explanation.patches for scale in patch.scales}
    others = [rank for rank in range(len(explanation.references)) if rank not in matched]
    return sorted([*matched, *others[: max(0, SHOWN_REFERENCES - len(matched))]])


def _summary(explanation: Explanation, pictures: Sequence[ReferencePicture]) -> str:
    nearer = f"{100 * explanation.unlike:.0f} % of the training images have a nearer neighbour than this image"
    text = f"References: {nearer if len(explanation.usual_distances) else 'nothing to compare their distance with'}"
    shown, count = len(shown_references(explanation)), len(explanation.references)
    if shown < count:
        text += f"; {shown} of {count} references are shown"
    if explanation.unlike >= 0.99:
        text += " - nothing in the gallery looks like it"
    if any(not picture.as_trained for picture in pictures):
        text += "     WARNING: the pictures marked with ! are not those that the model was trained on"
    return text


def _draw_search(
    figure: Figure,
    part: Any,  # noqa: ANN401 - a matplotlib SubplotSpec
    explanation: Explanation,
    colours: Tensor,
    pictures: Sequence[ReferencePicture],
    mask: Tensor | None,
    shown: Sequence[int],
) -> tuple[Axes, dict[int, Axes]]:
    """Query on the left, references on the right."""
    count = len(shown)
    columns = max(1, -(-count // 2)) if count > 5 else max(count, 1)
    rows = -(-count // columns)
    grid = GridSpecFromSubplotSpec(1, 2, part, width_ratios=[1.0, 2.35], wspace=0.04)
    query = figure.add_subplot(grid[0])
    show_colours(query, colours, "Query" + (", true defect outlined" if mask is not None and mask.any() else ""))
    if mask is not None:
        outline(query, mask, "#ff3b30")
    tiles = GridSpecFromSubplotSpec(rows, columns, grid[1], wspace=0.05, hspace=0.16)
    share = torch.bincount(
        torch.cat([match.reference.flatten() for match in explanation.matches]), minlength=len(pictures)
    )
    share = share / share.sum()
    references = {}
    for place, rank in enumerate(shown):
        picture = pictures[rank]
        axes = figure.add_subplot(tiles[place // columns, place % columns])
        if picture.colours is not None:
            show_colours(axes, picture.colours)
        else:
            height, width = colours.shape[-2:]
            axes.imshow(torch.full((height, width), 0.92).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.text(width / 2, height / 2, f"{picture.name}\npicture not found", ha="center", va="center", fontsize=7)
            bare(axes)
        warning = "" if picture.as_trained else " !"
        distance = explanation.histogram_distances[rank]
        axes.set_title(f"{rank + 1}: distance {distance:.2f}, gives {100 * share[rank]:.0f} %{warning}", fontsize=8)
        references[rank] = axes
    return query, references


def _draw_maps(
    figure: Figure,
    part: Any,  # noqa: ANN401
    explanation: Explanation,
    colours: Tensor,
    mask: Tensor | None,
    threshold: float | None,
) -> None:
    """Fused map, distances per scale, foregrounds, and how unusual the references are."""
    size = (colours.shape[-2], colours.shape[-1])
    grid = GridSpecFromSubplotSpec(1, 2, part, wspace=0.15, width_ratios=[6, 1])
    count = 3 + len(explanation.distances)
    maps = GridSpecFromSubplotSpec(1, count, grid[0], wspace=0.28)
    axes = [*(figure.add_subplot(maps[column]) for column in range(count)), figure.add_subplot(grid[1])]
    peak = float(explanation.anomaly_map.max())
    top = max(peak, 2 * threshold if threshold is not None else 0.0, 1e-6)
    factors = dict.fromkeys(f"{share:.2f}" for share in explanation.shares[: len(STRIDES)])  # relative to the image
    made_of = "" if max(explanation.shares[: len(STRIDES)]) == 1 else f"\ndistances x {' and '.join(factors)}"
    show_map(axes[0], explanation.anomaly_map, f"Anomaly map{made_of}", (0, top))
    if threshold is not None:
        outline(axes[0], explanation.anomaly_map > threshold, "#56B4E9", 1.0)
    if mask is not None:
        outline(axes[0], mask, "white", 0.8)
    largest = max(float(distance.max()) for distance in explanation.distances)
    for index, distance in enumerate(explanation.distances):
        what = f"Distance, stride {STRIDES[index]}" if index < len(STRIDES) else "Distance of colours"
        show_map(axes[1 + index], distance, what, (0, max(largest, 1e-6)), size=size)
    show_map(axes[-3], explanation.foreground, "Foreground: query", (0, 1), colours=SHARE_COLOURS, size=size)
    show_map(axes[-2], foreground_in_use(explanation), "with references, as used", (0, 1), colours=SHARE_COLOURS)
    for number, patch in enumerate(explanation.patches):
        for where in axes[:count]:
            row, column = patch.pixel
            where.plot(column, row, "o", ms=9, mfc="none", mec=MARKS[number % len(MARKS)], mew=1.3)
    _draw_distances(axes[-1], explanation)


def _draw_distances(axes: Axes, explanation: Explanation) -> None:
    usual = explanation.usual_distances
    axes.set_title("Are the references like it?")
    if len(usual):
        share = 100 * torch.arange(1, len(usual) + 1) / len(usual)
        axes.fill_between(
            usual.numpy(), share.numpy(), step="post", color="#bbbbbb", lw=0, label="nearest of a training image"
        )
    for rank, distance in enumerate(explanation.histogram_distances):
        axes.axvline(distance, color="#D55E00" if rank == 0 else "#E69F00", lw=2.0 if rank == 0 else 0.8)
    axes.plot([], [], color="#D55E00", lw=2, label="nearest of this image")
    axes.plot([], [], color="#E69F00", lw=0.8, label="its other references")
    axes.set_xlabel("histogram distance", labelpad=1)
    axes.set_ylabel("% of training images below", labelpad=1)
    axes.set_ylim(0, 105)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.legend(
        loc="lower right",
        fontsize=5.5,
        frameon=True,
        framealpha=0.85,
        edgecolor="none",
        handlelength=1.2,
        borderpad=0.2,
    )


def _draw_words(
    figure: Figure,
    part: Any,  # noqa: ANN401
    explanation: Explanation,
    pictures: Sequence[ReferencePicture],
    words: Any,  # noqa: ANN401 - a colour map
    shown: Sequence[int],
) -> None:
    """Word maps of query and references, by which the references were retrieved."""
    grid = GridSpecFromSubplotSpec(1, 1 + len(shown), part, wspace=0.08)
    show_words(figure.add_subplot(grid[0]), explanation.words, words, "Visual words: query")
    for place, rank in enumerate(shown, start=1):
        axes, picture = figure.add_subplot(grid[place]), pictures[rank]
        if picture.words is not None:
            show_words(axes, picture.words, words, f"reference {rank + 1}")
        else:
            bare(axes, f"reference {rank + 1}: not found")


def _draw_patches(
    figure: Figure,
    part: Any,  # noqa: ANN401
    explanation: Explanation,
    colours: Tensor,
    pictures: Sequence[ReferencePicture],
) -> None:
    """Each hot patch beside its match, and its distance to every reference."""
    columns = max(PATCHES, len(explanation.patches))
    grid = GridSpecFromSubplotSpec(1, columns, part, wspace=0.1)
    largest = max((max(s.per_reference + s.on_good_parts) for p in explanation.patches for s in p.scales), default=1.0)
    for number, patch in enumerate(explanation.patches):
        colour = MARKS[number % len(MARKS)]
        block = GridSpecFromSubplotSpec(2, 1, grid[number], height_ratios=[0.42, 1], hspace=0.03)
        text = figure.add_subplot(block[0])
        bare(text)
        text.set(xlim=(0, 1), ylim=(0, 1))
        text.text(0, 0.95, f"{number + 1}  {CAUSES[patch.cause]}", fontsize=9.5, weight="bold", va="top")
        text.text(0, 0.52, _numbers(patch), fontsize=7.2, color="#333333", va="top", linespacing=1.25)
        row = GridSpecFromSubplotSpec(1, 3, block[1], width_ratios=[1, 1, 1.15], wspace=0.07)
        own, other, dots = (figure.add_subplot(row[index]) for index in range(3))
        scale = patch.scales[0]
        picture = pictures[scale.reference]
        show_colours(own, _crop(colours, _centre(scale.cell)))
        if picture.colours is not None:
            show_colours(other, _crop(picture.colours, _centre(scale.match)))
        for axes, name in ((own, "query"), (other, f"reference {scale.reference + 1}")):
            axes.set(xticks=[], yticks=[], anchor="N")
            axes.set_xlabel(name, fontsize=7.5, labelpad=2)
            for spine in axes.spines.values():
                spine.set(visible=True, edgecolor=colour, linewidth=2)
        _draw_dots(dots, patch, largest, colour)


def _numbers(patch: HotPatch) -> str:
    good = [sum(parts) for parts in zip(*(scale.on_good_parts for scale in patch.scales), strict=True)]
    usual = f", good parts at most {max(good):.3f}" if good else ""
    return (
        f"distance {sum(scale.distance for scale in patch.scales):.3f}{usual}; map {patch.value:.3f}\n"
        f"foreground {patch.own_foreground:.2f}, on the references {patch.reference_foreground:.2f}"
    )


def _draw_dots(axes: Axes, patch: HotPatch, largest: float, colour: str) -> None:
    """Distance of the patch to every reference, over the band in which good parts lie at this place."""
    for index, (scale, marker) in enumerate(zip(patch.scales, ("o", "s"), strict=True)):
        ranks = range(1, len(scale.per_reference) + 1)
        if scale.on_good_parts:
            axes.axhspan(
                min(scale.on_good_parts), max(scale.on_good_parts), color="#999999", alpha=0.25 + 0.2 * index, lw=0
            )
        axes.plot(
            ranks,
            scale.per_reference,
            marker,
            ms=4,
            mfc=colour if index == 0 else "none",
            mec="#333333",
            mew=0.6,
        )
        axes.plot(scale.reference + 1, scale.distance, marker, ms=8, mfc="none", mec="black", mew=0.9)
    axes.set_ylim(-0.02 * largest, 1.08 * largest)
    axes.set_xlim(0.3, len(patch.scales[0].per_reference) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.tick_right()
    axes.spines["left"].set_visible(False)
    axes.spines["right"].set_visible(True)
    axes.set_xlabel("distance to each reference", fontsize=7, labelpad=1)
    axes.tick_params(labelsize=6, pad=1, length=2)


def _draw_lines(figure: Figure, query: Axes, references: Mapping[int, Axes], explanation: Explanation) -> None:
    """From every hot patch to its match: at stride 4 a full line, at stride 8 a dotted one."""
    for number, patch in enumerate(explanation.patches):
        colour = MARKS[number % len(MARKS)]
        for index, scale in enumerate(patch.scales):
            side = 4 * 2**index
            start, end = _centre(scale.cell, side), _centre(scale.match, side)
            line = ConnectionPatch(
                xyA=(start[1], start[0]),
                coordsA=query.transData,
                xyB=(end[1], end[0]),
                coordsB=references[scale.reference].transData,
                color=colour,
                lw=1.5 if index == 0 else 1.0,
                linestyle="-" if index == 0 else (0, (1.2, 1.8)),
                alpha=0.9,
            )
            figure.add_artist(line)
            for axes, (row, column) in ((query, start), (references[scale.reference], end)):
                reach = (16 if axes is query else 10) * 0.5 * (1 + index)
                axes.add_patch(
                    Rectangle((column - reach, row - reach), 2 * reach, 2 * reach, fill=False, ec=colour, lw=1.5)
                )
        row, column = _centre(patch.scales[0].cell)
        query.annotate(
            str(number + 1),
            (column, row),
            xytext=(-11, 11),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            weight="bold",
            bbox={"boxstyle": "circle,pad=0.2", "fc": colour, "ec": "black", "lw": 0.6},
            zorder=10,
        )


def _centre(cell: tuple[int, int], side: int = 4) -> tuple[float, float]:
    """Pixel at the middle of a cell."""
    return (cell[0] + 0.5) * side - 0.5, (cell[1] + 0.5) * side - 0.5


def _crop(colours: Tensor, centre: tuple[float, float]) -> Tensor:
    """Square around a pixel, moved inwards where it would leave the image."""
    height, width = colours.shape[-2:]
    side = max(8, int(CROP * min(height, width)))
    top = min(max(0, round(centre[0]) - side // 2), height - side)
    left = min(max(0, round(centre[1]) - side // 2), width - side)
    return colours[:, top : top + side, left : left + side]
