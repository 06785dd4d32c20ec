import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.bilinear import bilinear_cells, read_at
from anomalib_cpr.metric_head import InceptionBlock, MetricHead


@pytest.fixture
def head():
    torch.manual_seed(0)
    return MetricHead(16, 24).eval()


def test_descriptors_have_unit_length(head):
    descriptors = head.describe(torch.randn(2, 16, 9, 11))
    assert descriptors.shape == (2, 24, 9, 11)
    assert torch.allclose(descriptors.norm(dim=1), torch.ones(2, 9, 11), atol=1e-5)


def test_folded_layers_give_the_same_as_they_stand():
    torch.manual_seed(1)
    head = MetricHead(16, 24)
    for _ in range(3):  # statistics that are not 0 and 1
        head(torch.randn(4, 16, 8, 8) * 2 + 1)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    head.eval()
    features = torch.randn(2, 16, 9, 11)
    assert torch.allclose(head.describe(features), F.normalize(head(features), dim=1), atol=1e-6)
    head[0].weight.data *= 1.5  # nothing of the old weights is kept
    assert torch.allclose(head.describe(features), F.normalize(head(features), dim=1), atol=1e-6)


def test_describing_while_training_uses_the_batch(head):
    head.train()
    features = torch.randn(2, 16, 9, 11)
    assert torch.allclose(head.describe(features), F.normalize(head(features), dim=1), atol=1e-6)


def test_reading_before_the_last_layer_equals_reading_after_it(head):
    """Also at the edges, where bilinear reading reaches beyond the map and the bias must fade with it."""
    features = torch.randn(2, 16, 9, 11)
    positions = torch.cat(
        [torch.rand(2, 200, 2) * 2 - 1, torch.tensor([[[-1.0, -1], [1, 1], [-1, 1], [0, -1]]] * 2)], 1
    )
    described = head.describe_at(features, *bilinear_cells(positions, 9, 11))
    assert torch.allclose(described, read_at(head(features), positions), atol=1e-5)


def test_layout_is_that_of_the_released_checkpoints():
    names = set(MetricHead(256, 384).state_dict())
    for name in (
        "0.weight",
        "0.bias",
        "1.running_mean",
        "3.branch0.conv.weight",
        "3.branch1.0.bn.weight",
        "3.branch1.1.conv.weight",
        "3.branch2.0.conv.weight",
        "3.branch3.1.bn.running_var",
        "4.weight",
        "4.bias",
    ):
        assert name in names
    assert not any("conv.bias" in name for name in names)


def test_inception_block_has_the_published_shapes():
    block = InceptionBlock(192, 256)
    assert block.branch1[0].conv.weight.shape == (48, 192, 1, 1)
    assert block.branch1[1].conv.weight.shape == (64, 48, 3, 3)
    assert block.branch0.bn.eps == 1e-3
    assert block(torch.randn(1, 192, 5, 5)).shape == (1, 256, 5, 5)


def test_average_pool_does_not_count_padding():
    pool = InceptionBlock(4, 8).branch3[0]
    assert torch.equal(pool(torch.ones(1, 4, 3, 3)), torch.ones(1, 4, 3, 3))


def test_zero_features_do_not_give_nan(head):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    assert torch.equal(head.describe(torch.zeros(1, 16, 3, 3)), torch.zeros(1, 24, 3, 3))
    assert F.cosine_similarity(torch.zeros(1, 3), torch.zeros(1, 3)).isfinite().all()


def test_centred_descriptors_point_everywhere():
    torch.manual_seed(0)
    head = MetricHead(16, 24)
    features = torch.randn(4, 16, 12, 12).relu()
    assert head.is_untrained

    def cosines():
        descriptors = head.eval().describe(features).flatten(2).transpose(0, 1).flatten(1)
        head.train()
        return (descriptors.T @ descriptors).mean().item()

    before = cosines()
    head.centre(features)
    assert before > 0.5
    assert abs(cosines()) < 0.05
    assert head.training
    assert not head.is_untrained
    assert all(norm.momentum == 0.1 for norm in head.modules() if isinstance(norm, torch.nn.BatchNorm2d))
    # In evaluation the statistics are those of the images (with an unbiased variance): the mean is 0 there as well.
    assert head.eval()(features).mean((0, 2, 3)).abs().max() < 5e-3
