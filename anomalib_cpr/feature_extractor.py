# SPDX-License-Identifier: Apache-2.0
"""Frozen backbone that yields the feature maps F1 (stride 4) and F2 (stride 8)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureListNet
from torch import Tensor, nn

from .folded_densenet import FoldedDenseNet, can_fold
from .messages import first_line
from .quantisation import is_traced

logger = logging.getLogger(__name__)

STRIDES = (4, 8)


class FeatureExtractor(nn.Module):
    """Two intermediate feature maps of a frozen timm network.

    The network is built without weights. They are loaded by :meth:`load_weights` when training begins, so that a
    checkpoint, which carries them, opens on a machine without internet and without the weights file.

    Args:
        backbone (str): Name of any timm network that supports ``features_only``.
        layers (Sequence[str]): Names of the layers at strides 4 and 8, as timm lists them.

    Raises:
        ValueError: If the backbone is unknown to timm, or a layer does not exist or has another stride.

    Note:
        The paper uses DenseNet-201 up to ``denseblock2`` (section IV-A), with batch normalisation in evaluation mode.
    """

    weights_loaded: Tensor

    def __init__(
        self,
        backbone: str = "densenet201",
        layers: Sequence[str] = ("features.denseblock1", "features.denseblock2"),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.layers = tuple(layers)
        self.network = timm.create_model(
            backbone, pretrained=False, features_only=True, out_indices=_layer_indices(backbone, self.layers)
        )
        self.channels: tuple[int, ...] = tuple(self.network.feature_info.channels())  # type: ignore[operator, union-attr]
        self.register_buffer("weights_loaded", torch.tensor(False))
        self.requires_grad_(False).eval()
        self._folded: dict[torch.dtype, tuple[list[tuple[Tensor, int]], FoldedDenseNet]] = {}

    def train(self, mode: bool = True) -> "FeatureExtractor":  # noqa: ARG002 - a frozen network has one mode
        """Stay in evaluation mode: batch normalisation keeps the statistics of the pre-training."""
        return super().train(False)

    def load_weights(self, weights_file: str | Path | None = None) -> str:
        """Load pre-trained weights from a file, or from timm's hub (its cache first).

        Args:
            weights_file (str | Path | None): State dict of the network, complete or up to the second layer.

        Returns:
            str: What was loaded, for the log.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file holds another network.
            RuntimeError: If the hub cannot be reached and its cache does not hold the weights.
        """
        if weights_file is not None and not Path(weights_file).is_file():
            raise FileNotFoundError(f"backbone_weights={str(weights_file)!r} does not exist.")
        overlay = {"file": str(weights_file)} if weights_file is not None else None
        device = next(self.network.parameters()).device
        try:
            network = timm.create_model(
                self.backbone,
                pretrained=True,
                features_only=True,
                out_indices=_layer_indices(self.backbone, self.layers),
                pretrained_cfg_overlay=overlay,
            )
        except Exception as error:
            if weights_file is not None:
                raise ValueError(
                    f"backbone_weights={str(weights_file)!r} does not hold weights of {self.backbone!r}: "
                    f"{first_line(error)}. Give a state dict (torch.save) of this timm network, or another `backbone`."
                ) from error
            raise RuntimeError(
                f"The weights of {self.backbone!r} are not in the cache and could not be downloaded "
                f"({first_line(error)}). Without internet, pass `backbone_weights=FILE` (a state dict of the timm "
                "network, fetched on another machine), or `pre_trained=False` for random weights."
            ) from error
        self.network.load_state_dict(network.state_dict())
        self.network.to(device)
        self.weights_loaded.fill_(True)
        return f"{self.backbone} from {weights_file or 'timm'}"

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute F1 and F2.

        Args:
            images (Tensor): Normalised images of shape ``(batch, 3, height, width)``, sides divisible by 8.

        Returns:
            list[Tensor]: F1 ``(batch, channels_1, height / 4, width / 4)`` and
                F2 ``(batch, channels_2, height / 8, width / 8)``.

        Raises:
            ValueError: If a side is not divisible by 8.
        """
        images = _laid_out(images)
        with torch.no_grad():
            folded = self._fold(images.device)
            return folded(images) if folded is not None else _one_by_one(self.network, images)

    def finest(self, images: Tensor) -> Tensor:
        """Compute F1 alone, where nothing asks for F2, without the layers behind it: two thirds of DenseNet-201's time.

        Args:
            images (Tensor): As in :meth:`forward`.

        Returns:
            Tensor: F1, bit for bit that of :meth:`forward`.

        Raises:
            ValueError: If a side is not divisible by 8.
        """
        if not isinstance(self.network, FeatureListNet):  # some, such as EfficientNet, are not a list of layers
            return self(images)[0]
        images = _laid_out(images)
        with torch.no_grad():
            folded = self._fold(images.device)
            return folded(images, last=1)[0] if folded is not None else _one_by_one(self._first_layers, images)[0]

    def _first_layers(self, images: Tensor) -> list[Tensor]:
        network: Any = self.network
        maps: Any = images
        for name, layer in network.items():
            maps = layer(maps)
            if name in network.return_layers:
                break
        return [maps[0] if isinstance(maps, (tuple, list)) else maps]

    def _fold(self, device: torch.device) -> FoldedDenseNet | None:
        """The network in the form that is fast on a CPU, in the type that autocast asks for; None: there is none."""
        if device.type != "cpu" or is_traced():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        if dtype not in {torch.float32, torch.bfloat16} or not can_fold(self.network):
            return None
        tensors = [*self.network.parameters(), *self.network.buffers()]
        held = self._folded.get(dtype)
        if held is not None and all(
            own is tensor and tensor._version == version  # noqa: SLF001
            for own, (tensor, version) in zip(tensors, held[0], strict=True)
        ):
            return held[1]
        # Tensors of inference mode do not tell when they are changed.
        if any(t.is_inference() or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors):
            return None
        with torch.inference_mode(mode=False), torch.autocast("cpu", enabled=False):
            folded = FoldedDenseNet(self.network, dtype)
        self._folded[dtype] = [(tensor, tensor._version) for tensor in tensors], folded  # noqa: SLF001
        return folded

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: what can be made anew stays behind."""
        return {**self.__dict__, "_folded": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a pickle, which may be of a version that did not fold."""
        super().__setstate__({**state, "_folded": {}})


