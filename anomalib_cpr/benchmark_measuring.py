# SPDX-License-Identifier: Apache-2.0
"""What a benchmark measures of any model: memory, time, stages of a fit, raw predictions."""

import ctypes
import gc
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core import rank_zero
from torch import Tensor

from .benchmark_metrics import resize_maps, resize_masks, to_full_frame


def peak_host_megabytes() -> float | None:
    """Largest resident memory of this process so far, in MB (10^6 bytes); None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024 / 1e6
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def reset_peak(device: torch.device) -> bool:
    """Let the peaks start anew.

    Args:
        device (torch.device): Whose peak to reset beside the host's.

    Returns:
        bool: Whether the host's peak could be reset (Linux only).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform == "linux":  # memory that was freed, but that the C library still holds, belongs to no stage
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_device_megabytes(device: torch.device) -> float | None:
    """Largest memory that tensors took on the device, in MB (10^6 bytes); None on the CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeat_timed(
    act: Callable[[], object], device: torch.device, *, seconds: float, least: int = 5, most: int = 200
) -> list[float]:
    """Time an action after a warm-up.

    Args:
        act (Callable): What to time.
        device (torch.device): Synchronised before and after.
        seconds (float): Repeat about so long; a fifth of it warms up.
        least (int): Repetitions.
        most (int): Repetitions.

    Returns:
        list[float]: Seconds of each repetition.
    """
    start = time.perf_counter()
    for count in range(most):
        act()
        synchronise(device)
        if count >= 1 and time.perf_counter() - start > seconds / 5:
            break
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < least or (len(taken) < most and time.perf_counter() - start < seconds):
        synchronise(device)
        begin = time.perf_counter()
        act()
        synchronise(device)
        taken.append(time.perf_counter() - begin)
    return taken


def summary(seconds: list[float], images: int = 1) -> dict[str, float]:
    """Median, 95th percentile and throughput of timed repetitions."""
    return {
        "p50_ms": 1e3 * float(np.percentile(seconds, 50)),
        "p95_ms": 1e3 * float(np.percentile(seconds, 95)),
        "images_per_second": images / float(np.percentile(seconds, 50)),
        "repetitions": len(seconds),
        "batch": images,
    }


class Stages(Callback):
    """Where the time of a fit goes, for any model.

    ``preparation`` lasts until the first batch, ``steps`` while batches are trained on, ``after steps`` is what the
    model does between its last batch and the first validation batch or the end (a coreset, a bank), ``validation``
    lasts from the first to the last validation batch.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def switch(self, stage: str) -> None:
        """Begin another stage."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:  # noqa: ANN401
        """Training goes on."""
        del args
        synchronise(trainer.strategy.root_device)
        self.switch("steps")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # noqa: ANN401
        """It may have been the last batch: then the model goes on with something else."""
        del args
        if trainer.is_last_batch:
            synchronise(trainer.strategy.root_device)
            self.switch("after steps")

    def on_validation_batch_start(self, *args: Any) -> None:  # noqa: ANN401
        """Validation begins."""
        del args
        self.switch("validation")

    def on_validation_end(self, *args: Any) -> None:  # noqa: ANN401
        """Validation is over."""
        del args
        self.switch("after steps")


class NamedStages(logging.Handler):
    """Collects the stages that a model reports by itself, as Cpr does: log lines "Codebook: 12.3 s"."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line."""
        found = re.fullmatch(r"([A-Z][\w -]*): ([\d.]+) s", record.getMessage())
        if found:
            self.seconds[found[1]] = self.seconds.get(found[1], 0.0) + float(found[2])


@contextmanager
def collected_stages() -> Iterator[dict[str, float]]:
    """Collect the reported stages while the context lasts."""
    handler = NamedStages()
    loggers = [rank_zero.log]  # whichever of Lightning's packages was imported last has put its own there
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler.seconds
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class RawPredictions(Callback):
    """Collects what the model says before thresholds and normalisation touch it, at one size for all models.

    Callbacks of the trainer run before the model's own, so the masks are seen before the pre-processor resizes them,
    and the predictions before the post-processor normalises them.

    Args:
        size (tuple[int, int]): Height and width at which maps and masks are compared.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.paths: list[str] = []
        self._masks_expected = True

    def on_test_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, *args: Any) -> None:  # noqa: ANN401
        """Keep the true masks."""
        del trainer, module, args
        if batch.gt_mask is None:
            self._masks_expected = False
            return
        masks = batch.gt_mask.as_subclass(Tensor)
        self.masks.append(resize_masks(masks.reshape(-1, *masks.shape[-2:]).cpu(), self.size))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Keep the raw predictions."""
        del trainer, args
        self.paths += list(batch.image_path)
        self.labels.append(batch.gt_label.as_subclass(Tensor).cpu().bool())
        maps = outputs.anomaly_map
        if maps is not None:
            maps = maps.as_subclass(Tensor).detach().cpu().float()
            maps = maps.reshape(-1, 1, *maps.shape[-2:])
            transform = getattr(cast("AnomalibModule", module).pre_processor, "transform", None)
            maps = resize_maps(to_full_frame(maps, transform), self.size)
            self.maps.append(maps)
        scores = outputs.pred_score
        if scores is None:  # anomalib takes the maximum of the map, too
            scores = maps.flatten(1).amax(1)
        self.scores.append(scores.as_subclass(Tensor).detach().cpu().float().reshape(-1))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Scores, labels, maps (or None) and masks (or None) of the whole test set."""
        maps = torch.cat(self.maps) if self.maps else None
        masks = torch.cat(self.masks) if self._masks_expected and self.masks else None
        return torch.cat(self.scores), torch.cat(self.labels), maps, masks
