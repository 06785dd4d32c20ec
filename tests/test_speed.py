import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_BACKBONE
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr import speed
from anomalib_cpr.cli import main
from anomalib_cpr.matching import match
from anomalib_cpr.presets import PRESETS
from anomalib_cpr.speed_models import ROWS, SMALL_BANKS, NaiveCpr, Setting, build, cpr_stages, naive_match, random_cpr
from anomalib_cpr.speed_report import plot
from anomalib_cpr.torch_model import CprModel

CPU = torch.device("cpu")
TINY = {name: value for name, value in TINY_BACKBONE.items() if name != "pre_trained"} | {"descriptor_channels": 8}


@pytest.fixture(scope="module")
def model():
    return random_cpr(TINY, Setting(64, 3, 20), "float32", CPU)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_naive_matching_is_the_same_matching(window):
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(1, 8, 6, 7, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(4, 8, 6, 7, generator=generator), dim=1)
    expected = match(query, gallery, torch.tensor([[2, 0, 3]]), window)
    assert torch.allclose(naive_match(query[0], gallery[[2, 0, 3]], window), expected[0], atol=1e-6)


@torch.inference_mode()
def test_the_naive_way_and_the_stages_give_the_model_s_maps(model):
    images = torch.rand(1, 3, 64, 64)
    expected = model(images)
    laps = {"staged": [], "naive": []}
    staged = cpr_stages(model, images, laps["staged"].append)
    assert torch.equal(staged.anomaly_map, expected.anomaly_map)
    assert torch.equal(staged.pred_score, expected.pred_score)
    references, _ = model.retrieve(model.feature_extractor(images)[0])
    naive, _ = NaiveCpr(model).predict(images, references, laps["naive"].append)
    assert torch.allclose(naive.anomaly_map, expected.anomaly_map, atol=1e-5)
    assert laps["staged"] == ["backbone", "heads", "retrieval", "matching", "scoring"]
    assert laps["naive"] == ["backbone", "heads", "retrieval", "gather", "matching", "scoring"]


def test_random_models_are_not_degenerate(model):
    """Different references for different images, a foreground between 0 and 1, no two equal scores."""
    images = torch.rand(4, 3, 64, 64)
    with torch.inference_mode():
        references, foreground = model.retrieve(model.feature_extractor(images)[0])
        scores = model(images).pred_score
    assert foreground.max() > 0.5
    assert len(scores.unique()) == 4
    assert all(len(set(row)) == 3 for row in references.tolist())


def test_a_wrong_matching_is_noticed(model, monkeypatch, capsys):
    from anomalib_cpr import coarse_to_fine
    from anomalib_cpr.speed_models import Row

    rows = [Row("naive", NaiveCpr(model), 64, [])]
    console = speed.Console()
    assert speed.compare(rows, Setting(64, 3, 20), CPU, console)
    monkeypatch.setattr(coarse_to_fine, "match", lambda *arguments, **options: match(*arguments, **options) + 1e-3)
    assert not speed.compare(rows, Setting(64, 3, 20), CPU, console)
    assert "naive does not compute the same" in capsys.readouterr().out


@pytest.mark.gpu
def test_everything_agrees_on_a_gpu(tmp_path):
    """Naive, plain, fused and replayed ways of all presets."""
    arguments = ["--device", "cuda", "--fused", "--cuda-graphs", "--rounds", "3", "--batch", "1", "8"]
    rows = ["--rows", "naive", *PRESETS, *SMALL_BANKS]
    assert main(["speed", *arguments, *rows, "--json", str(tmp_path / "speed.json")]) == 0


@pytest.mark.parametrize("name", [name for name in ROWS if name != "naive"])
def test_every_row_can_be_built_and_run(name):
    row = build(name, Setting(64, 2, 3), CPU)
    with torch.inference_mode():
        result = row.model(torch.rand(2, 3, row.size, row.size))
    assert result.anomaly_map.shape[-2:] == (row.size, row.size)
    assert result.pred_score.numel() == 2
    assert row.bank_mb == pytest.approx(sum(tensor.nbytes for tensor in row.bank) / 1e6)
    assert row.checkpoint_mb >= row.bank_mb


def test_bank_sizes_are_those_of_the_descriptors():
    """At 64 px: 16x16 and 8x8 cells, 3 images."""
    sizes = {name: build(name, Setting(64, 2, 3), CPU).bank_mb for name in ("cpr", *SMALL_BANKS)}
    small = (3 * 25 * 12 + 3 * 16 * 16 + 1) * 4 / 1e6  # histograms, foregrounds, and the weight of colours
    cells = 3 * (16 * 16 + 8 * 8)
    assert sizes["cpr"] == pytest.approx(cells * 384 * 4 / 1e6 + small)
    assert sizes["cpr_float16"] == pytest.approx(cells * 384 * 2 / 1e6 + small)
    assert sizes["cpr_int8"] == pytest.approx(cells * (384 + 4) / 1e6 + small)
    assert sizes["cpr_int4"] == pytest.approx(cells * 384 / 2 / 1e6 + (3 * (25 * 12 * 4 + 8 * 8) + 4) / 1e6)


