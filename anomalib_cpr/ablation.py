# SPDX-License-Identifier: Apache-2.0
"""What helps a short training, and what does not: one thing changed at a time, on drawn data or a category of MVTec AD.

Every variant trains with the same seeds, hence on the same pairs of images, for the same number of steps. Codebook,
foreground and neighbours do not depend on the variant and are learned once for each seed. A finished run is never run
again.

    anomalib-cpr ablation run --weights densenet201.pth   # one JSON per run, in results/ablation
    anomalib-cpr ablation table                           # the table, as Markdown
    anomalib-cpr ablation run --mvtec MVTecAD --categories screw --held-out 10 --variants "10 known defects" ...
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from . import loss, training
from .benchmark_job import commit, cpu_name
from .benchmark_metrics import quality, resize_masks
from .bilinear import read_at
from .command_arguments import existing_file
from .drawn_data import DrawnParts
from .lightning_model import Cpr
from .pairs import PatchPairs, sample_patch_pairs
from .real_anomalies import give_back, read_from_test_set
from .scoring_settings import PAPER_SETTINGS
from .training import ImagePairs, step_precision

RESULTS = Path("results/ablation")
USUAL = {  # settings that two runs in one folder may differ in, and that are not in every file's name
    "channels": 64,
    "batch_size": 8,
    "image_size": 160,
    "held_out": 0,
    "precision": "auto",
    "drawing_seed": 0,
    "good_test_images": 12,
    "defective_test_images": 7,
}
DRAWING = ("drawing_seed", "good_test_images", "defective_test_images")


class AblationCpr(Cpr):
    """CPR with a switch for what is not an argument of the model.

    Args:
        positions (int): Patches of each kind that a pair of images contributes.
        anomaly_probability (float): Share of queries with an anomaly.
        nearest (int): Of how many nearest images one is the reference.
        arguments (Any): Of CPR.
    """

    def __init__(
        self,
        positions: int = 300,
        anomaly_probability: float = 0.9,
        nearest: int = 10,
        **arguments: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**arguments)
        self.positions = positions
        self.anomaly_probability = anomaly_probability
        self.nearest = nearest

    def draw_pairs(self, step: int, batch_idx: int) -> tuple[ImagePairs, torch.Generator]:
        """Draw other pairs of images than usual."""
        assert self._synthesise is not None and self._training_data is not None  # noqa: S101, PT018
        neighbours = self._training_data.neighbours[:, : self.nearest]
        self._training_data = replace(self._training_data, neighbours=neighbours)
        self._synthesise.anomaly_probability = self.anomaly_probability
        return super().draw_pairs(step, batch_idx)

    def compare_pairs(self, images: ImagePairs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Compare more or fewer patches than usual."""
        with mock.patch.object(training.training_loss, "__defaults__", (self.positions,)):
            return super().compare_pairs(images, generator)


class Average(Callback):
    """Exponential moving average of the heads, which replaces them before the bank is built.

    Args:
        decay (float): Share of the average that stays at each step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Cpr, *args: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Update the average."""
        del trainer, args
        for name, value in pl_module.model.metric_heads.state_dict().items():
            held = self.average.setdefault(name, value.clone())
            if value.is_floating_point():
                held.lerp_(value, 1 - self.decay)

    def on_train_end(self, trainer: Trainer, pl_module: Cpr) -> None:  # type: ignore[override]
        """Take the average over; the bank that was built a moment ago is outdated."""
        del trainer
        pl_module.model.metric_heads.load_state_dict(self.average)
        pl_module.model.bank.clear()
        pl_module.build_bank()


class Recalibrate(Callback):
    """Batch-norm statistics of the clean training images, instead of the running ones of the last steps."""

    def on_train_end(self, trainer: Trainer, pl_module: Cpr) -> None:  # type: ignore[override]
        """Measure them, and build the bank again."""
        del trainer
        norms = [
            module for module in pl_module.model.metric_heads.modules() if isinstance(module, torch.nn.BatchNorm2d)
        ]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        pl_module.model.metric_heads.train()
        assert pl_module._training_data is not None  # noqa: S101, SLF001
        with torch.no_grad():
            for images in pl_module._training_data.images.batches(8, pl_module.device):  # noqa: SLF001
                pl_module.model.describe_scales(pl_module.model.feature_extractor(images))
        pl_module.model.bank.clear()
        pl_module.build_bank()


