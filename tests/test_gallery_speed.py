import json

import pytest
import torch

from anomalib_cpr import gallery_speed
from anomalib_cpr.cli import main


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
    sizes = ["--images", "8", "16", "50", "--k", "2", "--size", "64", "--rounds", "2", "--disk-mb", "0.15"]
    assert main(["galleries", *sizes, "--json", str(tmp_path / "galleries.json")]) == 0
    rows = json.loads((tmp_path / "galleries.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [8, 16, 50]
    assert [row["shortlist_ms"] is None for row in rows] == [True, False, False]
    assert [row["inference_ms"] is None for row in rows] == [False, False, True]
    assert rows[1]["recall"] == 1, "a shortlist of 2000 holds all 16"
    assert all(row["exact_ms"] > 0 for row in rows)
    assert "50" in capsys.readouterr().out


def test_fewer_images_than_references():
    with pytest.raises(SystemExit, match="must be more than --k 10"):
        main(["galleries", "--images", "10"])
