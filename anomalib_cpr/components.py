# SPDX-License-Identifier: Apache-2.0
"""Connected parts of masks: which of them are large enough to be an anomaly, and touch the object."""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def keep_components(masks: Tensor, foreground: Tensor | None, minimum_area: float) -> Tensor:
    """Drop the parts of masks that are too small or lie off the object.

    Args:
        masks (Tensor): Bool, ``(count, height, width)``. Pixels that touch at a corner are connected.
        foreground (Tensor | None): Where the object is, bool, same shape and device; None: everywhere. A part that
            touches the object is kept whole.
        minimum_area (float): Smallest part to keep, as a share of the image area.

    Returns:
        Tensor: Bool, same shape and device; the same on a CPU and on a GPU.
    """
    if masks.device.type == "cuda":
        return keep_all_at_once(masks, foreground, minimum_area)
    # Not every device knows what the other way needs.
    kept = keep_one_by_one(masks.cpu(), None if foreground is None else foreground.cpu(), minimum_area)
    return kept.to(masks.device)


def keep_all_at_once(masks: Tensor, foreground: Tensor | None, minimum_area: float) -> Tensor:
    """:func:`keep_components` as suits a GPU, which need not wait for a CPU."""
    labels = label_components(masks)
    pixels = masks[0].numel()
    zeros = torch.zeros((len(masks), pixels + 1), dtype=torch.int32, device=masks.device)
    keep = zeros.scatter_add(1, labels, torch.ones_like(labels, dtype=torch.int32)) >= minimum_area * pixels
    if foreground is not None:
        keep &= zeros.scatter_add(1, labels, foreground.flatten(1).int()) > 0
    keep[:, 0] = False  # label 0 is what lies outside the mask
    return keep.gather(1, labels).view(masks.shape)


def label_components(masks: Tensor) -> Tensor:
    """Number the connected parts of masks, in few passes over all of them at once, as suits a GPU.

    Each pixel takes the largest number around it. Numbers remember which larger one they met, and a number is replaced
    by that at the end of the chain, so that it crosses a winding part in a few steps, where plain spreading (such as
    kornia's ``connected_components``) takes as many as the part is long.

    Args:
        masks (Tensor): Bool, ``(count, height, width)``. Pixels that touch at a corner are connected.

    Returns:
        Tensor: Of each pixel the largest index in its part, counted from 1 row by row; 0 outside of the mask. int64,
            ``(count, height * width)``.
    """
    count, height, width = masks.shape
    pixels = height * width
    # The type of the maximum filter must hold every number exactly.
    exact = torch.float32 if pixels < 2**24 else torch.float64
    inside = masks.flatten(1)
    larger = torch.arange(pixels + 1, device=masks.device).repeat(count, 1)
    labels = larger[:, 1:] * inside
    while True:
        around = F.max_pool2d(labels.view(count, 1, height, width).to(exact), 3, stride=1, padding=1)
        around = around.flatten(1).long() * inside
        larger.scatter_reduce_(1, labels, around, "amax")
        for _ in range(2):
            larger = larger.gather(1, larger)
        spread = larger.gather(1, around)
        if torch.equal(spread, labels):
            return labels
        labels = spread


def keep_one_by_one(masks: Tensor, foreground: Tensor | None, minimum_area: float) -> Tensor:
    """:func:`keep_components` as suits a CPU."""
    kept = torch.empty_like(masks)
    for index, mask in enumerate(masks.numpy()):
        # Of OpenCV's algorithms, which all find the same parts, this one takes a third of the default's time.
        count, labels, stats, _ = cv2.connectedComponentsWithStatsWithAlgorithm(
            mask.astype(np.uint8), 8, cv2.CV_32S, cv2.CCL_GRANA
        )
        keep = stats[:, cv2.CC_STAT_AREA] >= minimum_area * mask.size
        if foreground is not None:
            keep &= np.bincount(labels[foreground[index].numpy()], minlength=count) > 0
        keep[0] = False  # label 0 is what lies outside the mask
        kept[index] = torch.from_numpy(keep[labels])
    return kept
