"""What is shown before training is what training would use."""

import cv2
import pytest
import torch
import yaml
from anomalib.data import Folder
from conftest import TINY_BACKBONE, write_mvtec

from anomalib_cpr import Cpr, inspection
from anomalib_cpr.cli import main


@pytest.fixture
def configuration(tmp_path):
    root = write_mvtec(tmp_path / "data")
    config = {
        "model": {"class_path": "Cpr", "init_args": {**TINY_BACKBONE, "descriptor_channels": 8, "k": 3}},
        "data": {
            "class_path": "MVTecAD",
            "init_args": {"root": str(root), "category": "screw", "train_batch_size": 2, "num_workers": 0},
        },
    }
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def inspect(*arguments):
    return main(["inspect", *map(str, arguments), "--device", "cpu", "--image-size", "64"])


def test_pictures_and_findings_of_an_object(configuration, tmp_path, capsys):
    assert inspect("-c", configuration, "-o", tmp_path / "out") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "anomalies.png",
        "foreground.png",
        "neighbours.png",
        "pairs.png",
    ]
    assert cv2.imread(str(tmp_path / "out" / "pairs.png")).std() > 10
    output = capsys.readouterr().out
    for text in ("6 images of 64x64, kind: object", "Loneliest images: 00", "Foreground: ", "Synthetic anomalies: on "):
        assert text in output


def test_a_texture_has_no_foreground_picture(configuration, tmp_path, capsys):
    assert inspect("-c", configuration, "--kind", "texture", "-o", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "foreground.png").exists()
    assert "kind: texture" in capsys.readouterr().out


def test_nothing_is_trained_and_the_module_can_be_trained_afterwards(tiny_model, tiny_datamodule, tmp_path):
    module = tiny_model()
    before = [parameter.clone() for parameter in module.model.metric_heads.parameters()]
    inspection.inspect(module, tiny_datamodule, tmp_path, "cpu")
    after = list(module.model.metric_heads.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert len(module.model.bank) == 0

    from anomalib.engine import Engine

    engine = Engine(max_steps=1, default_root_dir=tmp_path, enable_progress_bar=False, accelerator="cpu")
    engine.fit(module, datamodule=tiny_datamodule)
    assert engine.trainer.global_step == 1
    assert len(module.model.bank) == 6


def test_options_win_over_the_file(configuration, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(inspection, "inspect", lambda module, data, *_: seen.update(m=module, d=data) or [])
    root = write_mvtec(tmp_path / "other", category="nut")
    inspect("-c", configuration, "--root", root, "--category", "nut", "--kind", "texture")
    assert isinstance(seen["m"], Cpr)
    assert seen["m"].kind == "texture"
    assert (str(seen["d"].root), seen["d"].category) == (str(root), "nut")


def test_arguments_of_the_data_module_are_those_of_anomalib(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(inspection, "inspect", lambda module, data, *_: seen.update(m=module, d=data) or [])
    write_mvtec(tmp_path)
    folder = ["--data.name", "parts", "--data.root", tmp_path / "screw" / "train", "--data.normal_dir", "good"]
    inspect("--data", "Folder", *folder, "--random-weights")
    assert isinstance(seen["d"], Folder)
    assert str(seen["d"].normal_dir) == "good"
    assert not seen["m"].model.pre_trained


def test_a_file_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        inspect("-c", tmp_path / "missing.yaml")
    assert "missing.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected `model` or `data`"),
        ({"trainer": {"max_steps": 1}}, "expected `model` or `data`"),
        ({"class_path": "Cpr", "init_args": {}}, "No data"),  # a file for --model
        ({"class_path": "Patchcore"}, "not Cpr"),
        ({"model": {"class_path": "Patchcore"}, "data": {"class_path": "MVTecAD"}}, "not Cpr"),
    ],
)
def test_refusals(tmp_path, content, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        inspect("-c", file)
