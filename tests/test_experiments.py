"""configs/experiments: protocols that are one command."""

from conftest import TINY_BACKBONE, write_mvtec
from test_command_line import PROJECT, anomalib


def test_screw_reports_every_metric_of_the_protocol(tmp_path):
    write_mvtec(tmp_path / "data")
    changes = [f"--model.init_args.{name}={value}" for name, value in TINY_BACKBONE.items()]
    result = anomalib(
        "train",
        *("--config", PROJECT / "configs" / "experiments" / "screw.yaml", *changes),
        *("--model.init_args.known_anomalies", "1", "--data.root", "data", "--data.num_workers", "0"),
        *("--data.train_batch_size", "2", "--trainer.max_steps", "2"),
        folder=tmp_path,
    )
    for level in ("image", "pixel"):
        for metric in ("AUROC", "AUPR", "F1Max"):
            assert f"{level}_{metric}" in result.stdout
    assert "pixel_AUPRO" in result.stdout
    assert "1 of 1 known anomalies are held out" in result.stdout + result.stderr
