# SPDX-License-Identifier: Apache-2.0
"""Keeps a long training safe between Lightning's own checkpoints, and on Ctrl-C."""

import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .lightning_bank import BankInCheckpoints

RESUME_NAME = "resume.ckpt"
INTERRUPTED_NAME = "interrupted.ckpt"


class ResumePoint(Callback):
    """Saves a point to resume from every few minutes, and a usable checkpoint when training is interrupted.

    Both lie beside the Engine's own checkpoint and are written only if the trainer keeps checkpoints at all.
    A resume point leaves out the reference bank, which is large and outdated by the next step. It is removed when
    training ends well.

    An Engine keeps its callbacks, and may be given another model afterwards, which is none of this one's business.

    Args:
        minutes (float): Time between resume points.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._last = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Save a resume point if the time has come, but not between the batches of one step: gradients are not kept."""
        del args, kwargs
        if not isinstance(pl_module, BankInCheckpoints):
            return
        folder = _folder(trainer)
        whole = not trainer.fit_loop.epoch_loop._should_accumulate()  # noqa: SLF001 - as Lightning decides on steps
        due = whole and time.monotonic() - self._last > 60 * self.minutes
        if folder is not None and trainer.strategy.reduce_boolean_decision(due):
            self._save(trainer, folder / RESUME_NAME, bank=False)
            self._last = time.monotonic()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep what was learned."""
        if not isinstance(pl_module, BankInCheckpoints):
            return
        try:
            self._rescue(trainer, exception)
        except OSError as error:
            # The disk may be what failed. The first error, not this one, is to reach the user.
            rank_zero_warn(f"No resume point: {error}")
        finally:
            # A later fit with this trainer must find it as the user made it; Lightning runs no teardown hook here.
            cast("Any", pl_module).end_fit()

    def _rescue(self, trainer: Trainer, exception: BaseException) -> None:
        folder = _folder(trainer)
        # Validation within a training counts: what it follows may have taken hours. Steps of an earlier fit do not.
        fitting = trainer.state.fn == TrainerFn.FITTING and cast("Any", trainer.lightning_module).is_prepared
        if folder is None or not fitting or trainer.global_step == 0:
            return
        unfinished = cast("Any", trainer.lightning_module).forget_unfinished_step()
        # The quick one first: building the bank takes a while, and may be what failed.
        self._save(trainer, folder / RESUME_NAME, bank=False, alone=True, unfinished=unfinished)
        rank_zero_info(f"Training can be resumed at step {trainer.global_step}: ckpt_path={folder / RESUME_NAME}")
        if isinstance(exception, KeyboardInterrupt):
            self._save(trainer, folder / INTERRUPTED_NAME, bank=True, alone=True, unfinished=unfinished)
            rank_zero_info(f"What was learned so far can be tested and resumed: ckpt_path={folder / INTERRUPTED_NAME}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the resume point: the final checkpoint holds more."""
        if not isinstance(pl_module, BankInCheckpoints):
            return
        # Not for a second model of an exhausted trainer, which would overwrite the checkpoint of the first.
        if trainer.ckpt_path is not None and trainer.global_step > 0 and cast("Any", pl_module).nothing_was_run:
            self._finish(trainer, pl_module)
        folder = _folder(trainer)
        if folder is not None and trainer.is_global_zero:
            (folder / RESUME_NAME).unlink(missing_ok=True)

    @staticmethod
    def _finish(trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what follows the last step, where a training was interrupted just there.

        What Lightning does then depends on where exactly that was, and is at best a part of it.
        """
        rank_zero_info("No step is left: what remains is the reference bank, validation and the checkpoint.")
        pl_module.to(trainer.strategy.root_device)  # Lightning has already moved it to the CPU
        cast("Any", pl_module).build_bank()
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # all of it: the metrics of its first half are gone
        trainer.validating = True
        validation.run()
        trainer.training = True
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback._last_global_step_saved = 0  # noqa: SLF001 - it may have saved what was not validated
                callback.on_train_epoch_end(trainer, pl_module)
        pl_module.cpu()

    @staticmethod
    def _save(trainer: Trainer, path: Path, *, bank: bool, alone: bool = False, unfinished: bool = False) -> None:
        """Write a checkpoint.

        Args:
            trainer (Trainer): Of the training.
            path (Path): Target.
            bank (bool): With the reference bank.
            alone (bool): Other processes, if there are any, may be anywhere: do not wait for them.
            unfinished (bool): A step has begun that did not come to its end.
        """
        module = cast("Any", trainer.lightning_module)
        module.saves_bank, module.saves_alone = bank, alone
        if not bank:
            module.drop_bank()
        try:
            if not alone:
                trainer.save_checkpoint(path)
            elif trainer.is_global_zero:
                checkpoint = trainer._checkpoint_connector.dump_checkpoint()  # noqa: SLF001 - there is no public way
                if unfinished and trainer.accumulate_grad_batches > 1:
                    _begin_step_anew(checkpoint, trainer.accumulate_grad_batches)
                trainer.strategy.save_checkpoint(checkpoint, path)
        finally:
            module.saves_bank, module.saves_alone = True, False


def _begin_step_anew(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let a resumed training do all batches of an unfinished step again: their gradients are not in a checkpoint."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["current"]["completed"] % accumulate
    for counts in (progress["current"], progress["total"]):
        counts.update(dict.fromkeys(counts, counts["completed"] - done))
    progress["is_last_batch"] = False


def _folder(trainer: Trainer) -> Path | None:
    """Where the Engine keeps its checkpoint; None if it keeps none."""
    if not any(isinstance(callback, ModelCheckpoint) for callback in trainer.checkpoint_callbacks):
        return None
    return Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir)
