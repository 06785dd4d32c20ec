"""`anomalib-cpr ablation`: runs are made once, and the table compares like with like."""

import json
import subprocess
import sys

import pytest
import torch
from test_command_line import PROJECT

from anomalib_cpr import training
from anomalib_cpr.ablation import VARIANTS, table
from anomalib_cpr.pairs import sample_patch_pairs


def ablation(*arguments, folder):
    command = [sys.executable, "-m", "anomalib_cpr.cli", "ablation", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.slow
def test_runs_and_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    variants = ["reference", "likely positives count more", "8 known defects"]
    size = ["--steps", 1, "--batch-size", 2, "--image-size", 64, "--held-out", 8, "--precision", "float32"]
    output = ablation("run", *size, "--categories", "gear", "--variants", *variants, folder=tmp_path)
    assert len([line for line in output.splitlines() if line.startswith("{")]) == 3
    files = sorted((tmp_path / "results" / "ablation").glob("*.json"))
    assert len(files) == 3
    row = json.loads(files[0].read_text())
    assert row["variant"] == "8 known defects"
    assert row["held_out"] == 8
    assert row["training_precision"] == "float32"
    assert row["backbone_weights"] == "random"
    assert row["coherent_matching"] is True
    assert row["relative_to_image"] is True
    assert row["drawing_seed"] == 0
    assert row["threads"] >= 1
    assert 0 <= row["pixel_AP"] <= 1
    assert "whole_test_set" not in row, "it was trained on some of it"
    other = json.loads(files[2].read_text())
    assert other["variant"] == "reference"
    assert row["test_images"] == other["test_images"]
    assert 0 <= other["whole_test_set"]["AUPRO"] <= 1
    again = ablation("run", *size, "--categories", "gear", "--variants", *variants, folder=tmp_path)
    assert "{" not in again, "nothing is run twice"
    assert again.count("exists.") == 3
    (prepared,) = (tmp_path / "datasets" / "DrawnParts").glob("prepared_*")
    assert prepared.name == "prepared_gear_0_64_auto_random_0.pt", "once for all variants of a seed"
    assert "| reference | 1: gear |" in ablation("table", folder=tmp_path)


@pytest.mark.slow
def test_measuring_in_the_middle_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    size = ["--steps", 4, "--batch-size", 2, "--image-size", 64, "--categories", "gear", "--variants", "reference"]
    ablation("run", *size, "--results", "plain", folder=tmp_path)
    ablation("run", *size, "--results", "curve", "--measure-at", 1, 2, 4, "--commit", "abc", folder=tmp_path)
    plain, curve = (json.loads(next((tmp_path / name).glob("*.json")).read_text()) for name in ("plain", "curve"))
    points = curve.pop("curve")
    assert [point["steps"] for point in points] == [1, 2], "the last is the result itself"
    assert points[0]["pixel_AP"] != points[1]["pixel_AP"]
    assert curve.pop("commit") == "abc"
    for row in (plain, curve):
        del row["fit_seconds"]
    del plain["commit"]
    assert curve == plain


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize(("variant", "drawn"), [("remote negatives", True), ("no remote negatives", False)])
def test_a_variant_decides_on_remote_negatives_whatever_the_kind(variant, drawn, remote):
    sample = VARIANTS[variant].patches["sample_patch_pairs"]
    anomalies = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    pairs = sample(anomalies, None, torch.Generator().manual_seed(0), remote=remote, count=20)  # as a training asks
    expected = sample_patch_pairs(anomalies, None, torch.Generator().manual_seed(0), remote=drawn, count=20)
    assert bool(pairs.valid[:, 20:40].all()) is drawn
    assert torch.equal(pairs.query, expected.query)
    assert torch.equal(pairs.valid, expected.valid)


@pytest.mark.parametrize("variant", [name for name, variant in VARIANTS.items() if variant.patches])
def test_what_a_variant_replaces_is_there(variant):
    assert all(callable(getattr(training, name)) for name in VARIANTS[variant].patches)


def test_differences_are_from_the_same_category_and_seed(tmp_path):
    common = {"steps": 40, "image_size": 160, "batch_size": 8, "image_AUROC": 0.9}
    runs = [("reference", 0, 0.5), ("reference", 1, 0.7), ("no warm-up", 1, 0.6), ("no warm-up", 2, 0.9)]
    runs.append(("texture", 5, 0.1))
    for index, (variant, seed, precision) in enumerate(runs):
        row = {**common, "variant": variant, "category": "gear", "seed": seed, "pixel_AP": precision}
        (tmp_path / f"{index}.json").write_text(json.dumps(row))
    lines = table(tmp_path).splitlines()
    assert lines[2] == "| reference | 2: gear | 0.900 (0.900, 0.900) |  | 0.600 (0.500, 0.700) |  |  |  |"
    assert lines[3] == (
        "| no warm-up | 2: gear | 0.900 (0.900, 0.900) |  | 0.750 (0.600, 0.900) |  "
        "| +0.000 (+0.000) | -0.100 (-0.100) |"
    ), "seed 2 is alone"
    assert lines[4] == "| texture | 1: gear | 0.900 |  | 0.100 |  |  |  |"


def test_other_settings_have_rows_of_their_own_that_say_what_differs(tmp_path):
    common = {"category": "screw", "seed": 0, "image_size": 320, "batch_size": 8}
    runs = [("reference", 64, 200, 0.5), ("texture", 64, 200, 0.4), ("texture", 384, 1000, 0.7)]
    for index, (variant, channels, steps, precision) in enumerate(runs):
        row = {"variant": variant, "descriptor_channels": channels, "steps": steps, "pixel_AP": precision, **common}
        (tmp_path / f"{index}.json").write_text(json.dumps(row))
    lines = table(tmp_path).splitlines()
    assert lines[2] == "| reference, 64 channels, 200 steps | 1: screw |  |  | 0.500 |  |  |  |"
    assert lines[3] == "| texture, 64 channels, 200 steps | 1: screw |  |  | 0.400 |  |  | -0.100 (-0.100) |"
    assert lines[4] == "| texture, 384 channels, 1000 steps | 1: screw |  |  | 0.700 |  |  |  |"
