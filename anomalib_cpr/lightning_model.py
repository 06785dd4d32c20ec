# SPDX-License-Identifier: Apache-2.0
"""CPR as an anomalib model: what `anomalib train --model Cpr` and `Engine().fit(Cpr())` run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torchvision.transforms import v2

from .feature_extractor import checked_size
from .file_check import FileCheck
from .lightning_bank import BankInCheckpoints
from .lightning_export import FaithfulExport
from .memory import keep_freed_memory, return_freed_memory
from .preparation import ClusteringBackend
from .progress import StepLog
from .ranks import average, gather_predictions
from .recorded_backbone import Backbone, record
from .reference_bank import BankDtype
from .resume_point import ResumePoint
from .torch_model import CprModel
from .training import ImagePairs, PairsAhead, draw_image_pairs, training_autocast, training_loss
from .training_steps import learning_rate_factor, step_generator

IMAGE_SIZE = (320, 320)


class Cpr(BankInCheckpoints, FaithfulExport, AnomalibModule):
    """Cascade Patch Retrieval: retrieve similar good parts, compare patches in a learned metric.

    Training reads each image once, learns a codebook and a foreground estimate, and then trains two small heads on
    synthetic anomalies. A step compares as many pairs of images as the data module's ``train_batch_size`` says. The
    default number of steps is 1,000 for objects and 500 for textures; any limit given to the trainer
    (``max_steps``, ``max_epochs``, ``max_time``) wins.

    Args:
        backbone (str): Name of any timm network that supports ``features_only``.
        layers (Sequence[str]): Its layers at strides 4 and 8.
        pre_trained (bool): Use ImageNet weights; otherwise random ones.
        backbone_weights (str | Path | None): File with the backbone's weights (a state dict of the timm network), for
            machines without internet. None asks timm's hub, its cache first.
        descriptor_channels (int): Channels of the descriptors: 384 in the paper, 64 and 16 in its fast variants.
        k (int | None): Number of references. More than there are training images means all of them. None takes the
            paper's 10, or up to 80 where these let weak synthetic anomalies on good images stand out clearly more, as
            with parts that come turned or loose. A prediction takes longer with them.
        window_sizes (Sequence[int] | None): Side of the matching window at strides 4 and 8, in cells, odd; 999 is the
            whole map. At both strides, for parts that lie anywhere, patches of stride 8 are searched for over the whole
            map and those of stride 4 where these were found. None takes the paper's 3 and 1, or the whole map where the
            training images may be of loose parts and it lets weak synthetic anomalies stand out most: matching then
            takes about five times as long.
        blur_sigma (float | None): Of the Gaussian that smooths the map, in pixels. None means 2 in a training, and that
            of its training for a checkpoint.
        follow_edges (bool | None): Let the map follow the edges of the image in place of smoothing it, so that defects
            are outlined more closely. Image scores are the same. None means yes in a training, and what its training
            had for a checkpoint; the paper's map is smooth.
        coherent_matching (bool | None): On the map, neighbouring patches agree on the references that they are matched
            with, which shows missing pieces better. Image scores are the same. None means yes for objects, no for
            textures and loose parts, and what its training had for a checkpoint; the paper's patches are on their own.
        unaligned_matching (bool | None): The distance of a patch is the mean over its five nearest references, at
            stride 8 of the ten that fit the image as a whole, and the scale that shows more of a defect counts more.
            None means yes for textures and loose parts, no for other objects, and what its training had for a
            checkpoint; the paper takes the nearest reference and the mean of the scales. Excludes
            ``coherent_matching``.
        averaged_descriptors (bool | None): Descriptors of stride 8 are averaged over 3x3 cells, after which a patch
            tells what is around it rather than what is just there. None means yes for loose parts and no for all
            others, as in the paper. A checkpoint keeps what its training had.
        colour_matching (bool | None): Where ``unaligned_matching`` is on, the colours of patches are compared as well,
            with those anywhere on the references that fit. None means yes for loose parts that have their like
            elsewhere and no for all others, as in the paper. A checkpoint keeps what its training had.
        relative_to_image (bool | None): Distances count in proportion to how far the image is from its references as a
            whole, background included, so that another lamp is no anomaly. None means yes in a training, and what its
            training had for a checkpoint; the paper's count as they are.
        codebook_size (int): Number of visual words.
        blocks (int): Blocks per side of the retrieval grid.
        clustering_backend (Literal["sklearn", "faiss"]): Learns codebook and foreground. faiss is an extra; its
            centres differ from scikit-learn's, so it is never chosen silently.
        bank_dtype (Literal["float32", "float16", "int8", "int4"]): How the reference bank stores descriptors: 4, 2, 1
            or half a byte per value. A checkpoint with a finer bank is converted when it is loaded.
        max_references (int | None): Keep at most so many training images in the reference bank, chosen so that they
            represent all; None keeps all. All images are trained on. A checkpoint with more is reduced when loaded.
        bank_on_host (bool): Leave the bank's descriptors in main memory and move only those of the K references to
            the device; for banks that outgrow a GPU.
        bank_file (str | Path | None): Keep the bank's descriptors in this file, mapped into memory, for banks that
            outgrow it. Only those of the K references are read. Training writes the file; the checkpoint is small and
            belongs to it: to load the checkpoint, name the file again, wherever it lies then.
        kind (Literal["object", "texture", "auto"]): Objects get a foreground estimate, textures do not. ``auto`` knows
            the categories of MVTec AD, BTAD and MVTec 3D-AD, and decides for other data from the training images.
        rotations (Sequence[float] | None): Angles in degrees, by which turned copies join each training image, for
            parts that lie at any angle. Memory and preparation grow in proportion, the time of a prediction does not.
        anomaly_source_path (str | Path | None): Folder of texture images (e.g. DTD) for synthetic anomalies. None
            draws procedural textures.
        known_anomalies (int | Sequence[int] | str | Path | None): A few real defects to learn from as well: a folder of
            images, or indices into the data module's test set, or a number, for so many of its defects chosen by
            chance. What is taken from the test set leaves it, now and whenever the checkpoint is tested.
        known_anomaly_masks (str | Path | None): Folder of masks with the names of the images in the folder
            ``known_anomalies``. None: its neighbour ``masks``.
        training_steps (int | Literal["paper"] | None): Steps if the trainer sets no limit. None means 1,000 for objects
            and 500 for textures; "paper" means 40,000 and 500.
        learning_rate (float): Of AdamW.
        weight_decay (float): Of AdamW.
        learning_rate_schedule (Literal["cosine", "constant"]): The paper's is constant.
        warm_up_steps (int): Steps of linearly increasing learning rate, at most a tenth of the training.
        recoloured_anomalies (float | None): Share of the synthetic anomalies that are the image itself in other
            colours, 0..1: some find defects that are wrong in nothing but their colour. None means 0.3 for textures and
            loose parts, 0 for others; the paper has none.
        displaced_anomalies (float | None): Share of the synthetic anomalies that are the image itself, moved by some
            pixels, 0..1: what they teach is the shape of things. None means 0.15 for objects, 0 for textures; the paper
            has none.
        boundary_weight (float): How many times as often a normal place within 8 pixels of a synthetic anomaly is
            compared as elsewhere. The paper's is 1; 4 outlines defects more closely on some data.
        centred_start (bool): Begin with descriptors whose mean over some training images is 0; the paper does not.
        eight_bit_training (bool): Round the colours of training pairs to 8 bits, as the paper's image files did.
        training_precision (Literal["auto", "float32", "bfloat16"]): Of backbone and heads in training steps; codebook,
            bank and inference stay in float32. ``auto`` takes bfloat16 where the device computes with it.
        image_size (Sequence[int] | int | None): Height and width to which the default pre-processor resizes, in pixels,
            divisible by 8; one number for both. None means 320.
        seed (int | None): Of heads and training. None takes the generator of torch as it stands, e.g. after
            ``seed_everything``; anomalib 2.7's command line has an option of that name, but never applies it.
        resume_point_minutes (float): Time between the points from which an interrupted training can be resumed.
        pre_processor (nn.Module | bool): Pre-processor, or whether to use the default one.
        post_processor (nn.Module | bool): Post-processor, or whether to use the default one.
        evaluator (Evaluator | bool): Evaluator, or whether to use the default one.
        visualizer (Visualizer | bool): Visualizer, or whether to use the default one.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib_cpr import Cpr
        >>> engine = Engine(max_steps=200)
        >>> engine.train(Cpr(descriptor_channels=64), datamodule=MVTecAD(category="screw"))

    Note:
        Source: "Target before Shooting: Accurate Anomaly Detection and Localization under One Millisecond via Cascade
        Patch Retrieval", arXiv 2308.06748, IEEE TIP 33, with the values of the authors' code.
    """

    # What lives as long as the steps.
    _pairs_ahead: PairsAhead | None = None
    _backbone: Backbone | None = None
    _before_step: tuple[int, list[Tensor]] | None = None
    _step_log: StepLog | None = None

    def __init__(
        self,
        backbone: str = "densenet201",
        layers: Sequence[str] = ("features.denseblock1", "features.denseblock2"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        descriptor_channels: int = 384,
        k: int | None = None,
        window_sizes: Sequence[int] | None = None,
        blur_sigma: float | None = None,
        follow_edges: bool | None = None,
        coherent_matching: bool | None = None,
        unaligned_matching: bool | None = None,
        averaged_descriptors: bool | None = None,
        colour_matching: bool | None = None,
        relative_to_image: bool | None = None,
        codebook_size: int = 12,
        blocks: int = 5,
        clustering_backend: ClusteringBackend = "sklearn",
        bank_dtype: BankDtype = "float32",
        max_references: int | None = None,
        bank_on_host: bool = False,
        bank_file: str | Path | None = None,
        kind: Literal["object", "texture", "auto"] = "auto",
        rotations: Sequence[float] | None = None,
        anomaly_source_path: str | Path | None = None,
        known_anomalies: int | Sequence[int] | str | Path | None = None,
        known_anomaly_masks: str | Path | None = None,
        training_steps: int | Literal["paper"] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        learning_rate_schedule: Literal["cosine", "constant"] = "cosine",
        warm_up_steps: int = 20,
        recoloured_anomalies: float | None = None,
        displaced_anomalies: float | None = None,
        boundary_weight: float = 1.0,
        centred_start: bool = True,
        eight_bit_training: bool = False,
        training_precision: Literal["auto", "float32", "bfloat16"] = "auto",
        image_size: Sequence[int] | int | None = None,
        seed: int | None = None,
        resume_point_minutes: float = 10.0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if image_size is not None:
            if pre_processor is not True:
                raise ValueError(f"image_size={image_size} is for the default pre-processor; leave it to yours.")
            pre_processor = self.configure_pre_processor(checked_size(image_size))
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        for name, value, choices in (
            ("kind", kind, ("object", "texture", "auto")),
            ("learning_rate_schedule", learning_rate_schedule, ("cosine", "constant")),
            ("training_precision", training_precision, ("auto", "float32", "bfloat16")),
            ("clustering_backend", clustering_backend, ("sklearn", "faiss")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}.")
        self.rotations = tuple(rotations or ())
        _check_training(training_steps, recoloured_anomalies, displaced_anomalies, boundary_weight, self.rotations)
        settings = {
            "k": k,
            "window_sizes": window_sizes,
            "blur_sigma": blur_sigma,
            "follow_edges": follow_edges,
            "coherent_matching": coherent_matching,
            "unaligned_matching": unaligned_matching,
            "averaged_descriptors": averaged_descriptors,
            "colour_matching": colour_matching,
            "relative_to_image": relative_to_image,
        }
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model: CprModel = CprModel(
                backbone=backbone,
                layers=layers,
                pre_trained=pre_trained,
                backbone_weights=backbone_weights,
                descriptor_channels=descriptor_channels,
                codebook_size=codebook_size,
                blocks=blocks,
                bank_dtype=bank_dtype,
                max_references=max_references,
                bank_on_host=bank_on_host,
                bank_file=bank_file,
                **({"coherent_matching": False} if unaligned_matching else {}) | given,
            )
        self._given_settings = frozenset(given)
        self.clustering_backend = clustering_backend
        self.kind = kind
        self.anomaly_source_path = anomaly_source_path
        self.known_anomalies = known_anomalies
        self.known_anomaly_masks = known_anomaly_masks
        self.training_steps = training_steps
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.learning_rate_schedule = learning_rate_schedule
        self.warm_up_steps = warm_up_steps
        self.recoloured_anomalies, self.displaced_anomalies = recoloured_anomalies, displaced_anomalies
        self.boundary_weight = boundary_weight
        self.centred_start = centred_start
        self.eight_bit_training = eight_bit_training
        self.training_precision = training_precision
        self.resume_point_minutes = resume_point_minutes

        self.resolved_kind = None if kind == "auto" else kind
        self._given_seed = seed
        self.training_paths, self.held_out = [], []
        self._synthesise = None

    # --- what anomalib asks of every model

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments that the Engine imposes on the trainer: no validation before there is anything to validate."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """CPR learns from good images only."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize without antialiasing, as the authors do and as exported models must, and ImageNet normalisation.

        Args:
            image_size (tuple[int, int] | None): Height and width in pixels, divisible by 8. Defaults to 320x320.

        Returns:
            PreProcessor: The pre-processor.
        """
        return PreProcessor(
            transform=v2.Compose(
                [
                    v2.Resize(image_size or IMAGE_SIZE, antialias=False),
                    v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
                ]
            )
        )

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Anomalib's thresholds and normalisation.

        Returns:
            PostProcessor: The post-processor.
        """
        return PostProcessor()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, what keeps long trainings safe, and what names unreadable files."""
        return [*super().configure_callbacks(), ResumePoint(self.resume_point_minutes), FileCheck()]  # type: ignore[misc]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the heads."""
        optimizer = torch.optim.AdamW(
            self.model.metric_heads.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        total = self._plan.steps if self._plan is not None else None
        return learning_rate_factor(step, total, self.learning_rate_schedule, self.warm_up_steps)

    # --- steps

    def on_train_start(self) -> None:
        """Centre the descriptors, record the backbone, and start the clock of the steps."""
        self._centre_descriptors()
        assert self._training_data is not None  # noqa: S101 - narrows the type
        shape = (2 * self._batch_size, 3, *self._training_data.images.size)
        precision = training_autocast(self.training_precision, self.device)
        self._backbone = record(self.model.feature_extractor.forward, shape, self.device, precision)
        self._step_log = StepLog(self._plan.steps if self._plan else None, self.trainer.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Free descriptors that the step is going to outdate."""
        del batch, batch_idx
        self.nothing_was_run = False
        self.drop_bank()
        if self.device.type == "cpu":
            keep_freed_memory()
        if self._before_step is None:  # not at the further batches of a step
            statistics = [statistic.clone() for statistic in self._running_statistics]
            self._before_step = (self.trainer.global_step, statistics)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """One step of metric learning.

        Args:
            batch (Any): Placeholder of the step loader.
            batch_idx (int): Batch within the epoch.

        Returns:
            Tensor: The loss.
        """
        del batch
        if self._pairs_ahead is None:
            self._pairs_ahead = PairsAhead(self.draw_pairs, self.device)
        ends_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        step = self.trainer.global_step
        positive, negative = self.compare_pairs(
            *self._pairs_ahead.take(step, batch_idx, following=(step + ends_step, batch_idx + 1))
        )
        loss = positive + negative
        self.log("train_loss", loss, prog_bar=True, batch_size=self._batch_size)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step + 1) % every == 0:  # at others no logger takes them, and logging takes time
            self.log("train_loss_positive", positive, batch_size=self._batch_size)
            self.log("train_loss_negative", negative, batch_size=self._batch_size)
        return loss

    def draw_pairs(self, step: int, batch_idx: int) -> tuple[ImagePairs, torch.Generator]:
        """The pairs of images that a step compares.

        Args:
            step (int): Optimiser steps done.
            batch_idx (int): Batch within the epoch.

        Returns:
            tuple[ImagePairs, torch.Generator]: The pairs, and the random generator of the step as it stands after them.
        """
        data, synthesise, described = self._training_data, self._synthesise, self._described
        assert data and synthesise and described and self.seed is not None  # noqa: S101, PT018 - set before steps
        generator = step_generator(self.seed, self.global_rank, step, batch_idx)
        # Not the foregrounds of the bank: with max_references, a validation leaves it only some.
        return draw_image_pairs(data, described[1], synthesise, self._batch_size, generator), generator

    def compare_pairs(self, images: ImagePairs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What a step learns from, without Lightning: compare the patches of pairs of images.

        Args:
            images (ImagePairs): From :meth:`draw_pairs`.
            generator (torch.Generator): From the same.

        Returns:
            tuple[Tensor, Tensor]: Loss of the positives and of the negatives.
        """
        assert self._training_data is not None  # noqa: S101 - narrows the type
        with training_autocast(self.training_precision, self.device):
            return training_loss(
                self.model,
                self._training_data,
                images,
                generator,
                boundary_weight=self.boundary_weight,
                backbone=self._backbone,
            )

    @property
    def _running_statistics(self) -> list[Tensor]:
        """What a step changes in the heads before it has changed their parameters."""
        return list(self.model.metric_heads.buffers())

    def forget_unfinished_step(self) -> bool:
        """Take back what a step has done that did not come to its end, so that it can be done again.

        Returns:
            bool: Whether there is such a step.
        """
        if self._before_step is None or self._before_step[0] != self.trainer.global_step:
            return False
        for held, before in zip(self._running_statistics, self._before_step[1], strict=True):
            held.copy_(before)
        return True

    def on_after_backward(self) -> None:
        """Of several processes each has seen other images; give their heads the running statistics of all."""
        if self._ranks > 1:
            average([statistic for statistic in self._running_statistics if statistic.is_floating_point()])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Tell a log file how far training is."""
        del batch, batch_idx
        if self._before_step is not None and self.trainer.global_step > self._before_step[0]:
            self._before_step = None
        if self._step_log is not None and not sys.stdout.isatty():
            line = self._step_log.update(self.trainer.global_step, outputs["loss"])
            if line is not None:
                rank_zero_info(line)

    def teardown(self, stage: str) -> None:
        """Free the training images and leave trainer and data module as they were."""
        self._give_back()
        if stage == "fit":
            self.end_fit()

    def end_fit(self) -> None:
        """Free the training images, and give the trainer its own loader and limits back."""
        self._give_back()
        if self._pairs_ahead is not None:
            self._pairs_ahead.close()
            self._pairs_ahead = None
        if self._given_by_user is not None:
            source = self.trainer.fit_loop._data_source  # noqa: SLF001
            source.instance, self.trainer.fit_loop.max_epochs = self._given_by_user
        self._given_by_user = self._training_data = self._synthesise = self._described = self._step_log = None
        self._known = self._before_step = self._backbone = None
        return_freed_memory()

    # --- evaluation

    def on_validation_end(self) -> None:
        """Remember that thresholds are those of the model."""
        self.nothing_was_run = False

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Predict a batch.

        Args:
            batch (Batch): Images, normalised by the pre-processor.
            args (Any): Unused.
            kwargs (Any): Unused.

        Returns:
            STEP_OUTPUT: The batch with predictions.
        """
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_predict_epoch_end(self) -> None:
        """Of several processes each has predicted a share; give all to each."""
        if self._ranks > 1:
            gather_predictions(self.trainer)

    # --- helpers

    @property
    def copies_in_bank(self) -> int:
        """How many consecutive images of the bank show one photograph; 1 if ``max_references`` has left some out."""
        return 1 + len(self.rotations) if len(self.model.bank) == len(self.training_paths) else 1

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel is not to broadcast before each batch: all buffers.

        Ours are equal on all ranks at any time. And ranks could not evaluate different numbers of batches, nor could
        the bank stay in main memory.
        """
        return [name for name, _ in self.named_buffers()]


def _check_training(
    training_steps: int | str | None,
    recoloured_anomalies: float | None,
    displaced_anomalies: float | None,
    boundary_weight: float,
    rotations: Sequence[float],
) -> None:
    if training_steps not in (None, "paper") and not (isinstance(training_steps, int) and training_steps >= 1):
        raise ValueError(
            f"training_steps={training_steps!r}: must be at least 1, 'paper' for the paper's number, or None."
        )
    shares = {"recoloured_anomalies": recoloured_anomalies, "displaced_anomalies": displaced_anomalies}
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: must be a share in 0..1.")
    if (recoloured_anomalies or 0) + (displaced_anomalies or 0) > 1:
        raise ValueError(f"{recoloured_anomalies=} and {displaced_anomalies=} are shares; their sum must be at most 1.")
    if not 0 < boundary_weight < float("inf"):
        raise ValueError(f"boundary_weight={boundary_weight}: must be a number above 0; 1 prefers no place.")
    if len({angle % 360 for angle in (0, *rotations)}) <= len(rotations):
        raise ValueError(f"rotations={list(rotations)}: expected angles in degrees, none twice and none of them 0.")
