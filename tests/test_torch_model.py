import pytest
import torch
from conftest import TINY_BACKBONE
from test_coherence import slow_coherent_distance
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.colours import as_stored, colours_of
from anomalib_cpr.outline import follow_edges
from anomalib_cpr.preparation import describe_globally
from anomalib_cpr.torch_model import CprModel


def make_model(images, **arguments):
    """A model with random weights that remembers the images."""
    torch.manual_seed(0)
    model = CprModel(**{**TINY_BACKBONE, "descriptor_channels": 8, "k": 3, **arguments}).eval()
    with torch.no_grad():
        model.global_retriever.codebook.copy_(torch.randn_like(model.global_retriever.codebook))
        model.foreground_estimator.projection.weight.normal_(0, 0.2)
        model.foreground_estimator.projection.bias.fill_(0.5)
    describe_globally(model, images.split(2))
    model.remember(images.split(2))
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_cascade_against_a_plain_one(images):
    """The whole method once more, image by image, written down as the paper says it."""
    model = make_model(images)
    model.relative_to_image = False
    queries = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    results = {}
    for coherent in (True, False):
        for followed in (True, False):
            model.coherent_matching, model.follow_edges = coherent, followed
            results[coherent, followed] = model(queries)
    result = results[False, False]
    assert all(torch.equal(one.pred_score, result.pred_score) for one in results.values())
    model.relative_to_image = True
    relative = model(queries)
    references = [_describe(model, image[None]) for image in images]
    for index, query in enumerate(queries):
        histogram, foreground, descriptors = _describe(model, query[None])
        order = sorted(range(5), key=lambda i: _block_distance(histogram, references[i][0]))[:3]
        nearest = agreed = 0
        for scale, window in ((0, 3), (1, 1)):
            found = []
            for reference in order:
                best = torch.full(descriptors[scale].shape[-2:], 9.0)
                padded = F.pad(references[reference][2][scale], [window // 2] * 4, value=float("nan"))
                for down in range(window):
                    for right in range(window):
                        other = padded[:, :, down : down + best.shape[0], right : right + best.shape[1]]
                        distance = 1 - (descriptors[scale] * other).sum(1)[0]
                        best = torch.where(distance < best, distance, best)
                found.append(best)
            together = torch.from_numpy(slow_coherent_distance(torch.stack(found).double().numpy())).float()
            nearest = nearest + F.interpolate(torch.stack(found).amin(0)[None, None], (16, 24), mode="bilinear") / 4
            agreed = agreed + F.interpolate(together[None, None], (16, 24), mode="bilinear") / 4
        masks = [foreground, *[references[i][1] for i in order]]
        mask = torch.stack([F.interpolate(one, (64, 96), mode="bilinear") for one in masks]).amax(0)
        for coherent, total in ((True, agreed), (False, nearest)):
            pixels = F.interpolate(total, (64, 96), mode="bilinear") * mask
            followed = results[coherent, True].anomaly_map[index]
            torch.testing.assert_close(followed, follow_edges(pixels, query[None])[0], atol=1e-5, rtol=1e-5)
            expected = _blur(pixels)
            assert torch.allclose(results[coherent, False].anomaly_map[index], expected[0], atol=1e-5)
        score = expected.flatten().sort().values[-round(64 * 96 / 200) :].mean().item()
        assert result.pred_score[index].item() == pytest.approx(score, abs=1e-5)
        share = (0.01 / (F.interpolate(nearest, (64, 96), mode="bilinear").mean().item() + 0.01)) ** 0.5
        assert relative.pred_score[index].item() == pytest.approx(share * score, abs=1e-5)
        lowered = share * expected[0] * (expected[0] / expected[0].max()) ** 0.25
        torch.testing.assert_close(relative.anomaly_map[index], lowered, atol=1e-5, rtol=1e-4)


def _describe(model, image):
    features = model.feature_extractor(image)
    descriptors = [F.normalize(head(f), dim=1) for head, f in zip(model.metric_heads, features, strict=True)]
    return (
        model.global_retriever(features[0])[0],
        model.foreground_estimator(features[0]),
        [d.detach() for d in descriptors],
    )


def _block_distance(query, reference):
    divergence = ((query + 1e-8) * ((query + 1e-8) / (reference + 1e-8)).log()).sum(1)
    return divergence.sort().values[:20].sum().item()


def _blur(image):
    offsets = torch.arange(17) - 8.0
    kernel = torch.exp(-(offsets**2) / 8)
    kernel = kernel[:, None] * kernel
    return F.conv2d(F.pad(image, [8] * 4, mode="reflect"), (kernel / kernel.sum())[None, None])


def test_averaged_descriptors_of_queries_and_bank(images):
    model, plain = make_model(images, averaged_descriptors=True), make_model(images)
    features = model.feature_extractor(images)
    fine, coarse = plain.describe(features, images)
    mean = F.avg_pool2d(coarse, 3, 1, 1, count_include_pad=False)
    for found in (model.describe(features, images), model.bank.descriptors):
        torch.testing.assert_close(found[0], fine, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1], F.normalize(mean, dim=1), atol=1e-5, rtol=0)
    assert model(images).pred_score.max() < 1e-5, "known images are normal"
    with pytest.raises(ValueError, match="averaged_descriptors=False: the descriptors in the bank are averaged"):
        model.averaged_descriptors = False
    with pytest.raises(ValueError, match="averaged_descriptors=True: the descriptors in the bank are not averaged"):
        plain.averaged_descriptors = True
    model.averaged_descriptors = True
    model.bank.clear()
    model.averaged_descriptors = False


UNALIGNED = {"coherent_matching": False, "unaligned_matching": True}


def test_colours_of_queries_and_bank(images):
    model, plain = make_model(images, colour_matching=True, **UNALIGNED), make_model(images, **UNALIGNED)
    features = model.feature_extractor(images)
    *descriptors, colours = model.describe(features, images)
    assert torch.equal(colours, as_stored(colours_of(images)))
    assert torch.equal(model.bank.colours, colours)
    assert len(plain.describe(features, images)) == len(descriptors) == 2
    assert plain.bank.colours.numel() == 0
    model.k = 1
    assert model(images).pred_score.max() < 1e-3, "known images are normal"
    with pytest.raises(ValueError, match="colour_matching=False: the bank was made with colours"):
        model.colour_matching = False
    with pytest.raises(ValueError, match="colour_matching=True: the bank was made without colours"):
        plain.colour_matching = True
    model.bank.clear()
    model.colour_matching = False
    assert model.bank.colours.numel() == 0


def test_a_wrong_colour_raises_the_map_where_it_is(images):
    """And colours that are in order change nothing at all."""
    model = make_model(images, colour_matching=True, **UNALIGNED)
    query = images[:1].clone()
    query[..., 24:40, 40:56] += torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    assert len(model.match(model.describe(model.feature_extractor(query), query), torch.tensor([[0, 1, 2]]))) == 3
    maps = {}
    for scale in (0.0, 2.0):
        model.bank.colour_scale = torch.tensor(scale)
        maps[scale] = model(query)
    added = (maps[2.0].anomaly_map - maps[0.0].anomaly_map)[0, 0]
    assert maps[2.0].pred_score > maps[0.0].pred_score
    assert added[24:40, 40:56].mean() > 5 * added[:, 80:].abs().mean()
    plain = make_model(images, **UNALIGNED)
    torch.testing.assert_close(maps[0.0].anomaly_map, plain(query).anomaly_map)
    model.unaligned_matching = False
    plain.unaligned_matching = False
    assert torch.equal(model(query).anomaly_map, plain(query).anomaly_map), "of aligned parts colours do not count"


def test_colours_need_unaligned_matching():
    with pytest.raises(ValueError, match="colour_matching=True needs unaligned_matching=True"):
        CprModel(backbone="resnet18", layers=["layer1", "layer2"], pre_trained=False, colour_matching=True)


def test_known_images_are_normal(images):
    model = make_model(images)
    with torch.no_grad():
        model.foreground_estimator.disable()
    result = model(images)
    assert result.pred_score.max() < 1e-5
    assert result.anomaly_map.max() < 0.01  # others that fit nearly as well have a say
    model.coherent_matching = False
    assert model(images).anomaly_map.max() < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (40, 72), (24, 160)])
