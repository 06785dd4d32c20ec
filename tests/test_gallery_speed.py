import json

import pytest
import torch

from anomalib_cpr import gallery_speed
from anomalib_cpr.cli import main
from anomalib_cpr.presets import PRESETS
from anomalib_cpr.reference_bank import DTYPES
from anomalib_cpr.speed_models import Setting, random_cpr


def test_histograms_are_histograms():
    generator = torch.Generator().manual_seed(0)
    plain = gallery_speed.synthetic_histograms(20, 0, generator)
    disturbed = gallery_speed.synthetic_histograms(20, 4, generator)
    for histograms in (plain, disturbed):
        assert histograms.shape == (20, 25, 12)
        assert torch.allclose(histograms.sum(-1), torch.ones(20, 25))
    assert ((disturbed.max(-1).values >= 0.5).sum(1) >= 4).all()


def test_command(tmp_path, monkeypatch, capsys):
    """Small, middle and large gallery; the last bank is larger than allowed."""
    monkeypatch.setattr(gallery_speed, "SHORTLIST", 10)
    monkeypatch.setattr(gallery_speed, "QUERIES", 3)
    sizes = ["--images", "8", "16", "50", "--k", "2", "--size", "64", "--rounds", "2", "--disk-mb", "0.06"]
    assert main(["galleries", *sizes, "--json", str(tmp_path / "galleries.json")]) == 0
    rows = json.loads((tmp_path / "galleries.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [8, 16, 50]
    assert [row["shortlist_ms"] is None for row in rows] == [True, False, False]
    assert [row["inference_ms"] is None for row in rows] == [False, False, True]
    assert all((row["inference_from_disk_ms"] is None) >= (row["inference_ms"] is None) for row in rows)
    assert json.loads((tmp_path / "galleries.json").read_text())["environment"]["busy_cores_of_others"] is not None
    assert rows[1]["recall"] == 1, "a shortlist of 2000 holds all 16"
    assert all(row["exact_ms"] > 0 for row in rows)
    assert "50" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_in_a_file_gives_the_maps_of_one_in_memory(tmp_path, dtype):
    torch.manual_seed(0)
    model = random_cpr(PRESETS["cpr_faster"], Setting(64, 2, 3), dtype, torch.device("cpu"))
    images, small = torch.rand(2, 3, 64, 64), model.bank
    rarest = small.histograms.sum((0, 1)).argmin()
    far = torch.eye(12)[rarest].expand(7, 25, 12)
    large = gallery_speed.in_a_file(small, torch.cat([small.histograms, far]), tmp_path / "bank")
    assert len(large) == 10
    for own, held in zip(small.descriptors, large.descriptors, strict=True):
        assert torch.equal(held, own[torch.arange(10) % 3])
        assert held.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(images)
        model.bank = large
        assert torch.equal(model(images).anomaly_map, expected.anomaly_map)


def test_fewer_images_than_references():
    with pytest.raises(SystemExit, match="must be more than --k 10"):
        main(["galleries", "--images", "10"])
