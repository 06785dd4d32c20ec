# SPDX-License-Identifier: Apache-2.0
"""``anomalib-cpr benchmark``: any models, data sets, categories and seeds, side by side.

Each job runs in a process of its own (:mod:`anomalib_cpr.benchmark_job`), so that its peak memory is its own and its
failure stays its own. A job's result is one JSON file, written in one step when the job ends; a result that is there is
never computed again. So a benchmark can be stopped at any time and goes on where it was.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .messages import first_line

EVALUATION = {"size": [320, 320], "speed_seconds": 5.0, "throughput_batch": 8}
KEYS = {"name", "title", "notes", "seeds", "time_limit_minutes", "trainer", "evaluation", "data", "models"}
MODEL_KEYS = {"name", "class_path", "init_args", "image_size", "backbone_weights", "trainer", "data", "notes"}
DATA_KEYS = {"name", "class_path", "init_args", "categories"}


@dataclass
class Job:
    """One model on one category with one seed.

    Attributes:
        name (str): Readable and unique; also the name of its files.
        label (str): For the progress.
        model (str): Name of the model, whose earlier jobs tell how long the next will take.
        specification (dict): What the process is told.
    """

    name: str
    label: str
    model: str
    specification: dict[str, Any] = field(repr=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser (argparse.ArgumentParser): Parser of the subcommand.
    """
    parser.epilog = "Exit code: 0 if all jobs are done, 1 if one has failed, 130 if it was interrupted."
    parser.add_argument("-c", "--config", type=Path, required=True, metavar="FILE", help="what to compare")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="for the results (default: benchmark/NAME-OF-CONFIG)"
    )
    parser.add_argument("--only", metavar="REGEX", help="only jobs whose name matches")
    parser.add_argument("--retry-failed", action="store_true", help="run jobs again that have failed")
    parser.add_argument("--devices", default="auto", help="auto, cpu, or GPU numbers such as 0,1 (default: auto)")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep each fitted model in FOLDER/checkpoints")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs and what is known of each")
    parser.add_argument("--no-report", action="store_true", help="write no report at the end")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrule the configuration, e.g. time_limit_minutes=5",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run all jobs that have no result yet, then write the report.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: Exit code of the process.
    """
    try:
        written, resolved = read_configuration(arguments.config, arguments.set)
        devices = find_devices(arguments.devices)
        folder = arguments.output or Path("benchmark") / resolved["name"]
        everything = plan_jobs(written, resolved, "cpu" if devices == ["cpu"] else "gpu", folder)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"{arguments.config}: {error}") from error
    jobs = [job for job in everything if re.search(arguments.only or "", job.name)]
    for job in jobs if arguments.keep_checkpoints else []:
        job.specification["checkpoint"] = str((folder / "checkpoints" / f"{job.name}.ckpt").resolve())
    if arguments.dry_run:
        for job in jobs:
            print(f"{status_of(folder, job) or 'to do':8} {job.name}")
        return 0
    from .benchmark_job import write_json  # noqa: PLC0415 - imports torch and anomalib, which `--help` need not

    write_json(folder / "plan.json", describe_plan(written, everything))
    code = run_jobs(jobs, folder, devices, float(resolved["time_limit_minutes"]), retry=arguments.retry_failed)
    if code != 130 and not arguments.no_report:
        from . import report  # noqa: PLC0415 - matplotlib and numpy, not needed while jobs run

        for file in report.write(report.load([folder]), folder):
            print(file)
    return code


# --- what to do


def read_configuration(file: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a configuration; values such as ``${oc.env:CPR_DATA_ROOT}`` come from the environment.

    Args:
        file (Path): YAML.
        overrides (Sequence[str]): ``key=value``, with dots, also for places in lists: ``models.0.image_size=256``.

    Returns:
        tuple[dict, dict]: As written, and with all values resolved. The first is what results are filed under and what
            they record: it names no folder of this machine.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key is unknown or missing, or an environment variable is not set.
    """
    if not file.is_file():
        raise FileNotFoundError("there is no such file.")
    loaded = OmegaConf.merge(
        {"name": file.stem, "seeds": [0], "time_limit_minutes": 120, "trainer": {}, "evaluation": EVALUATION},
        OmegaConf.load(file),
    )
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--set {override}: expected KEY=VALUE.")
        OmegaConf.update(loaded, key, yaml.safe_load(value), force_add=True)
    try:
        resolved: Any = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{first_line(error)}. Set it, or give the value with --set.") from error
    written: Any = OmegaConf.to_container(loaded, resolve=False)
    _check(resolved)
    for configuration in (resolved, written):
        for entry in [*configuration["models"], *configuration["data"]]:
            entry.setdefault("name", str(entry["class_path"]).rpartition(".")[2])
    _check_names(resolved)
    return written, resolved


def _check(resolved: dict[str, Any]) -> None:
    _check_keys(resolved, KEYS, "the configuration")
    _check_keys(resolved["evaluation"], set(EVALUATION), "evaluation")
    for key, allowed in (("models", MODEL_KEYS), ("data", DATA_KEYS)):
        if not resolved.get(key):
            raise ValueError(f"`{key}` is empty or missing.")
        for entry in resolved[key]:
            _check_keys(entry, allowed, f"an entry of `{key}`")
            if "class_path" not in entry:
                raise ValueError(f"an entry of `{key}` has no `class_path`: {entry}.")


