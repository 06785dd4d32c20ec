# SPDX-License-Identifier: Apache-2.0
"""Progress bars and durations of the stages that surround training, and progress in log files."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import SupportsFloat

from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

LOG_SECONDS = 30.0


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log how long a stage took.

    Args:
        name (str): What is being done, e.g. "Codebook".
    """
    start = time.perf_counter()
    yield
    rank_zero_info(f"{name}: {time.perf_counter() - start:.1f} s")


def progress_bar(description: str, total: int, *, enabled: bool) -> Callable[[Iterable], Iterator]:
    """A function that shows a progress bar while its argument is iterated.

    Args:
        description (str): Shown before the bar.
        total (int): Number of elements.
        enabled (bool): Show it; the user may have switched bars off, and only one process shows them.
    """
    # In a log file every update is a line of its own.
    interval = 0.1 if sys.stderr.isatty() else LOG_SECONDS

    def track(iterable: Iterable) -> Iterator:
        bar = tqdm(
            iter(iterable),  # else tqdm begins twice, and a data loader starts its processes twice
            desc=description,
            total=total,
            disable=not enabled,
            leave=False,
            dynamic_ncols=True,
            mininterval=interval,
        )
        return iter(bar)

    return track


class StepLog:
    """Tells a log file twice a minute how far training is; Lightning's bar is seen on a terminal only.

    Args:
        total (int | None): Steps in all; None if a time limit ends the training.
        done (int): Steps that a resumed training finds done.
        clock (Callable[[], float]): Seconds; tests bring their own.
    """

    def __init__(self, total: int | None, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._last = (done, clock())

    def update(self, step: int, loss: SupportsFloat) -> str | None:
        """Say where training is, if the time has come.

        Args:
            step (int): Steps done.
            loss (SupportsFloat): Loss of the last step; a tensor is only read (and a GPU waited for) when it is said.

        Returns:
            str | None: The line for the log.
        """
        before, since = self._last
        elapsed = self._clock() - since
        if elapsed < LOG_SECONDS or step == before:
            return None
        self._last = (step, since + elapsed)
        pace = elapsed / (step - before)
        if self._total is None:
            return f"Step {step}: loss {float(loss):.3f}, {pace:.2f} s per step."
        left = pace * (self._total - step) / 60
        return f"Step {step} of {self._total}: loss {float(loss):.3f}, {pace:.2f} s per step, {left:.0f} min left."
