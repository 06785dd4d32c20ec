# SPDX-License-Identifier: Apache-2.0
"""The models that ``anomalib-cpr speed`` compares, with random weights and banks: the time does not depend on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .presets import PRESETS
from .reference_bank import BankDtype
from .torch_model import CprModel

SMALL_BANKS: dict[str, tuple[str, BankDtype]] = {
    "cpr_float16": ("cpr", "float16"),
    "cpr_int8": ("cpr", "int8"),
    "cpr_int4": ("cpr", "int4"),
}
CORESET_SHARE = 0.1  # of PatchCore's bank, anomalib's default
ROWS = ("naive", *PRESETS, *SMALL_BANKS, "patchcore_256", "patchcore", "padim", "efficientad_s", "rad")
FUSED = "_fused"
FUSED_ROWS = tuple(name + FUSED for name in (*PRESETS, *SMALL_BANKS))  # with the Triton kernel, on a CUDA device


@dataclass(frozen=True)
class Setting:
    """What all models are built for.

    Attributes:
        size (int): Side of the images in pixels.
        k (int): Number of references.
        gallery (int): Number of training images that the banks remember.
    """

    size: int = 320
    k: int = 10
    gallery: int = 209


class NaiveCpr(nn.Module):
    """The matching as it is usually written, with unfold: the yardstick.

    Every reference is unfolded into its windows, a tensor of ``(k, channels, window^2, height, width)``, and multiplied
    with the query. Backbone and heads run as they stand, without folding and in the default memory layout.

    Args:
        model (CprModel): Whose weights and bank are used.
    """

    def __init__(self, model: CprModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> InferenceBatch:
        """Predict, as :meth:`CprModel.forward` does."""
        return self.predict(images)[0]

    def predict(
        self, images: Tensor, references: Tensor | None = None, lap: Callable[[str], None] = lambda _: None
    ) -> tuple[InferenceBatch, Tensor]:
        """Predict with given references.

        Args:
            images (Tensor): Normalised images, ``(batch, 3, height, width)``.
            references (Tensor | None): Indices ``(batch, k)``; None retrieves them.
            lap (Callable[[str], None]): Called after each stage with its name.

        Returns:
            tuple[InferenceBatch, Tensor]: Predictions, and the references.
        """
        model = self.model
        features = model.feature_extractor.network(images)
        lap("backbone")
        queries = [F.normalize(head(f).float(), dim=1) for head, f in zip(model.heads, features, strict=True)]
        lap("heads")
        histograms = model.global_retriever(features[0])
        own = model.global_retriever.nearest(histograms, model.bank.histograms, model.k)
        references = own if references is None else references
        foregrounds = model.foreground_estimator(features[0].float())
        foregrounds = torch.cat([foregrounds, model.bank.foregrounds[references][:, :, 0]], 1)
        lap("retrieval")
        galleries = [gallery[references].float() for gallery in model.bank.descriptors]
        lap("gather")
        distances = [
            torch.stack([naive_match(q, g, window) for q, g in zip(query, gallery, strict=True)])
            for query, gallery, window in zip(queries, galleries, model.window_sizes, strict=True)
        ]
        lap("matching")
        anomaly_map, score = model.score(distances, foregrounds, images)
        lap("scoring")
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map), own


def naive_match(query: Tensor, references: Tensor, window: int) -> Tensor:
    """Smallest distance to each reference by unfolding.

    Args:
        query (Tensor): Unit descriptors of shape ``(channels, height, width)``.
        references (Tensor): Unit descriptors of shape ``(k, channels, height, width)``.
        window (int): Side of the window.

    Returns:
        Tensor: Distances of shape ``(k, height, width)``.
    """
    k, channels, height, width = references.shape
    unfolded = F.unfold(references, window, padding=window // 2).view(k, channels, window**2, height, width)
    similarity = (query[None, :, None] * unfolded).sum(1)
    inside = F.unfold(references.new_ones(1, 1, height, width), window, padding=window // 2)
    similarity = similarity.masked_fill(inside.view(1, window**2, height, width) == 0, -2.0)
    return (1 - similarity.amax(1)).clamp(0, 2)


def cpr_stages(model: CprModel, images: Tensor, lap: Callable[[str], None]) -> InferenceBatch:
    """:meth:`CprModel.forward` with a call after each stage. The gather is part of the matching.

    Args:
        model (CprModel): The model.
        images (Tensor): Normalised images, ``(batch, 3, height, width)``.
        lap (Callable[[str], None]): Called after each stage with its name.

    Returns:
        InferenceBatch: The predictions.
    """
    features = model.feature_extractor(images)
    lap("backbone")
    queries = model.describe(features, images)
    lap("heads")
    references, foregrounds = model.retrieve(features[0])
    lap("retrieval")
    distances = model.match(queries, references)
    lap("matching")
    anomaly_map, score = model.score(distances, foregrounds, images)
    lap("scoring")
    return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)


@dataclass(frozen=True)
class Row:
    """A model to measure.

    Attributes:
        name (str): Of the row.
        model (nn.Module): Takes images, gives map and score.
        size (int): Side of its images in pixels.
        bank (Tensor | list[Tensor]): What it remembers of the training images.
    """

    name: str
    model: nn.Module
    size: int
    bank: list[Tensor]

    @property
    def bank_mb(self) -> float:
        """Memory of the bank in MB (10^6 bytes)."""
        return sum(tensor.nbytes for tensor in self.bank) / 1e6

    @property
    def checkpoint_mb(self) -> float:
        """Size of a checkpoint in MB: weights and bank."""
        return sum(tensor.nbytes for tensor in self.model.state_dict().values()) / 1e6


def build(name: str, setting: Setting, device: torch.device, cpr: CprModel | None = None) -> Row:
    """Build a model of :data:`ROWS` or :data:`FUSED_ROWS`.

    Args:
        name (str): Of the row.
        setting (Setting): Image size and bank.
        device (torch.device): Where it runs.
        cpr (CprModel | None): The standard model, if it was built; the naive way shares its weights and bank.

    Returns:
        Row: In evaluation mode, on the device.

    Raises:
        ValueError: If there is no such row, or the backbone cannot be built.
    """
    torch.manual_seed(0)
    if name == "naive":
        model: nn.Module = NaiveCpr(cpr or build("cpr", setting, device).model)  # type: ignore[arg-type]
        bank = list(model.model.bank.buffers())  # type: ignore[union-attr]
        return Row(name, model, setting.size, bank)
    plain = name.removesuffix(FUSED)
    if plain in PRESETS or plain in SMALL_BANKS:
        preset, dtype = SMALL_BANKS.get(plain, (plain, "float32"))
        model = random_cpr(PRESETS[preset], setting, dtype, device)
        model.fused_matching = name in FUSED_ROWS
        return Row(name, model, setting.size, list(model.bank.buffers()))
    if name not in ROWS:
        raise ValueError(f"rows={name!r}: there are {', '.join(ROWS)}.")
    size = 256 if name in {"patchcore_256", "padim", "efficientad_s"} else setting.size
    make = {"padim": _padim, "efficientad_s": _efficient_ad, "rad": _rad}.get(name, _patchcore)
    model, bank = make(size, setting, device)
    return Row(name, model.eval(), size, bank)


def random_cpr(preset: dict, setting: Setting, dtype: BankDtype, device: torch.device) -> CprModel:
    """A model with random weights and a full bank.

    Args:
        preset (dict): Arguments of the model.
        setting (Setting): Image size and bank.
        dtype (BankDtype): Of the bank.
        device (torch.device): Where it runs.

    Returns:
        CprModel: In evaluation mode.
    """
    model = CprModel(**preset, pre_trained=False, k=setting.k, bank_dtype=dtype).eval().to(device)
    bank, cells = model.bank, [(setting.size // stride,) * 2 for stride in (4, 8)]
    with torch.no_grad():
        image = _images(4, setting.size, device)
        features = model.feature_extractor.finest(image)
        # Words and foreground from real features, so that histograms are neither empty nor all alike.
        codebook = model.global_retriever.codebook
        cell = torch.randperm(cells[0][0] * cells[0][1])[: len(codebook)]
        codebook.copy_(features[0].flatten(1)[:, cell].T)
        model.foreground_estimator.projection.bias.fill_(0.8)  # type: ignore[union-attr]
        bank.histograms = torch.rand(setting.gallery, *bank.histograms.shape[1:], device=device)
        bank.histograms /= bank.histograms.sum(-1, keepdim=True)
        bank.foregrounds = torch.rand(setting.gallery, 1, *cells[0], device=device)
        bank.allocate(setting.gallery, cells)
        # Different images only as far as one inference can tell: random numbers for all would take a minute.
        channels = preset["descriptor_channels"]
        block = [F.normalize(torch.randn(16, channels, *c, device=device), dim=1) for c in cells]
        for start in range(0, setting.gallery, 16):
            bank.write(start, [b[: setting.gallery - start] for b in block])
        bank.keep(torch.arange(setting.gallery))
    return model


def _images(batch: int, size: int, device: torch.device) -> Tensor:
    """Smooth random images: noise at several scales."""
    parts = [F.interpolate(torch.randn(batch, 3, s, s), size, mode="bilinear") for s in (4, 16, 64)]
    return torch.stack(parts).sum(0).to(device)


def _patchcore(size: int, setting: Setting, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # noqa: PLC0415 - only if it is measured

    model = PatchcoreModel(layers=["layer2", "layer3"], pre_trained=False).to(device)
    count = int(setting.gallery * (size // 8) ** 2 * CORESET_SHARE)
    model.memory_bank = torch.randn(count, 1536, device=device)
    return model, [model.memory_bank]


def _padim(size: int, setting: Setting, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    from anomalib.models.image.padim.torch_model import PadimModel  # noqa: PLC0415

    del setting  # its Gaussians do not grow with the number of images
    model = PadimModel(pre_trained=False).to(device)
    cells, channels = (size // 4) ** 2, int(model.n_features or 0)
    model.gaussian.mean = torch.randn(channels, cells, device=device)
    model.gaussian.inv_covariance = torch.eye(channels, device=device).expand(cells, -1, -1).contiguous()
    return model, [model.gaussian.mean, model.gaussian.inv_covariance]


def _efficient_ad(size: int, setting: Setting, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel  # noqa: PLC0415

    del size, setting
    return EfficientAdModel(teacher_out_channels=384).to(device), []


def _rad(size: int, setting: Setting, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    from anomalib.models.image.rad.torch_model import RadModel  # noqa: PLC0415

    model = RadModel(pre_trained=False).to(device)
    side, channels, layers = size // model.patch_size, model.feature_extractor.out_dims[0], len(model.layers)
    dtype = torch.float32
    model.cls_banks = F.normalize(torch.randn(layers, setting.gallery, channels, device=device, dtype=dtype), dim=-1)
    model.patch_banks = torch.empty(layers, side**2, setting.gallery, channels, device=device, dtype=dtype)
    for bank in model.patch_banks:
        bank.copy_(F.normalize(torch.randn(1, setting.gallery, channels, device=device), dim=-1).expand_as(bank))
    model.bank_grid = torch.tensor([side, side], device=device)
    return model, [model.cls_banks, model.patch_banks]
