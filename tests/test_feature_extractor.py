import pytest
import timm
import torch

from anomalib_cpr.feature_extractor import FeatureExtractor

TINY = ("test_resnet", ("layer1", "layer2"))


def test_maps_are_those_of_the_whole_network():
    extractor = FeatureExtractor(*TINY)
    whole = timm.create_model("test_resnet", pretrained=False, features_only=True)
    extractor.network.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 48)
    # In the layout of the extractor: without AVX-512, oneDNN sums in another order in another layout.
    maps = whole.eval()(images.contiguous(memory_format=torch.channels_last))
    for own, other in zip(extractor(images), maps[1:3], strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("backbone", "layers", "channels"),
    [
        ("densenet201", ("features.denseblock1", "features.denseblock2"), (256, 512)),
        ("efficientnet_b0", ("blocks.1", "blocks.2"), (24, 40)),
        ("resnet18", ("layer1", "layer2"), (64, 128)),
    ],
)
def test_backbones_of_the_paper(backbone, layers, channels):
    extractor = FeatureExtractor(backbone, layers)
    first, second = extractor(torch.zeros(1, 3, 64, 96))
    assert extractor.channels == channels
    assert first.shape == (1, channels[0], 16, 24)
    assert second.shape == (1, channels[1], 8, 12)


@pytest.mark.parametrize(
    ("backbone", "layers", "needs_all"),
    [
        (*TINY, False),
        ("test_convnext", ("stages.0", "stages.1"), False),
        ("test_efficientnet", ("blocks.1", "blocks.2"), True),  # timm has no list of its layers
    ],
)
def test_finest_map_alone(backbone, layers, needs_all):
    extractor = FeatureExtractor(backbone, layers)
    images = torch.randn(2, 3, 64, 48)
    expected = extractor(images)[0]
    ran = []
    for name, module in extractor.network.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert torch.equal(extractor.finest(images), expected)
    last = layers[1].replace(".", "_")
    assert needs_all or not any(name.startswith(last) for name in ran)
    assert any(name.startswith((layers[0], layers[0].replace(".", "_"))) for name in ran)
    with pytest.raises(ValueError, match="Image size 60x48"):
        extractor.finest(images[:, :, :60])


def test_stays_frozen_and_in_evaluation_mode():
    extractor = FeatureExtractor(*TINY).train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


@pytest.mark.parametrize(
    ("backbone", "layers", "message"),
    [
        ("no_such_net", ("a", "b"), r"backbone='no_such_net'.*timm.list_models"),
        ("test_resnet", ("layer1", "layer9"), r"no layer 'layer9'. There are .*layer2 \(stride 8\)"),
        ("test_resnet", ("layer2", "layer3"), r"'layer2' has stride 8, expected 4"),
        ("test_resnet", ("layer1",), r"expected 2 names"),
    ],
)
def test_wrong_names(backbone, layers, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(backbone, layers)


@pytest.mark.parametrize("size", [(60, 64), (64, 100), (1, 1)])
def test_size_that_does_not_fit_the_strides(size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} does not fit.*divisible by 8"):
        FeatureExtractor(*TINY)(torch.zeros(1, 3, *size))


class TestWeights:
    def test_from_a_file(self, tmp_path):
        source = timm.create_model("test_resnet", pretrained=False)
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        extractor = FeatureExtractor(*TINY)
        assert "weights.pth" in extractor.load_weights(tmp_path / "weights.pth")
        assert torch.equal(next(extractor.network.parameters()), next(source.parameters()))
        assert extractor.weights_loaded

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent.pth' does not exist"):
            FeatureExtractor(*TINY).load_weights(tmp_path / "absent.pth")

    def test_file_of_another_network(self, tmp_path):
        torch.save(timm.create_model("test_efficientnet", pretrained=False).state_dict(), tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other.pth' does not hold weights of 'test_resnet'"):
            FeatureExtractor(*TINY).load_weights(tmp_path / "other.pth")

    def test_file_that_is_no_state_dict(self, tmp_path):
        (tmp_path / "text.pth").write_text("these are not weights")
        with pytest.raises(ValueError, match=r"text.pth' does not hold weights of 'test_resnet'"):
            FeatureExtractor(*TINY).load_weights(tmp_path / "text.pth")

    def test_no_internet_and_nothing_in_the_cache(self, tmp_path, monkeypatch):
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            RuntimeError, match=r"'test_resnet' are not in the cache.*backbone_weights=FILE.*pre_trained=False"
        ):
            FeatureExtractor(*TINY).load_weights()
