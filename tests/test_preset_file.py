from pathlib import Path

import pytest
import yaml

from anomalib_cpr.cli import main
from anomalib_cpr.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_writes_what_a_clone_has(name, tmp_path, capsys):
    assert main(["preset", name, "--output", str(tmp_path / "preset.yaml")]) == 0
    assert main(["preset", name]) == 0
    written = (tmp_path / "preset.yaml").read_text()
    assert capsys.readouterr().out == written
    of_clone = Path(__file__).parents[1] / "configs" / "model" / f"{name}.yaml"
    assert yaml.safe_load(written) == yaml.safe_load(of_clone.read_text())


def test_anomalib_reads_it(tmp_path):
    from anomalib.cli import AnomalibCLI

    main(["preset", "cpr_faster", "--output", str(tmp_path / "preset.yaml")])
    arguments = ["train", "--config", str(tmp_path / "preset.yaml"), "--model.pre_trained", "false"]
    config = AnomalibCLI(args=[*arguments, "--data", "DrawnParts", "--data.root", str(tmp_path)], run=False).config
    assert config.train.model.class_path.endswith("Cpr")
    assert config.train.model.init_args.descriptor_channels == 16
