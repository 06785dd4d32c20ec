"""anomalib's own commands with Cpr, from training to a prediction, and `anomalib-cpr` beside them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI
from conftest import TINY_BACKBONE, write_mvtec

PROJECT = Path(__file__).parents[1]


def anomalib(*arguments, folder: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run the command of the environment that runs the tests, as a user would: in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
    environment.pop("ANOMALIB_CPR_AUTOLOAD", None)
    result = subprocess.run(
        [sys.executable, "-c", "from anomalib.cli.cli import main; main()", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder in which `anomalib train` was run, and its output."""
    folder = tmp_path_factory.mktemp("run")
    write_mvtec(folder / "datasets" / "MVTecAD")
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "Cpr",
            "init_args": {
                **TINY_BACKBONE,
                "descriptor_channels": 8,
                "k": 3,
                "image_size": 64,
            },
        },
        "data": {
            "class_path": "MVTec",
            "init_args": {
                "root": str(folder / "datasets" / "MVTecAD"),
                "category": "screw",
                "train_batch_size": 2,
                "eval_batch_size": 4,
                "num_workers": 0,
            },
        },
        "trainer": {"max_steps": 2, "enable_progress_bar": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = anomalib("train", "--config", "config.yaml", folder=folder)
    return folder, result.stdout + result.stderr


def test_train_says_what_it_did(trained):
    folder, output = trained
    for text in (
        "Backbone: test_resnet with random weights",
        "Kind: object (category 'screw' of MVTec",
        "6 training images of 64x64 in memory",
        "the reference bank will hold 6 of them and take",
        "Codebook: ",
        "Reference bank: ",
        "image_AUROC",
    ):
        assert text in output, output
    assert list(folder.glob("results/Cpr/MVTec/screw/latest/weights/lightning/model.ckpt"))
    assert len(list(folder.glob("results/Cpr/MVTec/screw/latest/images/*/*.png"))) == 6


def checkpoint_of(folder: Path) -> Path:
    return next(folder.glob("results/Cpr/MVTec/screw/latest/weights/lightning/model.ckpt"))


@pytest.mark.parametrize("command", ["test", "validate"])
def test_checkpoint_can_be_evaluated(trained, command):
    folder, _ = trained
    result = anomalib(command, "--config", "config.yaml", "--ckpt_path", checkpoint_of(folder), folder=folder)
    assert "image_AUROC" in result.stdout or command == "validate"


@pytest.mark.parametrize("command", ["fit", "train"])
def test_training_goes_on_from_a_checkpoint(trained, tmp_path, command):
    """In this process; `anomalib fit` is the subcommand that the others here do not cover."""
    folder, _ = trained
    own = ["--trainer.max_steps=4", f"--default_root_dir={tmp_path}", f"--ckpt_path={checkpoint_of(folder)}"]
    command_line = AnomalibCLI([command, f"--config={folder / 'config.yaml'}", *own])
    assert command_line.engine.trainer.global_step == 4
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    assert bool(list(tmp_path.rglob("images/**/*.png"))) == (command == "train"), "only train tests and draws"


def test_predict_from_a_checkpoint_draws_pictures(trained, tmp_path):
    folder, _ = trained
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    del config["seed_everything"], config["trainer"]["max_steps"]
    config["data"] = str(folder / "datasets/MVTecAD/screw/test/scratch")
    config["default_root_dir"] = str(tmp_path)
    (folder / "predict.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    anomalib("predict", "--config", "predict.yaml", "--ckpt_path", checkpoint_of(folder), folder=folder)
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 3


def test_export_to_torch(trained, tmp_path):
    folder, _ = trained
    arguments = ["--model", "Cpr", "--export_type", "torch", "--default_root_dir", str(tmp_path)]
    for name, value in (*TINY_BACKBONE.items(), ("descriptor_channels", 8), ("k", 3)):
        arguments += [f"--model.{name}", json.dumps(value) if isinstance(value, list) else str(value).lower()]
    anomalib("export", *arguments, "--ckpt_path", checkpoint_of(folder), folder=folder)
    assert len(list(tmp_path.rglob("model.pt"))) == 1


def test_benchmark_takes_cpr_in_its_grid(trained, tmp_path):
    folder, _ = trained
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    benchmark = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 1,
            "model": {
                "class_path": "Cpr",
                "init_args": {**TINY_BACKBONE, "descriptor_channels": 8, "training_steps": 2},
            },
            "data": config["data"],
        },
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(benchmark), encoding="utf-8")
    anomalib("benchmark", "--config", "benchmark.yaml", folder=tmp_path)
    (table,) = tmp_path.rglob("results.csv")
    assert "image_AUROC" in table.read_text(encoding="utf-8")


def test_bad_value_is_one_clear_message(trained):
    folder, _ = trained
    result = anomalib("train", "--config", "config.yaml", "--model.k", "0", folder=folder, check=False)
    assert result.returncode != 0
    assert "k=0: must be at least 1" in result.stdout + result.stderr
