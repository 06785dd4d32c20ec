"""What anomalib's own integration tests ask of every model in `list_models()`: default arguments, five images, one
epoch, two images a batch, then every command from the checkpoint. No internet: the weights lie in the cache."""

import pytest
import timm
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import get_model
from conftest import write_mvtec
from huggingface_hub import constants
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Hugging Face's cache with (random) weights where timm looks for those of the default backbone."""
    folder = tmp_path_factory.mktemp("hub")
    repository = folder / "models--timm--densenet201.tv_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    torch.manual_seed(0)
    network = timm.create_model("densenet201", pretrained=False)
    save_file(network.state_dict(), snapshot / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_default_arguments(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = write_mvtec(tmp_path / "data", train=5, test=2)
    data = MVTecAD(root=root, category="screw", train_batch_size=2, eval_batch_size=2, num_workers=0)

    def engine():
        return Engine(
            max_epochs=1, default_root_dir=tmp_path / "results", logger=False, enable_progress_bar=False, devices=1
        )

    model = get_model("cpr")
    engine().fit(model, datamodule=data)
    assert bool(model.model.feature_extractor.weights_loaded)
    (checkpoint,) = (tmp_path / "results").rglob("model.ckpt")
    for command in ("validate", "test", "train"):  # the last continues a training that is complete, and tests
        (metrics,) = getattr(engine(), command)(get_model("cpr"), datamodule=data, ckpt_path=checkpoint)
        assert command == "validate" or "image_AUROC" in metrics
    predictions = engine().predict(get_model("cpr"), datamodule=data, ckpt_path=checkpoint)
    assert sum(len(batch.image) for batch in predictions) == 4
    assert all(batch.anomaly_map.isfinite().all() for batch in predictions)
    path = engine().export(get_model("cpr"), ExportType.TORCH, ckpt_path=checkpoint)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    result = TorchInferencer(path, device="cpu").predict(torch.full((3, 256, 256), 0.5))
    assert 0 <= result.pred_score <= 1
    assert result.anomaly_map.isfinite().all()
