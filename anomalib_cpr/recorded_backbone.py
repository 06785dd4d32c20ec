# SPDX-License-Identifier: Apache-2.0
"""The frozen backbone as one CUDA graph, for training steps.

Its 230 kernels of a step take the processor longer to start than the graph takes to be replayed, and all batches of a
training have one shape.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from .memory import available_bytes
from .messages import first_line

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.2  # of the free memory that a graph may keep: reference bank and heads need the rest
Backbone = Callable[[Tensor], list[Tensor]]
Result = TypeVar("Result")


def record_graph(compute: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record a computation as a CUDA graph, so that one call starts all of its kernels.

    Args:
        compute (Callable[[], Result]): Reads only tensors that stay where they are.
        device (torch.device): A CUDA device.

    Returns:
        tuple[torch.cuda.CUDAGraph, Result]: The graph, and what each replay computes anew.

    Raises:
        RuntimeError: If something in it cannot be recorded, or memory runs out.
    """
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(3):  # libraries choose their algorithms in the first calls
            compute()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Threads that watch over other devices may go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = compute()
    return graph, result


class RecordedBackbone:
    """Replays what a backbone does with batches of one shape in one precision; others it computes as ever.

    Args:
        backbone (Backbone): Frozen, on a CUDA device. Takes images and returns features.
        example (Tensor): Images of the shape that is going to be asked for.
        precision (AbstractContextManager): Autocast, or nothing, as it is going to be around the calls.

    Raises:
        RuntimeError: If the backbone does something that cannot be recorded, or memory runs out.
    """

    def __init__(self, backbone: Backbone, example: Tensor, precision: AbstractContextManager) -> None:
        self._backbone, self._images = backbone, example.clone()
        device = example.device
        with precision:
            self._precision = _precision(device)
            caches = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)  # converted weights would belong to the graph
            try:
                self._graph, self._features = record_graph(lambda: backbone(self._images), device)
            finally:
                torch.set_autocast_cache_enabled(caches)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Compute features.

        Args:
            images (Tensor): Normalised images of shape ``(batch, 3, height, width)``.

        Returns:
            list[Tensor]: As the backbone's, without gradients; the next call overwrites them.
        """
        if images.shape != self._images.shape or _precision(images.device) != self._precision:
            return self._backbone(images)
        self._images.copy_(images)
        self._graph.replay()
        return list(self._features)


def record(
    backbone: Backbone, shape: Sequence[int], device: torch.device, precision: AbstractContextManager
) -> Backbone:
    """Record a frozen backbone, if that is possible and leaves most of the memory free.

    Args:
        backbone (Backbone): As in :class:`RecordedBackbone`.
        shape (Sequence[int]): Of the images: ``(batch, 3, height, width)``.
        device (torch.device): Where the steps run.
        precision (AbstractContextManager): As in :class:`RecordedBackbone`.

    Returns:
        Backbone: The recorded one on a CUDA device, otherwise the given one.
    """
    if device.type != "cuda":
        return backbone
    available, before = available_bytes(device), torch.cuda.memory_reserved(device)
    try:
        recorded = RecordedBackbone(backbone, torch.zeros(tuple(shape), device=device), precision)
    except RuntimeError as error:
        logger.warning(
            "The backbone cannot be recorded as a CUDA graph (%s). Steps start its operations one by one, which takes "
            "longer and gives the same.",
            first_line(error),
        )
        return backbone
    kept = torch.cuda.memory_reserved(device) - before
    if available is not None and kept > MEMORY_SHARE * available:
        logger.info("The backbone is not recorded as a CUDA graph, which would keep %.0f MB of memory.", kept / 1e6)
        del recorded
        torch.cuda.empty_cache()
        return backbone
    return recorded


def _precision(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
