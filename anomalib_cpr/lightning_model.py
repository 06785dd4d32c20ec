# SPDX-License-Identifier: Apache-2.0
"""CPR as an anomalib model: what `anomalib train --model Cpr` and `Engine().fit(Cpr())` run."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torchvision.transforms import v2

from .alignment import LOOSE_ABOVE, looseness, surveyed
from .checkpoint_check import BANK, FILE_KEY, check_content, check_file, misfit
from .durable_checkpoint import save_checkpoints_durably
from .export import OPSET, compress_weights, fits_one_file, keep_full_precision, quantise, ready_for_export
from .feature_extractor import STRIDES, checked_size
from .file_check import FileCheck
from .kinds import DEFAULT_STEPS, PAPER_STEPS, Kind, kind_from_features, known_kind
from .matching_choice import (
    ASKED_IMAGES,
    CLEARLY_BETTER,
    SMALL_AREA,
    WEAK_OPACITY,
    Matching,
    candidates,
    choose,
    compare_matchings,
)
from .memory import ON_HOST, SMALLER_BANK, is_out_of_memory, scarcity
from .preparation import ClusteringBackend, cluster_centres, collect_samples, describe_globally, estimate_foreground
from .progress import StepLog, progress_bar, stage
from .ranks import (
    average,
    evaluate_each_image_once,
    exchange,
    gather_predictions,
    refuse_sharded_models,
    send,
    share_output_folder,
)
from .real_anomalies import KnownAnomalies, give_back, hold_out, in_test_set, read_folder, read_from_test_set
from .recorded_backbone import Backbone, record
from .reference_bank import BankDtype
from .resume_point import ResumePoint
from .scoring import PAPER_SIGMA, SIGMA, Scorer
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .torch_model import CprModel
from .training import (
    ImagePairs,
    PairsAhead,
    TrainingData,
    draw_image_pairs,
    frozen_features,
    step_precision,
    training_autocast,
    training_loss,
)
from .training_images import TrainingImages, load_training_images, split_transform, with_turned_copies
from .training_steps import StepLoader, StepPlan, learning_rate_factor, plan_steps, remaining_batches, step_generator

logger = logging.getLogger(__name__)

# 1 had no int8 banks and no max_references, 2 no int4 banks; up to 3 nothing was said of windows, and the blur was 4;
# up to 4 maps were smooth; up to 5 nothing was said of the number of references; up to 6 matching was not coherent;
# up to 7 distances were absolute, and outlines knew nothing of the largest value of the image.
CHECKPOINT_FORMAT = 8
USUAL_MATCHING = Matching(10, (3, 1))  # the paper's
IMAGE_SIZE = (320, 320)
CENTRING_IMAGES = 16
# Drawn tablets gained 0.025 and 0.039 pixel AP, a fabric 0.046 and nothing; a gear and a bracket lost 0.004 to 0.028
# (results/recoloured): where a thing's place says much, colour says little.
RECOLOURED = 0.3
# A drawn gear gained 0.073 and 0.082 pixel AP, a bracket lost 0.005 and 0.011; twice as many cost it 0.037
# (results/displaced, results/displaced_tried.json).
DISPLACED = 0.15
ENOUGH_IMAGES = 20  # of fewer, even aligned ones, some have no like


class Cpr(AnomalibModule):
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
            whole map, for parts that lie anywhere. None takes the paper's 3 and 1, or the whole map where the training
            images look like loose parts and it lets weak synthetic anomalies stand out most.
        blur_sigma (float | None): Of the Gaussian that smooths the map, in pixels. None means 2 in a training, and that
            of its training for a checkpoint.
        follow_edges (bool | None): Let the map follow the edges of the image in place of smoothing it, so that defects
            are outlined more closely. Image scores are the same. None means yes in a training, and what its training
            had for a checkpoint; the paper's map is smooth.
        coherent_matching (bool | None): On the map, neighbouring patches agree on the references that they are matched
            with, which shows missing pieces better. Image scores are the same. None means yes for objects, no for
            textures and loose parts, and what its training had for a checkpoint; the paper's patches are on their own.
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
        training_precision: Literal["auto", "float32", "bfloat16"] = "float32",
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
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model: CprModel = CprModel(
                backbone=backbone,
                layers=layers,
                pre_trained=pre_trained,
                backbone_weights=backbone_weights,
                descriptor_channels=descriptor_channels,
                k=USUAL_MATCHING.k if k is None else k,
                window_sizes=USUAL_MATCHING.window_sizes if window_sizes is None else window_sizes,
                blur_sigma=SIGMA if blur_sigma is None else blur_sigma,
                follow_edges=follow_edges is not False,
                coherent_matching=coherent_matching is not False,
                relative_to_image=relative_to_image is not False,
                codebook_size=codebook_size,
                blocks=blocks,
                bank_dtype=bank_dtype,
                max_references=max_references,
                bank_on_host=bank_on_host,
                bank_file=bank_file,
            )
        self._choose_k, self._choose_windows, self._loose = k is None, window_sizes is None, False
        self._default_blur, self._default_outlines, self._choose_coherence, self._default_relative = (
            value is None for value in (blur_sigma, follow_edges, coherent_matching, relative_to_image)
        )
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

        self.resolved_kind: Kind | None = None if kind == "auto" else kind
        self._given_seed = seed
        self.seed: int | None = None
        self.training_paths: list[str] = []
        self.saves_bank, self.saves_alone = True, False
        self.nothing_was_run = False
        self.held_out: list[str] = []
        self._known: tuple[Tensor, Tensor] | None = None
        self._training_data: TrainingData | None = None
        self._described: tuple[Tensor, Tensor] | None = None  # histograms and foregrounds of all training images
        self._trained_on: int | None = None
        self._synthesise: SyntheticAnomalyGenerator | None = None
        self._pairs_ahead: PairsAhead | None = None
        self._backbone: Backbone | None = None
        self._plan: StepPlan | None = None
        self._before_step: tuple[int, list[Tensor]] | None = None
        self._batch_size = 0
        self._given_by_user: tuple[Any, int | None] | None = None
        self._step_log: StepLog | None = None

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

    # --- before the first step

    def setup(self, stage: str) -> None:
        """Read known anomalies, and keep them out of what is measured.

        Args:
            stage (str): Of the trainer.
        """
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
                features = model.feature_extractor(images.normalize(batch.to(self.device)))[0].float()
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
        self._loose = self._looks_loose(images, neighbours.cpu())
        if self._choose_coherence:
            self.model.coherent_matching = self.resolved_kind == "object" and not self._loose
        if self.resolved_kind == "texture":
            synthesise.structure_probability = 0.0  # shuffled tiles of a texture are the texture
        synthesise.recoloured, synthesise.displaced = self._shares_of_the_image_itself()
        self._plan_training()
        self._say_what_it_takes(images)

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
        warning = scarcity(1e6 * megabytes * local, device, "The reference bank", _way_out(device))
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

    def _looks_loose(self, images: TrainingImages, neighbours: Tensor) -> bool:
        """Whether good patches find their match outside of the windows, so that the choice is worth asking for."""
        if not self._choose_windows or len(images) < ENOUGH_IMAGES or not self.model.pre_trained:
            return False
        chosen, references = surveyed(neighbours)
        with torch.no_grad():
            value = looseness(
                [self._coarse_features(images, torch.tensor([image]))[0] for image in chosen],
                [self._coarse_features(images, others) for others in references],
            )
        loose = value > LOOSE_ABOVE
        place = "may lie anywhere (above" if loose else "lie where their references have them (up to"
        rank_zero_info(
            f"Good patches are {value:.2f} times as far from their best match within a tenth of the image as from that "
            f"of anywhere: parts {place} {LOOSE_ABOVE:g})."
        )
        return loose

    def _decide_on_matching(self, data: TrainingData, in_bank: Tensor) -> None:
        """With how many references, in windows or over the whole map, by the evidence of the heads."""
        usual = Matching(
            self._pairs_k,
            USUAL_MATCHING.window_sizes
            if self._choose_windows
            else (self.model.window_sizes[0], self.model.window_sizes[1]),
        )
        self._match_as(usual)
        available = len(in_bank) - data.images.copies  # an image is no reference of itself
        options = candidates(usual, available, more_references=self._choose_k, whole_map=self._loose)
        if len(options) == 1 or available < ENOUGH_IMAGES or self._synthesise is None:
            return
        structure = self._synthesise.structure_probability  # that of the training: it depends on the kind
        weak = SyntheticAnomalyGenerator(self.anomaly_source_path, 1.0, structure, WEAK_OPACITY, SMALL_AREA)
        generator = step_generator(int(self.seed or 0), 0, 0, 0)
        track = self._track("References", min(ASKED_IMAGES, len(data.images)))
        with stage("References"):
            found = compare_matchings(self.model, data.images, in_bank, weak, generator, options, track)
        if not found:
            return
        chosen = choose(found)
        self._match_as(chosen)
        others = "; ".join(f"{matching}: {value:.2f}" for matching, value in found.items() if matching != chosen)
        rank_zero_info(
            f"Matching with {chosen}: weak synthetic anomalies add {found[chosen]:.2f} times its score to a good image "
            f"({others}; the usual one is left for {CLEARLY_BETTER:g} times its value). Overrule it with k and "
            "window_sizes."
        )

    def _match_as(self, matching: Matching) -> None:
        self.model.k, self.model.window_sizes = matching

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
        if not bank.holds_all_of(count):
            bank.clear()
            self._describe_globally(images)
        rank_zero_info("Codebook, foreground and histograms: from the checkpoint.")

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
        for head, features in zip(self.model.heads, frozen_features(self.model, images), strict=True):
            head.centre(features)
        if self._ranks > 1:  # parameters that differ in the last bit would differ for ever
            send([*self.model.metric_heads.parameters(), *self.model.metric_heads.buffers()])

    # --- steps

    def on_train_start(self) -> None:
        """Centre the descriptors, record the backbone, and start the clock of the steps."""
        self._centre_descriptors()
        assert self._training_data is not None  # noqa: S101 - narrows the type
        shape = (2 * self._batch_size, 3, *self._training_data.images.size)
        precision = training_autocast(self.training_precision, self.device)
        self._backbone = record(partial(frozen_features, self.model), shape, self.device, precision)
        self._step_log = StepLog(self._plan.steps if self._plan else None, self.trainer.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Free descriptors that the step is going to outdate."""
        del batch, batch_idx
        self.nothing_was_run = False
        self.drop_bank()
        self._before_step = (self.trainer.global_step, [statistic.clone() for statistic in self._running_statistics])

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

    def forget_unfinished_step(self) -> None:
        """Take back what a step has done that did not come to its end, so that it can be done again."""
        if self._before_step is not None and self._before_step[0] == self.trainer.global_step:
            for held, before in zip(self._running_statistics, self._before_step[1], strict=True):
                held.copy_(before)

    def on_after_backward(self) -> None:
        """Of several processes each has seen other images; give their heads the running statistics of all."""
        if self._ranks > 1:
            average([statistic for statistic in self._running_statistics if statistic.is_floating_point()])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Tell a log file how far training is."""
        del batch, batch_idx
        self._before_step = None
        if self._step_log is not None and not sys.stdout.isatty():
            line = self._step_log.update(self.trainer.global_step, outputs["loss"])
            if line is not None:
                rank_zero_info(line)

    # --- the reference bank

    def build_bank(self, *, alone: bool = False) -> None:
        """Describe the training images with the heads as they are now, if that was not done since the last step.

        Args:
            alone (bool): Of several processes only this one asks for it; otherwise they share the work.
        """
        data, bank = self._training_data, self.model.bank
        if data is None or len(bank):
            return
        rank, ranks = (0, 1) if alone else (self.trainer.global_rank, self._ranks)
        batches = -(-len(data.images) // self._preparation_batch)
        tracked = self._track("Reference bank", batches)(self._batches(data.images))
        with stage("Reference bank"):
            try:
                in_bank = self.model.remember(tracked, rank, ranks, self._exchange_descriptors)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                device = bank.descriptors_1.device
                raise MemoryError(
                    f"The reference bank of {bank.count_for(len(data.images))} images does not fit into the memory of "
                    f"{device} ({error}). Resume with a smaller one: {_way_out(device)}. No step is lost."
                ) from error
        self._decide_on_matching(data, in_bank)

    def drop_bank(self) -> None:
        """Free the descriptors of the training images."""
        self.model.bank.clear()
        if self._described is not None:  # with max_references, the bank has forgotten some
            self.model.bank.histograms, self.model.bank.foregrounds = self._described

    def _exchange_descriptors(self, spans: list[tuple[int, int, int]]) -> None:
        bank = self.model.bank
        exchange([tensor for tensor in (*bank.descriptors, *bank.scales) if tensor is not None], spans, self.device)

    def on_validation_start(self) -> None:
        """Build the bank that validation compares with."""
        self.build_bank()

    def on_train_end(self) -> None:
        """Leave a model that can predict, also where nothing was validated."""
        self.build_bank()

    def on_fit_end(self) -> None:
        """The same where the trainer had nothing left to train: in a second fit with one Engine."""
        self.build_bank()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the bank and what a resumed training needs to know."""
        super().on_save_checkpoint(checkpoint)
        if self.saves_bank:
            self.build_bank(alone=self.saves_alone)
            checkpoint["state_dict"].update(self.model.bank.state_dict(prefix="model.bank."))
        checkpoint["cpr"] = {"format": CHECKPOINT_FORMAT, "seed": self.seed, "kind": self.resolved_kind}
        if self.held_out:
            checkpoint["cpr"]["held_out"] = self.held_out
        # The thresholds in the checkpoint belong to these, also where a model that names none of its own loads it.
        checkpoint["cpr"]["k"], checkpoint["cpr"]["window_sizes"] = self.model.k, list(self.model.window_sizes)
        checkpoint["cpr"]["blur_sigma"] = self.model.scorer.sigma
        checkpoint["cpr"]["follow_edges"] = self.model.follow_edges
        checkpoint["cpr"]["coherent_matching"] = self.model.coherent_matching
        checkpoint["cpr"]["relative_to_image"] = self.model.relative_to_image
        checkpoint["cpr"]["training_images"] = self._trained_on
        # By which `anomalib-cpr explain` finds the pictures of the references.
        checkpoint["cpr"]["training_paths"] = self.training_paths

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what was decided in training, unless something is wrong with the checkpoint."""
        trainer = getattr(self, "_trainer", None)
        if trainer is not None and trainer.ckpt_path is not None:
            check_file(trainer.ckpt_path)
        check_content(checkpoint, CHECKPOINT_FORMAT)
        self._check_fit(checkpoint["state_dict"], checkpoint.get("anomalib_components_enabled"), checkpoint)
        super().on_load_checkpoint(checkpoint)
        # Some metrics have buffers (AUPRO its limit), so the state of a training with other metrics would not fit.
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("evaluator.")]:
            del state[name]
        if isinstance(self.evaluator, nn.Module):
            state.update(self.evaluator.state_dict(prefix="evaluator."))
        own = checkpoint.get("cpr", {})
        self.seed, self.resolved_kind = own.get("seed"), own.get("kind")
        self.held_out = own.get("held_out", self.held_out)
        self._score_as_trained(own)
        # The trainer reads a checkpoint after `setup`, but before it asks for data.
        if trainer is not None and not trainer.predicting:
            self._hold_out(getattr(trainer, "datamodule", None))
        self._trained_on = own.get("training_images")
        self.training_paths = list(own.get("training_paths", []))

    def _score_as_trained(self, own: dict[str, Any]) -> None:
        """Take from the checkpoint what its thresholds belong to, but for arguments that were given."""
        if self._choose_k:
            self.model.k = own.get("k", USUAL_MATCHING.k)
        if self._choose_windows:
            self.model.window_sizes = tuple(own.get("window_sizes", USUAL_MATCHING.window_sizes))
        if self._default_blur:
            self.model.scorer = Scorer(sigma=own.get("blur_sigma", PAPER_SIGMA)).to(self.device)
        if self._default_outlines:
            self.model.follow_edges = own.get("follow_edges", False)
        if self._choose_coherence:
            self.model.coherent_matching = own.get("coherent_matching", False)
        if self._default_relative:
            self.model.relative_to_image = own.get("relative_to_image", False)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> "Cpr":  # type: ignore[override]  # noqa: ANN401
        """Load a trained model, see anomalib's ``AnomalibModule.load_from_checkpoint``. No code in the file is run.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            args (Any): Of anomalib's method.
            kwargs (Any): Of anomalib's method: ``map_location``, ..., and arguments of the model to be replaced.

        Returns:
            Cpr: The model.

        Raises:
            ValueError: If the file is damaged, of another kind, or holds code.
        """
        if kwargs.get("weights_only", True) is not False:
            check_file(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[return-value]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load weights and bank if all of it fits; otherwise the model stays as it was.

        Args:
            state_dict (Mapping[str, Any]): Of a checkpoint.
            strict (bool): Refuse missing and unknown names.
            assign (bool): Take the tensors over in place of copying them.

        Returns:
            Any: Names that are missing or unknown, if ``strict`` lets them pass.

        Raises:
            RuntimeError: If it does not fit.
        """
        if strict:
            self._check_fit(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _check_fit(
        self,
        state: Mapping[str, Any],
        enabled: Mapping[str, bool] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        absent = [f"{name}." for name, value in (enabled or {}).items() if not value]
        if checkpoint is not None:
            absent.append("evaluator.")  # brought in line below
        expected = {name: value for name, value in self.state_dict().items() if not name.startswith(tuple(absent))}
        given = {name: value for name, value in state.items() if not name.startswith(tuple(absent))}
        problems = [misfit(given, expected, (checkpoint or {}).get("hyper_parameters"))]
        of_bank = self._misfit_of_bank(state)
        if of_bank is not None:
            problems.insert(0, f"The checkpoint's reference bank does not fit the configuration: {of_bank}")
        if any(problems):
            raise RuntimeError(" ".join(filter(None, problems)))

    def _misfit_of_bank(self, state: Mapping[str, Any]) -> str | None:
        """What the bank is going to refuse, asked before anything is copied."""
        parts = {name.removeprefix(BANK): value for name, value in state.items() if name.startswith(BANK)}
        key = bytes(parts.pop(FILE_KEY, torch.zeros(0)).tolist()).hex()
        return self.model.bank.misfit(key, parts)

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

    # --- export: anomalib's own, in a state in which the file scores like the model

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Pickle the model, see anomalib's ``ExportMixin.to_torch``. The pickled one records no gradients."""
        with ready_for_export(self):
            return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # noqa: ANN401
        """Export to ONNX, see anomalib's ``ExportMixin.to_onnx``. One file, as long as ONNX allows it (2 GB)."""
        kwargs.setdefault("external_data", not fits_one_file(self))
        kwargs.setdefault("opset_version", OPSET)
        with ready_for_export(self):
            return super().to_onnx(*args, **kwargs)

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to OpenVINO, see anomalib's ``ExportMixin.to_openvino``. The file asks for float32 arithmetic."""
        to_fp16 = compression_type == CompressionType.FP16
        path = super().to_openvino(
            export_root, model_file_name, input_size, None if to_fp16 else compression_type, **kwargs
        )
        keep_full_precision(path, compress_to_fp16=to_fp16)
        return path

    def _compress_ov_model(self, model: Any, compression_type: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Compress the networks, and neither the codebook nor the foreground."""
        if compression_type == CompressionType.INT8:
            return compress_weights(model)
        return super()._compress_ov_model(model, compression_type, *args, **kwargs)

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # noqa: ANN401
        """Quantise only the convolutions, on the images that anomalib would take."""
        return quantise(model, datamodule)

    # --- helpers

    @property
    def copies_in_bank(self) -> int:
        """How many consecutive images of the bank show one photograph; 1 if ``max_references`` has left some out."""
        return 1 + len(self.rotations) if len(self.model.bank) == len(self.training_paths) else 1

    @property
    def _ranks(self) -> int:
        """Number of processes."""
        trainer = getattr(self, "_trainer", None)
        return 1 if trainer is None else trainer.world_size

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel is not to broadcast before each batch: all buffers.

        Ours are equal on all ranks at any time. And ranks could not evaluate different numbers of batches, nor could
        the bank stay in main memory.
        """
        return [name for name, _ in self.named_buffers()]

    @property
    def _pairs_k(self) -> int:
        """A pair of the training is an image and one of its nearest so many, whatever predictions will use."""
        return USUAL_MATCHING.k if self._choose_k else self.model.k

    @property
    def _preparation_batch(self) -> int:
        """Images per batch where nothing is learned: memory stays low, and 8 keep a GPU busy enough."""
        return 8

    def _batches(self, images: TrainingImages) -> Iterator[Tensor]:
        return images.batches(self._preparation_batch, self.device)

    def _track(self, description: str, total: int) -> Any:  # noqa: ANN401
        enabled = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        return progress_bar(description, total, enabled=enabled)


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


def _way_out(device: torch.device) -> str:
    return SMALLER_BANK if device.type == "cpu" else SMALLER_BANK + ON_HOST
