"""Script of test_ranks.py: fits, tests and predicts in several processes, and writes what each of them holds."""

import os
import sys
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from conftest import TINY_BACKBONE
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback

from anomalib_cpr import Cpr

STEPS = 4


class Notes(Callback):
    """Keeps the gradients of the first step, after the ranks have exchanged them; and stops where asked."""

    def __init__(self, stop_at):
        self.gradients, self.stop_at = None, stop_at

    def on_before_optimizer_step(self, _trainer, pl_module, *_):
        if self.gradients is None:
            self.gradients = [parameter.grad.clone() for parameter in pl_module.model.metric_heads.parameters()]

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.stop_at:
            raise ZeroDivisionError


def make_model(**arguments):
    return Cpr(**{**TINY_BACKBONE, "descriptor_channels": 8, "k": 3, "image_size": 64, **arguments})


def make_data(root):
    return MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=3, num_workers=0)


def main(strategy, devices, root, out, stop_at=0, ckpt_path=None, **arguments):
    if "LOCAL_RANK" not in os.environ:  # the other ranks draw other numbers: what they share must be sent to them
        seed_everything(3)
    notes = Notes(stop_at)
    engine = Engine(
        default_root_dir=out / "results",
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        enable_progress_bar=False,
        callbacks=[notes],
    )
    model, data = make_model(**arguments), make_data(root)
    if stop_at:
        engine.fit(model, datamodule=data)
    engine.fit(model, datamodule=data, ckpt_path=ckpt_path)
    result = {
        "state": model.state_dict(),
        "kind": model.resolved_kind,
        "seed": model.seed,
        "gradients": notes.gradients,
        "metrics": engine.test(model, datamodule=data)[0],
    }
    if not strategy.startswith(("ddp_spawn", "ddp_notebook")):
        batches = engine.predict(model, datamodule=data)
        result["predictions"] = [(batch.image_path, batch.anomaly_map, batch.pred_score) for batch in batches]
    torch.save(result, out / f"rank_{engine.trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), **eval(sys.argv[5]))  # noqa: S307