def test_unknown_row():
    with pytest.raises(ValueError, match="there are naive, cpr"):
        build("cprr", Setting(), CPU)


def test_command(tmp_path, capsys):
    """Through the command line: memory from a process of its own, figures, picture."""
    figures, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    arguments = [
        "--rows",
        "cpr_faster",
        "--size",
        "64",
        "--gallery",
        "5",
        "--k",
        "2",
        "--rounds",
        "4",
        "--batch",
        "1",
        "2",
    ]
    assert main(["speed", *arguments, "--json", str(figures), "--plot", str(picture)]) == 0
    content = json.loads(figures.read_text())
    assert content["environment"]["gallery"] == 5
    assert content["environment"]["busy_cores_of_others"] >= 0
    assert len(content["environment"]["load_average"]) == 2
    assert [row["batch"] for row in content["rows"]] == [1, 2]
    for row in content["rows"]:
        assert row["name"] == "cpr_faster"
        assert row["device"] == "cpu"
        assert row["cpu_ms"] > 0
        assert 0 < row["ms_min"] <= row["ms_median"] <= row["ms_p95"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_median"], rel=1e-2)
        assert row["peak_mb"] > row["bank_mb"] > 0
        assert sum(row["stages_ms"].values()) > 0
    assert str(tmp_path) not in figures.read_text()
    assert picture.stat().st_size > 10_000
    assert "cpr_faster" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_peak_memory_of_a_peer(tmp_path):
    arguments = ["--rows", "padim", "--gallery", "3", "--k", "2", "--rounds", "1", "--batch", "1"]
    assert main(["speed", *arguments, "--json", str(tmp_path / "speed.json")]) == 0
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert row["peak_mb"] > row["checkpoint_mb"] > row["bank_mb"]
    assert 0 < row["working_mb"] < row["peak_mb"]


@pytest.mark.parametrize("option", ["--k", "--gallery", "--rounds", "--batch"])
def test_sizes_below_one(option):
    with pytest.raises(SystemExit, match="must be at least 1"):
        main(["speed", option, "0"])


@pytest.mark.parametrize("option", ["--fused", "--cuda-graphs"])
def test_options_of_another_device(option):
    with pytest.raises(SystemExit, match="need a CUDA device"):
        main(["speed", option])


def test_a_model_that_cannot_be_built_is_left_out(monkeypatch, capsys):
    def no_backbone(*_):
        raise RuntimeError("no such backbone")

    monkeypatch.setattr(speed, "build", no_backbone)
    assert speed.build_rows(["rad"], Setting(), CPU, speed.Console()) == []
    assert "rad is left out: RuntimeError: no such backbone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "end", "busy"),
    [
        ((0.0, 100.0, 10.0, 0.5), (10.0, 118.0, 18.0, 1.5), 1.0),  # 18 s of the machine, 8 of them its own
        ((0.0, 100.0, 10.0, 0.5), (10.0, 107.9, 18.0, 1.5), 0.0),  # its own time is counted more finely
        ((0.0, None, 10.0, None), (10.0, None, 18.0, None), None),  # a system that does not say
    ],
)
def test_what_others_did_meanwhile(monkeypatch, capsys, start, end, busy):
    times = iter([start, end, end])
    monkeypatch.setattr(speed.OtherWork, "_now", staticmethod(lambda: next(times)))
    others = speed.OtherWork()
    assert others.so_far() == {"load_average": [start[3], end[3]], "busy_cores_of_others": busy}
    others.warn(speed.Console())
    assert ("kept 1.0 processors busy" in capsys.readouterr().out) == (busy == 1)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="processor time of the machine is read from /proc")
def test_a_process_that_was_waited_for_is_own_work():
    # The system counts in hundredths of a second: somewhat more work than is asked for.
    others, work = speed.OtherWork(), "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    (_, machine_then, own_then, _), (_, machine_now, own_now, _) = others._start, others._now()
    assert own_now - own_then >= 0.5
    assert machine_now - machine_then >= 0.4


@pytest.mark.parametrize("peak_mb", [None, 90.0])
@pytest.mark.parametrize("stages_ms", [{}, {"backbone": 3.0, "matching": 2.0}])
def test_plot_of_whatever_was_measured(tmp_path, peak_mb, stages_ms):
    row = {"name": "cpr", "batch": 1, "ms_median": 5.0, "peak_mb": peak_mb, "stages_ms": stages_ms}
    environment = {"accelerator": "GPU", "precision": "float32", "size": 320, "k": 10, "gallery": 5}
    plot([row], environment, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_same_in_yaml_and_fit_the_model(name):
    config = yaml.safe_load((Path(__file__).parents[1] / "configs" / "model" / f"{name}.yaml").read_text())
    assert config["model"]["class_path"] == "anomalib_cpr.Cpr"
    arguments = config["model"]["init_args"]
    assert {**arguments, "layers": tuple(arguments["layers"])} == PRESETS[name]
    assert CprModel(**arguments, pre_trained=False).bank.descriptors_1.shape[1] == arguments["descriptor_channels"]
