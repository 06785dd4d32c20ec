"""The parity report: what it compares, what it counts apart, and what it writes."""

import json
import os

import numpy as np
import onnx
import pytest
import torch
from anomalib.data import MVTecAD
from conftest import train_tiny

from anomalib_cpr import parity
from anomalib_cpr.cli import main
from anomalib_cpr.lightning_model import Cpr
from anomalib_cpr.parity import Differences, OnnxRuntime, OpenVinoRuntime, Prediction, faults, recorded_references

KEYS = {"format", "images", "labels_equal", "score_max_abs", "map_max_abs", "reference_flips", "ms_median", "bytes"}


@pytest.fixture(scope="module")
def datamodule(mvtec_root):
    return MVTecAD(root=mvtec_root, category="screw", train_batch_size=2, eval_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def checkpoint(datamodule, tmp_path_factory):
    path = train_tiny(datamodule, tmp_path_factory.mktemp("trained"), steps=4, window_sizes=(1, 1))
    # anomalib's adaptive threshold is the score of one of the images, whose label then hangs on the last bit.
    state = torch.load(path, weights_only=True)
    state["state_dict"]["post_processor._image_threshold"] *= 0.999
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prediction(score=0.2, label=False, level=0.1, references=(1, 2), confirmed=True):
    return Prediction(score, label, np.full((2, 2), level, np.float32), frozenset(references), confirmed)


def test_flips_are_counted_apart_from_errors():
    result = Differences("onnx", 10)
    result.add(prediction(), prediction(score=0.2 + 1e-4, level=0.1 + 2e-4))
    result.add(prediction(), prediction(score=0.9, label=True, level=0.8, references=(1, 3)))
    row = result.row()
    assert row["images"] == 2
    assert row["labels_equal"] == 1
    assert row["reference_flips"] == 1
    assert row["score_max_abs"] == pytest.approx(1e-4)
    assert row["map_max_abs"] == pytest.approx(2e-4, rel=1e-3)
    assert row["flipped_score_max_abs"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("onnx", [prediction()] * 200, None),
        ("onnx", [prediction()] * 199 + [prediction(references=(7, 8))], None),  # a flip in 200 images is allowed
        ("onnx", [prediction(references=(7, 8)), prediction()], "1 reference flips, above 1 %"),
        ("onnx", [prediction(label=True)], "1 labels differ"),
        ("onnx", [prediction(score=0.5002, label=True)], "1 labels differ"),  # the Engine's was far from the threshold
        ("openvino", [prediction(score=0.21)], "1.0e-02 above 1e-03"),
        ("openvino-int8", [prediction(score=0.21, label=True, references=(7, 8))], None),  # for the user to judge
    ],
)
def test_faults(name, found, message):
    result = Differences(name, 0)
    for one in found:
        result.add(prediction(), one)
    assert (message is None) == (faults(result) == [])
    if message:
        assert message in "; ".join(faults(result))


@pytest.mark.parametrize(
    ("threshold", "engine", "found", "at_threshold"),
    [
        (0.5, 0.5, 0.5 + 1e-6, 1),
        (0.5, 0.4995, 0.5004, 1),
        (0.5, 0.498, 0.5004, 0),
        (0.3, 0.3, 0.3001, 1),
        (0.3, 0.5, 0.5001, 0),
    ],
)
def test_labels_at_the_threshold_hang_on_the_last_bit(threshold, engine, found, at_threshold):
    """anomalib's adaptive threshold is the score of one of the images that it was chosen on."""
    result = Differences("onnx", 0, threshold)
    result.add(prediction(score=engine), prediction(score=found, label=True))
    assert result.row()["labels_equal"] == 0
    assert result.row()["labels_at_threshold"] == at_threshold
    assert any("1 labels differ" in fault for fault in faults(result)) == (not at_threshold)


def test_command(checkpoint, mvtec_root, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    report = tmp_path / "reports" / "parity.json"
    data = ["--data", "MVTecAD", "--data.root", str(mvtec_root), "--data.category", "screw", "--data.num_workers", "0"]
    code = main(["parity", "--ckpt", str(checkpoint), *data, "--json", str(report), "--export-root", "kept"])
    rows = {row["format"]: row for row in json.loads(report.read_text())["rows"]}
    assert code == 0
    assert "TRUST_REMOTE_CODE" not in os.environ
    assert list(rows) == ["engine", "torch", "onnx", "openvino"]
    for row in rows.values():
        assert set(row) >= KEYS
        assert row["images"] == row["labels_equal"] == 6
        assert row["reference_flips"] == 0
        assert row["score_max_abs"] < 1e-4
        assert row["ms_median"] > 0
    (onnx_file,) = (tmp_path / "kept").rglob("*.onnx")  # the copy with references is gone
    assert rows["onnx"]["bytes"] == onnx_file.stat().st_size
    assert rows["openvino"]["bytes"] == sum(file.stat().st_size for file in onnx_file.parents[1].glob("openvino/*"))
    assert "6 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(("form", "runtime"), [("onnx", OnnxRuntime), ("openvino", OpenVinoRuntime)])
def test_references_are_read_from_the_file_itself(checkpoint, datamodule, mvtec_root, tmp_path, form, runtime):
    """A file whose bank is in another order must report other references, with the same score."""
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True).eval()
    path = max((mvtec_root / "screw" / "test").rglob("*.png"))
    plain = runtime(parity.export(model, form, tmp_path, datamodule)).predict(path)
    with recorded_references(model) as references:
        parity.EagerRuntime(model).predict(path)
    assert plain.confirmed
    assert plain.references == frozenset(references[0])
    for name, buffer in model.model.bank.named_buffers():
        model.model.bank.get_buffer(name).copy_(buffer.flip(0))
    turned = runtime(parity.export(model, form, tmp_path, datamodule)).predict(path)
    count = len(model.model.bank)
    assert turned.references == frozenset(count - 1 - index for index in plain.references)
    assert turned.score == pytest.approx(plain.score, abs=1e-6)


def test_graph_without_retrieval(tmp_path):
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), tmp_path / "other.onnx", dynamo=True, verbose=False)
    with (
        pytest.raises(RuntimeError, match="0 places in the graph"),
        parity.onnx_with_references(tmp_path / "other.onnx"),
    ):
        pass
    assert [path.name for path in tmp_path.glob("*references*")] == []
    assert onnx.load(tmp_path / "other.onnx").graph.node


def test_recording_ends(checkpoint):
    model = Cpr.load_from_checkpoint(checkpoint, weights_only=True)
    with recorded_references(model):
        assert "nearest" in vars(model.model.global_retriever)
    assert "nearest" not in vars(model.model.global_retriever)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "Nothing"], "Nothing"),
        (["--data", "MVTecAD", "--data.categry", "screw"], "categry"),
        (["--data", "MVTecAD", "--formats", "word"], "invalid choice: 'word'"),
    ],
)
def test_wrong_arguments(checkpoint, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["parity", "--ckpt", str(checkpoint), *arguments])
    assert message in capsys.readouterr().err
