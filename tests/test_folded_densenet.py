"""The folded DenseNet computes what timm's does."""

import copy
import pickle

import pytest
import timm
import torch

from anomalib_cpr.feature_extractor import FeatureExtractor
from anomalib_cpr.folded_densenet import FoldedDenseNet, can_fold

BLOCKS = ("features.denseblock1", "features.denseblock2")


def randomise(network, seed=0):
    """Statistics and factors as after a training, some of them negative or 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 2)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.weight.copy_(torch.randn(module.num_features, generator=generator).abs())
                module.weight[::7] *= -1
                module.weight[3] = 0
                module.bias.copy_(torch.randn(module.num_features, generator=generator) / 2)
    return network


@pytest.fixture
def extractor():
    extractor = FeatureExtractor("densenet121", BLOCKS)
    randomise(extractor.network)
    return extractor


def images(count=2, seed=1):
    return torch.randn(count, 3, 64, 48, generator=torch.Generator().manual_seed(seed))


def assert_near(found, expected, tolerance):
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert own.dtype == other.dtype
        assert own.is_contiguous(memory_format=torch.channels_last)
        assert (own.float() - other.float()).norm() / other.float().norm() < tolerance


def test_maps_are_those_of_the_network(extractor):
    assert_near(extractor(images()), extractor.network(images()), 1e-5)
    assert torch.equal(extractor.finest(images()), extractor(images())[0])


def test_the_batch_changes_nothing(extractor):
    whole, alone = extractor(images(3)), [extractor(image) for image in images(3).split(1)]
    for scale, parts in zip(whole, zip(*alone, strict=True), strict=True):
        assert torch.equal(scale, torch.cat(parts))


def test_under_autocast(extractor):
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = extractor(images()), extractor.network(images())
    assert_near(found, expected, 0.03)
    exact = extractor.network(images())
    # As near to what float32 gives as the network itself comes under autocast.
    for own, other, true in zip(found, expected, exact, strict=True):
        assert (own.float() - true).norm() < 1.6 * (other.float() - true).norm()
    # In the extractor's layout, which decides how a CPU without float16 units rounds.
    laid_out = images().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.float16):
        found, expected = extractor(images()), extractor.network(laid_out)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True)), "bounds may exceed float16"


def test_the_first_block_alone_runs_no_other(extractor):
    folded = FoldedDenseNet(extractor.network, torch.float32)
    (first,) = folded(images(), last=1)
    assert torch.equal(first, folded(images())[0])


@pytest.mark.parametrize("change", ["in place", "loaded", "assigned", "weights file", "converted"])
def test_other_weights_give_other_maps(extractor, tmp_path, change):
    extractor(images())
    other = FeatureExtractor("densenet121", BLOCKS)
    randomise(other.network, seed=5)
    if change == "in place":
        with torch.no_grad():
            for own, new in zip(extractor.network.buffers(), other.network.buffers(), strict=True):
                own.copy_(new)
            for own, new in zip(extractor.network.parameters(), other.network.parameters(), strict=True):
                own.copy_(new)
    elif change == "weights file":
        torch.save(other.network.state_dict(), tmp_path / "weights.pth")
        whole = timm.create_model("densenet121", pretrained=False).state_dict()
        whole.update(
            {name.replace("features_", "features.", 1): value for name, value in other.network.state_dict().items()}
        )
        torch.save(whole, tmp_path / "weights.pth")
        extractor.load_weights(tmp_path / "weights.pth")
    elif change == "converted":
        extractor.load_state_dict(other.state_dict())
        extractor.double().float()
    else:
        extractor.load_state_dict(other.state_dict(), assign=change == "assigned")
    assert_near(extractor(images()), other.network(images()), 1e-5)


def test_converted_weights_are_not_folded(extractor):
    extractor(images())
    extractor.double()
    found, expected = extractor(images().double()), extractor.network(images().double())
    assert [maps.dtype for maps in found] == [torch.float64] * 2
    assert all(torch.allclose(own, other) for own, other in zip(found, expected, strict=True))


def test_copies_and_pickles_leave_it_behind(extractor):
    expected = extractor(images())
    for copied in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):  # noqa: S301
        assert not copied._folded
        assert all(torch.equal(own, other) for own, other in zip(copied(images()), expected, strict=True))
    assert extractor._folded


def test_weights_of_inference_mode_are_not_folded():
    with torch.inference_mode():
        extractor = FeatureExtractor("densenet121", BLOCKS)
        found, expected = extractor(images()), extractor.network(images())
    assert not extractor._folded
    assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(found, expected, strict=True))


def test_exports_record_the_network(extractor):
    exported = torch.export.export(extractor, (images(1),)).module()
    assert_near(exported(images(1)), extractor.network(images(1)), 1e-6)


@pytest.mark.parametrize(
    ("backbone", "folds"), [("densenet201", True), ("densenetblur121d", False), ("resnet18", False)]
)
def test_what_can_be_folded(backbone, folds):
    network = timm.create_model(backbone, pretrained=False, features_only=True, out_indices=(1, 2))
    assert can_fold(network) == folds
    if not folds:
        with pytest.raises(ValueError, match="no DenseNet"):
            FoldedDenseNet(network, torch.float32)
