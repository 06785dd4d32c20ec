# SPDX-License-Identifier: Apache-2.0
"""``anomalib-cpr inspect``: what training would learn from, before an hour is spent on it.

Everything is taken from a real training that is stopped before its first step: the pairs are those of step 0.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .alignment import spread
from .augmentation import device_generator
from .command_arguments import existing_file, read_datamodule
from .global_retrieval import assign_words, histogram_distance
from .lightning_model import Cpr
from .pairs import sample_patch_pairs
from .registration import register
from .training import TrainingData, draw_image_pairs
from .training_steps import step_generator

logger = logging.getLogger(__name__)

TAKES_REST = True  # what argparse does not know is read as arguments of the data module

POSITIVE, REMOTE, ANOMALOUS = "#00C2A8", "#4C9BFF", "#FF3B30"
DOTS_PER_KIND = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser (argparse.ArgumentParser): Parser of the subcommand.
    """
    parser.epilog = (
        "Options given here win over those of the configuration file; those of the data module as in anomalib, e.g. "
        "--data Folder --data.name parts --data.root parts --data.normal_dir good."
    )
    parser.add_argument("-c", "--config", type=existing_file, metavar="FILE", help="configuration of `anomalib train`")
    parser.add_argument("--data", metavar="CLASS", help="data module, e.g. MVTecAD, Folder, DrawnParts")
    parser.add_argument("--root", metavar="FOLDER", help="its root")
    parser.add_argument("--category", help="its category")
    parser.add_argument("--backbone-weights", type=existing_file, metavar="FILE", help="weights of the backbone")
    parser.add_argument("--random-weights", action="store_true", help="of the backbone, where there are no others")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images, divisible by 8")
    parser.add_argument("--kind", choices=("auto", "object", "texture"), help="object or texture")
    parser.add_argument("--anomaly-source-path", metavar="FOLDER", help="textures for synthetic anomalies")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("inspection"), help="folder of the pictures")
    parser.add_argument("--device", default="auto", help="cpu, gpu or auto (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Prepare a training, draw what it would learn from, and stop.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0.
    """
    register()
    model, data = _configuration(arguments)
    seed_everything(arguments.seed, workers=True)
    datamodule = read_datamodule("inspect", ["--data", json.dumps(data), *arguments.rest])
    for line in inspect(Cpr(**model, visualizer=False), datamodule, arguments.output, arguments.device):
        print(line)
    return 0


def _configuration(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the model, and configuration of the data module."""
    model, data = _read(arguments.config, arguments.image_size) if arguments.config is not None else ({}, {})
    if arguments.data is not None:
        data["class_path"] = arguments.data
    if "class_path" not in data:
        raise SystemExit("No data: give --data CLASS (with --root and --category), or a --config that names it.")
    data["init_args"] = dict(data.get("init_args") or {})
    for name in ("root", "category"):
        if getattr(arguments, name) is not None:
            data["init_args"][name] = getattr(arguments, name)
    for name in ("backbone_weights", "image_size", "kind", "anomaly_source_path"):
        if getattr(arguments, name) is not None:
            model[name] = getattr(arguments, name)
    if arguments.random_weights:
        model["pre_trained"] = False
    return model, data


def _read(file: Path, image_size: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sections of a configuration of `anomalib train`."""
    loaded = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if "class_path" in loaded:  # a file for `--model FILE`
        loaded = {"model": loaded}
    if not {"model", "data"} & set(loaded):
        raise SystemExit(f"--config {file}: expected `model` or `data`, as `anomalib train --config` does.")
    section = loaded.get("model") or {}
    if str(section.get("class_path", "Cpr")).rpartition(".")[2] != "Cpr":
        raise SystemExit(f"--config {file}: its model is {section['class_path']}, not Cpr.")
    model = dict(section.get("init_args") or {})
    # The file gives these as classes for anomalib's own command line; the size is given by --image-size here.
    for name in ("pre_processor", "post_processor", "evaluator", "visualizer"):
        if model.pop(name, None) is not None and name == "pre_processor" and image_size is None:
            raise SystemExit(f"--config {file} sets a pre_processor: give its size as --image-size.")
    return model, dict(loaded.get("data") or {})


class _Prepared(Exception):  # noqa: N818 - not an error: the way out of a training that has not begun
    """Everything was drawn."""


class _Inspector(Callback):
    """Draws when a training is about to begin, and ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, then leave."""
        assert isinstance(pl_module, Cpr)  # noqa: S101 - narrows the type
        self.findings = draw_preparation(pl_module, self.folder, trainer.global_rank)
        raise _Prepared


def inspect(module: Cpr, datamodule: Any, folder: Path, accelerator: str = "auto") -> list[str]:  # noqa: ANN401
    """Prepare a training and draw what it would learn from.

    Args:
        module (Cpr): A model.
        datamodule (Any): anomalib's data module.
        folder (Path): For the pictures.
        accelerator (str): As Lightning names it.

    Returns:
        list[str]: Findings in words, and the files.
    """
    inspector = _Inspector(folder)
    engine = Engine(accelerator=accelerator, devices=1, callbacks=[inspector], default_root_dir=folder / "run")
    try:
        engine.fit(module, datamodule=datamodule)
    except _Prepared:
        pass
    finally:
        module.end_fit()
        _remove_empty(folder / "run")
    return inspector.findings


def _remove_empty(folder: Path) -> None:
    """Remove the folders that the engine has made for a run that did not take place."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_symlink():
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


@torch.no_grad()
def draw_preparation(module: Cpr, folder: Path, rank: int = 0) -> list[str]:
    """Draw neighbours, foreground, synthetic anomalies and pairs.

    Args:
        module (Cpr): About to be trained.
        folder (Path): For the pictures.
        rank (int): Of the process, which the drawing of a step depends on.

    Returns:
        list[str]: Findings in words, and the files.
    """
    from . import pictures  # noqa: PLC0415 - matplotlib takes a second

    data, synthesise = module._training_data, module._synthesise  # noqa: SLF001 - the training's own data
    assert data is not None and synthesise is not None and module.seed is not None  # noqa: S101, PT018
    bank = module.model.bank
    size = "x".join(map(str, data.images.size))
    findings = [f"{len(data.images)} images of {size}, kind: {data.kind}, {data.neighbours.shape[1]} references each."]
    files = []
    with pictures.style():
        files.append(folder / "neighbours.png")
        findings += _draw_neighbours(module, data, files[-1])
        if data.kind == "object":
            files.append(folder / "foreground.png")
            findings += _draw_foreground(data, bank.foregrounds.cpu(), files[-1])
        generator = step_generator(module.seed, rank, 0, 0)
        pairs = draw_image_pairs(data, bank.foregrounds, synthesise, 24, generator)
        files.append(folder / "anomalies.png")
        findings += _draw_anomalies(pairs.queries.cpu(), pairs.anomalies.cpu(), files[-1])
        files.append(folder / "pairs.png")
        _draw_pairs(pairs, remote=data.kind == "object", generator=generator, file=files[-1])
    return findings + [str(file) for file in files]


def _draw_neighbours(module: Cpr, data: TrainingData, file: Path) -> list[str]:
    """The references of the loneliest and of some ordinary images."""
    from . import pictures  # noqa: PLC0415

    histograms = module.model.bank.histograms
    own = data.neighbours.to(histograms.device)
    nearest = torch.cat(
        [
            histogram_distance(histograms[index : index + 1], histograms[own[index, :1]])[0]
            for index in range(len(data.images))
        ]
    ).cpu()
    order = nearest.argsort()
    lonely = order[-3:].flip(0).tolist()
    ordinary = order[torch.linspace(0, max(0, len(order) - 4), 3).long()].tolist()
    rows = list(dict.fromkeys([*ordinary, *lonely]))
    columns = min(6, data.neighbours.shape[1])
    figure = pictures.new_figure(1.75 * (columns + 2), 1.95 * len(rows) + 0.7)
    axes = figure.subplots(len(rows), columns + 2, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.75 / figure.get_figheight(), bottom=0.01, wspace=0.05)
    colours = pictures.word_colours(module.model.global_retriever.codebook)
    for line, index in zip(axes, rows, strict=True):
        image = data.images.images[index]
        kind = "lonely" if index in lonely else "ordinary"
        pictures.show_colours(line[0], image, f"{kind}: {_name(data, index)}")
        features = module.model.feature_extractor.finest(data.images.normalize(image[None].to(histograms.device)))
        words = assign_words(features.float(), module.model.global_retriever.codebook)[0].cpu()
        pictures.show_words(line[1], words, colours, "its visual words")
        for rank in range(columns):
            other = int(data.neighbours[index, rank])
            distance = float(histogram_distance(histograms[index : index + 1], histograms[other : other + 1]))
            pictures.show_colours(line[2 + rank], data.images.images[other], f"{rank + 1}: distance {distance:.2f}")
    figure.suptitle("Do the references look like the image? An ordinary image should be like its row.", y=0.995)
    pictures.save(figure, file)
    names = ", ".join(f"{_name(data, index)} ({nearest[index]:.2f})" for index in lonely)
    return [
        f"Nearest neighbour: histogram distance {nearest.median():.2f} in the median, {nearest.max():.2f} at most.",
        f"Loneliest images: {names}. Look whether they are good parts.",
    ]


def _draw_foreground(data: TrainingData, foregrounds: Tensor, file: Path) -> list[str]:
    """Training images beside their foreground."""
    from . import pictures  # noqa: PLC0415

    chosen = spread(len(data.images), 12).tolist()
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = pictures.new_figure(2.1 * columns, 4.2 * rows + 0.6)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.96, top=1 - 0.75 / figure.get_figheight(), bottom=0.01, wspace=0.06)
    for line in axes.flat:
        line.set_visible(False)
    for place, index in enumerate(chosen):
        row, column = 2 * (place // columns), place % columns
        own, estimate = axes[row, column], axes[row + 1, column]
        own.set_visible(True)
        estimate.set_visible(True)
        pictures.show_colours(own, data.images.images[index], _name(data, index))
        foreground = foregrounds[index, 0]
        pictures.show_map(
            estimate,
            foreground,
            f"{100 * float((foreground > 0.5).float().mean()):.0f} % of the image",
            (0, 1),
            colours=pictures.SHARE_COLOURS,
            bar=column == columns - 1,
        )
    figure.suptitle("Is the part bright and the background dark? Otherwise set kind='texture'.", y=0.995)
    pictures.save(figure, file)
    share = (foregrounds > 0.5).float().mean((1, 2, 3))
    limits = f"{100 * share.min():.0f} % to {100 * share.max():.0f} %"
    findings = [f"Foreground: {100 * share.mean():.0f} % of the image in the mean ({limits})."]
    if float(share.min()) < 0.01:
        findings.append("An image has next to no foreground: no anomaly can be put on it, and nothing is found there.")
    return findings


def _draw_anomalies(queries: Tensor, anomalies: Tensor, file: Path) -> list[str]:
    """Queries of the first step with the outlines of what was put on them."""
    from . import pictures  # noqa: PLC0415

    columns = 6
    rows = -(-len(queries) // columns)
    figure = pictures.new_figure(2.1 * columns, 4.25 * rows + 0.5)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / figure.get_figheight(), bottom=0.01, wspace=0.05)
    for index, (query, mask) in enumerate(zip(queries, anomalies, strict=True)):
        above = axes[2 * (index // columns), index % columns]
        below = axes[2 * (index // columns) + 1, index % columns]
        share = float(mask.float().mean())
        pictures.show_colours(above, query, f"{100 * share:.1f} % changed" if share else "left as it is")
        pictures.show_colours(below, pictures.with_tint(query, mask))
        pictures.outline(below, mask[0], "#ffffff", 0.8)
    figure.suptitle("Synthetic anomalies of the first step, and their masks", y=0.997)
    pictures.save(figure, file, dpi=80)
    area = anomalies.float().mean((1, 2, 3))
    placed = area[area > 0]
    if not len(placed):
        return ["No synthetic anomaly could be placed: is there any foreground?"]
    limits = f"{100 * placed.min():.1f} % to {100 * placed.max():.1f} %"
    where = f"on {len(placed)} of {len(area)} images, {100 * placed.median():.1f} % of the image in the median"
    return [f"Synthetic anomalies: {where} ({limits})."]


def _draw_pairs(pairs: Any, *, remote: bool, generator: torch.Generator, file: Path) -> None:  # noqa: ANN401
    """Query and reference with the positions that are compared."""
    from . import pictures  # noqa: PLC0415

    positions = sample_patch_pairs(
        pairs.anomalies, pairs.weights, device_generator(generator, pairs.anomalies.device), remote=remote
    )
    shown = range(min(6, len(pairs.queries)))
    height, width = pairs.queries.shape[-2:]
    figure = pictures.new_figure(14, 4.9 * -(-len(shown) // 3) + 0.9)
    axes = figure.subplots(2 * -(-len(shown) // 3), 6, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.9 / figure.get_figheight(), bottom=0.02, wspace=0.04, hspace=0.1
    )
    for line in axes.flat:
        line.set_visible(False)
    kinds = ((POSITIVE, "should agree"), (REMOTE, "other place: should differ"), (ANOMALOUS, "anomaly: should differ"))
    count = positions.count
    for index in shown:
        top, column = 2 * (index // 3), 2 * (index % 3)
        plain, dotted = axes[top, column : column + 2], axes[top + 1, column : column + 2]
        for place, (image, name, where) in enumerate(
            ((pairs.queries, "query", positions.query), (pairs.references, "reference", positions.reference))
        ):
            for view in (plain[place], dotted[place]):
                view.set_visible(True)
            pictures.show_colours(plain[place], image[index].cpu(), name)
            grey = image[index].cpu().mean(0, keepdim=True).expand(3, -1, -1)
            pictures.show_colours(dotted[place], 0.3 + 0.5 * grey)
            for kind, (colour, _) in enumerate(kinds):
                part = slice(kind * count, kind * count + DOTS_PER_KIND)
                points = where[index, part][positions.valid[index, part]].cpu()
                x, y = (points[:, 0] + 1) / 2 * (width - 1), (points[:, 1] + 1) / 2 * (height - 1)
                # Where a place is used twice, the smaller dot lies on the larger one.
                dotted[place].plot(x, y, ".", ms=2.6 if kind else 6.0, color=colour)
        if pairs.weights is not None:
            weights = F.interpolate(pairs.weights[index : index + 1], (height // 4, width // 4), mode="bilinear")
            dotted[0].contour(
                torch.linspace(0, width - 1, width // 4).numpy(),
                torch.linspace(0, height - 1, height // 4).numpy(),
                weights[0, 0].cpu().numpy(),
                levels=[0.5],
                colors=["white"],
                linewidths=[0.8],
            )
    figure.suptitle("Pairs of the first step: the patches that are compared (one in five)", y=0.995)
    for place, (colour, text) in enumerate(kinds):
        figure.text(0.3 + 0.16 * place, 1 - 0.5 / figure.get_figheight(), f"\u25cf {text}", color=colour, fontsize=9)
    if pairs.weights is not None:
        figure.text(0.78, 1 - 0.5 / figure.get_figheight(), "white line: half the weight of the part", fontsize=9)
    pictures.save(figure, file)


def _name(data: TrainingData, index: int) -> str:
    paths = data.images.paths
    return Path(paths[index]).name if index < len(paths) else f"image {index}"
