# SPDX-License-Identifier: Apache-2.0
"""One job of a benchmark: fits one model on one category with one seed, and measures it. Runs in a process of its own.

``python -m anomalib_cpr.benchmark_job JOB.json RESULT.json``. :mod:`anomalib_cpr.benchmark` starts it.
"""

import importlib
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import anomalib_cpr

from .benchmark_measuring import (
    RawPredictions,
    Stages,
    collected_stages,
    peak_device_megabytes,
    peak_host_megabytes,
    repeat_timed,
    reset_peak,
    summary,
    synchronise,
)
from .benchmark_metrics import quality, rarity_scale
from .registration import register
from .training_images import read_colours

RESULT_FORMAT = 1
DISTRIBUTIONS = ("anomalib", "torch", "torchvision", "lightning", "timm", "numpy", "scikit-learn", "faiss-cpu")
THUMBNAIL = 128


# --- making model and data


def build_data(data: dict[str, Any], category: str | None, seed: int) -> AnomalibDataModule:
    """Make a data module.

    Args:
        data (dict): ``class_path`` (a name in ``anomalib.data``, or a dotted path) and ``init_args``.
        category (str | None): Added to the arguments.
        seed (int): Of random splits, if the class takes one.

    Returns:
        AnomalibDataModule: The data module.
    """
    found = find_class(data["class_path"], "anomalib.data")
    arguments = {"seed": seed, **data.get("init_args", {})}
    if category is not None:
        arguments["category"] = category
    return found(**arguments)


def build_model(model: dict[str, Any]) -> AnomalibModule:
    """Make a model.

    Args:
        model (dict): ``class_path`` (a name in ``anomalib.models``, or a dotted path) and ``init_args``; optionally
            ``image_size``, handed to the model's own pre-processor, and ``backbone_weights``, a file for models of
            anomalib that can only download theirs.

    Returns:
        AnomalibModule: The model, without visualizer.
    """
    found = find_class(model["class_path"], "anomalib.models")
    arguments = dict(model.get("init_args", {}))
    weights = model.get("backbone_weights")
    if weights is not None:
        arguments["pre_trained"] = False
    if "image_size" in model:
        size = model["image_size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        arguments["pre_processor"] = found.configure_pre_processor(image_size=size)
    module = found(**arguments, visualizer=False)
    if weights is not None:
        load_timm_weights(module, Path(weights))
    return module


def find_class(path: str, home: str) -> Any:  # noqa: ANN401
    """Class of a dotted path, or of a name in a module of anomalib.

    Args:
        path (str): E.g. ``Patchcore`` or ``anomalib_cpr.Cpr``.
        home (str): Module in which plain names are looked up.

    Raises:
        ValueError: If there is no such class.
    """
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name or home), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"class_path={path!r} cannot be imported: {error}") from error


def load_timm_weights(module: nn.Module, file: Path) -> None:
    """Give a model of anomalib backbone weights from a file, where its own arguments only know download or none.

    Args:
        module (nn.Module): Holds one or more ``TimmFeatureExtractor``.
        file (Path): State dict of the timm network, complete or up to the deepest layer that is read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the model has no such feature extractor.
    """
    if not file.is_file():
        raise FileNotFoundError(f"backbone_weights={str(file)!r} does not exist.")
    extractors = [part for part in module.modules() if isinstance(part, TimmFeatureExtractor)]
    if not extractors:
        raise ValueError(
            f"{type(module).__name__} has no TimmFeatureExtractor into which backbone_weights could be loaded. "
            "Use the model's own arguments for its weights."
        )
    for extractor in extractors:
        network = timm.create_model(
            cast("str", extractor.backbone),
            pretrained=True,
            features_only=True,
            exportable=True,
            out_indices=extractor.idx,
            pretrained_cfg_overlay={"file": str(file)},
        )
        cast("nn.Module", extractor.feature_extractor).load_state_dict(network.state_dict())


# --- the job


