"""The authors' layout, written by a plain implementation that shares nothing with the package."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from conftest import draw, write_mvtec
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import v2
from torchvision.transforms.functional import gaussian_blur

from anomalib_cpr import cli
from anomalib_cpr.import_checkpoint import import_checkpoint, read_released
from anomalib_cpr.lightning_model import Cpr

SIZE = 96
POOLED = round(512 / 320**2 * SIZE**2)  # the authors' 512 pixels of 320x320, in proportion
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def convolution(inputs, outputs, side=1):
    parts = OrderedDict(
        conv=nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False), bn=nn.BatchNorm2d(outputs, eps=0.001)
    )
    return nn.Sequential(parts)


class PlainInception(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch0 = convolution(192, 64)
        self.branch1 = nn.Sequential(convolution(192, 48), convolution(48, 64, 3))
        self.branch2 = nn.Sequential(convolution(192, 64))
        self.branch3 = nn.Sequential(nn.Identity(), convolution(192, 64))

    def forward(self, x):
        weights = torch.ones(192, 1, 3, 3)
        inside = F.conv2d(torch.ones_like(x), weights, padding=1, groups=192)
        average = F.conv2d(x, weights, padding=1, groups=192) / inside
        first, second = self.branch1
        parts = [self.branch0(x).relu(), second(first(x).relu()).relu()]
        return torch.cat([*parts, self.branch2(x).relu(), self.branch3[1](average).relu()], 1)


class PlainCpr(nn.Module):
    """Names as in the released files; DenseNet-201 of torchvision."""

    def __init__(self, channels):
        super().__init__()
        self.lrb = nn.Module()
        self.lrb.conv = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, 192, 1), nn.BatchNorm2d(192), nn.ReLU(), PlainInception(), nn.Conv2d(256, channels, 1)
            )
            for inputs in (256, 512)
        )
        features = torchvision.models.densenet201(weights=None).features
        kept = nn.Sequential(OrderedDict(list(features.named_children())[:7]))
        self.backbone = nn.Module()
        self.backbone.feature_extractor = nn.Module()
        self.backbone.feature_extractor.backbone = nn.Module()
        self.backbone.feature_extractor.backbone.features = kept

    def frozen(self, images):
        features = self.backbone.feature_extractor.backbone.features
        first = features[:5](images)
        return first, features[5:7](first)

    def descriptors(self, images):
        scales = [head(scale) for head, scale in zip(self.lrb.conv, self.frozen(images), strict=True)]
        return [scale / (scale.norm(dim=1, keepdim=True) + 1e-8) for scale in scales]


def plain_prediction(plain, image, references, foreground_weight, foreground_bias):
    """Map and score as the authors compute them: unfold, minimum, sum, foreground, blur, largest pixels."""
    maps = []
    for query, gallery, window in zip(plain.descriptors(image), plain.descriptors(references), (3, 1), strict=True):
        count, channels, height, width = gallery.shape
        unfold = nn.Unfold(window, padding=window // 2)
        regions = unfold(gallery).reshape(count, channels, -1, height, width)
        inside = unfold(torch.ones(1, 1, height, width)).reshape(1, -1, height, width)
        distance = (1 - (query[:, :, None] * regions).sum(1)) / (inside + 1e-8)
        maps.append(distance.amin((0, 1))[None, None])
    maps[1] = F.interpolate(maps[1], maps[0].shape[-2:], mode="bilinear")
    total = F.interpolate(sum(maps), (SIZE, SIZE), mode="bilinear")
    frozen = plain.frozen(torch.cat([image, references]))[0]
    foreground = ((frozen * foreground_weight.view(1, -1, 1, 1)).sum(1, keepdim=True) + foreground_bias).clamp(0, 1)
    total = total * F.interpolate(foreground, (SIZE, SIZE), mode="bilinear").amax(0, keepdim=True)
    blurred = gaussian_blur(total, [33, 33], [4.0, 4.0])
    return blurred, blurred.flatten().topk(POOLED).values.sum()


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(7)
    network = PlainCpr(24)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    # Statistics as after a training; with those of the start all descriptors are alike.
    rng = np.random.default_rng(1)
    images = torch.stack([torch.from_numpy(draw(rng, SIZE, defect=True)[0]).permute(2, 0, 1) for _ in range(4)]) / 255
    with torch.no_grad():
        network.train().descriptors(v2.functional.normalize(images, MEAN, STD))
    return network.eval()


@pytest.fixture(scope="module")
def released(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "screw.pth"
    torch.save(plain.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_mvtec(tmp_path_factory.mktemp("data"), size=SIZE)
    return MVTecAD(root=root, category="screw", eval_batch_size=3, num_workers=0)


def test_maps_and_scores_are_those_of_a_plain_implementation(plain, released, data, tmp_path):
    output = tmp_path / "screw.ckpt"
    import_checkpoint(released, data, output, image_size=(SIZE, SIZE), k=3)
    model = Cpr.load_from_checkpoint(output, map_location="cpu", weights_only=True).eval()
    assert model.resolved_kind == "object"
    normalize = v2.Normalize(MEAN, STD)
    training = torch.stack([normalize(data.train_data[index].image) for index in range(len(data.train_data))])
    inner = model.model
    with torch.no_grad():
        for index in range(len(data.test_data)):
            image = normalize(data.test_data[index].image)[None]
            histogram = inner.global_retriever(inner.feature_extractor(image)[0])
            references = inner.global_retriever.nearest(histogram, inner.bank.histograms, 3)[0]
            projection = inner.foreground_estimator.projection
            anomaly_map, score = plain_prediction(
                plain, image, training[references], projection.weight[0, :, 0, 0], projection.bias
            )
            ours = inner(image)
            # The authors add distances and sum pixels; ours are means in 0..1.
            assert (4 * ours.anomaly_map - anomaly_map).abs().max() < 1e-4
            assert abs(4 * ours.pred_score.item() - score.item() / POOLED) < 1e-4
            assert anomaly_map.max() > 0.01, "a map of zeros would show nothing"


def test_command_writes_a_checkpoint_that_tests_predicts_and_exports(released, data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "screw.ckpt"
    arguments = ["--data", "MVTecAD", "--data.root", str(data.root), "--data.category", "screw"]
    arguments += ["--data.num_workers", "0", "--output", str(output), "--image-size", str(SIZE)]
    assert cli.main(["import-checkpoint", str(released), *arguments, "--accelerator", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "6 references, object" in said
    # The command to go on with says what differs from the defaults.
    assert (
        f"anomalib test --model Cpr --model.descriptor_channels 24 --model.image_size '[{SIZE}, {SIZE}]' --data" in said
    )
    model = Cpr(descriptor_channels=24, pre_processor=Cpr.configure_pre_processor((SIZE, SIZE)))
    engine = Engine(default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu")
    (metrics,) = engine.test(model, datamodule=data, ckpt_path=output)
    assert (model.model.window_sizes, model.model.scorer.sigma) == ((3, 1), 4.0), "the authors', whatever our defaults"
    assert 0 <= metrics["image_AUROC"] <= 1
    batches = engine.predict(model, datamodule=data, ckpt_path=output)
    assert len(batches) == 2
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    exported = TorchInferencer(engine.export(model, ExportType.TORCH, ckpt_path=output), device="cpu")
    for item in (item for batch in batches for item in batch):
        prediction = exported.predict(item.image_path)
        assert bool(prediction.pred_label) == bool(item.pred_label)
        torch.testing.assert_close(prediction.pred_score.flatten(), item.pred_score.flatten(), atol=1e-4, rtol=0)
        torch.testing.assert_close(prediction.anomaly_map.flatten(), item.anomaly_map.flatten(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_exported_to_onnx_its_maps_are_the_same(released, data, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    output = tmp_path / "screw.ckpt"
    import_checkpoint(released, data, output, image_size=(SIZE, SIZE), k=3)
    model = Cpr.load_from_checkpoint(output, map_location="cpu", weights_only=True).eval()
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(images)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path))
    names = [node.name for node in session.get_outputs()]
    found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(
            torch.from_numpy(found[name]).flatten(), getattr(expected, name).flatten(), atol=1e-4, rtol=0
        )


def change(state, **changes):
    state = dict(state)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lrb__conv__0__4__weight": None}, r"lrb\.conv\.0\.4\.weight is missing"),
        ({"lrb__conv__1__3__branch0__conv__weight": None}, r"head 1\.3\.branch0\.conv\.weight is missing"),
        ({"lrb__conv__0__0__weight": torch.zeros(192, 64, 1, 1)}, r"\[192, 64, 1, 1\], expected \[192, 256, 1, 1\]"),
        ({"lrb__conv__2__0__weight": torch.zeros(1)}, r"head 2\.0\.weight is unknown"),
        ({"epoch": torch.zeros(1)}, "also holds 'epoch'"),
        (
            {"backbone__feature_extractor__backbone__features__conv0__weight": None},
            r"backbone features_conv0\.weight is missing.*Give the backbone",
        ),
    ],
)
def test_what_does_not_fit_is_refused(plain, data, tmp_path, changes, message):
    torch.save(change(plain.state_dict(), **changes), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "other.pth", data, tmp_path / "x.ckpt", image_size=(SIZE, SIZE))
    assert not (tmp_path / "x.ckpt").exists()


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        read_released(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read as weights"):
        read_released(tmp_path / "text.pth")
    torch.save(PlainInception(), tmp_path / "code.pth")  # a pickle with classes in it
    with pytest.raises(ValueError, match=r"code\.pth cannot be read as weights"):
        read_released(tmp_path / "code.pth")
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="those need no import"):
        read_released(tmp_path / "own.ckpt")


def test_without_backbone_the_pre_trained_one_is_taken(plain, data, tmp_path):
    heads = {name: value for name, value in plain.state_dict().items() if name.startswith("lrb")}
    torch.save(heads, tmp_path / "heads.pth")
    backbone = {
        name.removeprefix("backbone.feature_extractor.backbone."): value
        for name, value in plain.state_dict().items()
        if name.startswith("backbone")
    }
    torch.save(backbone, tmp_path / "densenet.pth")
    model = import_checkpoint(
        tmp_path / "heads.pth",
        data,
        tmp_path / "x.ckpt",
        image_size=(SIZE, SIZE),
        backbone_weights=tmp_path / "densenet.pth",
    )
    weight = model.model.feature_extractor.network.state_dict()["features_conv0.weight"]
    assert torch.equal(weight, backbone["features.conv0.weight"])
