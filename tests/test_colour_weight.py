"""What colours are worth beside descriptors."""

import pytest
import torch
from test_torch_model import make_model
from torch.nn import functional as F  # noqa: N812

from anomalib_cpr.colour_weight import LEAST_COLOUR, WEIGHED_IMAGES, colour_scale_of
from anomalib_cpr.relative import share_that_counts
from anomalib_cpr.training_images import TrainingImages, with_turned_copies

COLOURED = {"coherent_matching": False, "unaligned_matching": True, "colour_matching": True}


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("rotations", [(), (180.0,)])
def test_good_images_show_as_much_by_colours_as_by_descriptors(images, rotations, relative):
    """One model per image, with all photographs but its own in the bank."""
    photographs = with_turned_copies(TrainingImages(images, None), rotations)
    arguments = {**COLOURED, "relative_to_image": relative, "k": 3}
    model = make_model(photographs.images, **arguments).train()
    model.bank.colour_scale.fill_(7.0)
    everything = torch.arange(len(photographs))
    scale = colour_scale_of(model, photographs, everything)
    assert model.training
    assert model.bank.colour_scale == 7, "left as it was"

    scores = []
    for index, image in enumerate(photographs.images):
        alone = make_model(
            photographs.images[everything // photographs.copies != index // photographs.copies], **arguments
        )
        features = alone.feature_extractor(image[None])
        references, foregrounds = alone.retrieve(features[0])
        _, coarse, colours = alone.match(alone.describe(features, image[None]), references)
        weight = F.interpolate(foregrounds, (64, 96), mode="bilinear").amax(1, keepdim=True)
        own = []
        for distance in (coarse.mean(1, keepdim=True), colours.mean(1, keepdim=True)):  # of three, all are near
            share = share_that_counts(distance / 2) if relative and not own else 1
            smooth = alone.scorer.blur(F.interpolate(share * distance / 2, (64, 96), mode="bilinear") * weight)
            own.append(smooth.flatten().sort().values[-round(64 * 96 / 200) :].mean())
        scores.append(torch.stack(own))
    by_descriptors, by_colours = torch.stack(scores).amax(0).tolist()
    assert scale == pytest.approx(by_descriptors / by_colours, rel=1e-3)


def test_with_that_scale_colours_make_no_good_image_an_anomaly(images):
    model = make_model(images, **COLOURED, k=4)
    everything = torch.arange(5)
    model.bank.colour_scale = torch.tensor(colour_scale_of(model, TrainingImages(images, None), everything))
    scores = {}
    for coloured in (True, False):
        found = []
        for index in range(5):
            alone = make_model(images[everything != index], **{**COLOURED, "colour_matching": coloured}, k=4)
            alone.bank.colour_scale = model.bank.colour_scale
            found.append(alone(images[index : index + 1]).pred_score)
        scores[coloured] = torch.cat(found)
    assert (scores[True] >= scores[False]).all(), "colours come on top"
    assert scores[True].max() < 1.3 * scores[False].max()


def test_images_whose_colours_are_all_alike_leave_a_bound(images):
    """They differ in stripes whose mean is 0 on every cell."""
    stripes = torch.tensor([0.5, -0.5]).repeat(48)
    many = images[:1] + stripes * torch.linspace(0, 1, 4)[:, None, None, None]
    model = make_model(many, **COLOURED)
    scale = colour_scale_of(model, TrainingImages(many, None), torch.arange(4))
    assert 3 < scale <= 1 / (0.5 * LEAST_COLOUR), "one over next to nothing without the bound"


def test_colours_far_beyond_the_mean_of_a_dark_image_are_weighed_as_they_are(images):
    dark = images * 0.02
    dark[:, :, 24:40, 40:56] = torch.linspace(0.2, 1, 5)[:, None, None, None]
    normalised = (dark - 0.45) / 0.225
    model = make_model(normalised, **COLOURED)
    far = model.match(model.describe(model.feature_extractor(normalised), normalised), torch.tensor([[0]] * 5))[2]
    assert far.max() > 2
    model.bank.colour_scale = torch.tensor(colour_scale_of(model, TrainingImages(normalised, None), torch.arange(5)))
    assert model(normalised).pred_score.max() < 0.5


def test_a_single_image_has_nothing_to_compare_with(images):
    model = make_model(images[:1], **COLOURED)
    assert colour_scale_of(model, TrainingImages(images[:1], None), torch.arange(1)) == 1


def test_at_most_so_many_images_are_looked_at(images):
    many, seen = images.repeat(20, 1, 1, 1), []

    def track(chosen):
        seen.extend(chosen)
        return seen[:1]

    colour_scale_of(make_model(many, **COLOURED), TrainingImages(many, None), torch.arange(100), track)
    assert len(set(seen)) == WEIGHED_IMAGES
    assert max(seen) > 90, "from all of them"