def test_any_size_that_fits_the_strides(size):
    images = torch.randn(4, 3, *size)
    result = make_model(images)(torch.randn(3, 3, *size))
    assert result.anomaly_map.shape == (3, 1, *size)
    assert result.pred_score.shape == (3,)
    assert 0 <= result.anomaly_map.min() <= result.anomaly_map.max() <= 1


def test_batch_1_and_batch_8_give_the_same(images):
    model = make_model(images)
    queries = torch.randn(8, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    whole = model(queries)
    for index in range(8):
        single = model(queries[index : index + 1])
        assert torch.allclose(whole.anomaly_map[index], single.anomaly_map[0], atol=1e-6)
        assert torch.allclose(whole.pred_score[index], single.pred_score[0], atol=1e-6)


def test_k_beyond_the_gallery_means_all_of_it(images):
    query = torch.randn(1, 3, 64, 96)
    assert torch.equal(make_model(images, k=5)(query).anomaly_map, make_model(images, k=500)(query).anomaly_map)


def test_survives_a_state_dict(images):
    model = make_model(images)
    other = CprModel(**TINY_BACKBONE, descriptor_channels=8, k=3).eval()
    other.load_state_dict(model.state_dict())
    query = torch.randn(2, 3, 64, 96)
    assert torch.equal(model(query).anomaly_map, other(query).anomaly_map)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 0.02), ("int4", 0.1)])
