"""What production does to a training: processes that are killed, disks that are full, workers that die."""

import contextlib
import errno
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from conftest import torch_threads
from fit_and_die import STEPS, fit, make_data, make_model
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn

from anomalib_cpr import Cpr, memory
from anomalib_cpr.durable_checkpoint import CheckpointNotWrittenError, DurableCheckpointIO, save_durably
from anomalib_cpr.memory import available_bytes, is_out_of_memory, scarcity
from anomalib_cpr.reference_bank import ReferenceBank

STAGES = ["codebook", "steps", "writing a resume point", "bank", "validation", "writing the checkpoint"]


def state_of(model):
    return {name: value for name, value in model.state_dict().items() if "num_batches" not in name}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the killed processes: with another number of threads, sums differ in the last bits."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def killed(mvtec_root, tmp_path_factory):
    """A folder for each stage, as a process left it that was killed with signal 9 in that stage."""
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("fit_and_die.py")
    subprocess.run([sys.executable, script, mvtec_root, out, repr(STAGES)], env=environment, check=True, timeout=300)
    return out


@pytest.fixture(scope="module")
def whole(mvtec_root, tmp_path_factory):
    """What an uninterrupted training gives."""
    return state_of(fit(mvtec_root, tmp_path_factory.mktemp("whole")))


def checkpoints(folder):
    return {path.name: path for path in folder.rglob("*.ckpt") if "latest" not in path.parts}


@pytest.mark.parametrize(
    ("stage", "steps_done"),
    [
        ("codebook", None),
        ("steps", 2),
        ("writing a resume point", 2),
        ("bank", STEPS),
        ("validation", STEPS),
        ("writing the checkpoint", STEPS),
    ],
)
def test_killed_training_resumes_as_if_nothing_had_been(killed, whole, mvtec_root, stage, steps_done):
    found = checkpoints(killed / stage)
    assert list(found) == ([] if steps_done is None else ["resume.ckpt"])
    point = found.get("resume.ckpt")
    if point is not None:
        assert torch.load(point, weights_only=True)["global_step"] == steps_done
    model = fit(mvtec_root, killed / stage, ckpt_path=point)
    assert_same(state_of(model), whole)
    final = checkpoints(killed / stage)["model.ckpt"]
    assert_same(state_of(Cpr.load_from_checkpoint(final, map_location="cpu")), whole)


