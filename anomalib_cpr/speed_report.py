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
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")

    for row in rows:
        if row["peak_mb"] is None:
            continue
        own = row["name"].startswith("cpr")
        left.scatter(row["ms_median"], row["peak_mb"], s=70, color="tab:blue" if own else "tab:gray", zorder=3)
        left.annotate(row["name"], (row["ms_median"], row["peak_mb"]), xytext=(7, 5), textcoords="offset points")
    left.set(xscale="log", yscale="log", xlabel=f"ms per batch of {batch} (median)", ylabel="peak memory, MB")
    left.set_title("Lower left is better")
    left.margins(0.18)
    left.grid(visible=True, which="both", alpha=0.25)

    staged = [row for row in rows if row["stages_ms"]]
    # The naive way would squeeze all others into a corner: cut off, with its length written beside it.
    limit = 1.25 * max((row["ms_median"] for row in staged if row["name"] != "naive"), default=0) or None
    colours = dict(zip(STAGES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for position, row in enumerate(staged):
        start = 0.0
        for stage in STAGES:
            width = row["stages_ms"].get(stage, 0.0)
            right.barh(position, width, left=start, color=colours[stage], label=stage if position == 0 else None)
            start += width
        if limit and start > limit:
            right.text(0.99 * limit, position, f"{start:.0f} ms", ha="right", va="center", color="white", weight="bold")
    right.set_yticks(range(len(staged)), [row["name"] for row in staged])
    right.invert_yaxis()
    right.set(xlabel=f"ms per batch of {batch}, stages", xlim=(0, limit))
    right.legend(loc="lower right")
    figure.suptitle(
        f"{machine(environment)}, {environment['precision']}, {environment['size']} px, K = {environment['k']}, "
        f"{environment['gallery']} training images"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
