# SPDX-License-Identifier: Apache-2.0
"""Which patches of a query and a reference are compared in training.

Of each pair of images: positives (same place, normal on both), anomaly negatives (same place, inside the synthetic
anomaly) and remote negatives (places too far apart to show the same thing).
Source: CPR (arXiv 2308.06748), section IV, with the values of the authors' code.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bilinear import bilinear_cells
from .outline import largest_within

POSITIONS_PER_KIND = 300
# Pixels; 4 is the stride of the first scale, 3 its window. Nearer places may legitimately match.
REMOTE_DISTANCE = 4 * (3 // 2) * math.sqrt(2)
# Pixels from an anomaly within which a normal place lies at its boundary: two cells of the first scale, one of the
# second. What is learned there is where an anomaly ends.
BOUNDARY_DISTANCE = 8


@dataclass(frozen=True)
class PatchPairs:
    """Positions to compare, ``(batch, 3 * count, 2)``: positives, then remote negatives, then anomaly negatives.

    Attributes:
        query (Tensor): Positions on the query, x and y in -1..1.
        reference (Tensor): Positions on the reference.
        valid (Tensor): Whether there is such a pair, ``(batch, 3 * count)``; the rest is padding.
        count (int): Pairs of each kind.
    """

    query: Tensor
    reference: Tensor
    valid: Tensor
    count: int
    _cells: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def cells(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where all positions lie on a feature map, first those of the queries, then those of the references.

        Args:
            height (int): Of the map, in cells.
            width (int): Of the map, in cells.

        Returns:
            tuple[Tensor, Tensor]: Indices and weights, see :func:`.bilinear.bilinear_cells`,
                ``(2 * batch, 3 * count, 4)`` each.
        """
        if (height, width) not in self._cells:  # asked for by the heads and by the loss
            self._cells[height, width] = bilinear_cells(torch.cat([self.query, self.reference]), height, width)
        return self._cells[height, width]


def draw_without_replacement(weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw indices in proportion to weights, for each row.

    Args:
        weights (Tensor): Non-negative weights of shape ``(batch, candidates)``.
        count (int): Number of draws.
        generator (torch.Generator): On the device of the weights.

    Returns:
        tuple[Tensor, Tensor]: Indices ``(batch, count)`` in the order of drawing, and whether each was drawn: where
            fewer candidates have a weight, the rest is padding.
    """
    # Exponential clocks: the index whose clock of rate w rings first is drawn first. torch.multinomial does the same,
    # but raises where a row has too few candidates, and asking beforehand would synchronise a GPU.
    # The logarithm of uniform numbers is exponential_() at a third of its time.
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device, dtype=weights.dtype)
    keys = weights / uniform.log_().neg_().clamp_min_(torch.finfo(weights.dtype).tiny)
    missing = max(0, count - weights.shape[1])
    values, indices = keys.topk(count - missing, dim=1)
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
        indices = torch.nn.functional.pad(indices, (0, missing))
    return indices, values > 0


def sample_patch_pairs(
    anomalies: Tensor,
    weights: Tensor | None,
    generator: torch.Generator,
    *,
    remote: bool,
    count: int = POSITIONS_PER_KIND,
    boundary_weight: float = 1.0,
) -> PatchPairs:
    """Choose the patches to compare.

    Args:
        anomalies (Tensor): Masks of the synthetic anomalies of the queries, bool, ``(batch, 1, height, width)``.
        weights (Tensor | None): How likely a normal pixel is drawn, ``(batch, 1, height, width)``; None means equally.
        generator (torch.Generator): On the device of the masks.
        remote (bool): Draw remote negatives (the paper does for objects, not for textures).
        count (int): Pairs of each kind and image.
        boundary_weight (float): How many times as likely a normal pixel at the boundary of an anomaly is drawn for a
            positive pair. The paper does not ask where it lies: 1.

    Returns:
        PatchPairs: Positions and which of them are real.
    """
    height, width = anomalies.shape[-2:]
    inside = anomalies.flatten(1)
    normal_weights = (~inside).float() if weights is None else weights.flatten(1).float() * ~inside
    normal, normal_valid = draw_without_replacement(normal_weights, 2 * count, generator)
    anomalous, anomalous_valid = draw_without_replacement(inside.float(), count, generator)
    positive, positive_valid = normal[:, :count], normal_valid[:, :count]
    if boundary_weight != 1:
        likelier = 1 + (boundary_weight - 1) * near_anomalies(anomalies).flatten(1)
        positive, positive_valid = draw_without_replacement(normal_weights * likelier, count, generator)

    # Twice as many candidates as needed, because some fall too near to each other.
    elsewhere = torch.randint(height * width, normal.shape, generator=generator, device=normal.device)
    down = normal // width - elsewhere // width
    right = normal % width - elsewhere % width
    far = normal_valid & (down.square() + right.square() > REMOTE_DISTANCE**2) & remote
    first = far.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :count]

    query = torch.cat([positive, elsewhere.gather(1, first), anomalous], dim=1)
    reference = torch.cat([positive, normal.gather(1, first), anomalous], dim=1)
    valid = torch.cat([positive_valid, far.gather(1, first), anomalous_valid], dim=1)
    return PatchPairs(
        query=_to_positions(query, height, width),
        reference=_to_positions(reference, height, width),
        valid=valid,
        count=count,
    )


def near_anomalies(anomalies: Tensor) -> Tensor:
    """Which pixels have an anomaly within 8 pixels along rows and columns, or lie in one.

    Args:
        anomalies (Tensor): Masks, bool, ``(batch, 1, height, width)``.

    Returns:
        Tensor: Same shape, float: 1 or 0.
    """
    return largest_within(anomalies.float(), BOUNDARY_DISTANCE)


def _to_positions(indices: Tensor, height: int, width: int) -> Tensor:
    """Pixel indices to x and y in -1..1; as in the authors' code, -1 and 1 are the centres of the outermost pixels."""
    x, y = indices % width, indices // width
    return torch.stack([2 * x / max(1, width - 1) - 1, 2 * y / max(1, height - 1) - 1], dim=-1)