def run_job(job: dict[str, Any], store: Callable[[str, Any], None]) -> None:
    """Fit, time and test a model.

    Args:
        job (dict): From :func:`anomalib_cpr.benchmark.plan_jobs`.
        store (Callable): Takes each finding as soon as it is known: a failed job keeps what it had found.
    """
    evaluation = job["evaluation"]
    device = torch.device("cuda" if job["accelerator"] == "gpu" else job["accelerator"])
    seed_everything(job["seed"], workers=True)
    store("memory", {"imports_mb": peak_host_megabytes()})

    datamodule = build_data(job["data"], job["category"], job["seed"])
    module = build_model(job["model"])
    stages, raw = Stages(), RawPredictions(tuple(evaluation["size"]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"enable_progress_bar": False, **job["trainer"]}
        engine = Engine(
            accelerator=job["accelerator"],
            devices=1,
            callbacks=[stages, raw],
            default_root_dir=folder,
            **trainer,
        )
        with collected_stages() as named:
            reset_peak(device)
            start = time.perf_counter()
            stages.switch("preparation")
            engine.fit(module, datamodule=datamodule)
            synchronise(device)
            stages.switch("")
            seconds = time.perf_counter() - start
        store(
            "fit",
            {
                "seconds": seconds,
                "stages": stages.seconds,
                "reported_stages": named,
                "steps": engine.trainer.global_step,
                "train_batch_size": datamodule.train_batch_size,
                "max_epochs": engine.trainer.max_epochs,
            },
        )
        memory = {
            "imports_mb": job["found"]["memory"]["imports_mb"],
            "fit_mb": peak_host_megabytes(),
            "fit_device_mb": peak_device_megabytes(device),
        }
        checkpoint = Path(job.get("checkpoint") or Path(folder) / "size.ckpt")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        store("size", sizes(module, engine, checkpoint))
        store("data", describe_data(datamodule))

        module.to(device).eval()
        reset = reset_peak(device)
        store("speed", speed(module, datamodule, device, evaluation))
        memory["inference_mb"] = peak_host_megabytes() if reset else None
        memory["inference_device_mb"] = peak_device_megabytes(device)
        store("memory", memory)

        start = time.perf_counter()
        reported = engine.test(module, datamodule=datamodule, verbose=False)
        store("test_seconds", time.perf_counter() - start)
    scores, labels, maps, masks = raw.tensors()
    store("as_anomalib_reports", {str(name): float(value) for name, value in reported[0].items()})
    store("metrics", quality(scores, labels, maps, masks))
    store(
        "images",
        [
            {"path": "/".join(Path(path).parts[-2:]), "anomalous": bool(label), "score": float(score)}
            for path, label, score in zip(raw.paths, labels, scores, strict=True)
        ],
    )
    if maps is not None:
        store("rarity_scale", rarity_scale(maps, labels))
        save_thumbnails(Path(job["thumbnails"]), raw.paths, maps, masks)


def sizes(module: AnomalibModule, engine: Engine, checkpoint: Path) -> dict[str, float]:
    """Size of checkpoint, bank and parameters, in MB (10^6 bytes).

    Args:
        module (AnomalibModule): The fitted model.
        engine (Engine): That has fitted it.
        checkpoint (Path): Where to save the checkpoint.
    """
    engine.trainer.save_checkpoint(checkpoint)
    norms = {
        id(buffer)
        for part in module.modules()
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        for buffer in part.buffers()
    }
    model = cast("nn.Module", module.model) if isinstance(getattr(module, "model", None), nn.Module) else module
    return {
        "checkpoint_mb": checkpoint.stat().st_size / 1e6,
        "bank_mb": sum(b.numel() * b.element_size() for b in model.buffers() if id(b) not in norms) / 1e6,
        "parameters_million": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def describe_data(datamodule: AnomalibDataModule) -> dict[str, Any]:
    """Number of images, and what validation used."""
    labels = [int(label) for label in datamodule.test_data.samples.label_index]
    same = getattr(datamodule, "val_split_mode", None)
    return {
        "train_images": len(datamodule.train_data),
        "test_good": labels.count(0),
        "test_anomalous": labels.count(1),
        "validation": str(getattr(same, "value", same)),
    }


@torch.no_grad()
def speed(
    module: AnomalibModule, datamodule: AnomalibDataModule, device: torch.device, evaluation: dict[str, Any]
) -> dict[str, Any]:
    """Latency and throughput from an image in memory, or in a file, to scores and map in memory.

    Pre- and post-processing are included, in the one path that anomalib exports.

    Args:
        module (AnomalibModule): On the device, in evaluation mode.
        datamodule (AnomalibDataModule): Its test images are used.
        device (torch.device): Where the model is.
        evaluation (dict): ``speed_seconds`` and ``throughput_batch``.

    Returns:
        dict: Batch 1 without and with reading the file, and a larger batch.
    """
    files = [str(path) for path in datamodule.test_data.samples.image_path[:16]]
    images = [read_colours(file)[None] for file in files]
    seconds, batch = float(evaluation["speed_seconds"]), int(evaluation["throughput_batch"])

    def predict(image: Tensor) -> None:
        found = module(image.to(device))
        if found.anomaly_map is not None:
            found.anomaly_map.cpu()
        found.pred_score.cpu()

    turn = iter(range(10**9))
    several = torch.cat([images[index % len(images)] for index in range(batch)])
    single = repeat_timed(lambda: predict(images[next(turn) % len(images)]), device, seconds=seconds)
    with_file = repeat_timed(
        lambda: predict(read_colours(files[next(turn) % len(files)])[None]),
        device,
        seconds=seconds,
    )
    larger = repeat_timed(lambda: predict(several), device, seconds=seconds, least=2)
    return {
        "latency": summary(single),
        "latency_with_decode": summary(with_file),
        "throughput": summary(larger, batch),
        "image_size": list(images[0].shape[-2:]),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def save_thumbnails(file: Path, paths: list[str], maps: Tensor, masks: Tensor | None) -> None:
    """Keep small versions of images, maps and masks, from which the report draws its pictures.

    Args:
        file (Path): An ``.npz`` file.
        paths (list[str]): Of the test images.
        maps (Tensor): Raw maps, ``(images, height, width)``.
        masks (Tensor | None): True masks.
    """
    size = (THUMBNAIL, THUMBNAIL)
    pictures = []
    for path in paths:
        image = F.interpolate(read_colours(path)[None], size, mode="bilinear", antialias=True)[0]
        pictures.append((image.clamp(0, 1) * 255).round().to(torch.uint8))
    small = F.interpolate(maps[:, None], size, mode="bilinear", antialias=True)[:, 0]
    held = {"images": torch.stack(pictures).numpy(), "maps": small.numpy().astype(np.float32)}
    if masks is not None:
        held["masks"] = (F.interpolate(masks[:, None].float(), size, mode="area")[:, 0] > 0.5).numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, **held)  # type: ignore[arg-type]
    temporary.replace(file)


def environment(accelerator: str) -> dict[str, Any]:
    """Versions, hardware and commit."""
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    versions = {"python": platform.python_version(), "anomalib-cpr": anomalib_cpr.__version__}
    versions |= {name: installed[name] for name in DISTRIBUTIONS if name in installed}
    hardware: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if accelerator == "gpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {"versions": versions, "hardware": hardware, "commit": commit()}


def cpu_name() -> str:
    """Model of the processor, as far as the system tells."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text(encoding="utf-8", errors="replace"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Commit of the package's repository, "+" where files differ from it; None outside of a repository."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(file: Path, value: object) -> None:
    """Write a JSON file in one step: it is there completely, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(file)


def main(job_file: Path, result_file: Path) -> int:
    """Run the job of a file and write its result, whatever happens.

    Args:
        job_file (Path): JSON of the job.
        result_file (Path): Where the result goes.

    Returns:
        int: 0 if the job was done, 1 if it failed.
    """
    logging.getLogger("anomalib").setLevel(logging.INFO)
    register()
    job = json.loads(job_file.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    job["found"] = found
    start = time.perf_counter()
    result: dict[str, Any] = {"format": RESULT_FORMAT, "job": job["recorded"], "started": time.time()}
    result |= environment(job["accelerator"])
    try:
        run_job(job, found.__setitem__)
        result["status"] = "done"
    except Exception as error:  # whatever a model may raise is a finding, too
        traceback.print_exc()
        result |= {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
    result |= found
    result["seconds"] = time.perf_counter() - start
    write_json(result_file, result)
    return 0 if result["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
