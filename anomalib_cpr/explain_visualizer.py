# SPDX-License-Identifier: Apache-2.0
"""The visualizer that explains each decision during ``anomalib test`` and ``anomalib predict``."""

from pathlib import Path
from typing import Any, cast

from anomalib.data import ImageBatch
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from .explain import PATCHES, explain, pixel_threshold
from .explain_picture import save_explanation
from .gallery_pictures import ImageReader, find_training_images, identify_gallery, reference_pictures
from .lightning_model import Cpr


class ExplanationVisualizer(ImageVisualizer):
    """anomalib's pictures, and beside them, in ``explanations/``, one that explains each decision of Cpr.

    Drawing takes a second or two per image.

    Args:
        limit (int | None): Explain at most so many images; None explains all.
        patches (int): Hot patches to follow in each image.
        train_images (str | Path | None): Folder of the training images, if they are no longer where they were.
        output_dir (str | Path | None): Folder of all pictures; by default the run's ``images``.

    Example:
        In a configuration of ``anomalib test``::

            model:
              class_path: Cpr
              init_args:
                visualizer:
                  class_path: anomalib_cpr.ExplanationVisualizer
    """

    def __init__(
        self,
        limit: int | None = None,
        patches: int = PATCHES,
        train_images: str | Path | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        super().__init__(output_dir=output_dir)
        self.limit = limit
        self.patches = patches
        self.train_images = Path(train_images) if train_images is not None else None
        self._explained = 0
        self._files: list[Path | None] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pictures of the gallery."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pictures of the gallery."""
        self._start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,  # noqa: ANN401 - anomalib's signature
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw anomalib's pictures and the explanations of a batch."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        module = cast("Cpr", pl_module)
        for index in range(len(batch.image)):
            if self.limit is not None and self._explained >= self.limit:
                return
            self._explained += 1
            self._explain(trainer, module, batch, index)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, Cpr):
            raise TypeError(f"ExplanationVisualizer explains Cpr; {type(module).__name__} works otherwise.")
        self._explained = 0
        paths = module.training_paths
        if not paths:  # a checkpoint that does not name them; the data module may
            samples = getattr(getattr(getattr(trainer, "datamodule", None), "train_data", None), "samples", None)
            paths = [] if samples is None else [str(path) for path in samples["image_path"]]
        reader = ImageReader(module.pre_processor, module.device, module.rotations)
        self._files = identify_gallery(module.model, reader, find_training_images(paths, self.train_images))

    def _explain(self, trainer: Trainer, module: Cpr, batch: ImageBatch, index: int) -> None:
        image = cast("Tensor", batch.image)[index : index + 1]
        reader = ImageReader(module.pre_processor, image.device, module.rotations)
        explanation = explain(module.model, image.as_subclass(Tensor), self.patches, module.copies_in_bank)
        masks = batch.gt_mask
        source = batch.image_path[index] if batch.image_path is not None else f"{self._explained:04}.png"
        datamodule = getattr(trainer, "datamodule", None)
        file = generate_output_filename(
            input_path=source,
            output_path=Path(str(self.output_dir)) / "explanations",
            dataset_name=getattr(datamodule, "name", None),
            category=getattr(datamodule, "category", None),
        )
        save_explanation(
            explanation,
            reader.denormalize(image[0].as_subclass(Tensor)),
            reference_pictures(module.model, reader, self._files, explanation.references),
            Path(file).with_suffix(".png"),
            codebook=module.model.global_retriever.codebook,
            title="/".join(Path(source).parts[-3:]),
            mask=masks[index].as_subclass(Tensor).reshape(image.shape[-2:]).bool().cpu() if masks is not None else None,
            threshold=pixel_threshold(module),
        )
