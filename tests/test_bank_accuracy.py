import json

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from test_torch_model import make_model

from anomalib_cpr.bank_accuracy import measure, plot, smaller_banks
from anomalib_cpr.cli import main


@pytest.fixture(scope="module")
def fitted():
    images = torch.randn(8, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    return make_model(images)


def batches():
    generator = torch.Generator().manual_seed(2)
    for label in (0, 1, 1):
        mask = torch.zeros(1, 128, 192)
        mask[:, 40:90, 60:120] = label
        yield torch.randn(1, 3, 64, 96, generator=generator), mask, torch.tensor([label])


def test_figures_of_the_whole_bank_are_those_of_the_model(fitted):
    own = fitted.bank
    (result,) = measure(fitted, smaller_banks(own, ["float32"], [1]), batches(), own.megabytes)
    assert fitted.bank is own
    maps = [fitted(images).anomaly_map.detach().flatten() for images, _, _ in batches()]
    scores = [float(fitted(images).pred_score) for images, _, _ in batches()]
    truth = [mask[:, ::2, ::2].flatten() > 0.5 for _, mask, _ in batches()]
    everything, truth = torch.cat(maps).numpy(), torch.cat(truth).numpy()
    assert result.pixel_ap == pytest.approx(average_precision_score(truth, everything), abs=1e-5)
    assert result.pixel_auroc == pytest.approx(roc_auc_score(truth, everything), abs=1e-5)
    assert result.image_auroc == pytest.approx(roc_auc_score([0, 1, 1], scores))
    assert result.share == pytest.approx(1)


def test_banks_are_smaller_as_asked(fitted):
    banks = smaller_banks(fitted.bank, ["float32", "int8"], [1, 0.5, 0.01])
    assert [len(bank) for bank in banks] == [8, 4, 1] * 2
    results = measure(fitted, banks, batches(), fitted.bank.megabytes)
    assert [r.bank_dtype for r in results] == ["float32"] * 3 + ["int8"] * 3
    assert results[0].megabytes > results[3].megabytes > results[4].megabytes
    assert results[4].share == pytest.approx(banks[4].megabytes / fitted.bank.megabytes)


def test_an_interruption_puts_the_bank_back(fitted):
    def interrupted():
        yield next(batches())
        raise KeyboardInterrupt

    own = fitted.bank
    with pytest.raises(KeyboardInterrupt):
        measure(fitted, smaller_banks(own, ["int8"], [1]), interrupted(), 1.0)
    assert fitted.bank is own


def test_command(tiny_model, tiny_datamodule, mvtec_root, tmp_path):
    from anomalib.engine import Engine

    engine = Engine(max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    engine.fit(tiny_model(), datamodule=tiny_datamodule)
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    files = ["--json", str(tmp_path / "bank.json"), "--plot", str(tmp_path / "bank.png")]
    place = ["--root", str(mvtec_root), "--category", "screw", "--shares", "1", "0.5"]
    assert main(["bank", str(checkpoint), *place, *files]) == 0
    rows = json.loads((tmp_path / "bank.json").read_text())["rows"]
    assert [(row["bank_dtype"], row["references"]) for row in rows] == [
        (dtype, count) for dtype in ("float32", "float16", "int8", "int4") for count in (6, 3)
    ]
    assert all(0 <= row["pixel_ap"] <= 1 for row in rows)
    assert (tmp_path / "bank.png").stat().st_size > 10_000


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["bank", str(tmp_path / "no.ckpt"), "--root", ".", "--category", "screw"])
    assert "no.ckpt does not exist" in capsys.readouterr().err
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(SystemExit, match="at most 1"):
        main(["bank", str(tmp_path / "model.ckpt"), "--root", ".", "--category", "screw", "--shares", "2"])


def test_plot(fitted, tmp_path):
    plot(measure(fitted, smaller_banks(fitted.bank, ["int8"], [1]), batches(), 1.0), "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