def _one_by_one(compute: Callable[[Tensor], list[Tensor]], images: Tensor) -> list[Tensor]:
    """Feature maps of a batch; on a CPU image by image, each of which stays in the processor's cache."""
    if images.device.type != "cpu" or is_traced() or len(images) == 1:
        return compute(images)
    return [torch.cat(maps) for maps in zip(*map(compute, images.split(1)), strict=True)]


def _laid_out(images: Tensor) -> Tensor:
    """Images of a size that fits, in the layout of the extractor."""
    height, width = images.shape[-2:]
    if height % STRIDES[-1] or width % STRIDES[-1]:
        raise ValueError(
            f"Image size {height}x{width} does not fit the strides {STRIDES}: both sides must be divisible by "
            f"{STRIDES[-1]}; nearest is {_nearest(height)}x{_nearest(width)}: "
            f"Cpr(image_size=({_nearest(height)}, {_nearest(width)})), --model.image_size "
            f"'[{_nearest(height)}, {_nearest(width)}]', or your own pre-processor."
        )
    # Channels last: CPUs convolve a third faster, GPUs in half precision too, and a descriptor is one piece.
    return images.contiguous(memory_format=torch.channels_last)


def checked_size(size: Sequence[int] | int) -> tuple[int, int]:
    """Height and width of images that fit the strides.

    Args:
        size (Sequence[int] | int): Height and width in pixels, or one number for both.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        ValueError: If it is not one or two positive numbers divisible by 8.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(side < STRIDES[-1] or side % STRIDES[-1] for side in sides):
        raise ValueError(f"image_size={size}: expected height and width in pixels, both divisible by {STRIDES[-1]}.")
    return sides[0], sides[1]


def _layer_indices(backbone: str, layers: Sequence[str]) -> tuple[int, ...]:
    """Positions of the named layers in timm's list, after checking their names and strides."""
    try:
        network: Any = timm.create_model(backbone, pretrained=False, features_only=True)
        info = network.feature_info.info
    except Exception as error:
        raise ValueError(
            f"backbone={backbone!r} cannot be built as a timm `features_only` network: {first_line(error)}. "
            "See timm.list_models()."
        ) from error
    strides = {entry["module"]: entry["reduction"] for entry in info}
    listing = ", ".join(f"{name} (stride {stride})" for name, stride in strides.items())
    if len(layers) != len(STRIDES):
        raise ValueError(
            f"layers={list(layers)}: expected {len(STRIDES)} names, at strides {STRIDES}. There are {listing}."
        )
    for layer, stride in zip(layers, STRIDES, strict=True):
        if layer not in strides:
            raise ValueError(f"layers={list(layers)}: {backbone} has no layer {layer!r}. There are {listing}.")
        if strides[layer] != stride:
            raise ValueError(
                f"layers={list(layers)}: {layer!r} has stride {strides[layer]}, expected {stride}. There are {listing}."
            )
    names = list(strides)
    return tuple(names.index(layer) for layer in layers)


def _nearest(side: int) -> int:
    return max(1, round(side / STRIDES[-1])) * STRIDES[-1]
