# SPDX-License-Identifier: Apache-2.0
"""Independent pieces of a computation on all CPU threads, where torch's operations are too small to be shared out."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_workers = 0


def run_in_threads(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks that write to different places, as many at a time as torch has threads.

    Each task computes in one thread. What it computes does not depend on how many there are.

    Args:
        tasks (Sequence[Callable]): What to run. They leave results in tensors of their own, or in parts of one that
            do not overlap, and record no gradients.

    Raises:
        BaseException: The first that a task raises, after all have ended.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) == 1:
        for task in tasks:
            task()
        return
    # Whether tensors may be changed in place is a matter of the thread.
    inference = torch.is_inference_mode_enabled()

    def guarded(task: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            task()

    futures = [_pool_of(threads).submit(guarded, task) for task in tasks]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def _pool_of(threads: int) -> ThreadPoolExecutor:
    global _pool, _workers
    with _lock:
        if _pool is None or _workers != threads:
            if _pool is not None:
                _pool.shutdown(wait=False)
            ready = Barrier(threads)
            _pool, _workers = ThreadPoolExecutor(threads, thread_name_prefix="cpr"), threads
            for future in [_pool.submit(_compute_alone, ready) for _ in range(threads)]:
                future.result()
            # torch gives a thread its own number, but new threads the number that was set last, whoever set it.
            torch.set_num_threads(threads)
        return _pool


def _compute_alone(ready: Barrier) -> None:
    torch.get_num_threads()  # a thread's first question sets its number to that of the process; later ones leave it
    torch.set_num_threads(1)
    ready.wait()  # so that each worker comes here once


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads do not survive a fork