def hardest_negatives(query: Tensor, reference: Tensor, pairs: PatchPairs, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As metric_loss, but of the remote negatives only the most similar quarter counts."""
    similarity = F.cosine_similarity(query.float(), reference.float(), dim=1, eps=1e-8).detach()
    remote = similarity[:, pairs.count : 2 * pairs.count].masked_fill(weights <= 0, -2)
    chosen = remote >= remote.topk(pairs.count // 4, dim=1).values[:, -1:]
    return loss.metric_loss(query, reference, pairs, weights * chosen)


class LikelyPositives:
    """Positives count the more, the more alike their frozen features are: misaligned ones are no truth."""

    def __init__(self) -> None:
        self.weights = torch.zeros(0)

    def remote_weights(self, query_features: Tensor, reference_features: Tensor, pairs: PatchPairs) -> Tensor:
        """Remember the weights of the positives on the way to those of the remote negatives."""
        positive = slice(0, pairs.count)
        with torch.no_grad():
            query = read_at(query_features.float(), pairs.query[:, positive])
            reference = read_at(reference_features.float(), pairs.reference[:, positive])
            distance = (query - reference).square().sum(1)
            likeness = torch.exp(-distance / distance.mean(1, keepdim=True))
            self.weights = likeness / likeness.mean(1, keepdim=True)
        return loss.remote_weights(query_features, reference_features, pairs)

    def metric_loss(
        self, query: Tensor, reference: Tensor, pairs: PatchPairs, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the package's, but for the weights of the positives."""
        _, negative = loss.metric_loss(query, reference, pairs, weights)
        similarity = F.cosine_similarity(query.float(), reference.float(), dim=1, eps=1e-8)[:, : pairs.count]
        valid = pairs.valid[:, : pairs.count].float()
        return loss.contrast(similarity, valid * self.weights, attract=True), negative


class BuildBank(Callback):
    """A training of no steps ends without the hook that builds the bank."""

    def on_fit_end(self, trainer: Trainer, pl_module: Cpr) -> None:  # type: ignore[override]
        """Build it, if that was not done."""
        del trainer
        pl_module.build_bank()


class Curve(Callback):
    """Measures the model in the middle of its training, which goes on as if nothing had been.

    Args:
        steps (list[int]): After which steps.
        measure (Callable[[Cpr], dict[str, Any]]): Gives the metrics.
    """

    def __init__(self, steps: list[int], measure: Callable[[Cpr], dict[str, Any]]) -> None:
        self.steps, self.measure = steps, measure
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Cpr, *args: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Measure, if it is time."""
        del args
        if trainer.global_step not in self.steps or trainer.global_step == trainer.max_steps:
            return
        start = time.perf_counter()
        pl_module.build_bank()
        self.points.append({"steps": trainer.global_step, **self.measure(pl_module)})
        pl_module.train()
        self.seconds += time.perf_counter() - start


def equal_weights(query_features: Tensor, reference_features: Tensor, pairs: PatchPairs) -> Tensor:
    """All remote negatives count the same."""
    del query_features, reference_features
    return pairs.valid[:, pairs.count : 2 * pairs.count].float()


@dataclass(frozen=True)
class Variant:
    """What differs from the reference.

    Attributes:
        arguments (dict[str, Any]): Of the model.
        callbacks (Callable): Makes callbacks of the trainer.
        patches (dict[str, Any]): Functions of :mod:`anomalib_cpr.training` to replace.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    patches: dict[str, Any] = field(default_factory=dict)


def sample_with(wanted: bool, *arguments: Any, **options: Any) -> PatchPairs:  # noqa: ANN401
    """Draw patches with or without remote negatives, whatever the kind of data."""
    return sample_patch_pairs(*arguments, **{**options, "remote": wanted})


LIKELY_POSITIVES = LikelyPositives()
REFERENCE = {
    "learning_rate": 1e-3,
    "learning_rate_schedule": "cosine",
    "warm_up_steps": 20,
    "centred_start": True,
}
# All that configs/model/cpr_paper.yaml says and that is not how long or with what is trained.
AS_THE_PAPER: dict[str, Any] = {
    **PAPER_SETTINGS,
    "averaged_descriptors": False,
    "colour_matching": False,
    "recoloured_anomalies": 0.0,
    "displaced_anomalies": 0.0,
    "centred_start": False,
    "eight_bit_training": True,
    "learning_rate_schedule": "constant",
    "warm_up_steps": 0,
    "training_precision": "float32",
}
VARIANTS = {
    "reference": Variant(),
    "everything as the paper": Variant(AS_THE_PAPER),
    "colours of 8 bits, as the paper": Variant({"eight_bit_training": True}),
    "constant learning rate": Variant({"learning_rate_schedule": "constant"}),
    "random start, as the paper": Variant({"centred_start": False}),
    "learning rate 2e-3": Variant({"learning_rate": 2e-3}),
    "learning rate 4e-3": Variant({"learning_rate": 4e-3}),
    "average of weights, 0.95": Variant(callbacks=lambda: [Average(0.95)]),
    "float32 steps": Variant({"training_precision": "float32"}),
    "batch norm of clean images": Variant(callbacks=lambda: [Recalibrate()]),
    "1000 positions per pair": Variant({"positions": 1000}),
    "hardest quarter of 1200 remote negatives": Variant(
        {"positions": 1200}, patches={"metric_loss": hardest_negatives}
    ),
    "remote negatives weigh the same": Variant(patches={"remote_weights": equal_weights}),
    "remote negatives": Variant(patches={"sample_patch_pairs": partial(sample_with, True)}),
    "no remote negatives": Variant(patches={"sample_patch_pairs": partial(sample_with, False)}),
    "every query has an anomaly": Variant({"anomaly_probability": 1.0}),
    "no warm-up": Variant({"warm_up_steps": 0}),
    "reference image of the 3 nearest": Variant({"nearest": 3}),
    "likely positives count more": Variant(
        patches={"remote_weights": LIKELY_POSITIVES.remote_weights, "metric_loss": LIKELY_POSITIVES.metric_loss}
    ),
    "no recoloured anomalies, as the paper": Variant({"recoloured_anomalies": 0.0}),
    "30 % of the anomalies recoloured": Variant({"recoloured_anomalies": 0.3}),
    "no displaced anomalies, as the paper": Variant({"displaced_anomalies": 0.0}),
    "30 % of the anomalies displaced": Variant({"displaced_anomalies": 0.3}),
    "10 references": Variant({"k": 10}),
    "patches on their own, as the paper": Variant({"coherent_matching": False}),
    "nearest reference and mean of scales, as the paper": Variant({"unaligned_matching": False}),
    "descriptors on their own, as the paper": Variant({"averaged_descriptors": False}),
    "averaged descriptors": Variant({"averaged_descriptors": True}),
    "no colours, as the paper": Variant({"colour_matching": False}),
    "absolute distances, as the paper": Variant({"relative_to_image": False}),
    "boundaries of anomalies 4 times as often": Variant({"boundary_weight": 4.0}),
    "boundaries of anomalies 9 times as often": Variant({"boundary_weight": 9.0}),
    "copies turned by 4 degrees": Variant({"rotations": [-4, 4]}),
    "8 known defects": Variant({"known_anomalies": 8}),
    "10 known defects": Variant({"known_anomalies": 10}),
    "10 known defects, copies turned by 4 degrees": Variant({"known_anomalies": 10, "rotations": [-4, 4]}),
    "texture": Variant({"kind": "texture"}),
    "object": Variant({"kind": "object"}),
    "windows 3 and 1": Variant({"window_sizes": [3, 1]}),
    "windows 5 and 3": Variant({"window_sizes": [5, 3]}),
    "windows 9 and 5": Variant({"window_sizes": [9, 5]}),
    "windows over the whole map": Variant({"window_sizes": [999, 999]}),
}
SHORT_TRAINING = list(VARIANTS)[:22]


def train_and_measure(name: str, category: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant and measure it on the test set of the drawn category.

    Args:
        name (str): Of the variant.
        category (str): Of the drawn data.
        seed (int): Of everything.
        options (argparse.Namespace): Of the command.

    Returns:
        dict[str, Any]: What was run, and its metrics on raw maps and scores.
    """
    variant, size = VARIANTS[name], options.image_size
    seed_everything(seed, verbose=False)
    model = AblationCpr(
        pre_trained=options.weights is not None,
        backbone_weights=options.weights,
        anomaly_source_path=options.textures,
        descriptor_channels=options.channels,
        pre_processor=Cpr.configure_pre_processor((size, size)),
        **{**REFERENCE, "training_precision": options.precision, **variant.arguments},
    )
    datamodule = load_data(category, options)
    curve = Curve(options.measure_at, lambda trained: measure(trained, load_data(category, options), options.held_out))
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(vars(training), variant.patches):
        _reuse_preparation(model, options.data_root / _preparation_name(model, category, seed, options))
        engine = Engine(
            max_steps=options.steps,
            limit_val_batches=0,
            callbacks=[*variant.callbacks(), BuildBank(), curve],
            default_root_dir=folder,
            logger=False,
            accelerator=options.accelerator,
            devices=1,
            enable_progress_bar=False,
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=datamodule)
        seconds = time.perf_counter() - start - curve.seconds
    model.to(engine.trainer.strategy.root_device)  # Lightning takes it back to main memory
    result = {
        "variant": name,
        "category": category,
        "seed": seed,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "image_size": size,
        **({} if options.mvtec else {name: getattr(options, name) for name in DRAWING}),
        "descriptor_channels": options.channels,
        "textures": "procedural" if options.textures is None else options.textures_name,
        "backbone": "densenet201",
        "backbone_weights": options.weights_name or ("random" if options.weights is None else options.weights.name),
        "held_out": options.held_out,
        "training_precision": step_precision(model.training_precision, model.device),
        "kind": model.resolved_kind,
        "k": model.model.k,
        "window_sizes": list(model.model.window_sizes),
        "follow_edges": model.model.follow_edges,
        "coherent_matching": model.model.coherent_matching,
        "unaligned_matching": model.model.unaligned_matching,
        "averaged_descriptors": model.model.averaged_descriptors,
        "colour_matching": model.model.colour_matching,
        "relative_to_image": model.model.relative_to_image,
        "commit": options.commit or commit(),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fit_seconds": round(seconds, 1),
        **measure(model, datamodule, options.held_out),
    }
    return {**result, "curve": curve.points} if curve.points else result


def load_data(category: str, options: argparse.Namespace) -> AnomalibDataModule:
    """Drawn parts, or a category of MVTec AD.

    Args:
        category (str): Name of the category.
        options (argparse.Namespace): Of the command.

    Returns:
        AnomalibDataModule: Read without workers; each image is read once.
    """
    if options.mvtec is not None:
        return MVTecAD(root=options.mvtec, category=category, train_batch_size=options.batch_size, num_workers=0)
    return DrawnParts(
        root=options.data_root,
        category=category,
        image_size=options.image_size,
        train_batch_size=options.batch_size,
        **{name: getattr(options, name) for name in DRAWING},
    )


def measure(model: Cpr, datamodule: AnomalibDataModule, held_out: int) -> dict[str, Any]:
    """Metrics on raw scores and maps, at the size of the maps.

    Args:
        model (Cpr): Fitted.
        datamodule (AnomalibDataModule): Its test set is the measure.
        held_out (int): Defects that ``known_anomalies`` would choose, and that no variant is measured on.

    Returns:
        dict[str, Any]: Of the test set without those that are held out; and for a model that knows none of them, as
            ``whole_test_set``, of all of it.
    """
    model.eval()
    transform: Any = getattr(model.pre_processor, "transform", None)
    datamodule.setup()
    give_back(datamodule)
    left_out = set(read_from_test_set(datamodule.test_data, held_out, transform)[2]) if held_out else set()
    scores, labels, maps, masks, kept = [], [], [], [], []
    for index in range(len(datamodule.test_data)):
        item: Any = datamodule.test_data[index]
        with torch.no_grad():
            prediction = model.model(transform(item.image[None].to(model.device)))
        scores.append(prediction.pred_score.cpu())
        labels.append(bool(item.gt_label))
        maps.append(prediction.anomaly_map[:, 0].cpu())
        mask = item.gt_mask if item.gt_mask is not None else torch.zeros(item.image.shape[-2:])
        masks.append(resize_masks((mask > 0).view(1, *mask.shape[-2:]), maps[-1].shape[-2:]))
        kept.append(item.image_path not in left_out)

    def of(chosen: Tensor) -> dict[str, float | None]:
        found = quality(
            torch.cat(scores)[chosen], torch.tensor(labels)[chosen], *(torch.cat(x)[chosen] for x in pixels)
        )
        return {name: None if value is None else round(value, 5) for name, value in found.items()}

    pixels = maps, masks
    result: dict[str, Any] = {"test_images": sum(kept), **of(torch.tensor(kept))}
    if held_out and model.known_anomalies is None:
        result["whole_test_set"] = of(torch.ones(len(kept), dtype=torch.bool))
    return result


def _preparation_name(model: Cpr, category: str, seed: int, options: argparse.Namespace) -> str:
    """Of a file, after all that a preparation depends on but the code."""
    copies = "".join(f"_{angle:g}" for angle in model.rotations)
    weights = "random" if options.weights is None else options.weights.stem
    drawn = "" if options.mvtec else f"_{options.drawing_seed}"
    return f"prepared_{category}{drawn}_{options.image_size}_{model.kind}{copies}_{weights}_{seed}.pt"


def _reuse_preparation(model: Cpr, path: Path) -> None:
    """Let codebook, foreground and histograms be learned once for a category and a seed."""
    learn = model._learn_retrieval  # noqa: SLF001

    def load_or_learn(images: Any) -> None:  # noqa: ANN401
        parts = model.model.global_retriever, model.model.foreground_estimator, model.model.bank
        if path.exists():
            kind, states = torch.load(path, weights_only=True)
            model.resolved_kind = kind
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
            return
        learn(images)
        path.parent.mkdir(parents=True, exist_ok=True)  # drawn data are not there where MVTec AD is trained on
        torch.save([model.resolved_kind, [copy.deepcopy(part.state_dict()) for part in parts]], path)

    model._learn_retrieval = load_or_learn  # type: ignore[method-assign]  # noqa: SLF001


def result_name(name: str, category: str, seed: int, options: argparse.Namespace) -> str:
    """File of a run: variant, category, seed, steps, and what is not as usual.

    Args:
        name (str): Of the variant.
        category (str): Of the data.
        seed (int): Of everything.
        options (argparse.Namespace): Of the command.

    Returns:
        str: Name of a JSON file.
    """
    told = [
        f"{getattr(options, option)}_{option}" for option, usual in USUAL.items() if getattr(options, option) != usual
    ]
    slug = "".join(letter if letter.isalnum() else "_" for letter in name)
    return "-".join([slug, category, str(seed), str(options.steps), *told]) + ".json"


def run_variants(options: argparse.Namespace) -> None:
    """Run what is missing until the time is over.

    Args:
        options (argparse.Namespace): Of the command.
    """
    options.results.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for seed in options.seeds:
        for category in options.categories:
            for name in options.variants:
                path = options.results / result_name(name, category, seed, options)
                if path.exists():
                    print(f"{path} exists.")
                    continue
                if time.monotonic() - start > 60 * options.minutes:
                    print("Time is over; run the command again for the rest.")
                    return
                result = train_and_measure(name, category, seed, options)
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                print(json.dumps(result))


SETTINGS = {
    "descriptor_channels": "{} channels",
    "steps": "{} steps",
    "batch_size": "{} pairs",
    "image_size": "{} px",
    "training_precision": "{}",
    "held_out": "{} defects held out",
    "drawing_seed": "drawing seed {}",
    "good_test_images": "{} good test images",
    "defective_test_images": "{} test images of each defect",
}
METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AP": "pixel AP", "AUPRO": "AUPRO"}


def table(folder: Path) -> str:
    """Means over categories and seeds, and the difference from the reference on the same category and seed.

    Args:
        folder (Path): With the JSON files of the runs.

    Returns:
        str: Markdown. Runs of other settings have a row of their own, which names what differs in the folder.
    """
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not rows:
        raise SystemExit(f"{folder}: no results there. Run `anomalib-cpr ablation run`, or give another --results.")
    earlier = {"held_out": 0, "drawing_seed": 0, "good_test_images": 12, "defective_test_images": 7}
    rows = [{**earlier, **row} for row in rows]

    def value_of(row: dict[str, Any], name: str) -> Any:  # noqa: ANN401
        # What a variant is about does not keep it from the reference.
        return None if name in getattr(VARIANTS.get(row["variant"]), "arguments", {}) else row.get(name)

    differ = [name for name in SETTINGS if len({value_of(row, name) for row in rows} - {None}) > 1]
    groups: dict[tuple, dict[tuple, dict]] = {}
    for row in rows:
        settings = tuple(value_of(row, name) for name in differ)
        groups.setdefault((row["variant"], settings), {})[row["category"], row["seed"]] = row
    order = list(VARIANTS)
    lines = [
        f"| variant | runs | {' | '.join(METRICS.values())} | minus reference: image AUROC, mean (each) | pixel AP |",
        "|---|---|" + "---|" * (len(METRICS) + 2),
    ]
    for name, settings in sorted(groups, key=lambda key: order.index(key[0]) if key[0] in order else 99):
        own = groups[name, settings]
        reference = next(
            (runs for (variant, others), runs in groups.items() if variant == "reference" and _alike(settings, others)),
            {},
        )
        told = [SETTINGS[key].format(value) for key, value in zip(differ, settings, strict=True) if value is not None]
        cells = [", ".join([name, *told]), f"{len(own)}: {', '.join(sorted({run[0] for run in own}))}"]
        cells += [_mean_and_each([row[metric] for row in own.values() if metric in row]) for metric in METRICS]
        for metric in ("image_AUROC", "pixel_AP"):
            both = [run for run in sorted(own) if metric in own[run] and metric in reference.get(run, {})]
            changes = [own[run][metric] - reference[run][metric] for run in both]
            cells.append(_mean_and_each(changes, "+.3f", always=True) if name != "reference" else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _alike(some: tuple, others: tuple) -> bool:
    """Whether settings are the same, as far as both are known."""
    return all(one == other or None in {one, other} for one, other in zip(some, others, strict=True))


def _mean_and_each(values: list[float], how: str = ".3f", *, always: bool = False) -> str:
    """The mean, and in brackets what it is of."""
    if not values:
        return ""
    each = f" ({', '.join(format(value, how) for value in values)})" if always or len(values) > 1 else ""
    return format(statistics.mean(values), how) + each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser (argparse.ArgumentParser): Parser of the subcommand.
    """
    parser.add_argument("command_of_ablation", choices=["run", "table"], help="train, or print")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data-root", type=Path, default=Path("datasets/DrawnParts"))
    parser.add_argument("--mvtec", type=Path, help="folder of MVTec AD: train on its categories, not on drawn data")
    parser.add_argument("--textures", type=Path, help="folder of textures for synthetic anomalies; none: drawn ones")
    parser.add_argument("--textures-name", default="a folder", help="what to call them in the results")
    parser.add_argument("--channels", type=int, default=USUAL["channels"], help="of the descriptors")
    parser.add_argument(
        "--weights", type=existing_file, help="file with the weights of DenseNet-201; none: random weights"
    )
    parser.add_argument("--weights-name", help="what to call them in the results; otherwise the file's name")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=SHORT_TRAINING, metavar="VARIANT")
    parser.add_argument("--categories", nargs="+", default=["gear", "bracket"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=USUAL["batch_size"])
    parser.add_argument("--measure-at", nargs="+", type=int, default=[], help="steps after which to measure as well")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu, ...: as Lightning calls it")
    parser.add_argument("--commit", help="what to call the code in the results, away from its repository")
    parser.add_argument("--image-size", type=int, default=USUAL["image_size"])
    parser.add_argument("--drawing-seed", type=int, default=USUAL["drawing_seed"], help="of the drawn images")
    parser.add_argument("--good-test-images", type=int, default=USUAL["good_test_images"], help="of drawn data")
    parser.add_argument(
        "--defective-test-images",
        type=int,
        default=USUAL["defective_test_images"],
        help="of drawn data, of each kind of defect",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bfloat16", "float32"],
        default=USUAL["precision"],
        help="of the steps; auto: bfloat16 where the device computes with it. Elsewhere that takes many times as long",
    )
    parser.add_argument(
        "--held-out", type=int, default=USUAL["held_out"], help="defects that leave the test set of every variant"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many minutes")


def run(arguments: argparse.Namespace) -> int:
    """Train the variants, or print the table of those that were trained.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0.
    """
    if arguments.command_of_ablation == "run":
        run_variants(arguments)
    else:
        print(table(arguments.results))
    return 0
