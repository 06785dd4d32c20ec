# SPDX-License-Identifier: Apache-2.0
"""One step of metric learning: pairs of images, pairs of patches, loss. Knows nothing of Lightning."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.profiler import record_function

from .augmentation import augment, device_generator, hand_over
from .foreground import sharpen
from .kinds import Kind
from .loss import metric_loss, remote_weights
from .pairs import POSITIONS_PER_KIND, sample_patch_pairs
from .real_anomalies import KnownAnomalies
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .torch_model import CprModel
from .training_images import TrainingImages

# What a step spends its time on, as profilers show it; they cost nothing where nobody profiles.
SYNTHESIS, AUGMENTATION, BACKBONE, HEADS, PAIRS = (
    f"cpr: {part}" for part in ("synthesis", "augmentation", "backbone", "heads", "pairs and loss")
)


@dataclass(frozen=True)
class TrainingData:
    """What all steps draw from.

    Attributes:
        images (TrainingImages): The good images.
        neighbours (Tensor): Indices of the references of each image, the most similar first, ``(images, k)``, CPU.
        kind (Kind): Object or texture.
        known (KnownAnomalies | None): Known defects.
        eight_bit (bool): Round colours to 8 bits after each change, as images do that are files or OpenCV arrays.
    """

    images: TrainingImages
    neighbours: Tensor
    kind: Kind
    known: KnownAnomalies | None = None
    eight_bit: bool = False


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
    tidy = round_to_eight_bits if data.eight_bit else _as_they_are
    rounds = -(-batch_size // len(data.images))
    chosen = torch.cat([torch.randperm(len(data.images), generator=generator) for _ in range(rounds)])[:batch_size]
    rank = torch.randint(data.neighbours.shape[1], (batch_size,), generator=generator)
    matched = data.neighbours[chosen, rank]

    own = foregrounds[hand_over(chosen, device)] if data.kind == "object" else None
    with record_function(SYNTHESIS):
        queries, anomalies = synthesise(tidy(data.images.take(chosen, device)), own, generator)
    if data.known is not None:
        replaced, which = data.known.draw_queries(batch_size, generator)
        matched = torch.where(replaced, data.known.neighbours[which, rank], matched)
        where, which = replaced.to(device).nonzero().flatten(), which[replaced]
        queries[where] = data.known.images[which].to(queries)
        anomalies[where] = data.known.masks[which].to(device)
        if own is not None:
            own[where] = data.known.foregrounds[which.to(data.known.foregrounds.device)].to(own)
        queries, anomalies = data.known.paste(queries, anomalies, generator)
    weights = None
    if own is not None:
        both = torch.maximum(sharpen(own), sharpen(foregrounds[hand_over(matched, device)]))
        weights = F.interpolate(both, data.images.size, mode="bilinear")
    with record_function(AUGMENTATION):
        queries = tidy(augment(tidy(queries), generator))
        references = tidy(augment(tidy(data.images.take(matched, device)), generator))
    return ImagePairs(queries, references, anomalies, weights)


class PairsAhead:
    """Draws the pairs of the next step while a GPU computes this one.

    Which anomalies stay is asked for on the CPU, and without this the GPU would wait for that, and then the CPU for the
    GPU. The pairs depend only on the numbers of the step, so they are the same as without.

    Args:
        draw (Callable[[int, int], tuple[ImagePairs, torch.Generator]]): Draws the pairs of a step and a batch within
            the epoch; also returns the random generator, for what the step draws after them.
        device (torch.device): Where the pairs are wanted. On a CPU nothing is drawn ahead.
    """

    def __init__(self, draw: Callable[[int, int], tuple[ImagePairs, torch.Generator]], device: torch.device) -> None:
        self._draw, self._device = draw, device
        self._next: tuple[tuple[int, int], Future] | None = None
        self._thread = self._stream = None
        if device.type == "cuda":
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="cpr-pairs")
            # Its small kernels would otherwise queue behind the large ones of the step.
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for images and foregrounds

    def take(self, step: int, batch: int, following: tuple[int, int] | None) -> tuple[ImagePairs, torch.Generator]:
        """Pairs of a step.

        Args:
            step (int): Optimiser steps done.
            batch (int): Batch within the epoch.
            following (tuple[int, int] | None): The same of the pairs that are going to be asked for next.

        Returns:
            tuple[ImagePairs, torch.Generator]: The pairs, and the random generator after their drawing.
        """
        if self._thread is None or self._stream is None:
            return self._draw(step, batch)
        ahead, self._next = self._next, None
        if ahead is None or ahead[0] != (step, batch):
            self._wait(ahead)
            ahead = (step, batch), self._thread.submit(self._draw_aside, step, batch)
        pairs, generator, done = ahead[1].result()
        if following is not None:
            self._next = following, self._thread.submit(self._draw_aside, *following)
        torch.cuda.current_stream(self._device).wait_event(done)
        for part in vars(pairs).values():
            if part is not None:  # its memory is not to be used anew before this stream is through with it
                part.record_stream(torch.cuda.current_stream(self._device))
        return pairs, generator

    def _draw_aside(self, step: int, batch: int) -> tuple[ImagePairs, torch.Generator, torch.cuda.Event]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            pairs, generator = self._draw(step, batch)
            done = torch.cuda.Event()
            done.record()
        return pairs, generator, done

    @staticmethod
    def _wait(ahead: tuple[tuple[int, int], Future] | None) -> None:
        """Let pairs that nobody wants come to their end, whatever it is."""
        if ahead is not None:
            ahead[1].exception()

    def close(self) -> None:
        """Draw no more."""
        if self._thread is not None:
            self._wait(self._next)
            self._thread.shutdown()
            self._next = self._thread = None


def round_to_eight_bits(images: Tensor) -> Tensor:
    """Colours in 0..1 to the nearest of 256 levels.

    Args:
        images (Tensor): Any shape.

    Returns:
        Tensor: Same shape.
    """
    return (images * 255).round() / 255


def _as_they_are(images: Tensor) -> Tensor:
    return images


def training_loss(
    model: CprModel,
    data: TrainingData,
    images: ImagePairs,
    generator: torch.Generator,
    count: int = POSITIONS_PER_KIND,
    *,
    boundary_weight: float = 1.0,
    backbone: Callable[[Tensor], list[Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare the patches of a batch of image pairs.

    Args:
        model (CprModel): Backbone and heads.
        data (TrainingData): Normalisation and kind.
        images (ImagePairs): The batch.
        generator (torch.Generator): On the CPU.
        count (int): Pairs of patches of each kind per pair of images.
        boundary_weight (float): How many times as likely a positive pair lies at the boundary of an anomaly.
        backbone (Callable[[Tensor], list[Tensor]] | None): Gives F1 and F2 of normalised images; None means the
            model's own.

    Returns:
        tuple[Tensor, Tensor]: Loss of the positives and of the negatives, each summed over the scales.
    """
    batch = len(images.queries)
    with record_function(PAIRS):
        pairs = sample_patch_pairs(
            images.anomalies,
            images.weights,
            device_generator(generator, images.queries.device),
            remote=data.kind == "object",
            count=count,
            boundary_weight=boundary_weight,
        )
    # Queries and references pass the heads as one batch: batch normalisation sees both.
    with record_function(BACKBONE):
        both = data.images.normalize(torch.cat([images.queries, images.references]))
        features = (model.feature_extractor if backbone is None else backbone)(both)
    positive = negative = torch.zeros((), device=images.queries.device)
    for head, scale in zip(model.heads, features, strict=True):
        with record_function(HEADS):
            query, reference = head.describe_at(scale, *pairs.cells(*scale.shape[-2:])).split(batch)
        with record_function(PAIRS):
            weights = remote_weights(scale[:batch], scale[batch:], pairs)
            scale_positive, scale_negative = metric_loss(query, reference, pairs, weights)
        positive, negative = positive + scale_positive, negative + scale_negative
    return positive, negative


def step_precision(precision: str, device: torch.device) -> str:
    """Precision in which backbone and heads compute in a training step.

    Args:
        precision (str): "float32", "bfloat16", or "auto": bfloat16 where the device has instructions for it. (Elsewhere
            it is emulated, and slower than float32.)
        device (torch.device): Where the step runs.

    Returns:
        str: "float32" or "bfloat16".
    """
    if precision != "auto":
        return precision
    if device.type == "cpu":
        # Versions of torch that cannot tell compute in float32.
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = bool(known.get("avx512_bf16") or known.get("amx_bf16"))
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float32"


def training_autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Precision of a training step; float32 leaves what the trainer has set.

    Args:
        precision (str): As in :func:`step_precision`.
        device (torch.device): Where the step runs.

    Returns:
        AbstractContextManager: In which the step is to be computed.
    """
    if step_precision(precision, device) == "float32" or torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
