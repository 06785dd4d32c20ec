import json

import pytest

from anomalib_cpr import cli
from anomalib_cpr.training_profile import STAGES


def test_profile_accounts_for_the_whole_step(tmp_path, capsys):
    path = tmp_path / "results" / "profile.json"
    code = cli.main(
        [
            "profile-training",
            *("--image-size", "64", "--batch-size", "2", "--channels", "8", "16", "--steps", "3"),
            *("--backbone", "test_resnet", "--layers", "layer1", "layer2", "--accelerator", "cpu"),
            *("--data-root", str(tmp_path / "data"), "--precision", "float32", "--json", str(path)),
        ]
    )
    assert code == 0
    report = json.loads(path.read_text())
    assert report["environment"]["batch_size"] == 2
    assert [row["descriptor_channels"] for row in report["rows"]] == [8, 16]
    for row in report["rows"]:
        assert row["steps"] == 3
        assert row["engine_to_in_memory"] == pytest.approx(row["engine_steps_per_s"] / row["in_memory_steps_per_s"])
        assert set(row["shares"]) == {name.removeprefix("cpr: ") for name in STAGES} | {"other"}
        assert all(share > 0 for name, share in row["shares"].items() if name != "other")
        assert abs(sum(row["shares"].values()) - 1) < 1e-9
    assert "steps/s with the Engine" in capsys.readouterr().out
