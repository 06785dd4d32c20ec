# SPDX-License-Identifier: Apache-2.0
"""``anomalib-cpr doctor``: what is installed, what works, and what to do about the rest.

The module imports nothing but the standard library, since anything else may be what is missing.
"""
# ruff: noqa: PLC0415 - for the same reason, other libraries are imported where they are used

import argparse
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from . import __version__
from ._autoload import PACKAGE, SWITCH, is_enabled

OK, MISSING, FAILED, NOTE = "ok", "missing", "FAILED", "-"

# distribution -> what to type when it is missing
REQUIRED = {
    "anomalib": 'pip install "anomalib>=2.7,<2.8"',
    "torch": "pip install torch",
    "torchvision": "pip install torchvision   (the release that belongs to your torch)",
    "lightning": "pip install lightning",
    "timm": "pip install timm",
    "numpy": "pip install numpy",
    "opencv-python-headless": "pip install opencv-python-headless",
    "scikit-learn": "pip install scikit-learn",
    "threadpoolctl": "pip install threadpoolctl",
    "rich": "pip install rich",
    "matplotlib": "pip install matplotlib",
    "omegaconf": "pip install omegaconf",
    "pyyaml": "pip install pyyaml",
    "tqdm": "pip install tqdm",
}
# Other distributions that bring the same module.
STAND_INS = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
}
OPTIONAL = {
    "onnx": 'export to ONNX: pip install "anomalib[openvino]"',
    "openvino": 'export to OpenVINO: pip install "anomalib[openvino]"',
    "onnxruntime": "inference with exported ONNX models: pip install onnxruntime",
}
FAISS_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")

BACKBONE = "densenet201"

PROBE_MARK = "anomalib-cpr-probe:"
PROBE_SECONDS = 300