def _check_names(resolved: dict[str, Any]) -> None:
    for key in ("models", "data"):
        names = [entry["name"] for entry in resolved[key]]
        if len(set(names)) < len(names):
            raise ValueError(f"two entries of `{key}` have one name: {names}. Give each a `name` of its own.")


def _check_keys(found: dict[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(found) - allowed)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in {where}; there are {', '.join(sorted(allowed))}.")


def plan_jobs(written: dict[str, Any], resolved: dict[str, Any], accelerator: str, folder: Path) -> list[Job]:
    """Make the list of jobs: seed by seed, category by category, so that early results compare all models.

    Args:
        written (dict): Configuration as written.
        resolved (dict): Configuration with all values.
        accelerator (str): ``cpu`` or ``gpu``; results of one do not stand for the other.
        folder (Path): For the results.

    Returns:
        list[Job]: All jobs.
    """
    jobs = []
    for seed in resolved["seeds"]:
        for own, data in zip(written["data"], resolved["data"], strict=True):
            for category in data.get("categories") or [None]:
                for model_written, model in zip(written["models"], resolved["models"], strict=True):
                    recorded = _specify(written, own, model_written, category, seed)
                    specification = _specify(resolved, data, model, category, seed)
                    key = hashlib.sha256(json.dumps([recorded, accelerator], sort_keys=True).encode()).hexdigest()[:8]
                    parts = [data["name"], *([category] if category else []), model["name"], f"seed{seed}", key]
                    name = re.sub(r"[^\w.+-]+", "_", "-".join(map(str, parts)))
                    specification |= {
                        "accelerator": accelerator,
                        "recorded": {**recorded, "accelerator": accelerator},
                        "thumbnails": str((folder / "thumbnails" / f"{name}.npz").resolve()),
                    }
                    label = " ".join([str(category or data["name"]), model["name"], f"seed {seed}"])
                    jobs.append(Job(name, label, model["name"], specification))
    return jobs


def describe_plan(written: dict[str, Any], jobs: Sequence[Job]) -> dict[str, Any]:
    """What the report needs to know beside the results: which jobs there should be, and what to say about them.

    Args:
        written (dict): Configuration as written.
        jobs (Sequence[Job]): All jobs.

    Returns:
        dict: For ``plan.json``.
    """
    return {
        "title": written.get("title") or written["name"],
        "notes": written.get("notes", ""),
        "models": [{"name": model["name"], "notes": model.get("notes", "")} for model in written["models"]],
        "jobs": [
            {
                "name": job.name,
                "data": job.specification["data"]["name"],
                "category": job.specification["category"],
                "model": job.model,
                "seed": job.specification["seed"],
            }
            for job in jobs
        ],
    }


def _specify(
    configuration: dict[str, Any], data: dict[str, Any], model: dict[str, Any], category: str | None, seed: int
) -> dict[str, Any]:
    """What a job consists of: no more than what its result depends on."""
    arguments = {**data.get("init_args", {}), **model.get("data", {})}
    return {
        "data": {"name": data["name"], "class_path": data["class_path"], "init_args": arguments},
        "category": category,
        "model": {key: value for key, value in model.items() if key not in {"trainer", "data", "notes"}},
        "seed": seed,
        "trainer": {**configuration["trainer"], **model.get("trainer", {})},
        "evaluation": configuration["evaluation"],
    }


def find_devices(choice: str) -> list[str]:
    """Devices on which jobs run, one job at a time on each.

    Args:
        choice (str): ``auto``, ``cpu``, or GPU numbers separated by commas.

    Returns:
        list[str]: ``["cpu"]``, or the numbers of GPUs as CUDA_VISIBLE_DEVICES takes them.

    Raises:
        ValueError: If a GPU is asked for that does not exist.
    """
    if choice == "cpu":
        return ["cpu"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    import torch  # noqa: PLC0415 - takes seconds, and only GPUs need it

    count = torch.cuda.device_count()
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    if choice == "auto":
        return names[:count] or ["cpu"]
    chosen = choice.split(",")
    for name in chosen:
        if not name.isdigit() or int(name) >= count:
            raise ValueError(f"--devices {choice}: torch sees {count} GPU(s). Use auto, cpu, or numbers below {count}.")
    return [names[int(name)] for name in chosen]


# --- doing it


def result_file(folder: Path, job: Job) -> Path:
    """Where a job's result is."""
    return folder / "jobs" / f"{job.name}.json"


def status_of(folder: Path, job: Job) -> str | None:
    """What is known of a job: ``done``, ``failed``, ``timeout``, or None."""
    try:
        return json.loads(result_file(folder, job).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError):
        return None


class _Running:
    """A job's process."""

    def __init__(self, job: Job, folder: Path, device: str, minutes: float) -> None:
        self.job, self.device, self.folder = job, device, folder
        self.start = time.monotonic()
        self.limit = 60 * minutes
        self.log = folder / "logs" / f"{job.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.work = tempfile.TemporaryDirectory(prefix="anomalib-cpr-benchmark-")
        specification = Path(self.work.name) / "job.json"
        specification.write_text(json.dumps(job.specification), encoding="utf-8")
        environment = dict(os.environ)
        # The process must find the package that this one runs, installed or not.
        home = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [environment.get("PYTHONPATH")])])
        environment["PYTHONWARNINGS"] = "ignore"
        environment["PYTHONUTF8"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(  # noqa: S603 - this package's own module
                [sys.executable, "-m", f"{__package__}.benchmark_job", str(specification), str(self.result)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends the others
            )

    @property
    def result(self) -> Path:
        """Where the process writes."""
        return Path(self.work.name) / "result.json"

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.start

    def stop(self) -> None:
        """End the process and all that it has started."""
        if self.process.poll() is None:
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        self.process.wait()
        self.work.cleanup()

    def finish(self) -> dict[str, Any] | None:
        """Result of a process that has ended or has run too long; None while it may go on."""
        overdue = self.seconds > self.limit
        code = self.process.poll()
        if code is None and not overdue:
            return None
        if code is None:
            result: dict[str, Any] = {"status": "timeout", "reason": f"not done after {self.limit / 60:g} minutes"}
        elif self.result.is_file():
            result = json.loads(self.result.read_text(encoding="utf-8"))
        else:
            result = {"status": "failed", "reason": self._death(code)}
        if result["status"] != "done":
            result["log"] = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        result = {"job": self.job.specification["recorded"], "seconds": self.seconds, **result}
        self.stop()
        return result

    def _death(self, code: int) -> str:
        if code < 0:
            hint = " (out of memory?)" if code == -9 else ""
            return f"the process was ended by {signal.Signals(-code).name}{hint}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the process ended with exit code {code}: {lines[-1] if lines else 'no message'}"


def run_jobs(jobs: Sequence[Job], folder: Path, devices: Sequence[str], minutes: float, *, retry: bool = False) -> int:
    """Run the jobs that have no result, one per device at a time.

    Args:
        jobs (Sequence[Job]): What to do.
        folder (Path): For results and logs.
        devices (Sequence[str]): From :func:`find_devices`.
        minutes (float): Time limit of each job.
        retry (bool): Run failed jobs again.

    Returns:
        int: 0 if all are done, 1 if one has failed, 130 if interrupted.
    """
    from .benchmark_job import write_json  # noqa: PLC0415 - imports torch and anomalib, which `--help` need not

    known = {job.name: status_of(folder, job) for job in jobs}
    waiting = deque(job for job in jobs if known[job.name] is None or (retry and known[job.name] != "done"))
    failed = sum(1 for job in jobs if job not in waiting and known[job.name] != "done")
    print(f"{len(jobs)} jobs, {len(waiting)} to do, on {', '.join(devices)}; results: {folder / 'jobs'}", flush=True)
    if failed:
        print(f"{failed} jobs have failed before and stay so; --retry-failed runs them again.", flush=True)
    total, done = len(waiting), 0
    free, running = deque(devices), list[_Running]()
    taken: dict[str, list[float]] = {}
    if threading.current_thread() is threading.main_thread():  # a scheduler's end signal is an interruption like Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and free:
                running.append(_Running(waiting.popleft(), folder, free.popleft(), minutes))
            for process in list(running):
                result = process.finish()
                if result is None:
                    continue
                write_json(result_file(folder, process.job), result)
                running.remove(process)
                free.append(process.device)
                taken.setdefault(process.job.model, []).append(process.seconds)
                done += 1
                failed += result["status"] != "done"
                left = estimate([*waiting, *(other.job for other in running)], taken, len(devices))
                print(f"[{done}/{total}] {process.job.label}: {describe(result)}{left}", flush=True)
            time.sleep(0.2)
    except KeyboardInterrupt:
        for process in running:
            process.stop()
        print(f"\nInterrupted: {done} jobs of this run are kept, {total - done} are to do. Run the same command again.")
        return 130
    finally:
        for process in running:
            process.stop()
    return int(failed > 0)


def describe(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if result["status"] != "done":
        return f"{result['status'].upper()} after {result['seconds']:.0f} s: {result['reason'][:200]}"
    metrics, latency = result["metrics"], result["speed"]["latency"]["p50_ms"]
    shown = [f"{name} {metrics[name]:.3f}" for name in ("image_AUROC", "pixel_AP") if metrics.get(name) is not None]
    return ", ".join([*shown, f"{latency:.0f} ms", f"job {result['seconds']:.0f} s"])


def estimate(waiting: Sequence[Job], taken: dict[str, list[float]], devices: int) -> str:
    """How long the rest will take, from what jobs of the same model took; the mean of all for a model not seen yet."""
    if not waiting:
        return ""
    everything = [seconds for times in taken.values() for seconds in times]
    mean = sum(everything) / len(everything)
    rest = sum(sum(taken[job.model]) / len(taken[job.model]) if job.model in taken else mean for job in waiting)
    return f"; about {max(1, round(rest / devices / 60))} min left"
