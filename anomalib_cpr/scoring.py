# SPDX-License-Identifier: Apache-2.0
"""Scorer: from distances per scale to an anomaly map and an image score."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .coherence import coherent_distance
from .feature_extractor import STRIDES
from .outline import follow_edges
from .quantisation import is_traced
from .relative import lower_the_rest, share_that_counts
from .unaligned import fuse_plainer, to_several_references

TOP_SHARE = 512 / 320**2
PAPER_SIGMA = 4.0
# Half of the paper's blur gave drawn parts of 320 pixels 0.007 (gear), 0.000 (bracket) and 0.029 (fabric) more pixel
# AP, and none a lower image AUROC or AUPRO by more than 0.0002 (results/blur).
SIGMA = 2.0


class Scorer(nn.Module):
    """Fuses the scales, applies the foreground, smooths, and pools.

    Args:
        top_share (float): Share of the largest pixels whose mean is the image score: the authors' 512 at 320x320
            pixels, and as many at other sizes in proportion.
        sigma (float): Of the Gaussian blur, in pixels; it is cut off at 4 sigma.

    Raises:
        ValueError: If sigma is not positive.

    Note:
        CPR (arXiv 2308.06748), section III-E; sigma is 4 there. The authors add the cosine distances of both scales
        (0..4) and sum the 512 largest pixels; here both are means, of distances halved, so that maps and scores lie in
        0..1. The ranking is the same. Predictions outside 0..1 would be squashed by torchmetrics' sigmoid, under which
        scores tie.
    """

    kernel: Tensor

    def __init__(self, top_share: float = TOP_SHARE, sigma: float = SIGMA) -> None:
        super().__init__()
        if not 0 < sigma < math.inf:
            raise ValueError(f"blur_sigma={sigma}: expected pixels, more than 0.")
        self.top_share = top_share
        self.sigma = sigma
        kernel_size = 2 * math.ceil(4 * sigma) + 1
        offsets = torch.arange(kernel_size, dtype=torch.float32) - kernel_size // 2
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        self.register_buffer("kernel", kernel / kernel.sum(), persistent=False)

    def forward(
        self,
        distances: Sequence[Tensor],
        foregrounds: Tensor,
        size: tuple[int, int],
        images: Tensor | None = None,
        *,
        coherent: bool = False,
        relative: bool = False,
        unaligned: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Anomaly map and image score.

        Args:
            distances (Sequence[Tensor]): Cosine distances to each reference, 0..2, of each scale, finest first,
                ``(batch, k, height_i, width_i)``; after them, with ``unaligned``, distances of colours, if these count.
            foregrounds (Tensor): Foregrounds of query and references, ``(batch, any number, height_0, width_0)``.
            size (tuple[int, int]): Height and width of the image, in pixels.
            images (Tensor | None): The images, ``(batch, 3, height, width)``, for a map that follows their edges; None
                for the paper's smooth map.
            coherent (bool): Neighbours agree on references, see :mod:`anomalib_cpr.coherence`; the paper's do not.
                The scores are those of the paper's smooth map either way.
            relative (bool): What distances mean depends on the image, see :mod:`anomalib_cpr.relative`; in the paper
                they count as they are.
            unaligned (bool): Several references and the plainer scale count, see :mod:`anomalib_cpr.unaligned`; in the
                paper the nearest reference and the mean of the scales. Each scale is then relative by itself.

        Returns:
            tuple[Tensor, Tensor]: Map of ``(batch, 1, height, width)`` and scores of ``(batch,)``, both in 0..1.
        """
        foreground = largest_foreground(foregrounds, size)
        if unaligned:
            several = to_several_references(distances)
            if relative:
                # But for colours, which are relative to those of the whole image.
                scales, colours = several[: len(STRIDES)], several[len(STRIDES) :]
                several = [*(distance * share_that_counts(distance * 0.5) for distance in scales), *colours]
            nearest = fuse_plainer(several, size)
        else:
            nearest = fuse([distance.amin(1, keepdim=True) for distance in distances], size)
            if relative:
                foreground = foreground * share_that_counts(nearest)
        anomaly_map = nearest * foreground
        smooth = self.blur(anomaly_map)
        score = self.pool(smooth)
        if coherent:
            anomaly_map = fuse([coherent_distance(distance) for distance in distances], size) * foreground
            smooth = self.blur(anomaly_map) if images is None else smooth
        shown = smooth if images is None else follow_edges(anomaly_map, images)
        return lower_the_rest(shown) if relative else shown, score

    def pool(self, smooth: Tensor) -> Tensor:
        """Mean of the largest pixels of a map, ``(batch, 1, height, width)``: ``(batch,)``."""
        count = max(1, round(self.top_share * smooth.shape[-2] * smooth.shape[-1]))
        return smooth.flatten(1).topk(count, dim=1, sorted=False).values.mean(1)

    def blur(self, image: Tensor) -> Tensor:
        """Gaussian blur, separable, mirrored at the borders; narrow images are extended by their edge instead."""
        radius = len(self.kernel) // 2
        for dimension, shape in ((-2, (1, 1, -1, 1)), (-1, (1, 1, 1, -1))):
            pad = (0, 0, radius, radius) if dimension == -2 else (radius, radius, 0, 0)
            mode = "reflect" if image.shape[dimension] > radius else "replicate"
            image = F.conv2d(F.pad(image, pad, mode=mode), self.kernel.view(shape))
        return image


def largest_foreground(foregrounds: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest of the enlarged maps, as the authors do it; the largest, enlarged, is more between cells.

    Args:
        foregrounds (Tensor): In 0..1, ``(batch, any number, height, width)``.
        size (tuple[int, int]): Height and width of the image, in pixels.

    Returns:
        Tensor: Of shape ``(batch, 1, *size)``.
    """
    at_a_time = foregrounds.shape[1]
    if foregrounds.device.type == "cpu" and not is_traced():
        at_a_time = 8  # of 80 references, what a processor's cache has room for
    parts = foregrounds.split(at_a_time, dim=1)
    return reduce(torch.maximum, [F.interpolate(part, size, mode="bilinear").amax(1, keepdim=True) for part in parts])


def fuse(distances: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of the scales, halved.

    Args:
        distances (Sequence[Tensor]): Cosine distances 0..2 of each scale, finest first,
            ``(batch, 1, height_i, width_i)``.
        size (tuple[int, int]): Height and width of the image, in pixels.

    Returns:
        Tensor: In 0..1, ``(batch, 1, height, width)``.
    """
    cells = distances[0].shape[-2:]
    # A sum, not the mean of a stack: one operation less that an export could round.
    total = reduce(torch.add, [F.interpolate(distance, cells, mode="bilinear") for distance in distances])
    return F.interpolate(total / (2 * len(distances)), size, mode="bilinear")
