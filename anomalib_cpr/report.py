# SPDX-License-Identifier: Apache-2.0
"""``anomalib-cpr report``: Markdown and one self-contained HTML page from the results of a benchmark.

What was not measured is shown as missing, what failed as failed.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import report_figures
from .published import find as find_published
from .report_document import Block, Folded, Heading, Picture, Table, Text, write_document

METRICS = {
    "image_AUROC": "Image AUROC",
    "pixel_AUROC": "Pixel AUROC",
    "pixel_AP": "Pixel AP",
    "AUPRO": "AUPRO (FPR up to 0.3)",
    "image_AP": "Image AP",
    "image_F1max": "Image F1max",
    "pixel_F1max": "Pixel F1max",
}
MISSING = "missing"
NONE = "-"
FORMAT = 1


@dataclass
class Benchmark:
    """Results of a benchmark, and what they should have been.

    Attributes:
        title (str): Of the report.
        notes (str): Said at its top.
        models (list[str]): In the order of the configuration.
        model_notes (dict[str, str]): What to know about a model.
        places (list[tuple[str, str]]): Data set and category, in order.
        seeds (list[int]): All seeds.
        jobs (list[dict]): What was planned.
        results (dict[str, dict]): By the name of the job.
        thumbnails (dict[str, Path]): By the name of the job.
        left_out (int): Results that belong to no planned job.
    """

    title: str = ""
    notes: str = ""
    models: list[str] = field(default_factory=list)
    model_notes: dict[str, str] = field(default_factory=dict)
    places: list[tuple[str, str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    thumbnails: dict[str, Path] = field(default_factory=dict)
    left_out: int = 0

    def of(self, model: str, place: tuple[str, str]) -> list[dict[str, Any]]:
        """Results of a model at a place, one per seed; of a job without result, its plan with status ``missing``."""
        planned = [job for job in self.jobs if job["model"] == model and (job["data"], job["category"] or "") == place]
        return [self.results.get(job["name"], {**job, "status": MISSING}) for job in planned]

    def done(self) -> list[dict[str, Any]]:
        """Results of all jobs that were done, in the order of the plan."""
        found = [self.results[job["name"]] for job in self.jobs if job["name"] in self.results]
        return [result for result in found if result["status"] == "done"]


def load(folders: Sequence[Path]) -> Benchmark:
    """Read the results of one or more benchmarks.

    Args:
        folders (Sequence[Path]): Output folders of ``anomalib-cpr benchmark``.

    Returns:
        Benchmark: All of them.

    Raises:
        FileNotFoundError: If a folder holds no benchmark.
        ValueError: If a result was written by a later version.
    """
    benchmark = Benchmark()
    titles, notes = [], []
    for folder in folders:
        plan_file = folder / "plan.json"
        if not plan_file.is_file():
            raise FileNotFoundError(f"{folder} holds no results of `anomalib-cpr benchmark` (no plan.json).")
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
        titles.append(plan["title"])
        notes.append(plan["notes"])
        for model in plan["models"]:
            benchmark.models += [model["name"]] if model["name"] not in benchmark.models else []
            benchmark.model_notes[model["name"]] = model["notes"]
        names = set()
        for job in plan["jobs"]:
            names.add(job["name"])
            benchmark.jobs.append(job)
            place = (job["data"], job["category"] or "")
            benchmark.places += [place] if place not in benchmark.places else []
            benchmark.seeds += [job["seed"]] if job["seed"] not in benchmark.seeds else []
        for file in sorted((folder / "jobs").glob("*.json")):
            if file.stem not in names:
                benchmark.left_out += 1
                continue
            result = json.loads(file.read_text(encoding="utf-8"))
            if result.get("format", FORMAT) > FORMAT:
                raise ValueError(f"{file} has format {result['format']}; this version reads up to {FORMAT}.")
            result["name"] = file.stem
            benchmark.results[file.stem] = result
            thumbnails = folder / "thumbnails" / f"{file.stem}.npz"
            if thumbnails.is_file():
                benchmark.thumbnails[file.stem] = thumbnails
    benchmark.title, benchmark.notes = " / ".join(dict.fromkeys(titles)), " ".join(dict.fromkeys(filter(None, notes)))
    return benchmark


def write(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Write the report.

    Args:
        benchmark (Benchmark): From :func:`load`.
        folder (Path): Gets ``report.md``, ``report.html`` and ``figures/``.

    Returns:
        list[Path]: The two reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return write_document(compose(benchmark, folder / "figures"), benchmark.title, folder)


def compose(benchmark: Benchmark, figures: Path) -> list[Block]:
    """Put the report together.

    Args:
        benchmark (Benchmark): The results.
        figures (Path): Folder for the figures.

    Returns:
        list[Block]: In order.
    """
    done = benchmark.done()
    blocks: list[Block] = [Heading(benchmark.title, 1)]
    if benchmark.notes:
        blocks.append(Text([benchmark.notes]))
    blocks.append(Text([_state(benchmark)]))
    blocks += [Heading("Protocol"), Text(_protocol(benchmark, done), bullets=True)]
    blocks += [Heading("Environment"), Text(_environment(done), bullets=True)]
    blocks += [Heading("Quality"), *_quality(benchmark)]
    blocks += [Heading("Cost"), *_cost(benchmark)]
    if done:
        blocks += [Picture(*found) for found in report_figures.quality_against_cost(benchmark, figures)]
        blocks += [Heading("Scores"), Picture(*report_figures.score_histograms(benchmark, figures))]
        pictures = report_figures.test_images(benchmark, figures)
        if pictures:
            blocks += [Heading("The same images for all models"), *(Picture(*found) for found in pictures)]
    blocks += _failures(benchmark)
    blocks.append(Folded("Configuration of each job", [_configurations(benchmark)]))
    return blocks


def _state(benchmark: Benchmark) -> str:
    found = [benchmark.results.get(job["name"], {"status": MISSING})["status"] for job in benchmark.jobs]
    counts = {status: found.count(status) for status in ("done", "failed", "timeout", MISSING)}
    text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    other = f" {benchmark.left_out} results of other configurations are left out." if benchmark.left_out else ""
    return f"{len(found)} jobs: {text}.{other}"


def _protocol(benchmark: Benchmark, done: Sequence[dict[str, Any]]) -> list[str]:
    validation = sorted({result["data"]["validation"] for result in done})
    sizes = sorted({"x".join(map(str, result["job"]["evaluation"]["size"])) for result in done})
    unvalidated = [r for r in done if r["job"]["trainer"].get("limit_val_batches") == 0]
    chosen = " (anomalib validates on the test set by default)" if "same_as_test" in validation else ""
    used = "; no model was validated or selected on them here" if done and len(unvalidated) == len(done) else ""
    lines = [
        "All metrics are computed on raw scores and raw anomaly maps, before any threshold or normalisation.",
        (
            f"Maps of all models are compared at {' and '.join(sizes) or MISSING} pixels (bilinear); true masks are "
            "resized bilinearly without antialiasing and count where > 0.5. What a centre crop removes is normal."
        ),
        (
            "AUROC: area under the receiver operating characteristic. AP: average precision, the sum over thresholds "
            "of precision times the gain in recall. F1max: F1 at the threshold that is best **on the test set "
            "itself**, an upper bound. AUPRO: area under the per-region overlap up to a false positive rate of 0.3, "
            "divided by 0.3. All pixels of a category are pooled."
        ),
        f"Validation data: {', '.join(validation) or MISSING}{chosen}{used}.",
        f"Seeds: {', '.join(map(str, benchmark.seeds))}. Where there are several, mean ± standard deviation.",
        (
            "Latency: from an image in memory to score and map in memory, resizing and normalising included, batch 1, "
            "after a warm-up, synchronised; with decoding, reading the file is included. p50 is the median."
        ),
        "Memory: peak of the job's own process, in MB of 10^6 bytes; inference after the peak was reset (Linux).",
    ]
    lines += [f"{name}: {note}" for name, note in benchmark.model_notes.items() if note]
    return lines


def _environment(done: Sequence[dict[str, Any]]) -> list[str]:
    if not done:
        return [MISSING]
    lines = []
    for label, key in (("Hardware", "hardware"), ("Versions", "versions")):
        texts = dict.fromkeys(", ".join(f"{k} {v}" for k, v in result[key].items()) for result in done)
        lines += [f"{label}: {text}" for text in texts]
    threads = sorted({result["speed"]["threads"] for result in done})
    commits = sorted({str(result["commit"] or "not from a repository") for result in done})
    lines.append(f"Threads of torch: {', '.join(map(str, threads))}. Commit of anomalib-cpr: {', '.join(commits)}.")
    busy = [r for r in done if (r["speed"]["load_average"] or 0) > r["hardware"]["cores"] + 0.5]
    if busy:
        lines.append(
            f"The machine was busy with other work in {len(busy)} of {len(done)} jobs (load average above its number "
            "of cores): times are too long there, and only roughly comparable."
        )
    return lines


# --- quality


def cell(results: Sequence[dict[str, Any]], metric: str) -> str:
    """Mean over seeds, with spread, or why there is none.

    Args:
        results (Sequence[dict]): One per seed.
        metric (str): Name of the metric.

    Returns:
        str: In percent.
    """
    values = [result["metrics"][metric] for result in results if result["status"] == "done"]
    values = [value for value in values if value is not None]
    others = sorted({result["status"] for result in results if result["status"] != "done"})
    if not results:
        return "not planned"
    if not values:
        return "/".join(others) if others else NONE
    text = f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")
    return text + (f" ({len(values)} of {len(results)}: {'/'.join(others)})" if others else "")


def average(benchmark: Benchmark, model: str, data: str, metric: str) -> tuple[float | None, str]:
    """Mean over categories of the mean over seeds, and how it is shown.

    Args:
        benchmark (Benchmark): The results.
        model (str): Name of the model.
        data (str): Name of the data set.
        metric (str): Name of the metric.

    Returns:
        tuple[float | None, str]: Value in 0..1, None if a category has none, and text in percent: with spread over
            seeds where there are several, with the number of categories where some have no value.
    """
    places = [place for place in benchmark.places if place[0] == data]
    by_seed: dict[int, list[float]] = {}
    found: list[float] = []
    for place in places:
        values: list[float] = []
        for result in benchmark.of(model, place):
            if result["status"] == "done" and result["metrics"].get(metric) is not None:
                values.append(result["metrics"][metric])
                by_seed.setdefault(result["job"]["seed"], []).append(values[-1])
        if values:
            found.append(mean(values))
    if not found:
        statuses = {result["status"] for place in places for result in benchmark.of(model, place)} - {"done"}
        return None, "/".join(sorted(statuses)) or NONE
    text = f"{100 * mean(found):.1f}"
    if len(found) < len(places):
        return None, f"{text} ({len(found)} of {len(places)} categories)"
    complete = [mean(values) for values in by_seed.values() if len(values) == len(places)]
    if len(complete) > 1:
        text += f" ± {100 * stdev(complete):.1f}"
    return mean(found), text


def _bold_best(values: list[float | None], texts: list[str]) -> list[str]:
    known = [value for value in values if value is not None]
    best = max(known, default=None)
    return [
        f"**{text}**" if len(known) > 1 and value is not None and value == best else text
        for value, text in zip(values, texts, strict=True)
    ]


def _quality(benchmark: Benchmark) -> list[Block]:
    blocks: list[Block] = []
    for data in dict.fromkeys(place[0] for place in benchmark.places):
        places = [place for place in benchmark.places if place[0] == data]
        published = _published(benchmark, data)
        blocks.append(Heading(f"{data}: mean over {len(places)} categor{'y' if len(places) == 1 else 'ies'}, %", 3))
        rows = []
        for metric, title in METRICS.items():
            pairs = [average(benchmark, model, data, metric) for model in benchmark.models]
            own = _bold_best([value for value, _ in pairs], [text for _, text in pairs])
            rows.append([title, *own, *(_percent(entry["metrics"].get(metric, {}).get(None)) for entry in published)])
        labels = [entry["label"] for entry in published]
        caption = " ".join(f"{entry['label']}: {entry['source']}." for entry in published)
        if published:
            caption += " Published means are over all categories of the data set."
        blocks.append(Table(["", *benchmark.models, *labels], rows, caption))
        for metric, title in METRICS.items():
            rows = []
            for place in places:
                results = [benchmark.of(model, place) for model in benchmark.models]
                values = [_mean_of(found, metric) for found in results]
                own = _bold_best(values, [cell(found, metric) for found in results])
                theirs = [_percent(entry["metrics"].get(metric, {}).get(place[1])) for entry in published]
                rows.append([place[1] or data, *own, *theirs])
            table = Table(["", *benchmark.models, *labels], rows)
            if len(places) > 1 or published:
                blocks.append(Folded(f"{title} per category, %", [table]))
    blocks += _as_reported(benchmark)
    return blocks


def _mean_of(results: Sequence[dict[str, Any]], metric: str) -> float | None:
    values = [result["metrics"][metric] for result in results if result["status"] == "done"]
    values = [value for value in values if value is not None]
    return mean(values) if values else None


def _published(benchmark: Benchmark, data: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for result in benchmark.done():
        job = result["job"]
        if job["data"]["name"] == data:
            found += find_published(job["model"]["class_path"], job["data"]["class_path"])
    return list({(entry["label"], entry["source"]): entry for entry in found}.values())


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _as_reported(benchmark: Benchmark) -> list[Block]:
    """How far anomalib's own numbers, on normalised and clamped scores, are from those on raw ones.

    Without a validation there is nothing to normalise with, and the numbers mean nothing.
    """
    gaps = [
        abs(result["as_anomalib_reports"][name] - result["metrics"][name])
        for result in benchmark.done()
        for name in ("image_AUROC", "pixel_AUROC")
        if result["job"]["trainer"].get("limit_val_batches") != 0
        and name in result["as_anomalib_reports"]
        and result["metrics"].get(name) is not None
    ]
    if not gaps:
        return []
    return [
        Text(
            [
                (
                    "anomalib's own test reports AUROC on scores that its post-processor has normalised and clamped, "
                    "and at each model's own size; from those on raw scores above it "
                    f"differs by at most {100 * max(gaps):.2f} points."
                )
            ]
        )
    ]


# --- cost


def _cost(benchmark: Benchmark) -> list[Block]:
    speeds, fits, stages = [], [], []
    first = None
    for model in benchmark.models:
        done = [r for place in benchmark.places for r in benchmark.of(model, place) if r["status"] == "done"]
        if not done:
            statuses = {r["status"] for place in benchmark.places for r in benchmark.of(model, place)}
            gap = "/".join(sorted(statuses)) or MISSING
            speeds.append([model, *[gap] * 6])
            fits.append([model, *[gap] * 9])
            continue
        latency = _median(done, "speed", "latency", "p50_ms")
        first = first or latency
        speeds.append(
            [
                model,
                _number(latency),
                _number(_median(done, "speed", "latency", "p95_ms")),
                _number(_median(done, "speed", "latency_with_decode", "p50_ms")),
                f"{latency / first:.2f}" if latency and first else MISSING,
                _number(_median(done, "speed", "throughput", "images_per_second")),
                str(done[0]["speed"]["throughput"]["batch"]),
            ]
        )
        steps = sorted({result["fit"]["steps"] for result in done})
        fits.append(
            [
                model,
                _number(_median(done, "fit", "seconds")),
                "-".join(map(str, (steps[0], steps[-1]) if len(steps) > 1 else steps)),
                str(done[0]["fit"]["train_batch_size"]),
                _number(_median(done, "memory", "fit_mb")),
                _number(_median(done, "memory", "inference_mb")),
                _number(_median(done, "memory", "inference_device_mb")),
                _number(_median(done, "size", "bank_mb")),
                _number(_median(done, "size", "checkpoint_mb")),
                _number(_median(done, "size", "parameters_million")),
            ]
        )
        stages.append([model, _stages(done, "stages"), _stages(done, "reported_stages") or NONE])
    return [
        Table(
            [
                "",
                "latency p50, ms",
                "p95, ms",
                "p50 with decoding, ms",
                "times the first model's",
                "images per second",
                "at batch",
            ],
            speeds,
            "Medians over all jobs of a model.",
        ),
        Table(
            [
                "",
                "fit, s",
                "steps",
                "batch",
                "peak fit, MB",
                "peak inference, MB",
                "on the GPU, MB",
                "bank, MB",
                "checkpoint, MB",
                "parameters, million",
            ],
            fits,
            f"Of the peaks, importing the libraries takes {_number(_median(benchmark.done(), 'memory', 'imports_mb'))}"
            " MB. Bank: all buffers of the model but those of batch normalisation.",
        ),
        Folded("Fit by stages, s", [Table(["", "stages", "as the model itself reports"], stages)]),
    ]


def _median(results: Sequence[dict[str, Any]], *path: str) -> float | None:
    values = []
    for result in results:
        value: Any = result
        for key in path:
            value = value.get(key) if value is not None else None
        if value is not None:
            values.append(float(value))
    return sorted(values)[len(values) // 2] if values else None


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _stages(done: Sequence[dict[str, Any]], kind: str) -> str:
    names = dict.fromkeys(name for result in done for name in result["fit"][kind])
    return ", ".join(f"{name} {_number(_median(done, 'fit', kind, name))}" for name in names)


# --- the rest


def _failures(benchmark: Benchmark) -> list[Block]:
    rows = []
    for job in benchmark.jobs:
        result = benchmark.results.get(job["name"])
        if result is not None and result["status"] == "done":
            continue
        reason = result["reason"] if result is not None else "not run"
        status = result["status"] if result is not None else MISSING
        rows.append([job["model"], job["category"] or job["data"], str(job["seed"]), status, reason[:300]])
    if not rows:
        return []
    return [Heading("Failed and missing"), Table(["model", "category", "seed", "status", "reason"], rows)]


def _configurations(benchmark: Benchmark) -> Block:
    rows = []
    for model in benchmark.models:
        for result in benchmark.results.values():
            job = result["job"]
            if job["model"]["name"] == model:
                shown = {key: value for key, value in job["model"].items() if key != "name"}
                rows.append(
                    [model, *(json.dumps(value) for value in (shown, job["data"]["init_args"], job["trainer"]))]
                )
                break
    return Table(["model", "model", "data (of its first job)", "trainer"], rows)


# --- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser (argparse.ArgumentParser): Parser of the subcommand.
    """
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output of `anomalib-cpr benchmark`")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="of the report; default: the first FOLDER")
    parser.add_argument(
        "--without-images", action="store_true", help="show no test images, where their licence forbids passing them on"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0.
    """
    try:
        benchmark = load(arguments.folders)
        if arguments.without_images:
            benchmark.thumbnails.clear()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    for file in write(benchmark, arguments.output or arguments.folders[0]):
        print(file)
    return 0