def test_coarse_banks(images, dtype, tolerance):
    queries = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    expected, result = make_model(images)(queries), make_model(images, bank_dtype=dtype)(queries)
    assert not torch.equal(result.anomaly_map, expected.anomaly_map)
    assert torch.allclose(result.anomaly_map, expected.anomaly_map, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_batch_size_changes_nothing_with_coarse_banks(images, dtype):
    model = make_model(images, bank_dtype=dtype)
    queries = torch.randn(8, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    whole = model(queries)
    single = [model(query[None]) for query in queries]
    assert torch.allclose(whole.anomaly_map, torch.cat([one.anomaly_map for one in single]), atol=1e-6)
    assert torch.allclose(whole.pred_score, torch.cat([one.pred_score for one in single]), atol=1e-6)


def test_only_representatives_are_remembered(images):
    """The same as a model that has seen nothing but them."""
    model = make_model(images, max_references=3)
    assert len(model.bank) == len(model.bank.histograms) == len(model.bank.foregrounds) == 3
    whole = make_model(images)
    whole.bank.max_references = 3
    chosen = whole.bank.representatives()
    query = torch.randn(2, 3, 64, 96)
    few = make_model(images[chosen])(query)
    assert torch.allclose(model(query).anomaly_map, few.anomaly_map, atol=1e-6)


def test_bank_on_host_gives_the_same(images):
    query = torch.randn(2, 3, 64, 96)
    model = make_model(images, bank_on_host=True)
    assert torch.equal(model.to("cpu")(query).anomaly_map, make_model(images)(query).anomaly_map)


def test_references_are_the_same_under_autocast(images):
    model = make_model(images)
    query = torch.randn(2, 3, 64, 96)
    expected = model(query)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(query)
    assert result.anomaly_map.dtype == torch.float32
    assert torch.allclose(result.anomaly_map, expected.anomaly_map, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0: must be at least 1"),
        ({"k": -3}, "k=-3"),
        ({"descriptor_channels": 0}, "descriptor_channels=0"),
        ({"codebook_size": 1}, "codebook_size=1: must be at least 2"),
        ({"blocks": 0}, "blocks=0"),
        ({"window_sizes": (3, 2)}, r"window_sizes=\[3, 2\]: expected two odd numbers"),
        ({"window_sizes": (3,)}, r"window_sizes=\[3\]"),
        ({"bank_dtype": "int2"}, "bank_dtype='int2'"),
        ({"max_references": 0}, "max_references=0"),
        ({"backbone_weights": "file.pth"}, "contradicts pre_trained=False"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        CprModel(**{**TINY_BACKBONE, **arguments})


def test_unfitted_model_says_so():
    model = CprModel(**TINY_BACKBONE)
    with pytest.raises(RuntimeError, match="has not been fitted"):
        model(torch.zeros(1, 3, 64, 64))


def test_query_of_another_size_than_the_bank(images):
    with pytest.raises(ValueError, match=r"32x32 pixels cannot be compared with the reference bank.*64x96"):
        make_model(images)(torch.zeros(1, 3, 32, 32))


def test_image_smaller_than_the_grid():
    with pytest.raises(ValueError, match="2x2 cells is smaller than the retrieval grid of 5x5"):
        make_model(torch.zeros(3, 3, 8, 8))


def test_failure_while_remembering_leaves_no_half_bank(images):
    model = make_model(images)

    def broken():
        yield images[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.remember(broken())
    assert len(model.bank) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_pixels_without_a_value_are_anomalies(images, value):
    model = make_model(images)
    queries = images[:3].clone()
    expected = model(queries)
    queries[1, 2, 10, 20] = value
    result = model(queries)
    assert result.anomaly_map.isfinite().all()
    assert result.anomaly_map[1, 0, 10, 20] == result.pred_score[1] == 1
    assert result.anomaly_map[1, 0].flatten().sort().values[-2] < 1, "only that pixel"
    for index in (0, 2):
        assert torch.equal(result.anomaly_map[index], expected.anomaly_map[index])
        assert torch.equal(result.pred_score[index], expected.pred_score[index])


def test_an_image_without_any_value(images):
    result = make_model(images)(torch.full((1, 3, 64, 96), float("nan")))
    assert (result.anomaly_map == 1).all()
    assert result.pred_score == 1
