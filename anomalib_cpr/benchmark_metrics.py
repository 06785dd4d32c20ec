# SPDX-License-Identifier: Apache-2.0
"""Quality of raw scores and raw anomaly maps, the same for every model.

Curves come from scikit-learn and anomalib, which take scores in any range. (torchmetrics' own curves squash scores
outside 0..1 with a sigmoid, under which large ones tie: raw distances of PatchCore would lose their order.)
"""

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms import v2

FPR_LIMIT = 0.3
# A map is drawn in units of "how rare is such a value on good test images": 10 %, 1 %, ... 0.001 % of their pixels.
RARITIES = tuple(round(0.25 * step, 2) for step in range(21))


def ranking_quality(scores: Tensor, labels: Tensor) -> dict[str, float | None]:
    """AUROC, average precision and best F1 of scores.

    Args:
        scores (Tensor): Any shape, any range; higher means more anomalous.
        labels (Tensor): Same shape, bool.

    Returns:
        dict[str, float | None]: ``AUROC``, ``AP`` and ``F1max`` in 0..1; None where only one class is present.

    Raises:
        ValueError: If a score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} scores are not finite.")
    values, truth = scores.flatten().float().numpy(), labels.flatten().bool().numpy()
    if truth.all() or not truth.any():
        return {"AUROC": None, "AP": None, "F1max": None}
    precision, recall, _ = precision_recall_curve(truth, values, drop_intermediate=True)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "AUROC": float(roc_auc_score(truth, values)),
        "AP": float(average_precision_score(truth, values)),
        "F1max": float(f1.max()),
    }


def per_region_overlap(maps: Tensor, masks: Tensor) -> float | None:
    """Area under the per-region overlap up to a false positive rate of 0.3, divided by 0.3.

    Args:
        maps (Tensor): Of shape ``(images, height, width)``, any range.
        masks (Tensor): Same shape, bool.

    Returns:
        float | None: In 0..1; None if there is no defect.
    """
    if not bool(masks.any()):
        return None
    metric = _AUPRO(fpr_limit=FPR_LIMIT)
    metric.update(maps.float(), masks.int())
    return float(metric.compute())


def quality(scores: Tensor, labels: Tensor, maps: Tensor | None, masks: Tensor | None) -> dict[str, float | None]:
    """All metrics of a test set.

    Args:
        scores (Tensor): Image scores, ``(images,)``.
        labels (Tensor): Whether an image is anomalous, bool, ``(images,)``.
        maps (Tensor | None): Anomaly maps, ``(images, height, width)``; None if the model gives none.
        masks (Tensor | None): True masks, bool, same shape; None if the data set has none.

    Returns:
        dict[str, float | None]: None where a metric does not exist.
    """
    found = {f"image_{name}": value for name, value in ranking_quality(scores, labels).items()}
    for name in ("AUROC", "AP", "F1max"):
        found[f"pixel_{name}"] = None
    found["AUPRO"] = None
    if maps is not None and masks is not None:
        found |= {f"pixel_{name}": value for name, value in ranking_quality(maps, masks).items()}
        found["AUPRO"] = per_region_overlap(maps, masks)
    return found


def to_full_frame(maps: Tensor, transform: object) -> Tensor:
    """Undo the centre crop of a pre-processor: what was cropped away was called normal.

    Args:
        maps (Tensor): Maps of the cropped images, ``(batch, 1, height, width)``.
        transform (object): The pre-processor's transform.

    Returns:
        Tensor: Maps of the whole images, filled with the smallest value of each map.
    """
    parts = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
    full: tuple[int, int] | None = None
    for part in parts:
        if isinstance(part, v2.Resize) and part.size is not None:
            size = [part.size] if isinstance(part.size, int) else list(part.size)
            full = (size[0], size[-1])
        if isinstance(part, v2.CenterCrop) and full is not None:
            crop = (part.size[0], part.size[1])
            scale = maps.shape[-2] / crop[0], maps.shape[-1] / crop[1]
            height, width = round(full[0] * scale[0]), round(full[1] * scale[1])
            lowest = maps.flatten(1).amin(1)[:, None, None, None]
            canvas = lowest.expand(-1, 1, height, width).clone()
            top, left = (height - maps.shape[-2]) // 2, (width - maps.shape[-1]) // 2
            canvas[:, :, top : top + maps.shape[-2], left : left + maps.shape[-1]] = maps
            return canvas
    return maps


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring maps to the common size, bilinearly: ``(batch, 1, any, any)`` to ``(batch, height, width)``."""
    return F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)[:, 0]


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring masks to the common size, bilinearly without antialiasing, then > 0.5: the paper's rule.

    Args:
        masks (Tensor): Of shape ``(batch, any, any)``, 0 or 1.
        size (tuple[int, int]): Height and width.

    Returns:
        Tensor: Bool, ``(batch, height, width)``.
    """
    return F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0] > 0.5


def rarity_scale(maps: Tensor, labels: Tensor) -> list[float]:
    """Values that a share of 10^-r of the pixels of good test images exceed, for the rarities r.

    They put the maps of all models on one scale, whatever unit each has.

    Args:
        maps (Tensor): Of shape ``(images, height, width)``.
        labels (Tensor): Whether an image is anomalous, bool, ``(images,)``.

    Returns:
        list[float]: One value for each of :data:`RARITIES`; empty if no image is good.
    """
    good = maps[~labels.bool()]
    if not len(good):
        return []
    ordered = np.sort(good.flatten().numpy())
    places = [min(len(ordered) - 1, int((1 - 10**-rarity) * len(ordered))) for rarity in RARITIES]
    return [float(ordered[place]) for place in places]
