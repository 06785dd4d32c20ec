# SPDX-License-Identifier: Apache-2.0
"""The cascade as one PyTorch module: what validates, predicts and exports."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from .coarse_to_fine import match_scales
from .colours import as_stored, colours_of, distance_to_colours
from .feature_extractor import STRIDES, FeatureExtractor
from .foreground import ForegroundEstimator
from .global_retrieval import GlobalRetriever
from .metric_head import MetricHead
from .quantisation import is_traced
from .reference_bank import BankDtype, ReferenceBank
from .scoring import SIGMA, Scorer
from .unaligned import average_neighbours, ranks_on_the_whole

BEYOND_ANY_COLOUR = 1e4  # sum of the channels of a normalised pixel; with 255 in place of 1 it is about 3,000


class CprModel(nn.Module):
    """Cascade Patch Retrieval.

    Picks the training images that look most like the query, then compares each patch of the query with the patches at
    nearly the same place of these references only, in a metric that was learned for that comparison.

    Args:
        backbone (str): Name of a timm network.
        layers (Sequence[str]): Its layers at strides 4 and 8.
        pre_trained (bool): Start from ImageNet weights; otherwise from random ones.
        backbone_weights (str | Path | None): File with the backbone's weights, for machines without internet.
        descriptor_channels (int): Channels of the descriptors: 384 in the paper, 64 and 16 in its fast variants.
        k (int): Number of references. More than there are training images means all of them.
        window_sizes (Sequence[int]): Side of the matching window per scale, in cells, odd; 999 is the whole
            map, for parts that lie anywhere.
        blur_sigma (float): Of the Gaussian that smooths the map, in pixels.
        follow_edges (bool): Let the map follow the edges of the image in place of smoothing it. Scores are the same.
        coherent_matching (bool): On the map, neighbouring patches agree on references. Scores are the same.
        unaligned_matching (bool): Several references and the plainer scale count, for textures and loose parts; with
            ``coherent_matching=False``.
        averaged_descriptors (bool): Those of stride 8 are averaged over neighbouring cells, for loose parts. A bank
            that is loaded brings its own value.
        colour_matching (bool): Where ``unaligned_matching`` is on, the colours of patches are compared as well, with
            those anywhere on the references. A bank that is loaded brings its own value.
        relative_to_image (bool): Distances count in proportion to how far the image is from its references as a whole.
        codebook_size (int): Number of visual words.
        blocks (int): Blocks per side of the retrieval grid.
        bank_dtype (Literal["float32", "float16", "int8", "int4"]): How the bank stores descriptors: 4, 2, 1 or half a
            byte per value.
        max_references (int | None): Keep at most so many training images, chosen to represent all; None keeps all.
        bank_on_host (bool): Leave the descriptors in main memory and move only those of the K references.
        bank_file (str | Path | None): Keep the descriptors in this file, mapped into memory, for banks that outgrow it.

    Raises:
        ValueError: If a value is out of range.

    Note:
        Source: "Target before Shooting", arXiv 2308.06748, with the values of the authors' code.
    """

    def __init__(
        self,
        backbone: str = "densenet201",
        layers: Sequence[str] = ("features.denseblock1", "features.denseblock2"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        descriptor_channels: int = 384,
        k: int = 10,
        window_sizes: Sequence[int] = (3, 1),
        blur_sigma: float = SIGMA,
        follow_edges: bool = True,
        coherent_matching: bool = True,
        unaligned_matching: bool = False,
        averaged_descriptors: bool = False,
        colour_matching: bool = False,
        relative_to_image: bool = True,
        codebook_size: int = 12,
        blocks: int = 5,
        bank_dtype: BankDtype = "float32",
        max_references: int | None = None,
        bank_on_host: bool = False,
        bank_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("k", k, 1),
            ("descriptor_channels", descriptor_channels, 1),
            ("codebook_size", codebook_size, 2),
            ("blocks", blocks, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}.")
        if len(window_sizes) != 2 or any(size < 1 or size % 2 == 0 for size in window_sizes):
            raise ValueError(f"window_sizes={list(window_sizes)}: expected two odd numbers, one per scale.")
        if coherent_matching and unaligned_matching:
            raise ValueError(
                "coherent_matching=True contradicts unaligned_matching=True: the one is for parts that lie alike, the "
                "other for textures and loose parts; give one of them."
            )
        if colour_matching and not unaligned_matching:
            raise ValueError(
                "colour_matching=True needs unaligned_matching=True: where parts lie alike, a place has its own "
                "colours, which the heads learn. To match otherwise with a checkpoint that has colours, give "
                "colour_matching=None."
            )
        if backbone_weights is not None and not pre_trained:
            raise ValueError(
                f"backbone_weights={str(backbone_weights)!r} contradicts pre_trained=False; give one of them."
            )
        self.pre_trained = pre_trained
        self.backbone_weights = backbone_weights
        self.k = k
        self.window_sizes = tuple(window_sizes)
        self.follow_edges = follow_edges
        self.coherent_matching = coherent_matching
        self.unaligned_matching = unaligned_matching
        self.relative_to_image = relative_to_image
        self.fused_matching = False  # set it to match with a Triton kernel; on a CUDA device only

        self.feature_extractor = FeatureExtractor(backbone, layers)
        self.global_retriever = GlobalRetriever(self.feature_extractor.channels[0], codebook_size, blocks)
        self.foreground_estimator = ForegroundEstimator(self.feature_extractor.channels[0])
        self.metric_heads = nn.ModuleList(
            MetricHead(channels, descriptor_channels) for channels in self.feature_extractor.channels
        )
        self.scorer = Scorer(sigma=blur_sigma)
        self.bank = ReferenceBank(
            descriptor_channels, codebook_size, blocks, bank_dtype, max_references, bank_on_host, bank_file
        )
        self.averaged_descriptors, self.colour_matching = averaged_descriptors, colour_matching

    def load_backbone_weights(self) -> str:
        """Load the backbone's weights, unless a checkpoint has brought them.

        Returns:
            str: Which weights the backbone has, for the log.
        """
        if bool(self.feature_extractor.weights_loaded):
            return f"{self.feature_extractor.backbone}, weights from the checkpoint"
        if not self.pre_trained:
            return f"{self.feature_extractor.backbone} with random weights (pre_trained=False)"
        return self.feature_extractor.load_weights(self.backbone_weights)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Find and outline anomalies.

        Args:
            images (Tensor): Normalised images of shape ``(batch, 3, height, width)``, of the size of the training.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(batch,)`` and ``anomaly_map`` of shape
                ``(batch, 1, height, width)``, both in 0..1; a score of 0 means that every patch was found on the
                references.
                A pixel that is NaN or infinite is 1 on the map, and so is the score of its image: what was not seen
                must not pass as good, as NaN would (it exceeds no threshold), in an exported file as well.

        Raises:
            RuntimeError: If the model was not fitted.
            ValueError: If the size is not that of the training.
        """
        if images.device.type == "cpu" and not is_traced() and len(images) > 1:
            # One at a time stays in the processor's cache, and is bit for bit the same in any batch.
            found = [self(image) for image in images.split(1)]
            return InferenceBatch(
                pred_score=torch.cat([one.pred_score for one in found]),
                anomaly_map=torch.cat([one.anomaly_map for one in found]),
            )
        images, unseen = split_unseen(images)
        features = self.feature_extractor(images)
        self.bank.check(features[0].shape[-2:])
        queries = self.describe(features, images)
        with full_precision(images.device):
            references, foregrounds = self.retrieve(features[0])
            distances = self.match(queries, references)
            anomaly_map, score = self.score(distances, foregrounds, images)
        return InferenceBatch(
            pred_score=torch.maximum(score, unseen.amax((1, 2, 3))), anomaly_map=torch.maximum(anomaly_map, unseen)
        )

    @property
    def blur_sigma(self) -> float:
        """Sigma of the Gaussian that smooths the map, in pixels."""
        return self.scorer.sigma

    @blur_sigma.setter
    def blur_sigma(self, sigma: float) -> None:
        self.scorer = Scorer(self.scorer.top_share, sigma).to(self.scorer.kernel.device)

    @property
    def averaged_descriptors(self) -> bool:
        """Whether descriptors of stride 8 are averaged: those of queries as those of the bank are."""
        return self.bank.averaged

    @averaged_descriptors.setter
    def averaged_descriptors(self, averaged: bool) -> None:
        if averaged != self.bank.averaged and len(self.bank):
            raise ValueError(
                f"averaged_descriptors={averaged}: the descriptors in the bank are {'' if not averaged else 'not '}"
                "averaged, and stay so. Train anew."
            )
        self.bank.averaged = averaged

    @property
    def colour_matching(self) -> bool:
        """Whether colours are compared as well, where matching is unaligned."""
        return self.bank.coloured

    @colour_matching.setter
    def colour_matching(self, coloured: bool) -> None:
        if coloured != self.bank.coloured and len(self.bank):
            raise ValueError(
                f"colour_matching={coloured}: the bank was made with{'' if self.bank.coloured else 'out'} colours, and "
                "stays so. Train anew."
            )
        self.bank.coloured = coloured

    @property
    def heads(self) -> list[MetricHead]:
        """The metric heads, finest scale first."""
        return [cast("MetricHead", head) for head in self.metric_heads]

    def describe(self, features: Sequence[Tensor], images: Tensor) -> list[Tensor]:
        """Descriptors of both scales, and colours where they are compared.

        Args:
            features (Sequence[Tensor]): F1 and F2, ``(batch, channels_i, height / stride_i, width / stride_i)``.
            images (Tensor): The normalised images, ``(batch, 3, height, width)``.

        Returns:
            list[Tensor]: Unit vectors, ``(batch, descriptor_channels, height / stride_i, width / stride_i)``, float32;
                then, with ``colour_matching``, colours as the bank stores them.
        """
        descriptors = self.describe_scales(features)
        return [*descriptors, as_stored(colours_of(images.float()))] if self.colour_matching else descriptors

    def describe_scales(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Descriptors of both scales, without colours.

        Args:
            features (Sequence[Tensor]): As in :meth:`describe`.

        Returns:
            list[Tensor]: The first two of :meth:`describe`.
        """
        fine, coarse = (head.describe(scale) for head, scale in zip(self.heads, features, strict=True))
        return [fine, average_neighbours(coarse) if self.averaged_descriptors else coarse]

    def retrieve(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The most similar training images, and where the object is on the query and on each of them.

        Args:
            features (Tensor): F1 of shape ``(batch, channels, height, width)``.

        Returns:
            tuple[Tensor, Tensor]: Indices into the bank, ``(batch, k)``, the most similar first; foregrounds
                ``(batch, 1 + k, height, width)``, the query's and its references'.
        """
        histograms = self.global_retriever(features)
        references = self.global_retriever.nearest(histograms, self.bank.histograms, self.k, roots=self.bank.roots)
        foreground = self.foreground_estimator(features.float())
        return references, torch.cat([foreground, self.bank.foregrounds_of(references)], dim=1)

    def match(self, queries: Sequence[Tensor], references: Tensor) -> list[Tensor]:
        """Distance of each cell to its best match on each of the references, per scale.

        Args:
            queries (Sequence[Tensor]): Descriptors of both scales, and colours, of :meth:`describe`.
            references (Tensor): Indices into the bank, ``(batch, k)``.

        Returns:
            list[Tensor]: Distances 0..2, ``(batch, k, height_i, width_i)``; where colours count, theirs to those
                references that fit the image as a whole, 0 or more.
        """
        descriptors, held = queries[: len(STRIDES)], (self.bank.descriptors, references)
        distances = match_scales(descriptors, *held, self.window_sizes, self.bank.scales, fused=self.fused_matching)
        if not (self.colour_matching and self.unaligned_matching):
            return distances
        fitting = references.gather(1, ranks_on_the_whole(distances[-1]))
        return [*distances, distance_to_colours(queries[-1], self.bank.colours, fitting) * self.bank.colour_scale]

    def score(self, distances: Sequence[Tensor], foregrounds: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Anomaly map and image score.

        Args:
            distances (Sequence[Tensor]): To each reference, of each scale, ``(batch, k, height_i, width_i)``, and of
                colours.
            foregrounds (Tensor): Of query and references, ``(batch, any number, height / 4, width / 4)``.
            images (Tensor): Normalised images, ``(batch, 3, height, width)``.

        Returns:
            tuple[Tensor, Tensor]: Map of ``(batch, 1, height, width)`` and scores of ``(batch,)``, both in 0..1.
        """
        outlined = images if self.follow_edges else None
        return self.scorer(
            distances,
            foregrounds,
            images.shape[-2:],
            outlined,
            coherent=self.coherent_matching,
            relative=self.relative_to_image,
            unaligned=self.unaligned_matching,
        )

    @torch.no_grad()
    def remember(
        self,
        batches: Iterable[Tensor],
        rank: int = 0,
        ranks: int = 1,
        exchange: Callable[[list[tuple[int, int, int]]], None] | None = None,
    ) -> Tensor:
        """Fill the bank with the descriptors of the training images, in the order of the bank's histograms.

        With ``max_references``, only images that represent all are described, and the bank forgets the others.

        Args:
            batches (Iterable[Tensor]): Normalised images, ``(batch, 3, height, width)`` each.
            rank (int): Of this process.
            ranks (int): Number of processes, of which each describes the batches whose turn it is.
            exchange (Callable | None): Fetches what the others have described. It is told, for each batch, its first
                image in the bank, the one after its last, and the rank that describes it.

        Returns:
            Tensor: Which of the images the bank holds, in ascending order, ``(count,)``, on the CPU.
        """
        was_training = self.training
        self.eval()
        spans: list[tuple[int, int, int]] = []
        try:
            chosen = self.bank.representatives()
            wanted = torch.zeros(len(self.bank.histograms), dtype=torch.bool).index_fill_(0, chosen, True)
            seen = written = 0
            for batch in batches:
                kept = wanted[seen : seen + len(batch)]
                seen += len(batch)
                if not kept.any():
                    continue
                if not spans:
                    height, width = batch.shape[-2:]
                    self.bank.allocate(len(chosen), [(height // stride, width // stride) for stride in STRIDES])
                owner = len(spans) % ranks
                spans.append((written, written + int(kept.sum()), owner))
                if owner == rank:
                    images = batch[kept.to(batch.device)]
                    at_a_time = 1 if images.device.type == "cpu" else len(images)
                    for first, some in enumerate(images.split(at_a_time)):
                        self.bank.write(written + first, self.describe(self.feature_extractor(some), some))
                written = spans[-1][1]
            if ranks > 1 and exchange is not None:
                exchange(spans)
            self.bank.keep(chosen)
        except BaseException:
            self.bank.discard_unfinished()  # a half-filled bank would silently compare with noise
            raise
        finally:
            self.train(was_training)
        return chosen


def split_unseen(images: Tensor) -> tuple[Tensor, Tensor]:
    """Part images into what the network can look at, and where there is nothing to look at.

    By comparison with a limit, which NaN fails: ``x != x`` is what optimisers of exported graphs like to fold away.

    Args:
        images (Tensor): Normalised images of shape ``(batch, channels, height, width)``.

    Returns:
        tuple[Tensor, Tensor]: The images with 0 in place of pixels that are NaN, infinite or beyond
            :data:`BEYOND_ANY_COLOUR` in any channel; and a map of ``(batch, 1, height, width)``, 1 at these pixels,
            0 elsewhere.
    """
    seen = images.abs().sum(1, keepdim=True) < BEYOND_ANY_COLOUR
    zero = torch.zeros((), dtype=images.dtype, device=images.device)
    return torch.where(seen, images, zero), torch.where(seen, zero, torch.ones_like(zero))


def full_precision(device: torch.device) -> AbstractContextManager:
    """Leave autocast, under which a rounded distance could change which references are retrieved.

    Args:
        device (torch.device): Where the tensors are.

    Returns:
        AbstractContextManager: In which operations compute in the type of their tensors.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
