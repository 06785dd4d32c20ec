"""configs/model/cpr_paper.yaml: what the authors' code does, and that anomalib takes it."""

import inspect

import cv2
import numpy as np
import pytest
import yaml
from anomalib.models import get_model
from conftest import TINY_BACKBONE, write_mvtec
from test_command_line import PROJECT, anomalib

from anomalib_cpr import Cpr
from anomalib_cpr.ablation import AS_THE_PAPER

CONFIGURATION = PROJECT / "configs" / "model" / "cpr_paper.yaml"


def test_values_are_those_of_the_authors_code():
    written = yaml.safe_load(CONFIGURATION.read_text())["init_args"]
    assert written == {
        "backbone": "densenet201",
        "layers": ["features.denseblock1", "features.denseblock2"],
        "pre_trained": True,
        "descriptor_channels": 384,
        "k": 10,
        "window_sizes": [3, 1],
        "blur_sigma": 4.0,
        "follow_edges": False,
        "coherent_matching": False,
        "unaligned_matching": False,
        "averaged_descriptors": False,
        "colour_matching": False,
        "relative_to_image": False,
        "codebook_size": 12,
        "blocks": 5,
        "kind": "auto",
        "anomaly_source_path": "datasets/dtd/images",
        "recoloured_anomalies": 0.0,
        "displaced_anomalies": 0.0,
        "boundary_weight": 1.0,
        "centred_start": False,
        "eight_bit_training": True,
        "training_steps": "paper",
        "learning_rate": 0.001,
        "weight_decay": 0.01,
        "learning_rate_schedule": "constant",
        "warm_up_steps": 0,
        "training_precision": "float32",
    }
    model = get_model({"class_path": "anomalib_cpr.Cpr", "init_args": written})
    assert [model._learning_rate_factor(step) for step in (0, 1, 39_999)] == [1, 1, 1]


def train(folder, *arguments, **options):
    changes = [f"--model.init_args.{name}={value}" for name, value in TINY_BACKBONE.items()]
    data = ["--data", "MVTecAD", "--data.root", "data", "--data.category", "screw", "--data.num_workers", "0"]
    limits = ["--data.train_batch_size", "2", "--trainer.max_steps", "2", "--model.seed", "66"]
    command = ["train", "--model", CONFIGURATION, *changes, *data, *limits, *arguments]
    return anomalib(*command, folder=folder, **options)


@pytest.fixture
def folder(tmp_path):
    write_mvtec(tmp_path / "data")
    return tmp_path


def test_anomalib_trains_with_it(folder):
    textures = folder / "datasets" / "dtd" / "images" / "dotted"
    textures.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    cv2.imwrite(str(textures / "0.jpg"), noise)
    assert "image_AUROC" in train(folder).stdout


def test_without_the_textures_it_says_where_they_belong(folder):
    result = train(folder, check=False)
    assert result.returncode != 0
    assert "datasets/dtd/images does not exist" in result.stderr + result.stdout


def test_ablation_changes_all_that_the_authors_code_does_otherwise():
    written = yaml.safe_load(CONFIGURATION.read_text())["init_args"]
    sizes = {"backbone", "layers", "pre_trained", "descriptor_channels", "anomaly_source_path", "training_steps"}
    defaults = {name: parameter.default for name, parameter in inspect.signature(Cpr).parameters.items()}
    differing = {name: value for name, value in written.items() if name not in sizes and value != defaults[name]}
    assert len(differing) >= 10
    assert {**differing, **AS_THE_PAPER} == {name: written[name] for name in differing | AS_THE_PAPER}
