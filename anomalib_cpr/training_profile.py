# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr profile-training``: what a training step costs, and on what the time goes.

Steps of anomalib's Engine and steps of a bare loop over the same images in memory alternate within one training, so
that whatever else the machine does falls on both. The shares come from PyTorch's profiler.

On a GPU, an Engine's step finds pairs that were drawn during the bare step before it, so that its rate is the most that
a training can reach; the log of a training tells what it does reach.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from .benchmark_job import commit, cpu_name
from .command_arguments import existing_file, output_file
from .drawn_data import DrawnParts
from .lightning_model import Cpr
from .training import AUGMENTATION, BACKBONE, HEADS, PAIRS, SYNTHESIS

BACKWARD, OPTIMIZER = "cpr: backward", "cpr: optimizer"
STAGES = (SYNTHESIS, AUGMENTATION, BACKBONE, HEADS, PAIRS, BACKWARD, OPTIMIZER)
WARM_UP = 2


class StepClock(Callback):
    """Lets a bare step follow each step of the Engine, and takes the time of both.

    Args:
        profiled_steps (int): Bare steps that are profiled at the end.
    """

    def __init__(self, profiled_steps: int = 2) -> None:
        self.profiled_steps = profiled_steps
        self.engine_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.bare_cpu_seconds: list[float] = []
        self.shares: dict[str, float] = {}
        self._start: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Cpr, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Take the Engine's time, and run a bare step that draws the same."""
        del args, kwargs
        _wait(pl_module.device)
        if self._start is not None:
            self.engine_seconds.append(time.perf_counter() - self._start)
        cpu = time.process_time()
        self.bare_seconds.append(self._bare_step(pl_module, trainer.global_step))
        self.bare_cpu_seconds.append(time.process_time() - cpu)
        self._start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: Cpr) -> None:  # type: ignore[override]
        """Profile some more bare steps."""
        on_gpu = pl_module.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        start = time.perf_counter()
        with profile(activities=activities) as profiler:
            for step in range(self.profiled_steps):
                self._bare_step(pl_module, trainer.global_step + step)
        microseconds = 1e6 * (time.perf_counter() - start)
        seen = {event.key: event for event in profiler.key_averages()}
        for name in STAGES:
            spent = getattr(seen[name], "device_time_total" if on_gpu else "cpu_time_total") if name in seen else 0
            self.shares[name.removeprefix("cpr: ")] = spent / microseconds
        other = 1 - sum(self.shares.values())
        if on_gpu:  # autograd starts these kernels in a thread of its own, where the profiler does not see the stage
            other += self.shares.pop(BACKWARD.removeprefix("cpr: "))
            self.shares["backward and other"] = other
        else:
            self.shares["other"] = other

    @staticmethod
    def _bare_step(model: Cpr, step: int) -> float:
        optimizer = model.optimizers(use_pl_optimizer=False)
        _wait(model.device)
        start = time.perf_counter()
        with torch.enable_grad():
            positive, negative = model.compare_pairs(*model.draw_pairs(step, 0))
        with record_function(BACKWARD):
            optimizer.zero_grad()  # type: ignore[union-attr]
            (positive + negative).backward()
        with record_function(OPTIMIZER):
            optimizer.step()  # type: ignore[union-attr]
        _wait(model.device)
        return time.perf_counter() - start


def profile_training(
    model: Cpr, datamodule: AnomalibDataModule, steps: int = 8, accelerator: str = "auto"
) -> dict[str, Any]:
    """Measure a short training.

    Args:
        model (Cpr): What to train. Its weights change.
        datamodule (AnomalibDataModule): On which data, in which batches.
        steps (int): Measured steps of the Engine, and as many bare ones.
        accelerator (str): Of the trainer.

    Returns:
        dict[str, Any]: ``engine_steps_per_s`` and ``in_memory_steps_per_s`` (from median step times), their ratio
            ``engine_to_in_memory``, ``pairs_per_s``, ``cpu_s_per_step`` (processor time of a bare step, which other
            programs disturb least), and ``shares`` of the step by stage.
    """
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            max_steps=steps + WARM_UP,
            limit_val_batches=0,
            callbacks=[clock],
            default_root_dir=folder,
            logger=False,
            accelerator=accelerator,
            devices=1,
        )
        engine.fit(model, datamodule=datamodule)
    own, bare = (
        statistics.median(seconds[WARM_UP - 1 :]) for seconds in (clock.engine_seconds, clock.bare_seconds[1:])
    )
    return {
        "steps": len(clock.engine_seconds[WARM_UP - 1 :]),
        "engine_steps_per_s": 1 / own,
        "in_memory_steps_per_s": 1 / bare,
        "engine_to_in_memory": bare / own,
        "cpu_s_per_step": statistics.median(clock.bare_cpu_seconds[WARM_UP:]),
        "pairs_per_s": datamodule.train_batch_size / own,
        "shares": clock.shares,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``anomalib-cpr profile-training``.

    Args:
        parser (argparse.ArgumentParser): Receives them.
    """
    parser.add_argument("--image-size", type=int, default=320, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of images in a step")
    parser.add_argument("--channels", type=int, nargs="+", default=[384], help="descriptor channels, one run each")
    parser.add_argument("--steps", type=int, default=8, help="measured steps")
    parser.add_argument("--category", default="bracket", help="category of the drawn data")
    parser.add_argument("--data-root", type=Path, default=Path("datasets/DrawnParts"), help="where it is drawn")
    parser.add_argument("--backbone", default="densenet201")
    parser.add_argument("--layers", nargs=2, default=["features.denseblock1", "features.denseblock2"])
    parser.add_argument(
        "--backbone-weights", type=existing_file, help="file; without it the backbone is random, as fast"
    )
    parser.add_argument(
        "--precision", nargs="+", default=["auto"], help="training_precision of the model, one run each"
    )
    parser.add_argument("--accelerator", default="auto", help="of the trainer: cpu, gpu, auto")
    parser.add_argument("--json", type=output_file, help="write the result to this file")


def run(arguments: argparse.Namespace) -> int:
    """Profile, print a table and write the result.

    Args:
        arguments (argparse.Namespace): From :func:`add_arguments`.

    Returns:
        int: 0.
    """
    rows = []
    for channels in arguments.channels:
        for precision in arguments.precision:
            seed_everything(0, verbose=False)
            model = Cpr(
                backbone=arguments.backbone,
                layers=arguments.layers,
                pre_trained=arguments.backbone_weights is not None,
                backbone_weights=arguments.backbone_weights,
                descriptor_channels=channels,
                training_precision=precision,
                pre_processor=Cpr.configure_pre_processor((arguments.image_size, arguments.image_size)),
            )
            datamodule = DrawnParts(
                root=arguments.data_root,
                category=arguments.category,
                image_size=arguments.image_size,
                train_images=24,
                train_batch_size=arguments.batch_size,
            )
            result = profile_training(model, datamodule, arguments.steps, arguments.accelerator)
            rows.append({"descriptor_channels": channels, "training_precision": precision, **result})
    report = {"environment": _environment(arguments), "rows": rows}
    for row in rows:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        print(
            f"{row['descriptor_channels']} channels, {row['training_precision']}: "
            f"{row['engine_steps_per_s']:.2f} steps/s with the Engine, "
            f"{row['in_memory_steps_per_s']:.2f} bare ({row['engine_to_in_memory']:.0%}), "
            f"{row['cpu_s_per_step']:.2f} s of processor time; {shares}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and arguments.accelerator != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backbone": arguments.backbone,
        "image_size": arguments.image_size,
        "batch_size": arguments.batch_size,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
