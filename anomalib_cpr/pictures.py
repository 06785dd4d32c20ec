# SPDX-License-Identifier: Apache-2.0
"""Helpers of all pictures: one style, perceptually uniform maps with a bar, colours of visual words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

MAP_COLOURS = "inferno"
SHARE_COLOURS = "cividis"
# Told apart by most kinds of colour blindness, and bright enough on grey, colour and dark maps (Okabe and Ito).
MARKS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.titlepad": 4,
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display.

    Args:
        width (float): In inches.
        height (float): In inches.

    Returns:
        Figure: The figure.
    """
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style() -> Any:  # noqa: ANN401 - matplotlib's own context manager
    """Context in which the project's pictures are drawn."""
    return rc_context(STYLE)  # type: ignore[arg-type]  # matplotlib lists its keys one by one


def save(figure: Figure, file: Path, dpi: int = 100) -> None:
    """Write a figure, making its folder.

    Args:
        figure (Figure): What to write.
        file (Path): Where to; the suffix tells the format.
        dpi (int): Dots per inch.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)


def show_colours(axes: Axes, colours: Tensor, title: str = "") -> AxesImage:
    """Show an image.

    Args:
        axes (Axes): Where.
        colours (Tensor): In 0..1, ``(3, height, width)``.
        title (str): Above it.

    Returns:
        AxesImage: What was drawn.
    """
    drawn = axes.imshow(colours.permute(1, 2, 0).cpu().numpy().clip(0, 1), interpolation="antialiased")
    bare(axes, title)
    return drawn


def show_map(
    axes: Axes,
    values: Tensor,
    title: str,
    limits: tuple[float, float],
    *,
    colours: str = MAP_COLOURS,
    bar: bool = True,
    size: tuple[int, int] | None = None,
) -> AxesImage:
    """Show a map of numbers with its colour bar.

    Args:
        axes (Axes): Where.
        values (Tensor): Of shape ``(height, width)``.
        title (str): Above it.
        limits (tuple[float, float]): Numbers of the darkest and of the brightest colour.
        colours (str): A perceptually uniform colour map.
        bar (bool): Draw the bar.
        size (tuple[int, int] | None): Height and width in pixels of the image that the cells cover.

    Returns:
        AxesImage: What was drawn.
    """
    height, width = size or (values.shape[-2], values.shape[-1])
    drawn = axes.imshow(
        values.float().numpy(),
        cmap=colours,
        norm=Normalize(*limits),
        interpolation="nearest",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    bare(axes, title)
    if bar:
        box = axes.inset_axes((1.02, 0.0, 0.05, 1.0))
        scale = axes.figure.colorbar(drawn, cax=box)
        scale.ax.tick_params(labelsize=6, length=2, pad=1)
        scale.outline.set_linewidth(0.4)
    return drawn


def show_words(axes: Axes, words: Tensor, colours: ListedColormap, title: str = "") -> None:
    """Show a map of visual words.

    Args:
        axes (Axes): Where.
        words (Tensor): Indices of shape ``(height, width)``.
        colours (ListedColormap): From :func:`word_colours`.
        title (str): Above it.
    """
    axes.imshow(words.numpy(), cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, interpolation="nearest")
    bare(axes, title)


def word_colours(codebook: Tensor) -> ListedColormap:
    """One colour per visual word; words that are alike get colours that are alike.

    Args:
        codebook (Tensor): Of shape ``(words, channels)``.

    Returns:
        ListedColormap: Colours in the order of the words.
    """
    centred = (codebook - codebook.mean(0)).double().cpu()
    main = torch.linalg.svd(centred, full_matrices=False)[2][0]
    order = (centred @ main).argsort()
    colours = np.empty((len(codebook), 4))
    colours[order.numpy()] = colormaps["turbo"](np.linspace(0.06, 0.94, len(codebook)))
    return ListedColormap(list(colours))


def bare(axes: Axes, title: str = "") -> None:
    """Remove ticks and frame, set the title."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title)


def outline(axes: Axes, mask: Tensor, colour: str = "white", width: float = 1.2) -> None:
    """Draw the outline of a mask, if there is anything in it.

    Args:
        axes (Axes): Where.
        mask (Tensor): Bool, ``(height, width)``.
        colour (str): Of the line.
        width (float): Of the line, in points.
    """
    if bool(mask.any()) and not bool(mask.all()):
        axes.contour(mask.numpy().astype(float), levels=[0.5], colors=[colour], linewidths=[width])


def with_tint(colours: Tensor, mask: Tensor, tint: Sequence[float] = (1.0, 0.1, 0.1), share: float = 0.45) -> Tensor:
    """Tint the part of an image that lies inside a mask.

    Args:
        colours (Tensor): In 0..1, ``(3, height, width)``.
        mask (Tensor): Bool, ``(1, height, width)``.
        tint (Sequence[float]): Red, green and blue in 0..1.
        share (float): Of the tint.

    Returns:
        Tensor: Same shape as the image.
    """
    return torch.where(mask, colours * (1 - share) + share * torch.tensor(list(tint))[:, None, None], colours)
