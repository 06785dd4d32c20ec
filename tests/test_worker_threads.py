"""Pieces of a computation on all threads."""

import os
import threading

import pytest
import torch
from conftest import torch_threads

from anomalib_cpr.worker_threads import run_in_threads


@pytest.fixture(autouse=True)
def _two_threads():
    with torch_threads(2):
        yield


def fill(result, place):
    def task():
        result[place] = place + torch.get_num_threads() / 10

    return task


@pytest.mark.parametrize("inference", [False, True])
def test_tasks_run_with_one_thread_each_and_leave_torch_its_number(inference):
    with torch.inference_mode(inference):
        result = torch.zeros(20)
        for _ in range(2):
            run_in_threads([fill(result, place) for place in range(20)])
    torch.testing.assert_close(result, torch.arange(20) + 0.1)
    assert torch.get_num_threads() == 2
    others = []
    new = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    new.start(), new.join()
    assert others == [2], "other threads of the user's program compute as before"


def test_one_thread_and_one_task_need_no_workers():
    names = []
    run_in_threads([lambda: names.append(threading.current_thread().name)])
    torch.set_num_threads(1)
    run_in_threads([lambda: names.append(threading.current_thread().name)] * 2)
    assert set(names) == {threading.current_thread().name}


def test_an_error_of_a_task_is_raised_after_all_have_ended():
    done = []

    def fail():
        raise ValueError("task 1")

    with pytest.raises(ValueError, match="task 1"):
        run_in_threads([fail, *[lambda: done.append(1)] * 3])
    assert len(done) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_workers_of_its_own():
    result = torch.zeros(4)
    run_in_threads([fill(result, place) for place in range(4)])
    child = os.fork()
    if child == 0:
        own = [0, 0]
        run_in_threads([lambda: own.__setitem__(0, 1), lambda: own.__setitem__(1, 1)])
        os._exit(0 if own == [1, 1] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
