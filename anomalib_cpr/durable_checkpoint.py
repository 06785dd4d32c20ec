# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are either whole or not there, whatever happens while they are written."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written; the one before it, if there was one, is still there."""


class DurableCheckpointIO(AnomalibCheckpointIO):
    """Writes beside the target, waits until the disk has it, and only then replaces what was there.

    Lightning's own way, of which this takes the place, writes into the system's folder for temporary files and moves
    the file from there. Onto another file system that is a copy, and an interrupted copy destroys the checkpoint that
    it replaces. It also holds the file in memory twice before it writes.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Save a checkpoint.

        Args:
            checkpoint (dict[str, Any]): What :func:`torch.save` accepts.
            path (str | Path): Target. Anything but a local file is left to Lightning.
            storage_options (Any): As in Lightning.

        Raises:
            CheckpointNotWrittenError: If the disk is full or cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_durably(checkpoint, Path(path))


def save_durably(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that at any moment either the old or the new one is complete.

    Args:
        checkpoint (dict[str, Any]): What :func:`torch.save` accepts.
        path (Path): Target, a local file.

    Raises:
        CheckpointNotWrittenError: If the disk is full or cannot be written. What was at ``path`` is untouched.
    """
    # One name per target: what a killed process leaves is overwritten by the next attempt.
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch reports a failed write as a RuntimeError about positions in its archive; the cause comes before it.
        if isinstance(error, OSError | RuntimeError):
            raise CheckpointNotWrittenError(_explain(path, error)) from error
        raise
    with suppress(OSError):  # some file systems, and Windows, know no synchronisation of folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _explain(path: Path, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = str(cause if cause is not None else error).strip().partition("\n")[0]
    before = "The one before it is untouched." if path.is_file() else ""
    try:
        room = f" Its disk has {shutil.disk_usage(path.parent).free / 1e6:.0f} MB left."
    except OSError:
        room = ""
    return (
        f"The checkpoint {path} could not be written: {reason}.{room} {before} Make room or choose another "
        "`default_root_dir`; a smaller `bank_dtype`, `max_references` or `descriptor_channels` makes a smaller file."
    )


def save_checkpoints_durably(trainer: Trainer) -> None:
    """Let a trainer write with :class:`DurableCheckpointIO`, unless the user has chosen a way of writing.

    Args:
        trainer (Trainer): About to fit.
    """
    given = trainer.strategy.checkpoint_io
    if type(given) in {AnomalibCheckpointIO, TorchCheckpointIO}:
        trainer.strategy.checkpoint_io = DurableCheckpointIO(getattr(given, "extra_safe_globals", None))
