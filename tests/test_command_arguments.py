"""Slips in arguments are told at once, in one line."""

import argparse

import pytest
from anomalib.data import MVTecAD
from conftest import write_mvtec

from anomalib_cpr import parity
from anomalib_cpr.cli import main
from anomalib_cpr.command_arguments import existing_file, output_file, read_datamodule


def test_files_to_read(tmp_path):
    (tmp_path / "there").touch()
    assert existing_file(str(tmp_path / "there")) == tmp_path / "there"
    for name in ("absent", "."):
        with pytest.raises(argparse.ArgumentTypeError, match="does not exist, or is not a file"):
            existing_file(str(tmp_path / name))


def test_files_to_write(tmp_path):
    assert output_file(str(tmp_path / "new" / "deep" / "a.json")).parent.is_dir()
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        output_file(str(tmp_path / "new"))
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
        output_file(str(tmp_path / "file" / "a.json"))


def test_data_as_on_the_command_line_of_anomalib(tmp_path):
    root = write_mvtec(tmp_path)
    data = read_datamodule("parity", ["--data", "MVTecAD", f"--data.root={root}", "--data.category", "screw"])
    assert isinstance(data, MVTecAD)
    assert (data.root, data.category) == (root, "screw")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "image.png", "--ckpt", "absent.ckpt"],
        ["parity", "--ckpt", "absent.ckpt", "--data", "MVTecAD"],
        ["ablation", "run", "--weights", "absent.ckpt"],
        ["profile-training", "--backbone-weights", "absent.ckpt"],
    ],
)
def test_commands_name_the_file_that_is_not_there(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "absent.ckpt does not exist" in capsys.readouterr().err


def test_parity_names_what_is_not_installed_before_it_predicts(tmp_path, monkeypatch):
    (tmp_path / "model.ckpt").touch()
    monkeypatch.setattr(parity, "find_spec", lambda name: None if name == "onnxruntime" else name)
    command = ["parity", "--ckpt", str(tmp_path / "model.ckpt"), "--data", "MVTecAD"]
    with pytest.raises(SystemExit, match=r"onnxruntime missing: pip install onnxruntime, .* --formats torch openvino"):
        main(command)
