# SPDX-License-Identifier: Apache-2.0
"""The picture of ``anomalib-cpr speed``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("backbone", "heads", "retrieval", "gather", "matching", "scoring")


def machine(environment: dict[str, Any]) -> str:
    """What the figures were measured on, for titles."""
    return environment["accelerator"] or f"{environment['processor']}, {environment['threads']} threads"


def plot(rows: Sequence[dict[str, Any]], environment: dict[str, Any], path: Path) -> None:
    """Latency against memory, and the stages of CPR.

    Args:
        rows (Sequence[dict[str, Any]]): Of the JSON file; those of the smallest batch are drawn.
        environment (dict[str, Any]): Of the JSON file.
        path (Path): Of the picture.
    """
    import matplotlib as mpl  # noqa: PLC0415 - takes a second

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    batch = min(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    measured, staged = ([row for row in rows if row[key]] for key in ("peak_mb", "stages_ms"))
    panels = [(_memory, measured), (_stages, staged)]
    panels = [(draw, own) for draw, own in panels if own] or [(_latency, rows)]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5.2), layout="constrained", squeeze=False)
    for (draw, own), axis in zip(panels, axes[0], strict=True):
        draw(axis, own, batch)
    figure.suptitle(
        f"{machine(environment)}, {environment['precision']}, {environment['size']} px, K = {environment['k']}, "
        f"{environment['gallery']} training images"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _memory(axis: Any, rows: Sequence[dict[str, Any]], batch: int) -> None:  # noqa: ANN401 - matplotlib's Axes
    """Latency against peak memory."""
    for row in rows:
        own = row["name"].startswith("cpr")
        place = (row["ms_median"], row["peak_mb"])
        axis.scatter(*place, s=70, color="tab:blue" if own else "tab:gray", zorder=3)
        axis.annotate(row["name"], place, xytext=(7, 5), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel=f"ms per batch of {batch} (median)", ylabel="peak memory, MB")
    axis.set_title("Lower left is better")
    axis.margins(0.18)
    axis.grid(visible=True, which="both", alpha=0.25)


def _stages(axis: Any, rows: Sequence[dict[str, Any]], batch: int) -> None:  # noqa: ANN401
    """Stages of CPR on top of one another."""
    from matplotlib import colormaps  # noqa: PLC0415

    # The naive way would squeeze all others into a corner: it is cut off, with its length written beside it.
    limit = 1.25 * max((sum(row["stages_ms"].values()) for row in rows if row["name"] != "naive"), default=0) or None
    colours = dict(zip(STAGES, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    for position, row in enumerate(rows):
        start = 0.0
        for stage in STAGES:
            width = row["stages_ms"].get(stage, 0.0)
            axis.barh(position, width, left=start, color=colours[stage], label=stage if position == 0 else None)
            start += width
        if limit and start > limit:
            axis.text(0.99 * limit, position, f"{start:.0f} ms", ha="right", va="center", color="white", weight="bold")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"ms per batch of {batch}, stages", xlim=(0, limit))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(STAGES), fontsize=8, frameon=False)


def _latency(axis: Any, rows: Sequence[dict[str, Any]], batch: int) -> None:  # noqa: ANN401
    """Latency alone, where nothing else was measured."""
    axis.barh([row["name"] for row in rows], [row["ms_median"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlabel=f"ms per batch of {batch} (median)")
