# SPDX-License-Identifier: Apache-2.0
"""What a difference of colours is worth beside one of descriptors, from good images alone."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .alignment import spread
from .matching_choice import held_out_references
from .relative import share_that_counts
from .scoring import largest_foreground
from .torch_model import CprModel, full_precision
from .training_images import TrainingImages
from .unaligned import to_several_references

WEIGHED_IMAGES = 60
LEAST_COLOUR = 0.002  # difference of colours, in proportion to the image, that is noise even where all images are one


@torch.no_grad()
def colour_scale_of(
    model: CprModel,
    images: TrainingImages,
    in_bank: Tensor,
    track: Callable[[Iterable], Iterable] = iter,
) -> float:
    """By what distances of colours are to be multiplied.

    Good images are scored as if they were not in the bank, once by the descriptors of stride 8 alone and once by
    colours alone. The highest of either scores shall be the same, so that colours make no good image an anomaly.

    Args:
        model (CprModel): With unaligned and colour matching, and a bank of these images.
        images (TrainingImages): The good images.
        in_bank (Tensor): Which of them the bank holds, in its order, ``(count,)``, CPU.
        track (Callable): Wraps the iteration, for a progress bar.

    Returns:
        float: 1 where there is no other image to compare with.
    """
    was_training = model.training
    model.eval()
    device, scale = model.foreground_estimator.projection.weight.device, model.bank.colour_scale
    model.bank.colour_scale = torch.ones_like(scale)
    highest = torch.zeros(2)
    try:
        photographs = in_bank.to(device) // images.copies
        for image in track(spread(len(images), WEIGHED_IMAGES).tolist()):
            others = photographs != image // images.copies
            if others.any():
                good = images.normalize(images.take(torch.tensor([image]), device))
                highest = torch.maximum(highest, _scores(model, good, others).cpu())
    finally:
        model.bank.colour_scale = scale
        model.train(was_training)
    by_descriptors, by_colours = highest.tolist()
    return by_descriptors / max(by_colours, 0.5 * LEAST_COLOUR) if by_descriptors else 1.0


def _scores(model: CprModel, image: Tensor, others: Tensor) -> Tensor:
    """Scores of an image by stride 8 alone and by colours alone, ``(2,)``, with ``others`` as possible references."""
    features = model.feature_extractor(image)
    queries = model.describe(features, image)
    size = (image.shape[-2], image.shape[-1])
    with full_precision(image.device):
        references, foregrounds = held_out_references(model, features[0], others, model.k)
        _, coarse, colours = to_several_references(model.match(queries, references))
        if model.relative_to_image:
            coarse = coarse * share_that_counts(coarse * 0.5)
        both = F.interpolate(torch.cat([coarse, colours]) * 0.5, size, mode="bilinear")
        return model.scorer.pool(model.scorer.blur(both * largest_foreground(foregrounds, size)))
