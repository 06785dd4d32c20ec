# SPDX-License-Identifier: Apache-2.0
"""Progress bars and durations of the stages that surround training."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm


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

    def track(iterable: Iterable) -> Iterator:
        return iter(tqdm(iterable, desc=description, total=total, disable=not enabled, leave=False, dynamic_ncols=True))

    return track
