# SPDX-License-Identifier: Apache-2.0
"""Foreground estimate: which cells of F1 belong to the object?

Two clusters of features, of which the border of the image tells the background; a linear discriminant between the two;
folded into one 1x1 convolution. Source: CPR (arXiv 2308.06748), section III-D, with the values of the authors' code.
"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

RING_SHARE = 3 / 80
CENTRE_SHARE = 1 / 5
DISCRIMINANT_SAMPLES = 15_000


def border_and_centre(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of the border ring, of the next ring inside it, and of the central square of a feature map.

    Args:
        height (int): Cells.
        width (int): Cells.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Three boolean masks of shape ``(height, width)``. The rings are
            ``int(3/80 * side)`` cells wide (at least one), the square reaches a fifth of the side to both sides of the
            centre.
    """
    top, left = max(1, int(RING_SHARE * height)), max(1, int(RING_SHARE * width))
    ring, inner_ring = torch.ones(2, height, width, dtype=torch.bool)
    ring[top : height - top, left : width - left] = False
    inner_ring[ring] = False
    inner_ring[2 * top : height - 2 * top, 2 * left : width - 2 * left] = False
    centre = torch.zeros(height, width, dtype=torch.bool)
    rows = slice(int(height * (0.5 - CENTRE_SHARE)), int(height * (0.5 + CENTRE_SHARE)))
    columns = slice(int(width * (0.5 - CENTRE_SHARE)), int(width * (0.5 + CENTRE_SHARE)))
    centre[rows, columns] = True
    return ring, inner_ring, centre


@dataclass(frozen=True)
class Discriminant:
    """Linear decision between foreground and background, scaled to 0..1.

    Attributes:
        weight (Tensor): Of shape ``(channels,)``.
        bias (float): Offset.
        ring_background (float): Share of cells near the border in the background cluster.
        centre_background (float): Share of centre cells in the background cluster.
    """

    weight: Tensor
    bias: float
    ring_background: float
    centre_background: float


def fit_discriminant(
    ring: np.ndarray, inner_ring: np.ndarray, centre: np.ndarray, sample: np.ndarray, centres: np.ndarray
) -> Discriminant | None:
    """Learn the decision from features of the border and of the middle of the training images.

    Args:
        ring (np.ndarray): Features of border cells, ``(count, channels)``.
        inner_ring (np.ndarray): Features of the next cells inside, ``(count, channels)``. They tell how far border and
            middle differ: in the outermost cells, a network's zero padding alone makes a difference.
        centre (np.ndarray): Features of central cells, ``(count, channels)``.
        sample (np.ndarray): Features of cells anywhere, ``(count, channels)``; they fix the scale.
        centres (np.ndarray): The two cluster centres, ``(2, channels)``.

    Returns:
        Discriminant | None: The decision, or None where border and middle do not differ at all (every cell of the
            middle belongs to the background cluster).
    """
    ring_cluster, centre_cluster = _nearest_centre(ring, centres), _nearest_centre(centre, centres)
    background_cluster = int(np.bincount(ring_cluster, minlength=2).argmax())
    background, foreground = ring[ring_cluster == background_cluster], centre[centre_cluster != background_cluster]
    count = min(DISCRIMINANT_SAMPLES, len(background), len(foreground))
    if count < 2:
        return None
    analysis = LinearDiscriminantAnalysis().fit(
        np.concatenate([background[:count], foreground[:count]]).astype(np.float64), np.repeat([0, 1], count)
    )
    border_cluster = _nearest_centre(inner_ring if len(inner_ring) else ring, centres)
    low, high = np.percentile(analysis.decision_function(sample.astype(np.float64)), [1, 99])
    scale = 1.0 / max(high - low, 1e-12)
    return Discriminant(
        weight=torch.from_numpy(analysis.coef_[0] * scale).float(),
        bias=float((analysis.intercept_[0] - low) * scale),
        ring_background=float((border_cluster == background_cluster).mean()),
        centre_background=float((centre_cluster == background_cluster).mean()),
    )


def _nearest_centre(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return (np.square(centres).sum(1) - 2 * features @ centres.T).argmin(1)


def sharpen(foreground: Tensor) -> Tensor:
    """Weights by which training positions are drawn: smoothed and pushed to 0 or 1.

    Args:
        foreground (Tensor): Probabilities of shape ``(batch, 1, height, width)``.

    Returns:
        Tensor: Same shape; a Gaussian of sigma height / 25, then the logistic curve ``1 / (1 + exp(5 - 10 x))``.
    """
    sigma = foreground.shape[-2] / 25
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=foreground.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    smooth = foreground
    for pad, shape in (((0, 0, radius, radius), (1, 1, -1, 1)), ((radius, radius, 0, 0), (1, 1, 1, -1))):
        smooth = F.conv2d(F.pad(smooth, pad, mode="replicate"), kernel.view(shape))
    return torch.sigmoid(10 * smooth - 5)


class ForegroundEstimator(nn.Module):
    """Probability that a cell of F1 shows the object.

    Until fitted, and for textures for ever, every cell is foreground: the map is 1, and multiplying by it changes
    nothing. So inference has no branch.

    Args:
        channels (int): Channels of F1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, 1, 1).requires_grad_(False)
        self.disable()

    @torch.no_grad()
    def disable(self) -> None:
        """Call every cell foreground."""
        self.projection.weight.zero_()
        self.projection.bias.fill_(1.0)  # type: ignore[union-attr]

    @torch.no_grad()
    def set_discriminant(self, discriminant: Discriminant) -> None:
        """Take over a learned decision.

        Args:
            discriminant (Discriminant): From :func:`fit_discriminant`.
        """
        self.projection.weight.copy_(discriminant.weight.view_as(self.projection.weight))
        self.projection.bias.fill_(discriminant.bias)  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        """Estimate the foreground.

        Args:
            features (Tensor): F1 of shape ``(batch, channels, height, width)``.

        Returns:
            Tensor: Probabilities of shape ``(batch, 1, height, width)``.
        """
        return self.projection(features).clamp(0, 1)