class Fail(Callback):
    """Raises at a moment of a training, when it has done so many steps."""

    def __init__(self, moment, step):
        self.moment, self.step = moment, step

    def check(self, moment, trainer):
        if (moment, trainer.global_step) == (self.moment, self.step):
            raise ZeroDivisionError

    def on_before_zero_grad(self, trainer, *_):
        self.check("amid a step", trainer)

    def on_train_batch_end(self, trainer, *_):
        self.check("after a step", trainer)

    def on_validation_batch_end(self, trainer, *_):
        self.check("validation", trainer)

    def on_validation_end(self, trainer, *_):
        self.check("after validation", trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.check("end of an epoch", trainer)

    def on_train_end(self, trainer, *_):
        self.check("end", trainer)


@pytest.fixture(scope="module")
def train(mvtec_root, tmp_path_factory):
    """Trains until the end or until it fails; returns model and folder."""

    def run(limits, fail=None, ckpt_path=None):
        seed_everything(5, verbose=False)
        folder = tmp_path_factory.mktemp("run")
        engine = Engine(
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            callbacks=[fail] if fail else [],
            accelerator="cpu",
            max_steps=limits.get("max_steps", -1),
            max_epochs=limits.get("max_epochs"),
        )
        model = make_model(training_steps=limits.get("training_steps"))
        with pytest.raises(ZeroDivisionError) if fail else contextlib.nullcontext():
            engine.fit(model, datamodule=make_data(mvtec_root), ckpt_path=ckpt_path)
        return model, folder

    run.whole = functools.cache(lambda limits: state_of(run(dict(limits))[0]))
    return run


@pytest.mark.parametrize(
    ("limits", "step", "moment"),
    [
        ({"max_steps": 4}, 2, "amid a step"),
        ({"max_steps": 4}, 4, "after a step"),
        ({"max_steps": 4}, 4, "validation"),
        ({"max_steps": 4}, 4, "end"),
        ({"training_steps": 4}, 4, "after a step"),
        ({"training_steps": 4}, 4, "validation"),
        ({"training_steps": 4}, 4, "end of an epoch"),
        ({"max_epochs": 2}, 3, "validation"),
        ({"max_epochs": 2}, 3, "after a step"),
        ({"max_epochs": 2}, 6, "validation"),
        ({"max_epochs": 2}, 6, "after validation"),
    ],
)
def test_an_error_at_any_moment_loses_no_step(train, limits, step, moment):
    """Lightning alone would skip validation, validate with half of the images, or save nothing at the end."""
    _, folder = train(limits, Fail(moment, step))
    point = checkpoints(folder)["resume.ckpt"]
    assert torch.load(point, weights_only=True)["global_step"] == step
    model, folder = train(limits, ckpt_path=point)
    whole = train.whole(tuple(limits.items()))
    assert_same(state_of(model), whole)
    assert_same(state_of(Cpr.load_from_checkpoint(checkpoints(folder)["model.ckpt"], map_location="cpu")), whole)


# --- disks


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    resource = pytest.importorskip("resource", reason="limits the size of files as Unix does")
    path = tmp_path / "deep" / "model.ckpt"
    save_durably({"weights": torch.arange(4)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointNotWrittenError, match=r"File too large.*before it is untouched.*bank_dtype"):
            save_durably({"weights": torch.arange(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path, weights_only=True)["weights"].tolist() == [0, 1, 2, 3]
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    path = tmp_path / "model.ckpt"
    (tmp_path / ".model.ckpt.part").write_bytes(b"half")
    save_durably({"step": 1}, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_cannot_be_saved_is_no_matter_of_disks(tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        save_durably({"generator": (number for number in range(3))}, tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == []


def fill_the_disk(monkeypatch, number, also_afterwards):
    """Let the disk be full when a checkpoint is written for the given time."""
    original, calls = torch.save, []

    def save(checkpoint, file, *arguments, **others):
        calls.append(file)
        original(checkpoint, file, *arguments, **others)
        if len(calls) == number or (also_afterwards and len(calls) > number):
            file.truncate(1000)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize(
    ("number", "also_afterwards", "resumes_at"),
    [
        (3, True, 2),  # the resume point of step 3, and the attempt to save it after the error
        (STEPS + 1, False, STEPS),  # the checkpoint with the bank, which is larger than a resume point
    ],
)
def test_a_full_disk_loses_little(mvtec_root, tmp_path, whole, monkeypatch, number, also_afterwards, resumes_at):
    with monkeypatch.context() as patch:
        fill_the_disk(patch, number, also_afterwards)
        with pytest.raises(CheckpointNotWrittenError, match=r"No space left on device.*MB left.*default_root_dir"):
            fit(mvtec_root, tmp_path)
    assert not list(tmp_path.rglob("*.part"))
    point = checkpoints(tmp_path)["resume.ckpt"]
    assert torch.load(point, weights_only=True)["global_step"] == resumes_at
    assert_same(state_of(fit(mvtec_root, tmp_path, ckpt_path=point)), whole)


def test_a_way_of_writing_that_the_user_chose_stays(mvtec_root, tmp_path):
    class Own(DurableCheckpointIO):
        pass

    engine = Engine(default_root_dir=tmp_path, max_steps=1, logger=False, accelerator="cpu", plugins=[Own()])
    engine.fit(make_model(), datamodule=make_data(mvtec_root))
    assert type(engine.trainer.strategy.checkpoint_io) is Own


# --- workers


class DieInWorker(nn.Module):
    """An augmentation that ends the process, if it is one that reads images."""

    def forward(self, *items):
        if torch.utils.data.get_worker_info() is not None:
            os._exit(1)
        return items if len(items) > 1 else items[0]


def test_a_worker_that_dies_before_training(mvtec_root, tmp_path):
    data = make_data(mvtec_root, num_workers=1, train_augmentations=DieInWorker())
    engine = Engine(default_root_dir=tmp_path, max_steps=1, logger=False, accelerator="cpu")
    with pytest.raises(
        RuntimeError, match=r"process that reads training images died.*num_workers.*Nothing was trained"
    ):
        engine.fit(make_model(), datamodule=data)


def test_a_worker_that_dies_in_validation(mvtec_root, tmp_path, whole):
    seed_everything(5, verbose=False)
    data = make_data(mvtec_root, num_workers=1, val_augmentations=DieInWorker())
    engine = Engine(default_root_dir=tmp_path, max_steps=STEPS, logger=False, accelerator="cpu")
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        engine.fit(make_model(), datamodule=data)
    assert_same(state_of(fit(mvtec_root, tmp_path, ckpt_path=checkpoints(tmp_path)["resume.ckpt"])), whole)


# --- memory


def test_a_bank_that_does_not_fit(mvtec_root, tmp_path, monkeypatch):
    """The message says which option helps; with it, the training goes on where it was."""
    with monkeypatch.context() as patch:
        patch.setattr(ReferenceBank, "allocate", lambda *_: torch.empty(2**55))
        with pytest.raises(MemoryError, match=r"6 images does not fit.*bank_dtype='float16'.*No step is lost"):
            fit(mvtec_root, tmp_path)
    point = checkpoints(tmp_path)["resume.ckpt"]
    model = fit(mvtec_root, tmp_path, ckpt_path=point, bank_dtype="int8", max_references=4)
    assert len(model.model.bank) == 4
    assert model.model.bank.descriptors_1.dtype == torch.int8
    assert "model.ckpt" in checkpoints(tmp_path)


def test_scarce_memory_is_announced(mvtec_root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    with pytest.warns(UserWarning, match=r"reference bank will take 0 MB, and 0 MB are free on cpu.*max_references"):
        fit(mvtec_root, tmp_path, steps=1)
    assert "The training images will take 0 MB" in caplog.text


@pytest.mark.parametrize(
    ("needed", "available", "warns"), [(79, 100, False), (81, 100, True), (1e12, None, False), (0, 0, False)]
)
def test_scarcity(monkeypatch, needed, available, warns):
    monkeypatch.setattr(memory, "available_bytes", lambda _: available)
    assert (scarcity(needed, torch.device("cpu"), "It", "do less") is not None) == warns


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_000_000 * 1024),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "anon 3\ninactive_file 2"}, 8_000_000 * 1024),
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 3\ninactive_file 50"}, 150),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "anon 3"}, 0),
        ({"memory.max": "1000"}, 8_000_000 * 1024),
    ],
)
def test_available_memory(tmp_path, monkeypatch, files, expected):
    information = tmp_path / "meminfo"
    information.write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n", encoding="ascii")
    monkeypatch.setattr(memory, "_MEMORY_INFO", information)
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    assert available_bytes(torch.device("cpu")) == expected


def test_available_memory_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "missing")
    assert available_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            True,
        ),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected
