"""Script of test_faults.py: trainings that are killed in the middle of what they do."""

import ast
import os
import signal
import sys
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from conftest import TINY_BACKBONE
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback

from anomalib_cpr import Cpr, lightning_preparation
from anomalib_cpr.torch_model import CprModel

STEPS = 4


def make_model(**arguments):
    return Cpr(**{**TINY_BACKBONE, "descriptor_channels": 8, "k": 3, "image_size": 64, **arguments})


def make_data(root, **arguments):
    arguments = {"train_batch_size": 2, "eval_batch_size": 4, "num_workers": 0, **arguments}
    return MVTecAD(root=root, category="screw", **arguments)


def fit(root, out, callbacks=(), ckpt_path=None, steps=STEPS, **arguments):
    """Train with a resume point after every step."""
    seed_everything(5, verbose=False)
    engine = Engine(
        default_root_dir=out,
        accelerator="cpu",
        max_steps=steps,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        logger=False,
    )
    model = make_model(resume_point_minutes=0, **arguments)
    engine.fit(model, datamodule=make_data(root), ckpt_path=ckpt_path)
    return model


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class DieInStep(Callback):
    def on_before_zero_grad(self, trainer, *_):
        if trainer.global_step == 2:
            die()


class DieInValidation(Callback):
    def on_validation_batch_end(self, *_):
        die()


def save_half_and_die(number):
    """A torch.save that stops after half of the file when it is called for the given time."""
    original, calls = torch.save, []

    def save(checkpoint, file, *arguments, **others):
        original(checkpoint, file, *arguments, **others)
        calls.append(file)
        if len(calls) == number:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    return save


def arrange(stage):
    """Make this process die in a stage; return the callbacks that do it."""
    if stage == "codebook":
        lightning_preparation.cluster_centres = die
    elif stage == "steps":
        return [DieInStep()]
    elif stage == "bank":
        CprModel.describe = die
    elif stage == "validation":
        return [DieInValidation()]
    elif stage == "writing a resume point":
        torch.save = save_half_and_die(3)
    elif stage == "writing the checkpoint":
        torch.save = save_half_and_die(STEPS + 1)
    return []


if __name__ == "__main__":
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    for stage in ast.literal_eval(sys.argv[3]):
        # Forked, because importing everything again takes longer than all that is tested here.
        child = os.fork()
        if not child:
            fit(root, out / stage, arrange(stage))
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, stage
