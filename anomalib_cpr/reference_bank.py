# SPDX-License-Identifier: Apache-2.0
"""What the model remembers of the training images, as buffers that a checkpoint carries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ReferenceBank(nn.Module):
    """Histograms, foreground maps and descriptors of the training images.

    The buffers are empty until :meth:`allocate` and :meth:`write` fill them, or a checkpoint is loaded.

    Args:
        descriptor_channels (int): Channels of the descriptors.
        codebook_size (int): Number of visual words in a histogram.
        blocks (int): Blocks per side of the retrieval grid.
    """

    histograms: Tensor
    foregrounds: Tensor
    descriptors_1: Tensor
    descriptors_2: Tensor

    def __init__(self, descriptor_channels: int, codebook_size: int, blocks: int) -> None:
        super().__init__()
        self.register_buffer("histograms", torch.zeros(0, blocks * blocks, codebook_size))
        self.register_buffer("foregrounds", torch.zeros(0, 1, 0, 0))
        self.register_buffer("descriptors_1", torch.zeros(0, descriptor_channels, 0, 0))
        self.register_buffer("descriptors_2", torch.zeros(0, descriptor_channels, 0, 0))

    def __len__(self) -> int:
        """Number of training images whose descriptors are held."""
        return self.descriptors_1.shape[0]

    @property
    def descriptors(self) -> list[Tensor]:
        """Descriptors per scale, finest first, each ``(gallery, channels, height_i, width_i)``."""
        return [self.descriptors_1, self.descriptors_2]

    @property
    def megabytes(self) -> float:
        """Memory of all buffers in MB (10^6 bytes)."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers()) / 1e6

    def size_for(self, count: int, cells: Sequence[tuple[int, int]]) -> float:
        """Memory that the descriptors of ``count`` images will take, in MB (10^6 bytes).

        Args:
            count (int): Number of images.
            cells (Sequence[tuple[int, int]]): Height and width of the feature maps, per scale.
        """
        return 4e-6 * count * self.descriptors_1.shape[1] * sum(height * width for height, width in cells)

    def allocate(self, count: int, cells: Sequence[tuple[int, int]]) -> None:
        """Make room for descriptors; what was held before is freed first, so that there are never two copies.

        Args:
            count (int): Number of images.
            cells (Sequence[tuple[int, int]]): Height and width of the feature maps, per scale.
        """
        self.clear()
        for name, (height, width) in zip(("descriptors_1", "descriptors_2"), cells, strict=True):
            empty = getattr(self, name)
            setattr(self, name, empty.new_empty(count, empty.shape[1], height, width))

    def write(self, start: int, descriptors: Sequence[Tensor]) -> None:
        """Store descriptors of consecutive images.

        Args:
            start (int): Index of the first image.
            descriptors (Sequence[Tensor]): Per scale, ``(batch, channels, height_i, width_i)``.
        """
        for held, new in zip(self.descriptors, descriptors, strict=True):
            held[start : start + len(new)] = new

    def clear(self) -> None:
        """Free the descriptors. Histograms and foregrounds do not depend on the heads and stay."""
        for name in ("descriptors_1", "descriptors_2"):
            held = getattr(self, name)
            setattr(self, name, held.new_zeros(0, held.shape[1], 0, 0))

    def check(self, cells: tuple[int, int]) -> None:
        """Refuse to compare with nothing, or with references of another size.

        Args:
            cells (tuple[int, int]): Height and width of the query's F1.

        Raises:
            RuntimeError: If the bank is empty.
            ValueError: If the references have another size.
        """
        if len(self) == 0:
            raise RuntimeError(
                "The reference bank is empty: this model has not been fitted. Run `anomalib train --model Cpr ...` or "
                "Engine().fit(model, datamodule), or load a checkpoint of a finished training "
                "(a resume point, resume.ckpt, holds no bank: continue its training with ckpt_path)."
            )
        own = tuple(self.descriptors_1.shape[-2:])
        if own != tuple(cells):
            raise ValueError(
                f"Images of {4 * cells[0]}x{4 * cells[1]} pixels cannot be compared with the reference bank, which was "
                f"built from images of {4 * own[0]}x{4 * own[1]} pixels. Use the size of the training."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Take over the sizes of a checkpoint, after checking that they fit each other and the configuration."""
        incoming = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        problem = self._misfit(incoming)
        if problem:
            errors: list[str] = args[-1]
            errors.append(f"The checkpoint's reference bank does not fit the configuration: {problem}")
            return
        for name, tensor in incoming.items():
            held = getattr(self, name)
            if held.shape != tensor.shape:
                setattr(self, name, held.new_empty(tensor.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _misfit(self, incoming: dict[str, Tensor]) -> str | None:
        for name, tensor in incoming.items():
            if tensor.ndim != getattr(self, name).ndim:
                return f"{name} has shape {tuple(tensor.shape)}."
        if "histograms" in incoming and incoming["histograms"].shape[1:] != self.histograms.shape[1:]:
            blocks, words = incoming["histograms"].shape[1:]
            own_blocks, own_words = self.histograms.shape[1:]
            return (
                f"it was made with blocks={round(blocks**0.5)} and codebook_size={words}, the model has "
                f"blocks={round(own_blocks**0.5)} and codebook_size={own_words}. Use the values of the checkpoint."
            )
        for name in ("descriptors_1", "descriptors_2"):
            own = getattr(self, name).shape[1]
            if name in incoming and incoming[name].shape[1] != own:
                return (
                    f"its descriptors have {incoming[name].shape[1]} channels, the model descriptor_channels={own}. "
                    "Use the value of the checkpoint."
                )
        counts = {name: tensor.shape[0] for name, tensor in incoming.items()}
        if counts.get("descriptors_1") != counts.get("descriptors_2"):
            return f"its parts hold different numbers of images: {counts}."
        if counts.get("descriptors_1") and len(set(counts.values())) != 1:
            return f"its parts hold different numbers of images: {counts}."
        return None
