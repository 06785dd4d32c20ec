# SPDX-License-Identifier: Apache-2.0
"""Figures of a benchmark's report."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import NullFormatter, ScalarFormatter

from . import pictures
from .benchmark_metrics import RARITIES

if TYPE_CHECKING:
    from .report import Benchmark

GOOD, DEFECT = "#0072B2", "#D55E00"
ROWS = 6


def quality_against_cost(benchmark: Benchmark, folder: Path) -> list[tuple[Path, str]]:
    """Image AUROC and pixel AP against latency and memory.

    Args:
        benchmark (Benchmark): The results.
        folder (Path): For the figure.

    Returns:
        list[tuple[Path, str]]: File and caption.
    """
    costs = (
        ("latency, ms (batch 1)", lambda result: result["speed"]["latency"]["p50_ms"]),
        ("peak memory of inference, MB", _inference_memory),
    )
    metrics = (("image_AUROC", "image AUROC, %"), ("pixel_AP", "pixel AP, %"))
    with pictures.style():
        figure = pictures.new_figure(9, 6.4)
        axes = figure.subplots(2, 2)
        for row, (metric, label) in zip(axes, metrics, strict=True):
            for place, (cost, find) in zip(row, costs, strict=True):
                _scatter(place, benchmark, metric, find)
                place.set_xlabel(cost)
                place.set_ylabel(label)
        figure.tight_layout()
        file = folder / "quality_against_cost.png"
        pictures.save(figure, file, dpi=90)
    return [(file, "Mean quality of all jobs against median cost; better is up and to the left.")]


def _inference_memory(result: dict[str, Any]) -> float | None:
    memory = result["memory"]
    return memory.get("inference_device_mb") or memory.get("inference_mb")


def _scatter(axes: Axes, benchmark: Benchmark, metric: str, find: Any) -> None:  # noqa: ANN401
    for number, model in enumerate(benchmark.models):
        done = [result for result in benchmark.done() if result["job"]["model"]["name"] == model]
        costs = [cost for cost in map(find, done) if cost is not None]
        values = [value for result in done if (value := result["metrics"][metric]) is not None]
        if not costs or not values:
            continue
        x, y = float(np.median(costs)), 100 * mean(values)
        axes.plot(x, y, "o", ms=9, color=pictures.MARKS[number % len(pictures.MARKS)], mec="#333333", mew=0.7)
        axes.annotate(model, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.ticklabel_format(axis="x", style="plain")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.4, high * 1.9)
    ticks = [base * 10**power for power in range(-1, 6) for base in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low / 1.4 <= tick <= high * 1.9])
    axes.margins(y=0.2)
    axes.grid(alpha=0.25)


def score_histograms(benchmark: Benchmark, folder: Path) -> tuple[Path, str]:
    """Image scores of good and defective images, per model and category.

    Args:
        benchmark (Benchmark): The results.
        folder (Path): For the figure.

    Returns:
        tuple[Path, str]: File and caption.
    """
    with pictures.style():
        rows, columns = len(benchmark.places), len(benchmark.models)
        figure = pictures.new_figure(0.6 + 2.6 * columns, 0.6 + 1.35 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for line, place in zip(axes, benchmark.places, strict=True):
            for where, model in zip(line, benchmark.models, strict=True):
                results = [result for result in benchmark.of(model, place) if result["status"] == "done"]
                _histogram(where, results, benchmark.of(model, place))
                where.set_title(model if place == benchmark.places[0] else "")
            line[0].set_ylabel(place[1] or place[0])
        figure.tight_layout()
        file = folder / "scores.png"
        pictures.save(figure, file, dpi=80)
    return (
        file,
        "Raw image scores of the first seed: good images blue, defective ones orange. Each model has its own unit.",
    )


def _histogram(axes: Axes, results: list[dict[str, Any]], planned: list[dict[str, Any]]) -> None:
    axes.set_yticks([])
    if not results:
        statuses = "/".join(sorted({result["status"] for result in planned})) or "not planned"
        axes.text(0.5, 0.5, statuses, ha="center", va="center", transform=axes.transAxes, color="#a33", style="italic")
        axes.set_xticks([])
        return
    scores = np.array([image["score"] for image in results[0]["images"]])
    anomalous = np.array([image["anomalous"] for image in results[0]["images"]])
    bins = np.linspace(scores.min(), scores.max() + 1e-12, 31)
    for chosen, colour in ((~anomalous, GOOD), (anomalous, DEFECT)):
        axes.hist(scores[chosen], bins=bins.tolist(), color=colour, alpha=0.65)
    axes.locator_params(axis="x", nbins=4)


def test_images(benchmark: Benchmark, folder: Path) -> list[tuple[Path, str]]:
    """The same test images for all models, worst cases first.

    Args:
        benchmark (Benchmark): The results.
        folder (Path): For the figures.

    Returns:
        list[tuple[Path, str]]: One file and caption per category that has any maps.
    """
    found = []
    for place in benchmark.places:
        shown: dict[str, tuple[dict[str, Any], Any]] = {}
        for model in benchmark.models:
            for result in benchmark.of(model, place):
                held = benchmark.thumbnails.get(result.get("name", ""))
                if (
                    result["status"] == "done"
                    and held is not None
                    and result.get("rarity_scale")
                    and model not in shown
                ):
                    shown[model] = (result, np.load(held))
        if shown:
            file = folder / f"images_{'_'.join(filter(None, place))}.jpg"
            _draw_images(benchmark, place, shown, file)
            caption = (
                f"{place[1] or place[0]}: test images on which the models err most, then typical ones. All maps have "
                "one scale, whatever unit a model has: how rare such a value is among the pixels of good test images "
                "(brightest: rarer than one in 100,000). True defects are outlined; below each map is the share of "
                "images of the other class that the score puts on the wrong side."
            )
            found.append((file, caption))
    return found


def _errors(result: dict[str, Any]) -> np.ndarray:
    """For each image, the share of images of the other class that its score puts on the wrong side."""
    scores = np.array([image["score"] for image in result["images"]])
    anomalous = np.array([image["anomalous"] for image in result["images"]])
    errors = np.zeros(len(scores))
    for index, (score, defect) in enumerate(zip(scores, anomalous, strict=True)):
        others = scores[anomalous != defect]
        errors[index] = float(np.mean(others >= score if defect else others <= score)) if len(others) else 0.0
    return errors


def choose_images(errors: list[np.ndarray], anomalous: np.ndarray, count: int = ROWS) -> list[int]:
    """Images worth showing: the worst defects and good images over all models, then ordinary ones.

    Args:
        errors (list[np.ndarray]): Per model, the error of each image.
        anomalous (np.ndarray): Whether an image is anomalous.
        count (int): Images to choose.

    Returns:
        list[int]: Indices without repetition.
    """
    worst, together = np.max(errors, axis=0), np.mean(errors, axis=0)
    badness = worst + 1e-3 * together
    defects, good = np.flatnonzero(anomalous), np.flatnonzero(~anomalous)
    defects, good = defects[np.argsort(-badness[defects])], good[np.argsort(-badness[good])]
    chosen = [*defects[:2], *good[:2], *defects[len(defects) // 2 :][:1], *good[-1:]]
    rest = [*defects[2:], *good[2:]]
    return list(dict.fromkeys(int(index) for index in [*chosen, *rest]))[:count]


def _draw_images(
    benchmark: Benchmark, place: tuple[str, str], shown: dict[str, tuple[dict[str, Any], Any]], file: Path
) -> None:
    first = next(iter(shown.values()))
    anomalous = np.array([image["anomalous"] for image in first[0]["images"]])
    errors = {model: _errors(result) for model, (result, _) in shown.items()}
    paths = [image["path"] for image in first[0]["images"]]
    agreeing = [e for model, e in errors.items() if [i["path"] for i in shown[model][0]["images"]] == paths]
    chosen = choose_images(agreeing, anomalous)
    columns = 1 + len(benchmark.models)
    with pictures.style():
        figure = pictures.new_figure(1.65 * columns + 0.9, 1.92 * len(chosen) + 0.3)
        axes = figure.subplots(len(chosen), columns, squeeze=False)
        width = figure.get_figwidth()
        figure.subplots_adjust(
            left=0.01,
            right=1 - 0.85 / width,
            top=1 - 0.3 / figure.get_figheight(),
            bottom=0.03,
            wspace=0.06,
            hspace=0.16,
        )
        norm = Normalize(RARITIES[0], RARITIES[-1])
        drawn = None
        for line, index in zip(axes, chosen, strict=True):
            held = first[1]
            image = torch.from_numpy(held["images"][index]).float() / 255
            mask = torch.from_numpy(held["masks"][index]) if "masks" in held else None
            pictures.show_colours(line[0], image)
            line[0].set_xlabel(paths[index], fontsize=7, labelpad=2)
            for where, model in zip(line[1:], benchmark.models, strict=True):
                pictures.bare(where)
                if model not in shown or [i["path"] for i in shown[model][0]["images"]] != paths:
                    status = "/".join(sorted({result["status"] for result in benchmark.of(model, place)}))
                    where.text(
                        0.5, 0.5, status if status != "done" else "no map", ha="center", va="center", color="#a33"
                    )
                    continue
                result, own = shown[model]
                rarity = np.interp(own["maps"][index], np.maximum.accumulate(result["rarity_scale"]), RARITIES)
                drawn = where.imshow(rarity, cmap=pictures.MAP_COLOURS, norm=norm, interpolation="nearest")
                where.set_xlabel(f"wrong side: {100 * errors[model][index]:.0f} %", fontsize=7, labelpad=2)
                if mask is not None:
                    pictures.outline(where, mask, "#7FDBFF", 0.9)
            if mask is not None:
                pictures.outline(line[0], mask, "#ff3b30", 1.0)
        for where, title in zip(axes[0], ["image", *benchmark.models], strict=True):
            where.set_title(title)
        if drawn is not None:
            box = figure.add_axes((1 - 0.75 / width, 0.3, 0.14 / width, 0.4))
            bar = figure.colorbar(drawn, cax=box, ticks=range(6))
            bar.ax.set_yticklabels(["any", "10 %", "1 %", "0.1 %", "0.01 %", "0.001 %"], fontsize=7)
            bar.ax.set_title("as rare as", fontsize=7, loc="left")
        pictures.save(figure, file, dpi=80)
