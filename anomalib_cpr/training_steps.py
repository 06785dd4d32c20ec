# SPDX-License-Identifier: Apache-2.0
"""How many steps training takes, and the loader that counts them.

The images of all steps are already in memory, so Lightning iterates over placeholders; what a step draws depends only
on seed, step and rank, so that a resumed training continues exactly where it stopped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

# Lightning's own limit when the user gives none. It cannot be told from an explicit 1000.
LIGHTNING_DEFAULT_EPOCHS = 1000


@dataclass
class StepBatch:
    """Placeholder that passes through anomalib's pre-processor untouched."""

    image: tuple[()] = ()
    gt_mask: None = None


class StepLoader:
    """Yields one placeholder per step.

    Args:
        length (Callable[[], int]): Batches per epoch; asked late, when a resumed training knows where it stands.
    """

    def __init__(self, length: Callable[[], int]) -> None:
        self._length = length

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._length()

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the placeholders of an epoch."""
        for _ in range(len(self)):
            yield StepBatch()


@dataclass(frozen=True)
class StepPlan:
    """Length of an epoch and of the whole training.

    Attributes:
        batches_per_epoch (int): Batches in an epoch.
        steps (int | None): Optimiser steps in all; None if only a time limit ends the training.
        epochs (int | None): Number of epochs to ask of Lightning; None leaves the user's.
        single_epoch (bool): The whole training is one epoch, of which a resumed run does the rest.
    """

    batches_per_epoch: int
    steps: int | None
    epochs: int | None
    single_epoch: bool


def plan_steps(
    *, max_epochs: int | None, max_steps: int, accumulate: int, images: int, batch_size: int, default_steps: int
) -> StepPlan:
    """Any limit that the user gives wins; without one, the default number of steps makes one epoch.

    Args:
        max_epochs (int | None): The trainer's; -1 or None means no limit, 1000 is what Lightning sets by itself.
        max_steps (int): The trainer's; -1 means no limit.
        accumulate (int): Batches per optimiser step.
        images (int): Number of training images.
        batch_size (int): Pairs per batch.
        default_steps (int): Steps if the user says nothing.

    Returns:
        StepPlan: The plan.
    """
    if max_epochs not in {None, -1, LIGHTNING_DEFAULT_EPOCHS}:
        batches = -(-images // batch_size)
        steps = max_epochs * -(-batches // accumulate)
        return StepPlan(batches, min(steps, max_steps) if max_steps >= 0 else steps, None, single_epoch=False)
    if max_steps >= 0:
        return StepPlan(max_steps * accumulate, max_steps, None, single_epoch=True)
    if max_epochs == LIGHTNING_DEFAULT_EPOCHS:
        return StepPlan(default_steps * accumulate, default_steps, 1, single_epoch=True)
    return StepPlan(default_steps * accumulate, None, None, single_epoch=False)


def remaining_batches(plan: StepPlan, trainer: Trainer) -> int:
    """Length of the current epoch: of a single-epoch plan, what earlier epochs (another plan's) have left of it.

    Args:
        plan (StepPlan): The plan.
        trainer (Trainer): Knows the batches done.

    Returns:
        int: Number of batches, at least 1.
    """
    if not plan.single_epoch:
        return plan.batches_per_epoch
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return max(1, plan.batches_per_epoch - (progress.total.completed - progress.current.completed))


def restart(scheduler: LambdaLR) -> None:
    """Give an optimiser the learning rate of the first step anew; what a checkpoint says comes later.

    Args:
        scheduler (LambdaLR): Of the optimiser.
    """
    rates = [base * factor(0) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # noqa: SLF001 - what get_last_lr tells


def step_generator(seed: int, rank: int, step: int, batch: int) -> torch.Generator:
    """Random numbers of one step, on the CPU.

    Args:
        seed (int): Of the training.
        rank (int): Process.
        step (int): Optimiser steps done.
        batch (int): Batch within the epoch, which differs between the batches of an accumulated step.
    """
    state = np.random.SeedSequence([seed, rank, step, batch]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


def learning_rate_factor(step: int, total: int | None, schedule: str, warm_up: int) -> float:
    """Factor of the learning rate at a step.

    Args:
        step (int): Optimiser steps done.
        total (int | None): Steps in all; unknown means constant after the warm-up.
        schedule (str): "cosine" decays to 0 at the last step, "constant" does not.
        warm_up (int): Steps of linear increase, at most a tenth of the training.

    Returns:
        float: Between 0 and 1.
    """
    warm_up = min(warm_up, total // 10) if total is not None else warm_up
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    if schedule == "constant" or total is None:
        return 1.0
    done = (step - warm_up) / max(1, total - warm_up)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))
