"""The main job on real images with real weights, as small as it can be."""

import shutil

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything

from anomalib_cpr import Cpr

pytestmark = pytest.mark.data


@pytest.fixture
def few_screws(data_root, tmp_path):
    """Twelve good screws, and four good and six scratched ones to test."""
    source, target = data_root / "MVTecAD" / "screw", tmp_path / "data" / "screw"
    for folder, count in (("train/good", 12), ("test/good", 4), ("test/scratch_head", 6)):
        (target / folder).mkdir(parents=True)
        for file in sorted((source / folder).glob("*.png"))[:count]:
            shutil.copy(file, target / folder / file.name)
    (target / "ground_truth/scratch_head").mkdir(parents=True)
    for file in (target / "test/scratch_head").glob("*.png"):
        mask = f"{file.stem}_mask.png"
        shutil.copy(source / "ground_truth/scratch_head" / mask, target / "ground_truth/scratch_head" / mask)
    return MVTecAD(root=tmp_path / "data", category="screw", train_batch_size=4, eval_batch_size=5, num_workers=0)


def test_screws(few_screws, data_root, tmp_path):
    seed_everything(0, verbose=False)
    model = Cpr(
        backbone_weights=data_root / "weights" / "densenet201_to_denseblock2.pth",
        anomaly_source_path=data_root / "dtd" / "images",
        descriptor_channels=16,
        image_size=160,
    )
    engine = Engine(max_steps=16, default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    (metrics,) = engine.train(model, datamodule=few_screws)
    assert model.resolved_kind == "object"
    assert bool(model.model.feature_extractor.weights_loaded)
    foregrounds = model.model.bank.foregrounds
    assert foregrounds[..., 18:22, 18:22].mean() > foregrounds[..., :4, :].mean() + 0.2, "screws lie in the middle"
    assert metrics["pixel_AUROC"] > 0.9
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 10


def test_weights_are_the_whole_networks(data_root):
    """The file holds nothing but the layers that are read, and all of these."""
    model = Cpr(backbone_weights=data_root / "weights" / "densenet201_to_denseblock2.pth", descriptor_channels=16).model
    assert "densenet201_to_denseblock2.pth" in model.load_backbone_weights()
    own = model.feature_extractor.network.state_dict()
    stored = torch.load(data_root / "weights" / "densenet201_to_denseblock2.pth", weights_only=True)
    assert own
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        match = [key for key in stored if key.replace(".", "_") == name.replace(".", "_")]
        assert match, name
        assert torch.equal(value, stored[match[0]])