class Finding(NamedTuple):
    """One line of the report.

    Args:
        topic (str): What was looked at.
        status (str): One of :data:`OK`, :data:`MISSING`, :data:`FAILED`, :data:`NOTE`.
        detail (str): What was found.
        advice (str): What to do about it.
    """

    topic: str
    status: str
    detail: str = ""
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser (argparse.ArgumentParser): Parser of the subcommand.
    """
    parser.epilog = "Exit code: 0, or 1 if anomalib does not find the model or if the file given as --weights is unfit."
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="try this file as Cpr's `backbone_weights` instead of the caches"
    )


def run(arguments: argparse.Namespace) -> int:
    """Examine the installation and print the report.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 1 if a form of registration fails or the given weights file is unfit, else 0.
    """
    registration = check_registration()
    weights = [check_weights(arguments.weights)]
    report = {
        "Versions": check_versions(),
        "Registration with anomalib": registration,
        "Weights": weights,
        "Devices": check_devices(),
        "Extras": [*check_faiss(), *check_optional()],
    }
    _print_report(report)
    fatal = [*registration, *(weights if arguments.weights is not None else [])]
    return int(any(finding.status in {FAILED, MISSING} for finding in fatal))


def check_versions() -> list[Finding]:
    """Look for the distributions that the package needs.

    Returns:
        list[Finding]: Python, the package itself, and each dependency.
    """
    findings = [
        Finding("Python", OK, f"{platform.python_version()} on {platform.platform()}"),
        Finding("anomalib-cpr", OK, f"{__version__} in {Path(__file__).parent}"),
    ]
    for name, command in REQUIRED.items():
        found = next((n for n in (name, *STAND_INS.get(name, ())) if _version(n) is not None), None)
        if found is None:
            findings.append(Finding(name, MISSING, advice=command))
        else:
            findings.append(Finding(name, OK, f"{_version(found)}" + (f" ({found})" if found != name else "")))
    return findings


def check_registration() -> list[Finding]:
    """Try, in a process of its own, every form in which anomalib lets one ask for a model or a data set.

    Returns:
        list[Finding]: The hook and each form.
    """
    entry_points = _hook_entry_points()
    switched_off = [] if is_enabled() else [f"{SWITCH}={os.environ[SWITCH]}"]
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        switched_off.append(f"TORCH_DEVICE_BACKEND_AUTOLOAD={os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD']}")
    if switched_off:
        advice = f"the forms below work after `import {PACKAGE}`; unset {' and '.join(switched_off)} to do without"
        findings = [Finding("hook in torch", NOTE, f"switched off by {' and '.join(switched_off)}", advice)]
    elif entry_points:
        findings = [Finding("hook in torch", OK, f"entry point {entry_points[0]}")]
    else:
        advice = f"install the package with pip (a copied folder has no entry point), or `import {PACKAGE}` first"
        findings = [Finding("hook in torch", FAILED, "no entry point", advice)]

    absent = [name for name in ("anomalib", "torch") if _version(name) is None]
    if absent:
        return [*findings, Finding("anomalib's forms", MISSING, f"{absent[0]} is missing", REQUIRED[absent[0]])]
    first = f"import {PACKAGE}\n" if switched_off else ""
    output, results = _run_probe(f"{first}{inspect.getsource(_probe)}\n_probe({PROBE_MARK!r})\n")
    if not isinstance(results, dict):
        return [*findings, Finding("anomalib's forms", FAILED, _last_line(output), "see the versions above")]
    advice = "see the reason; then `pip install --force-reinstall --no-deps .` in its clone, or report it"
    findings += [
        Finding(form, OK if reason is None else FAILED, reason or "", "" if reason is None else advice)
        for form, reason in results.items()
    ]
    return findings


def _hook_entry_points() -> list[str]:
    """What torch is told to call for this package."""
    return [point.value for point in metadata.entry_points(group="torch.backends") if point.name == PACKAGE]


def _probe(mark: str) -> None:
    """Ask anomalib for the model in every way, and print the reasons of those that fail; runs in a fresh process.

    Args:
        mark (str): What the line with the results begins with.
    """
    import json
    import logging
    import tempfile
    from collections.abc import Callable
    from pathlib import Path

    logging.disable()
    from anomalib.cli import AnomalibCLI
    from anomalib.data import get_datamodule
    from anomalib.models import AnomalibModule, get_model, list_models
    from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

    class Parse(AnomalibCLI):
        def instantiate_classes(self) -> None:
            """Leave it at parsing."""

    def need(truth: bool) -> None:
        if not truth:
            raise LookupError("not listed")

    def from_config() -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.yaml"
            file.write_text("model:\n  class_path: Cpr\n  init_args:\n    k: 5\n", encoding="utf-8")
            AnomalibModule.from_config(file)

    def benchmark() -> None:
        grid = {"seed": 1, "model": {"class_path": "Cpr"}, "data": {"class_path": "MVTec"}}
        list(BenchmarkJobGenerator("cpu").generate_jobs(grid, None))

    def reason_of_failure(ask: Callable[[], object]) -> str | None:
        try:
            ask()
        except (Exception, SystemExit) as error:  # the command line ends with SystemExit
            cause = error.__cause__ or error.__context__ or error
            return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        return None

    forms = {
        "list_models()": lambda: need("cpr" in list_models()),
        'get_model("cpr")': lambda: get_model("cpr"),
        'get_model("Cpr", k=5)': lambda: get_model("Cpr", k=5),
        'get_model({"class_path": "Cpr", "init_args": {...}})': lambda: get_model(
            {"class_path": "Cpr", "init_args": {"k": 5}}
        ),
        'get_model({"class_path": "anomalib_cpr.Cpr"})': lambda: get_model({"class_path": "anomalib_cpr.Cpr"}),
        "AnomalibModule.from_config(FILE)": from_config,
        'get_datamodule({"class_path": "MVTec"})': lambda: get_datamodule({"class_path": "MVTec"}),
        "anomalib train --model Cpr --data MVTec": lambda: Parse(
            ["train", "--model", "Cpr", "--data", "MVTec"], run=False
        ),
        "anomalib benchmark (Cpr, MVTec in its YAML)": benchmark,
    }
    print("\n" + mark + json.dumps({form: reason_of_failure(ask) for form, ask in forms.items()}))


def check_weights(file: Path | None = None) -> Finding:
    """Look for the weights of the paper's backbone, without downloading anything.

    Args:
        file (Path | None): File to be tried; the caches of Hugging Face and torch otherwise.

    Returns:
        Finding: Where the weights are.
    """
    advice = (
        "they are downloaded at the first training; without internet, copy the file from another machine and pass "
        "`backbone_weights=FILE` (command line: --model.backbone_weights FILE), or use `pre_trained=False`"
    )
    try:
        if file is not None:
            from .feature_extractor import FeatureExtractor

            return Finding(BACKBONE, OK, FeatureExtractor().load_weights(file))
        found = _cached_weights(BACKBONE)
    except Exception as error:  # anything may be wrong with an installation or a file
        reason = f"{type(error).__name__}: {error}"
        return Finding(BACKBONE, FAILED, reason, "see the versions above" if isinstance(error, ImportError) else "")
    if found is None:
        return Finding(BACKBONE, MISSING, "not in the caches of Hugging Face and torch", advice)
    return Finding(BACKBONE, OK, str(found))


def _cached_weights(backbone: str) -> Path | None:
    """File in which timm would find the weights of a network without a download."""
    import timm
    from torch import hub

    config = timm.get_pretrained_cfg(backbone)
    if config is None:
        raise ValueError(f"timm has no weights for backbone={backbone!r}; see timm.list_pretrained()")
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        for name in (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin"):
            found = try_to_load_from_cache(config.hf_hub_id, name) if name else None
            if isinstance(found, str):
                return Path(found)
    if config.url:
        file = Path(hub.get_dir()) / "checkpoints" / str(config.url).rpartition("/")[2]
        return file if file.is_file() else None
    return None


def check_devices() -> list[Finding]:
    """List the devices that torch can use.

    Returns:
        list[Finding]: One line per device.
    """
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever it likes
        return [Finding("torch", FAILED, f"{type(error).__name__}: {error}", REQUIRED["torch"])]
    findings = [Finding("cpu", OK, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for kind in ("cuda", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is None or not backend.is_available():
            continue
        for index in range(backend.device_count()):
            properties = backend.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            findings.append(Finding(f"{kind}:{index}", OK, f"{properties.name}, {memory}"))
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", OK, platform.machine()))
    if len(findings) == 1:
        advice = "fine for inference and a few hundred steps; if there is one, check its driver and the torch build"
        findings.append(Finding("GPU", NOTE, f"none that torch {torch.__version__} can use", advice))
    return findings


def check_faiss() -> list[Finding]:
    """Try faiss in a process of its own: a clash of OpenMP libraries ends the process, not just the import.

    Returns:
        list[Finding]: One line.
    """
    installed = [f"{name} {_version(name)}" for name in FAISS_DISTRIBUTIONS if _version(name) is not None]
    if not installed:
        advice = 'only for clustering_backend="faiss": pip install "anomalib-cpr[faiss]" (with CUDA 12: faiss-gpu)'
        return [Finding("faiss", NOTE, "not installed", advice)]
    if len(installed) > 1:
        advice = "they overwrite each other: pip uninstall all of them, then install one"
        return [Finding("faiss", FAILED, ", ".join(installed), advice)]
    output, gpus = _run_probe(f"import faiss, json\nprint('{PROBE_MARK}' + json.dumps([faiss.get_num_gpus()]))\n")
    if gpus is None:
        advice = "pip uninstall it and install faiss-cpu instead; CPR works without"
        return [Finding("faiss", FAILED, f"{installed[0]}: {_last_line(output)}", advice)]
    return [Finding("faiss", OK, f"{installed[0]}, {gpus[0]} GPU(s)")]


def check_optional() -> list[Finding]:
    """Look for the distributions that only some commands need.

    Returns:
        list[Finding]: One line per distribution.
    """
    return [
        Finding(name, OK, str(_version(name))) if _version(name) else Finding(name, NOTE, "not installed", command)
        for name, command in OPTIONAL.items()
    ]


def _version(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _run_probe(code: str) -> tuple[str, dict | list | None]:
    """Run code in a fresh process: what it printed, and the results in its marked line."""
    # `python -c` looks into the current folder, the command `anomalib` does not.
    code = f"import sys\nsys.path[:] = [entry for entry in sys.path if entry]\n{code}"
    try:
        process = subprocess.run(  # noqa: S603 - this module's own code
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_SECONDS} seconds", None
    marked = [line for line in process.stdout.splitlines() if line.startswith(PROBE_MARK)]
    results = json.loads(marked[-1].removeprefix(PROBE_MARK)) if marked else None
    return process.stdout + process.stderr, results


def _last_line(text: str) -> str:
    """Last line of a traceback, which names the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the process ended without a word"


def _print_report(report: dict[str, list[Finding]]) -> None:
    """Print tables, or plain lines where ``rich`` is missing."""
    write = _plain_writer() if _version("rich") is None else _table_writer()
    for title, findings in report.items():
        write(title, findings)


def _plain_writer() -> Callable[[str, list[Finding]], None]:
    """Printing without any library."""

    def write(title: str, findings: list[Finding]) -> None:
        print(f"\n{title}")
        for finding in findings:
            print(f"  {finding.status:8}{finding.topic}: {finding.detail}")
            if finding.advice:
                print(f"{'':10}-> {finding.advice}")

    return write


def _table_writer() -> Callable[[str, list[Finding]], None]:
    """Printing with ``rich``."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {OK: "green", MISSING: "yellow", FAILED: "bold red", NOTE: "dim"}
    console = Console()

    def write(title: str, findings: list[Finding]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        for finding in findings:
            detail = Text(finding.detail)
            if finding.advice:
                detail.append(("\n" if finding.detail else "") + f"-> {finding.advice}", style="italic")
            table.add_row(Text(finding.topic), Text(finding.status, style=colours[finding.status]), detail)
        console.print(table)

    return write
