# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr import-checkpoint``: the CPR authors' released checkpoints as anomalib checkpoints.

Such a file holds the heads (``lrb.conv.{0,1}.…``) and the frozen backbone (``backbone.…``) of one category. Codebook,
foreground and reference bank are not in it; they are made from the training images, as at the start and at the end of a
training.
"""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from .checkpoint_check import is_finite
from .command_arguments import read_datamodule
from .feature_extractor import checked_size
from .lightning_model import IMAGE_SIZE, Cpr
from .messages import first_line
from .presets import PRESETS
from .scoring_settings import PAPER_SETTINGS
from .torch_model import CprModel

HEADS_PREFIX = "lrb.conv."
# The authors wrap the network twice; files in which it is wrapped less are read as well.
BACKBONE_PREFIXES = ("backbone.feature_extractor.backbone.", "backbone.feature_extractor.", "backbone.")
AUTHORS_SEED = 66
TAKES_REST = True


@dataclass(frozen=True)
class ReleasedWeights:
    """Content of a released checkpoint.

    Attributes:
        heads (dict[str, Tensor]): State dict of both metric heads, names without prefix.
        backbone (dict[str, Tensor]): State dict of the backbone, names without prefix; empty if the file has none.
        descriptor_channels (int): Channels of the descriptors.
    """

    heads: dict[str, Tensor]
    backbone: dict[str, Tensor]
    descriptor_channels: int


def read_released(path: str | Path) -> ReleasedWeights:
    """Read a checkpoint of the authors' layout.

    Args:
        path (str | Path): File; no code in it is run.

    Returns:
        ReleasedWeights: Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a state dict of that layout.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load answers a file of another kind with any of a dozen
        raise ValueError(
            f"{path} cannot be read as weights ({first_line(error)}). Give a file made by torch.save of a "
            "state dict, complete, and with nothing but tensors in it."
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        hint = " It looks like a checkpoint of Lightning; those need no import." if _is_lightning(content) else ""
        raise ValueError(f"{path} does not hold a state dict of tensors.{hint}")
    odd = [name for name, value in content.items() if not is_finite(value)]
    if odd:
        raise ValueError(f"{path} is damaged: {odd[0]} holds NaN or infinite numbers. Download it again.")
    heads, backbone, other = {}, {}, []
    for name, value in content.items():
        prefix = next((prefix for prefix in (HEADS_PREFIX, *BACKBONE_PREFIXES) if name.startswith(prefix)), None)
        if prefix is None:
            other.append(name)
        elif prefix == HEADS_PREFIX:
            heads[name.removeprefix(prefix)] = value
        else:
            backbone[name.removeprefix(prefix)] = value
    last = heads.get("0.4.weight")
    if other or last is None:
        found = f"it also holds {other[0]!r}" if last is not None else f"{HEADS_PREFIX}0.4.weight is missing"
        raise ValueError(
            f"{path} is not a checkpoint of the CPR authors' code: {found}. Expected {HEADS_PREFIX}{{0,1}}.… and "
            "backbone.…, as their train.py saves them."
        )
    return ReleasedWeights(heads, backbone, last.shape[0])


def take_over(model: CprModel, weights: ReleasedWeights) -> None:
    """Copy released weights into a model.

    Args:
        model (CprModel): Of the same backbone and number of channels.
        weights (ReleasedWeights): From :func:`read_released`.

    Raises:
        ValueError: If they do not fit; the model is then as it was.
    """
    extractor = model.feature_extractor
    own_backbone = extractor.network.state_dict()
    # timm joins the names of nested parts by underscores where it returns features: features_conv0, not features.conv0.
    named = {name.replace(".", "_"): value for name, value in weights.backbone.items()}
    backbone = {name: named[flat] for name in own_backbone if (flat := name.replace(".", "_")) in named}
    problems = _misfits(weights.heads, model.metric_heads.state_dict(), "head ", strict=True)
    if weights.backbone:
        problems += _misfits(backbone, own_backbone, "backbone ", strict=False)
    if problems:
        raise ValueError(
            f"The checkpoint does not fit backbone={extractor.backbone!r}, layers={list(extractor.layers)}: "
            f"{'; '.join(problems[:3])}{'; …' if len(problems) > 3 else ''}. Give the backbone of its training: "
            "densenet201 (the default), or resnet18 with layers layer1 layer2. The authors' EfficientNet is "
            "torchvision's, which timm names differently; it cannot be imported."
        )
    model.metric_heads.load_state_dict(weights.heads)
    if weights.backbone:
        extractor.network.load_state_dict(backbone)
        extractor.weights_loaded.fill_(True)


def import_checkpoint(
    checkpoint: str | Path,
    datamodule: AnomalibDataModule,
    output: str | Path,
    *,
    image_size: tuple[int, int] = IMAGE_SIZE,
    seed: int = AUTHORS_SEED,
    accelerator: str = "auto",
    **arguments: Any,  # noqa: ANN401
) -> Cpr:
    """Turn a released checkpoint into an anomalib checkpoint that tests, predicts and exports.

    Args:
        checkpoint (str | Path): The authors' file.
        datamodule (AnomalibDataModule): Its training images become the references.
        output (str | Path): Where to write the new checkpoint.
        image_size (tuple[int, int]): Height and width in pixels, 320x320 in the released ones.
        seed (int): Of codebook and foreground.
        accelerator (str): Of the trainer.
        arguments (Any): Of :class:`Cpr`, e.g. ``backbone``, ``layers``, ``k``, ``kind``.

    Returns:
        Cpr: The model, ready to predict.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If it does not fit.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib_cpr.import_checkpoint import import_checkpoint
        >>> model = import_checkpoint("bottle.pth", MVTecAD(category="bottle"), "bottle.ckpt")  # doctest: +SKIP
    """
    weights = read_released(checkpoint)
    seed_everything(seed, verbose=False)
    model = Cpr(
        descriptor_channels=weights.descriptor_channels,
        pre_processor=Cpr.configure_pre_processor(image_size),
        **{**PAPER_SETTINGS, **arguments},
    )
    take_over(model.model, weights)
    if not weights.backbone:
        rank_zero_info("The checkpoint holds no backbone; the pre-trained one is taken.")
    # A training of no steps: everything that surrounds the steps is done.
    with TemporaryDirectory() as folder:
        engine = Engine(
            max_steps=0,
            callbacks=[_Save(Path(output))],
            accelerator=accelerator,
            devices=1,
            logger=False,
            default_root_dir=folder,
        )
        engine.fit(model, datamodule=datamodule)
    return model.eval()


class _Save(Callback):
    """Builds the bank and writes the checkpoint before the training images are freed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.to(trainer.strategy.root_device)  # Lightning has already moved it to the CPU
        del pl_module
        self.path.parent.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(self.path)


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, *, strict: bool) -> list[str]:
    problems = [f"{what}{name} is missing" for name in expected if name not in found and "num_batches" not in name]
    problems += [f"{what}{name} is unknown" for name in found if strict and name not in expected]
    problems += [
        f"{what}{name} has shape {list(found[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    return problems


def _is_lightning(content: object) -> bool:
    return isinstance(content, Mapping) and "pytorch-lightning_version" in content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``anomalib-cpr import-checkpoint``.

    Args:
        parser (argparse.ArgumentParser): To be extended.
    """
    parser.add_argument("checkpoint", type=Path, help="file of the authors, e.g. bottle.pth")
    parser.add_argument(
        "--data",
        required=True,
        metavar="CLASS",
        help="data module of the category, with --data.root, --data.category ... as in anomalib",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="anomalib checkpoint to write")
    parser.add_argument("--backbone", default="densenet201", help="that of the checkpoint, as timm names it")
    parser.add_argument("--layers", nargs=2, default=["features.denseblock1", "features.denseblock2"])
    parser.add_argument("--backbone-weights", type=Path, metavar="FILE", help="if the checkpoint holds no backbone")
    parser.add_argument("--k", type=int, default=10, help="number of references")
    parser.add_argument("--kind", choices=["object", "texture", "auto"], default="auto")
    parser.add_argument("--image-size", type=int, nargs="+", default=list(IMAGE_SIZE), help="height and width")
    parser.add_argument("--accelerator", default="auto", help="of the trainer: cpu, gpu, auto")


def run(arguments: argparse.Namespace) -> int:
    """Import, and say how to go on.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0, or 1 if the checkpoint cannot be imported.
    """
    kind: Literal["object", "texture", "auto"] = arguments.kind
    if len(arguments.image_size) == 1:
        arguments.image_size *= 2
    try:
        datamodule = read_datamodule("import-checkpoint", ["--data", arguments.data, *arguments.rest])
        model = import_checkpoint(
            arguments.checkpoint,
            datamodule,
            arguments.output,
            image_size=checked_size(arguments.image_size),
            accelerator=arguments.accelerator,
            backbone=arguments.backbone,
            layers=arguments.layers,
            backbone_weights=arguments.backbone_weights,
            k=arguments.k,
            kind=kind,
        )
    except (ValueError, OSError) as error:
        print(f"anomalib-cpr import-checkpoint: {error}")
        return 1
    print(
        f"Wrote {arguments.output}: {model.model.bank.histograms.shape[0]} references, {model.resolved_kind}.\n"
        f"anomalib test --model Cpr{_model_arguments(arguments, model)} --data {arguments.data} "
        f"{' '.join(arguments.rest)} --ckpt_path {arguments.output}"
    )
    return 0


def _model_arguments(arguments: argparse.Namespace, model: Cpr) -> str:
    """What `anomalib test` must be told of the model, because it differs from the defaults."""
    usual = {**PRESETS["cpr"], "image_size": IMAGE_SIZE}
    own = {
        "backbone": arguments.backbone,
        "layers": tuple(arguments.layers),
        "descriptor_channels": model.model.bank.channels,
        "image_size": tuple(arguments.image_size),
    }
    told = []
    for name, value in own.items():
        if value != usual[name]:
            text = f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
            told.append(f" --model.{name} {shlex.quote(text)}")
    return "".join(told)
