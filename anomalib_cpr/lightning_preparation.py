# SPDX-License-Identifier: Apache-2.0
"""What a fit does before its first step: images, codebook, foreground, neighbours, and the plan of the training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .alignment import LOOSE_ABOVE, MAYBE_LOOSE_ABOVE, looseness, spread, surveyed
from .durable_checkpoint import save_checkpoints_durably
from .feature_extractor import STRIDES
from .kinds import DEFAULT_STEPS, PAPER_STEPS, Kind, kind_from_features, known_kind
from .matching_choice import ENOUGH_IMAGES, USUAL_MATCHING, is_anywhere
from .memory import scarcity, smaller_bank
from .preparation import ClusteringBackend, cluster_centres, collect_samples, describe_globally, estimate_foreground
from .progress import progress_bar, stage
from .ranks import evaluate_each_image_once, exchange, refuse_sharded_models, send, share_output_folder
from .real_anomalies import KnownAnomalies, give_back, hold_out, in_test_set, read_folder, read_from_test_set
from .scoring_settings import TRAINING_SETTINGS, apply_settings
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .torch_model import CprModel
from .training import TrainingData, step_precision
from .training_images import TrainingImages, load_training_images, split_transform, with_turned_copies
from .training_steps import StepLoader, StepPlan, plan_steps, remaining_batches, restart, step_generator

CENTRING_IMAGES = 16
CHECKED_IMAGES = 4
SAME_WORDS = 0.1
# Drawn tablets gained 0.025 and 0.039 pixel AP, a fabric 0.046 and nothing; a gear and a bracket lost 0.004 to 0.028
# (results/recoloured): where a thing's place says much, colour says little.
RECOLOURED = 0.3
# A drawn gear gained 0.073 and 0.082 pixel AP, a bracket lost 0.005 and 0.011; twice as many cost it 0.037
# (results/displaced, results/displaced_tried.json).
DISPLACED = 0.15


class Preparation(LightningModule):
    """The part of :class:`Cpr` that reads the training images and learns everything but the heads."""

    model: CprModel
    pre_processor: nn.Module | None
    # Arguments of Cpr.
    kind: Literal["object", "texture", "auto"]
    rotations: tuple[float, ...]
    clustering_backend: ClusteringBackend
    anomaly_source_path: str | Path | None
    known_anomalies: int | Sequence[int] | str | Path | None
    known_anomaly_masks: str | Path | None
    training_steps: int | Literal["paper"] | None
    learning_rate_schedule: Literal["cosine", "constant"]
    recoloured_anomalies: float | None
    displaced_anomalies: float | None
    centred_start: bool
    eight_bit_training: bool
    training_precision: Literal["auto", "float32", "bfloat16"]
    _given_seed: int | None
    _given_settings: frozenset[str]  # names of the settings of matching and scoring that were given
    # What is decided here, or comes from a checkpoint.
    seed: int | None = None
    resolved_kind: Kind | None
    training_paths: list[str]
    held_out: list[str]
    nothing_was_run = False
    _looseness = 1.0
    _coherent_in_windows = False
    _trained_on: int | None = None
    # What lives as long as the fit.
    _known: tuple[Tensor, Tensor] | None = None
    _training_data: TrainingData | None = None
    _described: tuple[Tensor, Tensor] | None = None  # histograms and foregrounds of all training images
    _synthesise: SyntheticAnomalyGenerator | None  # no default: it would hide the module that is assigned
    _plan: StepPlan | None = None
    _batch_size = 0
    _given_by_user: tuple[Any, int | None] | None = None

    def setup(self, stage: str) -> None:
        """Read known anomalies, and keep them out of what is measured.

        Args:
            stage (str): Of the trainer.

        Raises:
            ValueError: If it cannot run like this; says why.
        """
        if self.trainer.precision in ("bf16-true", "16-true", "64-true"):
            raise ValueError(
                f"precision={self.trainer.precision!r}: retrieval needs float32. Use '32-true', or 'bf16-mixed' or "
                "'16-mixed'. Steps of a training compute in bfloat16 anyway where the device can."
            )
        datamodule = getattr(self.trainer, "datamodule", None)
        if self._ranks > 1:
            refuse_sharded_models(self.trainer.strategy)
            evaluate_each_image_once(self.trainer, self)
            if stage == "fit":
                self._refuse_shared_file()
                share_output_folder(self.trainer)
        if stage == "fit":
            save_checkpoints_durably(self.trainer)
        if stage == "fit" and self.known_anomalies is not None:
            self._read_known(datamodule)
        if stage != "predict":
            self._hold_out(datamodule)

    def _refuse_shared_file(self) -> None:
        if self.model.bank.file is not None:
            raise ValueError(
                f"bank_file={str(self.model.bank.file)!r} would be written by {self._ranks} processes at once. Train "
                "with devices=1 (--trainer.devices 1), or without bank_file; tests and predictions may use several."
            )

    def _read_known(self, datamodule: Any) -> None:  # noqa: ANN401
        known, (transform, _) = self.known_anomalies, split_transform(getattr(self.pre_processor, "transform", None))
        if isinstance(known, (str, Path)):
            images, masks, paths = read_folder(known, self.known_anomaly_masks, transform)
            paths = in_test_set(datamodule, paths)
        else:
            if getattr(datamodule, "test_data", None) is None:
                raise ValueError(
                    f"known_anomalies={known!r} means images of the data module's test set, but there is none. "
                    "Pass a data module to the Engine, or give a folder."
                )
            give_back(datamodule)
            images, masks, paths = read_from_test_set(datamodule.test_data, known, transform)  # type: ignore[arg-type]
        self._known, self.held_out = (images, masks), paths
        rank_zero_info(f"Known anomalies: {len(images)}.")

    def _hold_out(self, datamodule: Any) -> None:  # noqa: ANN401
        if self.held_out and datamodule is not None:
            count = hold_out(datamodule, self.held_out)
            rank_zero_info(f"{count} of {len(self.held_out)} known anomalies are held out of validation and test.")

    def _give_back(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            give_back(datamodule)

    def _describe_known(self, images: TrainingImages) -> KnownAnomalies | None:
        if self._known is None:
            return None
        known, masks = self._known
        if known.shape[1:] != images.images.shape[1:]:
            raise ValueError(
                f"Known anomalies are {known.shape[-2]}x{known.shape[-1]} pixels after pre-processing, training images "
                f"{images.size[0]}x{images.size[1]}. Let the pre-processor resize them."
            )
        model = self.model
        histograms, foregrounds = [], []
        with torch.no_grad():
            for batch in known.split(self._preparation_batch):
                features = model.feature_extractor.finest(images.normalize(batch.to(self.device))).float()
                histograms.append(model.global_retriever(features))
                foregrounds.append(model.foreground_estimator(features))
        neighbours = model.global_retriever.nearest(torch.cat(histograms), model.bank.histograms, self._pairs_k)
        return KnownAnomalies(known, masks, torch.cat(foregrounds), neighbours.cpu())

    def on_fit_start(self) -> None:
        """Read the images, learn codebook and foreground, and find the neighbours; skip what a checkpoint holds."""
        self.nothing_was_run = True
        resumed = self.trainer.ckpt_path is not None and self.model.global_retriever.is_fitted
        if self.seed is None or not resumed:
            seed = torch.initial_seed() % 2**63 if self._given_seed is None else self._given_seed
            self.seed = self.trainer.strategy.broadcast(seed)
        if not resumed:
            self.resolved_kind = None if self.kind == "auto" else self.kind
            # Whatever checkpoint this model has seen before.
            apply_settings(self.model, TRAINING_SETTINGS, self._given_settings)
        # What may be missing comes first, so that nobody waits for an error.
        synthesise = self._synthesise = SyntheticAnomalyGenerator(self.anomaly_source_path)
        rank_zero_info(f"Backbone: {self.model.load_backbone_weights()}")
        loader = self._take_over_loader()
        self._batch_size = int(loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32)

        with stage("Training images"):
            total = len(loader.dataset)  # type: ignore[arg-type]
            images = load_training_images(
                loader, getattr(self.pre_processor, "transform", None), self.seed, self._track("Training images", total)
            )
        images = with_turned_copies(images, self.rotations)
        if self.device.type == "cuda":  # where a step would wait for them to come
            images.to_device(self.device)
        self.training_paths = images.paths
        if resumed:
            self._check_resumed(images)
        else:
            self._learn_retrieval(images)
        self._described = (self.model.bank.histograms, self.model.bank.foregrounds)
        self._trained_on = len(images)
        neighbours = self.model.global_retriever.nearest(
            self.model.bank.histograms,
            self.model.bank.histograms,
            self._pairs_k,
            exclude_self=True,
            copies=images.copies,
        )
        assert self.resolved_kind is not None  # noqa: S101 - narrows the type: decided above or in the checkpoint
        self._training_data = TrainingData(
            images, neighbours.cpu(), self.resolved_kind, self._describe_known(images), self.eight_bit_training
        )
        # Ranks may differ in the last bits, and must decide alike.
        self._looseness = self.trainer.strategy.broadcast(self._survey_looseness(images, neighbours.cpu()))
        if not resumed:
            self._decide_on_alignment(aligned=self.resolved_kind == "object" and not self._loose)
        # Where the training goes on from a checkpoint that chose the whole map, only that ruled out coherent matching.
        over_whole_map = is_anywhere(self.model.window_sizes) and not self.model.unaligned_matching
        self._coherent_in_windows = self.model.coherent_matching or over_whole_map
        if self.resolved_kind == "texture":
            synthesise.structure_probability = 0.0  # shuffled tiles of a texture are the texture
        synthesise.recoloured, synthesise.displaced = self._shares_of_the_image_itself()
        self._plan_training()
        self._say_what_it_takes(images)

    def _decide_on_alignment(self, *, aligned: bool) -> None:
        """Coherent matching for what is aligned, unaligned for what is not, averages for what is loose.

        Unless the user says otherwise.
        """
        given, model = self._given_settings, self.model  # what was not given is that of every new training
        if "coherent_matching" not in given:
            model.coherent_matching = aligned and not model.unaligned_matching
        if "unaligned_matching" not in given:
            model.unaligned_matching = not aligned and not model.coherent_matching
        if "averaged_descriptors" not in given:
            model.averaged_descriptors = self._loose
        if "colour_matching" not in given:
            model.colour_matching = self._loose and model.unaligned_matching

    def _shares_of_the_image_itself(self) -> tuple[float, float]:
        """Of the synthetic anomalies, those in other colours and those that are moved."""
        texture = self.resolved_kind == "texture"
        recoloured, displaced = self.recoloured_anomalies, self.displaced_anomalies
        if recoloured is None:
            recoloured = RECOLOURED if texture or self._loose else 0.0
            recoloured = min(recoloured, 1 - (displaced or 0.0))
        if displaced is None:
            displaced = 0.0 if texture else min(DISPLACED, 1 - recoloured)
        return recoloured, displaced

    def _say_what_it_takes(self, images: TrainingImages) -> None:
        bank = self.model.bank
        cells = [(images.size[0] // stride, images.size[1] // stride) for stride in STRIDES]
        megabytes, device = bank.size_for(len(images), cells), bank.descriptors_1.device
        rank_zero_info(
            f"{len(images)} training images of {images.size[0]}x{images.size[1]} in memory "
            f"({images.images.nbytes / 1e6:.0f} MB); the reference bank will hold "
            f"{bank.count_for(len(images))} of them and take {megabytes:.0f} MB "
            f"({bank.bank_dtype}) on {bank.file or device}. "
            f"A step compares {self._batch_size} pairs of images (train_batch_size)"
            f"{f' on each of {self._ranks} processes' if self._ranks > 1 else ''}, in "
            f"{step_precision(self.training_precision, self.device)}."
        )
        local = (
            self.trainer.num_devices if device.type == "cpu" else 1
        )  # processes of one machine share its main memory
        warning = scarcity(1e6 * megabytes * local, device, "The reference bank", smaller_bank(device))
        if warning and bank.file is None:
            rank_zero_warn(warning)

    def _take_over_loader(self) -> torch.utils.data.DataLoader:
        """Put a loader of steps in place of the user's loader, which is read only once; return the user's."""
        source = self.trainer.fit_loop._data_source  # noqa: SLF001 - Lightning has no public way
        loader = source.dataloader()
        self._given_by_user = (source.instance, self.trainer.fit_loop.max_epochs)
        source.instance = StepLoader(self._remaining_batches)
        return loader

    def _learn_retrieval(self, images: TrainingImages) -> None:
        model, bank = self.model, self.model.bank
        bank.clear()
        model.foreground_estimator.disable()
        if self.trainer.is_global_zero:
            self._learn_codebook_and_foreground(images)
        if self._ranks > 1:
            send([model.global_retriever.codebook, *model.foreground_estimator.parameters()])
            self.resolved_kind = self.trainer.strategy.broadcast(self.resolved_kind)
        self._describe_globally(images)

    def _learn_codebook_and_foreground(self, images: TrainingImages) -> None:
        # Turned copies show the same parts once more, and corners that no camera has seen.
        images = images.photographs
        model, seed, count = self.model, int(self.seed or 0), len(images)
        batches = -(-count // self._preparation_batch)
        with stage("Features"):
            samples = collect_samples(model, self._track("Features", batches)(self._batches(images)), count, seed)
        with stage("Codebook"):
            words = cluster_centres(
                samples["anywhere"],
                len(model.global_retriever.codebook),
                seed,
                self.clustering_backend,
                self.device,
            )
            model.global_retriever.codebook.copy_(torch.from_numpy(words))
        with stage("Foreground"):
            self._learn_foreground(samples, seed)

    def _describe_globally(self, images: TrainingImages) -> None:
        bank, total = self.model.bank, -(-len(images) // self._preparation_batch)
        with stage("Histograms"):
            batches = self._track("Histograms", total)(self._batches(images))
            spans = describe_globally(self.model, batches, self.trainer.global_rank, self._ranks)
            if self._ranks > 1:
                exchange([bank.histograms, bank.foregrounds], spans, self.device)

    def _learn_foreground(self, samples: dict[str, Any], seed: int) -> None:
        kind, reason = self.resolved_kind, f"kind={self.kind!r} was given"
        if kind is None:
            datamodule = getattr(self.trainer, "datamodule", None)
            category = getattr(datamodule, "category", None)
            kind = known_kind(datamodule, category)
            reason = f"category {category!r} of {type(datamodule).__name__}"
        discriminant = None
        if kind != "texture":
            discriminant = estimate_foreground(samples, seed, self.clustering_backend, self.device)
        if kind is None:
            kind, reason = kind_from_features(discriminant)
            reason += "; overrule it with kind='object' or kind='texture'"
        self.resolved_kind = kind
        if kind == "object" and discriminant is not None:
            self.model.foreground_estimator.set_discriminant(discriminant)
        elif kind == "object":
            rank_zero_warn("No foreground was found: border and middle of the images look alike. All of it counts.")
        rank_zero_info(f"Kind: {kind} ({reason}).")

    @property
    def _loose(self) -> bool:
        """Whether good patches find their match outside of the windows."""
        return self._looseness > LOOSE_ABOVE

    @property
    def _maybe_loose(self) -> bool:
        """Whether they might find a better one there, with trained heads."""
        return self._looseness > MAYBE_LOOSE_ABOVE

    def _survey_looseness(self, images: TrainingImages, neighbours: Tensor) -> float:
        """How loose the parts look, where something depends on it; 1 elsewhere, as for aligned parts."""
        if len(images) < ENOUGH_IMAGES or not self.model.pre_trained:
            return 1.0
        given, model = self._given_settings, self.model
        ways = {name: getattr(model, name) for name in ("coherent_matching", "unaligned_matching") if name in given}
        settled = len(ways) == 2 or any(ways.values())  # they exclude each other
        decided = {"window_sizes", "averaged_descriptors"} <= given
        decided = decided and ("colour_matching" in given or not model.unaligned_matching)
        if settled and decided and self.recoloured_anomalies is not None:
            return 1.0
        chosen, references = surveyed(neighbours)
        with torch.no_grad():
            value = looseness(
                [self._coarse_features(images, torch.tensor([image]))[0] for image in chosen],
                [self._coarse_features(images, others) for others in references],
            )
        place = f"lie where their references have them (up to {MAYBE_LOOSE_ABOVE:g})"
        if value > MAYBE_LOOSE_ABOVE:
            place = f"may lie anywhere, which the trained heads will tell ({MAYBE_LOOSE_ABOVE:g} to {LOOSE_ABOVE:g})"
        if value > LOOSE_ABOVE:
            place = f"lie anywhere (above {LOOSE_ABOVE:g})"
        rank_zero_info(
            f"Good patches are {value:.2f} times as far from their best match within a tenth of the image as from that "
            f"of anywhere: parts {place}."
        )
        return value

    def _coarse_features(self, images: TrainingImages, chosen: Tensor) -> Tensor:
        return self.model.feature_extractor(images.normalize(images.take(chosen, self.device)))[1]

    def _check_resumed(self, images: TrainingImages) -> None:
        bank = self.model.bank
        count, size = self._trained_on or len(bank.histograms), bank.cells
        if count != len(images) or tuple(side // 4 for side in images.size) != size:
            raise ValueError(
                f"ckpt_path={self.trainer.ckpt_path} was trained on {count} images of {4 * size[0]}x{4 * size[1]} "
                f"pixels, the data module gives {len(images)} of {images.size[0]}x{images.size[1]}. Resume with "
                "the same data, or train anew without ckpt_path."
            )
        if self.kind not in ("auto", self.resolved_kind):
            raise ValueError(
                f"kind={self.kind!r} was given, but ckpt_path={self.trainer.ckpt_path} was trained as "
                f"{self.resolved_kind!r}. Resume without kind, or train anew without ckpt_path."
            )
        if bank.holds_all_of(count):
            self._check_same_images(images)
        else:  # there is nothing to compare with
            bank.clear()
            self._describe_globally(images)
        rank_zero_info("Codebook, foreground and histograms: from the checkpoint.")

    def _check_same_images(self, images: TrainingImages) -> None:
        """By content, because data may have moved since."""
        chosen = spread(len(images), CHECKED_IMAGES)
        with torch.no_grad():
            features = self.model.feature_extractor.finest(images.normalize(images.take(chosen, self.device))).float()
            histograms = self.model.global_retriever(features)
        expected = self.model.bank.histograms[chosen.to(self.device)]
        # A word here and there may differ on another device.
        differing = ((histograms - expected).abs().sum((1, 2)) / expected.sum((1, 2)) > SAME_WORDS).nonzero().flatten()
        if len(differing):
            index = int(chosen[differing[0].cpu()])
            raise ValueError(
                f"ckpt_path={self.trainer.ckpt_path} was trained on another image in place of {images.paths[index]}. "
                "Resume with the same data, or train anew without ckpt_path."
            )

    def _plan_training(self) -> None:
        data = self._training_data
        assert data is not None  # noqa: S101 - narrows the type
        self._plan = plan_steps(
            max_epochs=self.trainer.max_epochs,
            max_steps=self.trainer.max_steps,
            accumulate=self.trainer.accumulate_grad_batches,
            images=len(data.images),
            batch_size=self._batch_size * self._ranks,
            default_steps=self._default_steps(data.kind),
        )
        if self._plan.epochs is not None:
            self.trainer.fit_loop.max_epochs = self._plan.epochs
            rank_zero_info(
                f"{self._plan.steps} steps: the trainer has no limit of its own (max_epochs=1000, Lightning's default, "
                "counts as none)."
            )
        for configured in self.trainer.lr_scheduler_configs:  # made before the plan, on which the first step depends
            if isinstance(configured.scheduler, LambdaLR):
                restart(configured.scheduler)
        if self._plan.steps is None and self.learning_rate_schedule != "constant":
            rank_zero_warn("The learning rate stays constant: without max_steps or max_epochs its end is not known.")

    def _default_steps(self, kind: Kind) -> int:
        if isinstance(self.training_steps, int):
            return self.training_steps
        return (PAPER_STEPS if self.training_steps == "paper" else DEFAULT_STEPS)[kind]

    def _remaining_batches(self) -> int:
        assert self._plan is not None  # noqa: S101 - narrows the type
        return remaining_batches(self._plan, self.trainer)

    def _centre_descriptors(self) -> None:
        """Centre the descriptors of heads that were never trained."""
        data = self._training_data
        if not self.centred_start or data is None or not all(head.is_untrained for head in self.model.heads):
            return
        generator = step_generator(int(self.seed or 0), 0, 0, 0)
        chosen = torch.randperm(len(data.images), generator=generator)[:CENTRING_IMAGES]
        images = data.images.normalize(data.images.take(chosen, self.device))
        for head, features in zip(self.model.heads, self.model.feature_extractor(images), strict=True):
            head.centre(features)
        if self._ranks > 1:  # parameters that differ in the last bit would differ for ever
            send([*self.model.metric_heads.parameters(), *self.model.metric_heads.buffers()])

    @property
    def is_prepared(self) -> bool:
        """Whether a fit is under way that has its images, so that there is something to train or to keep."""
        return self._training_data is not None

    @property
    def _ranks(self) -> int:
        """Number of processes."""
        trainer = getattr(self, "_trainer", None)
        return 1 if trainer is None else trainer.world_size

    @property
    def _pairs_k(self) -> int:
        """A pair of the training is an image and one of its nearest so many, whatever predictions will use."""
        return self.model.k if "k" in self._given_settings else USUAL_MATCHING.k

    @property
    def _preparation_batch(self) -> int:
        """Images per batch where nothing is learned: memory stays low, and 8 keep a GPU busy enough."""
        return 8

    def _batches(self, images: TrainingImages) -> Iterator[Tensor]:
        return images.batches(self._preparation_batch, self.device)

    def _track(self, description: str, total: int) -> Any:  # noqa: ANN401
        enabled = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        return progress_bar(description, total, enabled=enabled)
