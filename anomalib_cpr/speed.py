# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr speed``: latency, throughput and memory of CPR and its peers, side by side.

All models run in one process, one after the other, round by round, so that whatever else the machine does falls on all
of them. Peak memory is measured apart, one fresh process per model.
"""

import argparse
import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .command_arguments import output_file
from .messages import first_line
from .recorded_backbone import record_graph
from .speed_models import FUSED, FUSED_ROWS, ROWS, NaiveCpr, Row, Setting, build, cpr_stages
from .speed_report import STAGES, machine, plot
from .torch_model import CprModel

WARM_UP = 2
BUSY = 0.1  # processors of others, above which the clock measures them too
TOLERANCE = 1e-5  # between the maps of the naive way and ours
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Measurement:
    """A row of the result, with one batch size.

    Attributes:
        name (str): Of the model.
        device (str): Where it ran.
        batch (int): Images at once.
        size (int): Side of the images in pixels.
        ms_median (float): Time of a batch, image tensors in, maps and scores out.
        ms_p95 (float): 95th percentile.
        ms_min (float): The fastest.
        cpu_ms (float | None): Median of the CPU time of all threads, on a CPU. Shared among the threads, it is what an
            idle machine would take at best; on a busy one it says more than the clock.
        images_per_s (float): Throughput at the median.
        peak_mb (float | None): Memory beyond that of the imported libraries at its highest: weights, bank, temporaries.
        working_mb (float | None): The part of it that inference takes beyond the built model.
        bank_mb (float): Memory of the bank.
        checkpoint_mb (float): Weights and bank.
        stages_ms (dict[str, float]): Medians of the stages, of CPR only.
        stages_cpu_ms (dict[str, float]): The same of the CPU time of all threads, on a CPU.
    """

    name: str
    device: str
    batch: int
    size: int
    ms_median: float
    ms_p95: float
    ms_min: float
    cpu_ms: float | None
    images_per_s: float
    peak_mb: float | None
    working_mb: float | None
    bank_mb: float
    checkpoint_mb: float
    stages_ms: dict[str, float] = field(default_factory=dict)
    stages_cpu_ms: dict[str, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser (argparse.ArgumentParser): Of the subcommand.
    """
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="models to measure; all by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="autocast of the networks")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--k", type=int, default=10, help="references per image")
    parser.add_argument("--size", type=int, default=320, help="side of CPR's images in pixels")
    parser.add_argument("--gallery", type=int, default=209, help="training images in the banks")
    parser.add_argument(
        "--rounds", type=int, default=20, help="measurements per model at batch 1; fewer at larger ones"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="skip the peak memory, which takes a process per model"
    )
    parser.add_argument("--fused", action="store_true", help="CPR with the Triton kernel as well; CUDA only")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay CPR from CUDA graphs; CUDA only")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="draw latency, memory and stages (PNG)")
    parser.add_argument("--only-memory", choices=ROWS + FUSED_ROWS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, write.

    Args:
        arguments (argparse.Namespace): Of :func:`add_arguments`.

    Returns:
        int: Exit code: 1 if two ways of one model give different maps.
    """
    if min(arguments.k, arguments.gallery, arguments.rounds, *arguments.batch) < 1:
        raise SystemExit("--k, --gallery, --rounds and --batch must be at least 1.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device, setting = torch.device(arguments.device), Setting(arguments.size, arguments.k, arguments.gallery)
    if device.type != "cuda" and (arguments.fused or arguments.cuda_graphs):
        raise SystemExit(f"--fused and --cuda-graphs need a CUDA device, not --device {arguments.device}.")
    precision, others = PRECISIONS[arguments.precision], OtherWork()
    if arguments.only_memory:
        print(json.dumps(peak_memory(arguments.only_memory, setting, device, precision, arguments.batch)))
        return 0

    console = Console(width=None if sys.stdout.isatty() else 120)
    names = [*arguments.rows, *(name for name in FUSED_ROWS if arguments.fused and _plain(name) in arguments.rows)]
    memory = {} if arguments.no_memory else {name: _memory_apart(name, arguments, console) for name in names}
    rows = build_rows([name for name in names if memory.get(name, True)], setting, device, console)
    agrees = compare(rows, setting, device, console)
    results: list[Measurement] = []
    for batch in arguments.batch:
        rounds = max(3, arguments.rounds // batch)
        console.print(f"Batch {batch}: {rounds} rounds")
        peaks = {name: pairs[batch] for name, pairs in memory.items() if pairs}
        results += measure(rows, batch, rounds, device, precision, peaks, arguments.cuda_graphs)
    environment = {**describe_environment(arguments, device), **others.so_far()}
    _show(results, environment, console)
    others.warn(console)
    if arguments.json:
        content = {"environment": environment, "rows": [_rounded(asdict(result)) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        plot([asdict(result) for result in results], environment, arguments.plot)
    return 0 if agrees else 1


def build_rows(names: Sequence[str], setting: Setting, device: torch.device, console: Console) -> list[Row]:
    """Build the models; one that cannot be built is named and left out.

    Args:
        names (Sequence[str]): Of :data:`ROWS`.
        setting (Setting): Sizes.
        device (torch.device): Where they run.
        console (Console): For messages.

    Returns:
        list[Row]: What was built.
    """
    rows: list[Row] = []
    shared: CprModel | None = None
    for name in sorted(names, key=lambda name: name != "cpr"):
        try:
            rows.append(build(name, setting, device, shared))
        except (ValueError, RuntimeError, ImportError) as error:
            console.print(f"[yellow]{name} is left out: {first_line(error)}[/yellow]")
            continue
        if name == "cpr":
            shared = rows[-1].model  # type: ignore[assignment]
    return sorted(rows, key=lambda row: (*ROWS, *FUSED_ROWS).index(row.name))


def measure(
    rows: Sequence[Row],
    batch: int,
    rounds: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    memory: dict[str, tuple[float, float]] | None = None,
    cuda_graphs: bool = False,
) -> list[Measurement]:
    """Time all models round by round.

    Args:
        rows (Sequence[Row]): The models.
        batch (int): Images at once.
        rounds (int): Measurements per model, after a warm-up.
        device (torch.device): Where they are.
        precision (torch.dtype): Of autocast; float32 means none.
        memory (dict[str, tuple[float, float]] | None): Peak and working memory per model, in MB.
        cuda_graphs (bool): Capture CPR in a CUDA graph and replay it.

    Returns:
        list[Measurement]: In the order of the rows.
    """
    generator = torch.Generator().manual_seed(1)
    images = {row.size: torch.rand(batch, 3, row.size, row.size, generator=generator).to(device) for row in rows}
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    work: dict[str, list[float]] = {row.name: [] for row in rows}
    stages: dict[str, list[dict[str, tuple[float, float]]]] = {row.name: [] for row in rows}
    with torch.inference_mode(), _autocast(device, precision):
        calls: dict[str, Callable[[], Any]] = {}
        for row in rows:
            calls[row.name] = partial(row.model, images[row.size])
            if cuda_graphs and isinstance(row.model, CprModel):
                calls[row.name] = capture(row.model, images[row.size])
        for number in range(WARM_UP + rounds):
            for row in rows:
                _synchronise(device)
                start, start_work = time.perf_counter(), time.process_time()
                calls[row.name]()
                _synchronise(device)
                times[row.name].append(1e3 * (time.perf_counter() - start))
                work[row.name].append(1e3 * (time.process_time() - start_work))
                if number >= WARM_UP and isinstance(row.model, (CprModel, NaiveCpr)):
                    stages[row.name].append(_stages(row.model, images[row.size], device))
    results = []
    for row in rows:
        own = sorted(times[row.name][WARM_UP:])
        median = statistics.median(own)
        peak, working = (memory or {}).get(row.name, (None, None))
        results.append(
            Measurement(
                name=row.name,
                device=str(device),
                batch=batch,
                size=row.size,
                ms_median=median,
                ms_p95=own[min(len(own) - 1, int(0.95 * len(own)))],
                ms_min=own[0],
                cpu_ms=statistics.median(work[row.name][WARM_UP:]) if device.type == "cpu" else None,
                images_per_s=1e3 * batch / median,
                peak_mb=peak,
                working_mb=working,
                bank_mb=row.bank_mb,
                checkpoint_mb=row.checkpoint_mb,
                stages_ms=_stage_medians(stages[row.name], 0),
                stages_cpu_ms=_stage_medians(stages[row.name], 1) if device.type == "cpu" else {},
            )
        )
    return results


def capture(model: CprModel, images: Tensor) -> Callable[[], Any]:
    """Record an inference as a CUDA graph: a launch-bound network is then started by one call.

    Args:
        model (CprModel): On a CUDA device.
        images (Tensor): Of the shape that is to be replayed; new images are copied into it.

    Returns:
        Callable[[], Any]: Replays the graph and returns its (static) predictions.
    """
    graph, predictions = record_graph(lambda: model(images), images.device)

    def replay() -> Any:  # noqa: ANN401
        graph.replay()
        return predictions

    return replay


def _stages(model: CprModel | NaiveCpr, images: Tensor, device: torch.device) -> dict[str, tuple[float, float]]:
    """Milliseconds of each stage by the clock, and of all threads' CPU time."""
    result: dict[str, tuple[float, float]] = {}
    last = time.perf_counter(), time.process_time()

    def lap(stage: str) -> None:
        nonlocal last
        _synchronise(device)
        now = time.perf_counter(), time.process_time()
        result[stage] = 1e3 * (now[0] - last[0]), 1e3 * (now[1] - last[1])
        last = now

    if isinstance(model, CprModel):
        cpr_stages(model, images, lap)
    else:
        model.predict(images, lap=lap)
    return result


def _stage_medians(laps: Sequence[dict[str, tuple[float, float]]], clock: int) -> dict[str, float]:
    return {stage: statistics.median(one[stage][clock] for one in laps) for stage in (laps[0] if laps else ())}


def peak_memory(
    name: str, setting: Setting, device: torch.device, precision: torch.dtype, batches: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """Memory of one model in this process, which should do nothing else.

    Args:
        name (str): Of :data:`ROWS`.
        setting (Setting): Sizes.
        device (torch.device): Where it runs.
        precision (torch.dtype): Of autocast.
        batches (Sequence[int]): Batch sizes.

    Returns:
        dict[int, tuple[float, float]]: Per batch size, MB beyond the imported libraries at the highest, and the part of
            it that inference takes beyond the built model.
    """
    before = _resident(device)
    row = build(name, setting, device)
    result = {}
    with torch.inference_mode(), _autocast(device, precision):
        for batch in batches:
            images = torch.rand(batch, 3, row.size, row.size).to(device)
            _give_back_freed_memory()
            built = _resident(device)
            _reset_peak(device)
            row.model(images)
            peak = _peak(device)
            result[batch] = (peak - before, max(0.0, peak - built))
    return result


def _memory_apart(name: str, arguments: argparse.Namespace, console: Console) -> dict[int, tuple[float, float]] | None:
    """Peak memory of a model, from a process of its own; None if it cannot be built."""
    command = [sys.executable, "-m", "anomalib_cpr.cli", "speed", "--only-memory", name]
    for option in ("device", "precision", "threads", "k", "size", "gallery"):
        if getattr(arguments, option) is not None:
            command += [f"--{option}", str(getattr(arguments, option))]
    command += ["--batch", *map(str, arguments.batch)]
    console.print(f"Memory: {name}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this very program
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        console.print(f"[yellow]{name} is left out: {lines[-1] if lines else f'exit code {done.returncode}'}[/yellow]")
        return None
    return {int(batch): tuple(pair) for batch, pair in json.loads(done.stdout.splitlines()[-1]).items()}


def compare(rows: Sequence[Row], setting: Setting, device: torch.device, console: Console) -> bool:
    """Whether all ways of one model give the same maps: naive, plain, fused, replayed from a CUDA graph.

    Retrieval is discrete: where two distances tie in the last bit, two right programs may choose differently. That is
    reported, and the maps are compared with the references of one of them.

    Args:
        rows (Sequence[Row]): The models.
        setting (Setting): Sizes.
        device (torch.device): Where they are.
        console (Console): For the figures.

    Returns:
        bool: Whether no map differs by more than :data:`TOLERANCE`.
    """
    images = torch.rand(2, 3, setting.size, setting.size, generator=torch.Generator().manual_seed(2)).to(device)
    differences: dict[str, float] = {}
    # cuDNN's default, TF32, rounds what it convolves to 10 bits: it makes 1e-5 of a difference in the last bit.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for row in rows:
            model: Any = row.model
            if isinstance(model, NaiveCpr):
                references = model.model.retrieve(model.model.feature_extractor.finest(images))[0]
                result, own_references = model.predict(images, references)
                expected = model.model(images)
                if not torch.equal(references, own_references):
                    console.print("Naive and ours retrieve other references: a tie. Compared with ours.")
            elif row.name in FUSED_ROWS:
                result = model(images)
                model.fused_matching = False
                expected = model(images)
                model.fused_matching = True
            elif isinstance(model, CprModel) and device.type == "cuda":
                # The same weights and the same kernels: a graph that captured too little would show here.
                result, expected = capture(model, images)(), model(images)
            else:
                continue
            differences[row.name] = float((result.anomaly_map - expected.anomaly_map).abs().max())
    for name, difference in differences.items():
        console.print(f"{name}: maps differ from the plain way's by at most {difference:.1e}")
        if difference > TOLERANCE:
            console.print(f"[red]More than {TOLERANCE:.0e}: {name} does not compute the same.[/red]")
    return all(difference <= TOLERANCE for difference in differences.values())


def _plain(name: str) -> str:
    return name.removesuffix(FUSED)


def _autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return _status_mb("VmRSS")


def _give_back_freed_memory() -> None:
    """What building has freed but the allocator keeps would hide what inference takes."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with Path("/proc/self/clear_refs").open("w") as file:
        file.write("5")  # resets VmHWM


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    path = Path("/proc/self/status")
    if not path.exists():
        raise SystemExit("Memory of a CPU process is read from /proc, which only Linux has.")
    line = next(line for line in path.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024 / 1e6


class OtherWork:
    """What else the machine did since this was made, by which figures of a busy machine can be told from others."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float | None, float, float | None]:
        """Time, processor time of the machine, that of this process and its children, in seconds; load average."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        own = os.times()
        path, machine_time = Path("/proc/stat"), None
        if path.exists():
            # user, nice, system, idle, waiting, interrupts of two kinds, time that a hypervisor gave to other machines
            ticks = [int(number) for number in path.read_text().splitlines()[0].split()[1:9]]
            machine_time = (sum(ticks[:3]) + sum(ticks[5:])) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), machine_time, sum(own[:4]), load

    def so_far(self) -> dict[str, Any]:
        """For the JSON file.

        Returns:
            dict[str, Any]: ``load_average``, of one minute, at the start and now; ``busy_cores_of_others``, how many
                processors other programs kept busy on average. None where the system does not say.
        """
        (start, machine_then, own_then, load_then), (now, machine_now, own_now, load_now) = self._start, self._now()
        others = None
        if machine_then is not None and machine_now is not None:
            others = max(0.0, machine_now - machine_then - (own_now - own_then)) / max(1e-9, now - start)
        return {
            "load_average": [load_then, load_now],
            "busy_cores_of_others": None if others is None else round(others, 3),
        }

    def warn(self, console: Console) -> None:
        """Say that the clock has not measured the models alone, if so.

        Args:
            console (Console): For the message.
        """
        others = self.so_far()["busy_cores_of_others"]
        if others is not None and others > BUSY:
            console.print(
                f"[yellow]Other programs kept {others:.1f} processors busy meanwhile: compare the processor time, not "
                "the clock, or measure again on an idle machine.[/yellow]"
            )


def describe_environment(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures depend on.

    Args:
        arguments (argparse.Namespace): Of the command.
        device (torch.device): Where the models ran.

    Returns:
        dict[str, Any]: For the JSON file; no path and no name of the machine.
    """
    return {
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "size": arguments.size,
        "k": arguments.k,
        "gallery": arguments.gallery,
        "rounds": arguments.rounds,
        "cuda_graphs": arguments.cuda_graphs,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "anomalib", "timm", "anomalib-cpr")},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _show(results: Sequence[Measurement], environment: dict[str, Any], console: Console) -> None:
    title = f"{machine(environment)}, {environment['precision']}, K {environment['k']}, {environment['gallery']} images"
    table = Table(title=title)
    for name in ("model", "px", "batch", "ms median", "p95", "CPU ms", "images/s", "peak MB", "working MB", "bank MB"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    stages = Table(title="Stages, ms and (CPU ms); the gather is part of the matching where it is not named")
    for name in ("model", "batch", *STAGES):
        stages.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in results:
        table.add_row(
            row.name,
            str(row.size),
            str(row.batch),
            f"{row.ms_median:.2f}",
            f"{row.ms_p95:.2f}",
            "-" if row.cpu_ms is None else f"{row.cpu_ms:.1f}",
            f"{row.images_per_s:.1f}",
            *("-" if value is None else f"{value:.0f}" for value in (row.peak_mb, row.working_mb)),
            f"{row.bank_mb:.1f}",
        )
        if row.stages_ms:
            stages.add_row(row.name, str(row.batch), *(_stage(row, stage) for stage in STAGES))
    console.print(table)
    console.print(stages)


def _stage(row: Measurement, stage: str) -> str:
    if stage not in row.stages_ms:
        return ""
    work = f" ({row.stages_cpu_ms[stage]:.1f})" if row.stages_cpu_ms else ""
    return f"{row.stages_ms[stage]:.2f}{work}"


def _rounded(value: Any) -> Any:  # noqa: ANN401 - whatever JSON has
    """Four significant digits: what a timing is worth."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
