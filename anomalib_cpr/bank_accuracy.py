# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr bank``: what a coarser or smaller reference bank costs in accuracy.

Loads a trained checkpoint, makes the banks that ``bank_dtype`` and ``max_references`` would make of it, and compares
them on the test images. The networks run once per image; only the retrieval and the matching run once per bank.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import get_datamodule
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from .command_arguments import existing_file, output_file
from .lightning_model import Cpr
from .progress import progress_bar
from .real_anomalies import hold_out
from .reference_bank import DTYPES, BankDtype, ReferenceBank
from .torch_model import CprModel


@dataclass(frozen=True)
class BankResult:
    """A bank and what it achieves, on raw maps and scores.

    Attributes:
        bank_dtype (str): How descriptors are stored.
        references (int): Number of images that are remembered.
        megabytes (float): Memory of the bank in MB (10^6 bytes).
        share (float): Of the memory of the float32 bank of all images.
        pixel_ap (float): Average precision of all pixels of all test images.
        pixel_auroc (float): Of the same pixels.
        image_auroc (float): Of the image scores.
    """

    bank_dtype: str
    references: int
    megabytes: float
    share: float
    pixel_ap: float
    pixel_auroc: float
    image_auroc: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser (argparse.ArgumentParser): Of the subcommand.
    """
    parser.add_argument(
        "checkpoint", type=existing_file, help="of a finished training, with a float32 bank of all images"
    )
    parser.add_argument("--data", default="MVTecAD", help="anomalib's data module (default: MVTecAD)")
    parser.add_argument("--root", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--category", required=True)
    parser.add_argument("--shares", nargs="+", type=float, default=[1, 0.5, 0.25, 0.125], help="of the images to keep")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the descriptors")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="draw accuracy against memory (PNG)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, write.

    Args:
        arguments (argparse.Namespace): Of :func:`add_arguments`.

    Returns:
        int: Exit code.
    """
    if not all(0 < share <= 1 for share in arguments.shares):
        raise SystemExit(f"--shares {arguments.shares}: must be above 0 and at most 1.")
    # Not strict: a training with metrics of its own leaves their state in the checkpoint too. A bank or weights that do
    # not fit are refused all the same.
    module: Any = Cpr.load_from_checkpoint(
        arguments.checkpoint, map_location=arguments.device, weights_only=True, strict=False
    )
    module.eval()
    data = get_datamodule(
        {
            "data": {
                "class_path": arguments.data,
                "init_args": {"root": str(arguments.root), "category": arguments.category, "eval_batch_size": 1},
            }
        }
    )
    data.prepare_data()
    data.setup()
    hold_out(data, module.held_out)
    loader = data.test_dataloader()
    model = module.model
    banks = smaller_banks(model.bank, arguments.dtypes, arguments.shares)
    track = progress_bar("Test images", len(loader), enabled=True)
    results = measure(model, banks, _images(track(loader), module), model.bank.megabytes)
    console = Console()
    _show(results, console)
    if arguments.json:
        content = {"environment": _environment(arguments, module), "rows": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if arguments.plot:
        plot(results, f"{arguments.category}, {model.bank.channels} channels", arguments.plot)
    return 0


def smaller_banks(bank: ReferenceBank, dtypes: Sequence[BankDtype], shares: Sequence[float]) -> list[ReferenceBank]:
    """What a checkpoint's bank becomes when it is loaded with other ``bank_dtype`` and ``max_references``.

    Args:
        bank (ReferenceBank): Of the checkpoint.
        dtypes (Sequence[BankDtype]): Ways of storage.
        shares (Sequence[float]): Of the images to keep.

    Returns:
        list[ReferenceBank]: All combinations.
    """
    state, banks = bank.state_dict(), []
    blocks = round(bank.histograms.shape[1] ** 0.5)
    for dtype in dtypes:
        for share in shares:
            few = max(1, round(share * len(bank)))
            own = ReferenceBank(bank.channels, bank.histograms.shape[2], blocks, dtype, few)
            own.to(bank.histograms.device).load_state_dict(state)
            banks.append(own)
    return banks


def _images(batches: Iterable[Any], module: Cpr) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    for batch in batches:
        image = cast("Any", module.pre_processor)(batch.image.to(module.device))
        masks = batch.gt_mask if batch.gt_mask is not None else torch.zeros(len(image), *batch.image.shape[-2:])
        yield image, masks, batch.gt_label


@torch.inference_mode()
def measure(
    model: CprModel,
    banks: Sequence[ReferenceBank],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    whole_mb: float,
) -> list[BankResult]:
    """Accuracy with each bank.

    Args:
        model (CprModel): Fitted; its own bank is put back in the end.
        banks (Sequence[ReferenceBank]): To compare.
        batches (Iterable[tuple[Tensor, Tensor, Tensor]]): Normalised images ``(batch, 3, height, width)``, masks
            ``(batch, height, width)`` of any size, labels ``(batch,)``.
        whole_mb (float): Memory of the bank that shares refer to.

    Returns:
        list[BankResult]: In the order of the banks.
    """
    original = model.bank
    maps: list[list[Tensor]] = [[] for _ in banks]
    scores: list[list[Tensor]] = [[] for _ in banks]
    pixels, labels = [], []
    try:
        for images, masks, label in batches:
            size = images.shape[-2:]
            pixels.append(F.interpolate(masks[:, None].float(), size, mode="bilinear")[:, 0].flatten() > 0.5)
            labels.append(label.flatten().long())
            features = model.feature_extractor(images)
            queries = model.describe(features, images)
            for bank, own_maps, own_scores in zip(banks, maps, scores, strict=True):
                model.bank = bank
                references, foregrounds = model.retrieve(features[0])
                anomaly_map, score = model.score(model.match(queries, references), foregrounds, images)
                own_maps.append(anomaly_map.flatten().cpu())
                own_scores.append(score.cpu())
    finally:
        model.bank = original
    truth, anomalous = torch.cat(pixels).long(), torch.cat(labels)
    results = []
    for bank, own_maps, own_scores in zip(banks, maps, scores, strict=True):
        everything = torch.cat(own_maps)
        results.append(
            BankResult(
                bank_dtype=bank.bank_dtype,
                references=len(bank),
                megabytes=bank.megabytes,
                share=bank.megabytes / whole_mb,
                pixel_ap=float(binary_average_precision(everything, truth)),
                pixel_auroc=float(binary_auroc(everything, truth)),
                image_auroc=float(binary_auroc(torch.cat(own_scores), anomalous)),
            )
        )
    return results


def _environment(arguments: argparse.Namespace, module: Cpr) -> dict[str, Any]:
    return {
        "data": arguments.data,
        "category": arguments.category,
        "protocol": "raw maps and scores at the model's image size, masks resized bilinearly and cut at 0.5",
        "checkpoint": {name: module.hparams[name] for name in ("backbone", "descriptor_channels", "k")},
        "seed": module.seed,
        **{name: version(name) for name in ("torch", "anomalib", "anomalib-cpr")},
    }


def _show(results: Sequence[BankResult], console: Console) -> None:
    table = Table(title="Accuracy against memory of the bank")
    for name in ("bank_dtype", "images", "MB", "share", "pixel AP", "pixel AUROC", "image AUROC"):
        table.add_column(name, justify="left" if name == "bank_dtype" else "right", no_wrap=True)
    for row in results:
        figures = (f"{row.megabytes:.1f}", f"{row.share:.3f}")
        accuracy = (f"{value:.4f}" for value in (row.pixel_ap, row.pixel_auroc, row.image_auroc))
        table.add_row(row.bank_dtype, str(row.references), *figures, *accuracy)
    console.print(table)


def plot(results: Sequence[BankResult], title: str, path: Path) -> None:
    """Draw average precision against memory.

    Args:
        results (Sequence[BankResult]): Of :func:`measure`.
        title (str): Of the picture.
        path (Path): Of the picture.
    """
    import matplotlib as mpl  # noqa: PLC0415 - takes a second

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for dtype in dict.fromkeys(result.bank_dtype for result in results):
        own = sorted((r for r in results if r.bank_dtype == dtype), key=lambda r: r.megabytes)
        axes.plot([r.megabytes for r in own], [100 * r.pixel_ap for r in own], "o-", label=dtype)
        for result in own:
            place = (result.megabytes, 100 * result.pixel_ap)
            axes.annotate(str(result.references), place, xytext=(4, -12), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlabel="bank, MB", ylabel="pixel AP, %", title=f"{title}; numbers: images remembered")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
