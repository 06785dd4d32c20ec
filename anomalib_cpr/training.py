# SPDX-License-Identifier: Apache-2.0
"""One step of metric learning: pairs of images, pairs of patches, loss. Knows nothing of Lightning."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .augmentation import augment, device_generator
from .foreground import sharpen
from .kinds import Kind
from .loss import metric_loss, remote_weights
from .pairs import sample_patch_pairs
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .torch_model import CprModel
from .training_images import TrainingImages


@dataclass(frozen=True)
class TrainingData:
    """What all steps draw from.

    Attributes:
        images (TrainingImages): The good images.
        neighbours (Tensor): Indices of the references of each image, the most similar first, ``(images, k)``, CPU.
        kind (Kind): Object or texture.
    """

    images: TrainingImages
    neighbours: Tensor
    kind: Kind


@dataclass(frozen=True)
class ImagePairs:
    """A batch of queries with synthetic anomalies, and their references.

    Attributes:
        queries (Tensor): Colours in 0..1, ``(batch, 3, height, width)``.
        references (Tensor): Same shape.
        anomalies (Tensor): Masks on the queries, bool, ``(batch, 1, height, width)``.
        weights (Tensor | None): How likely normal pixels are compared, ``(batch, 1, height, width)``; None: equally.
    """

    queries: Tensor
    references: Tensor
    anomalies: Tensor
    weights: Tensor | None


def draw_image_pairs(
    data: TrainingData,
    foregrounds: Tensor,
    synthesise: SyntheticAnomalyGenerator,
    batch_size: int,
    generator: torch.Generator,
) -> ImagePairs:
    """Draw queries and references, put anomalies on the queries, and augment both.

    Args:
        data (TrainingData): Images and their neighbours.
        foregrounds (Tensor): Foreground of the clean images, ``(images, 1, height / 4, width / 4)``.
        synthesise (SyntheticAnomalyGenerator): Makes the anomalies.
        batch_size (int): Number of pairs.
        generator (torch.Generator): On the CPU; every choice comes from it.

    Returns:
        ImagePairs: On the device of the foregrounds.
    """
    device = foregrounds.device
    rounds = -(-batch_size // len(data.images))
    chosen = torch.cat([torch.randperm(len(data.images), generator=generator) for _ in range(rounds)])[:batch_size]
    rank = torch.randint(data.neighbours.shape[1], (batch_size,), generator=generator)
    matched = data.neighbours[chosen, rank]

    own = foregrounds[chosen.to(device)] if data.kind == "object" else None
    queries, anomalies = synthesise(data.images.take(chosen, device), own, generator)
    weights = None
    if own is not None:
        both = torch.maximum(sharpen(own), sharpen(foregrounds[matched.to(device)]))
        weights = F.interpolate(both, data.images.size, mode="bilinear")
    return ImagePairs(
        queries=augment(queries, generator),
        references=augment(data.images.take(matched, device), generator),
        anomalies=anomalies,
        weights=weights,
    )


def training_loss(
    model: CprModel, data: TrainingData, images: ImagePairs, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Compare the patches of a batch of image pairs.

    Args:
        model (CprModel): Backbone and heads.
        data (TrainingData): Normalisation and kind.
        images (ImagePairs): The batch.
        generator (torch.Generator): On the CPU.

    Returns:
        tuple[Tensor, Tensor]: Loss of the positives and of the negatives, each summed over the scales.
    """
    batch = len(images.queries)
    pairs = sample_patch_pairs(
        images.anomalies,
        images.weights,
        device_generator(generator, images.queries.device),
        remote=data.kind == "object",
    )
    positions = torch.cat([pairs.query, pairs.reference])
    # Queries and references pass the heads as one batch: batch normalisation sees both.
    features = model.feature_extractor(data.images.normalize(torch.cat([images.queries, images.references])))
    positive = negative = torch.zeros((), device=positions.device)
    for head, scale in zip(model.heads, features, strict=True):
        query, reference = head.describe_at(scale, positions).split(batch)
        weights = remote_weights(scale[:batch], scale[batch:], pairs)
        scale_positive, scale_negative = metric_loss(query, reference, pairs, weights)
        positive, negative = positive + scale_positive, negative + scale_negative
    return positive, negative
