import pytest

from anomalib_cpr import progress
from anomalib_cpr.progress import LOG_SECONDS, StepLog, progress_bar, stage


@pytest.mark.parametrize(
    ("total", "done", "times", "steps", "lines"),
    [
        (100, 0, [0, 10, 40], [1, 4], [None, "Step 4 of 100: loss 0.500, 10.00 s per step, 16 min left."]),
        (100, 40, [0, 40], [60], ["Step 60 of 100: loss 0.500, 2.00 s per step, 1 min left."]),
        (None, 0, [0, 30], [15], ["Step 15: loss 0.500, 2.00 s per step."]),
        (100, 0, [0, 40, 60, 80], [2, 3, 6], ["Step 2 of 100", None, "Step 6 of 100: loss 0.500, 10.00 s per step"]),
        (100, 7, [0, 90], [7], [None]),  # accumulation: time has passed, no step has
    ],
)
def test_step_log(total, done, times, steps, lines):
    clock = iter(times)
    log = StepLog(total, done, lambda: float(next(clock)))
    for step, line in zip(steps, lines, strict=True):
        said = log.update(step, 0.5)
        assert said is None if line is None else said.startswith(line)
    assert LOG_SECONDS == 30


def test_stage_logs_its_time(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "rank_zero_info", said.append)
    with stage("Codebook"):
        pass
    assert said == ["Codebook: 0.0 s"]


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bar_yields_what_it_is_given(capsys, enabled):
    assert list(progress_bar("Features", 3, enabled=enabled)("abc")) == ["a", "b", "c"]
    assert ("Features" in capsys.readouterr().err) == enabled


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bar_begins_once(enabled):
    """A data loader starts its processes each time that it is asked to begin."""

    class Counted:
        begun = 0

        def __iter__(self):
            self.begun += 1
            return iter("abc")

    iterable = Counted()
    assert list(progress_bar("Features", 3, enabled=enabled)(iterable)) == ["a", "b", "c"]
    assert iterable.begun == 1
