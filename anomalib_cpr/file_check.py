# SPDX-License-Identifier: Apache-2.0
"""Names files that cannot be read: images before anything is computed, and whatever fails to be read all the same."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from .checkpoint_check import check_file
from .image_files import ImageFile, complaint, examine_all, files_of, images_in, missing_masks
from .progress import progress_bar

# What anomalib answers, without a name, to links that lead nowhere and to masks that are missing.
COLLECTION_ERRORS = (OSError, ValueError, RuntimeError)


class FileCheck(Callback):
    """Looks at the header and the end of every image file before the first batch, at every pixel after an error.

    So a batch of 10,000 images with one upload that was cut off is refused at once, with the name of the file; and one
    that is damaged in its middle is named, with all others like it, when reading it has failed.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unreadable training and validation images; warn of test images, which may not be needed."""
        del pl_module
        train, validation = _fit_datasets(trainer)
        if any(hasattr(dataset, "__len__") and len(dataset) == 0 for dataset in train):
            raise ValueError("There are no training images. Check `root`, `category` and the folder of good images.")
        _refuse(trainer, train, "training images")
        _refuse(trainer, validation, "validation images and masks")
        test = [getattr(getattr(trainer, "datamodule", None), "test_data", None)]
        known = set(_paths([*train, *validation]))
        others = [path for path in _paths(test) if path not in known]
        problem = complaint(_examine(trainer, others, "test images and masks"), "test images and masks")
        if problem:
            rank_zero_warn(problem)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unreadable images, unless that was done when training began."""
        del pl_module
        if trainer.state.fn == TrainerFn.VALIDATING:
            _refuse(trainer, _datasets(trainer.val_dataloaders), "validation images and masks")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unreadable images."""
        del pl_module
        _refuse(trainer, _datasets(trainer.test_dataloaders), "test images and masks")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse unreadable images."""
        del pl_module
        _refuse(trainer, _datasets(trainer.predict_dataloaders), "images")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say which file it was, if the data loader failed, or the checkpoint could not be loaded.

        The error keeps its type and place and gets another message: one raised from here would keep Lightning from
        putting the trainer in order.
        """
        del pl_module
        if not isinstance(exception, Exception):
            return
        root = getattr(getattr(trainer, "datamodule", None), "root", None)
        problem: str | None = None
        if _comes_from(exception, "lightning.pytorch.trainer.connectors.checkpoint_connector"):
            problem = _trouble_with_checkpoint(trainer)
        elif _comes_from(exception, "torch.utils.data"):
            files = _examine(trainer, _paths(_current_datasets(trainer)), "images", decode=True)
            problem = complaint(files, "images and masks", exception)
        elif root and isinstance(exception, COLLECTION_ERRORS) and _comes_from(exception, "anomalib.data"):
            files = examine_all(list(images_in(root)))
            problem = complaint([*files, *missing_masks(root)], f"images and masks below {root}", exception)
        if problem:
            exception.args = (problem,)


def _refuse(trainer: Trainer, datasets: Iterable[Any], what: str) -> None:
    problem = complaint(_examine(trainer, _paths(datasets), what), what)
    if problem:
        raise ValueError(problem)


def _examine(trainer: Trainer, paths: list[str], what: str, *, decode: bool = False) -> list[ImageFile]:
    enabled = trainer.is_global_zero and trainer.progress_bar_callback is not None
    track = progress_bar(f"Files of {what}", len(paths), enabled=enabled)
    return examine_all(paths, decode=decode, track=track)


def _trouble_with_checkpoint(trainer: Trainer) -> str | None:
    try:
        if trainer.ckpt_path is not None:
            check_file(trainer.ckpt_path)
    except ValueError as error:
        return str(error)
    return None


def _paths(datasets: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(path for dataset in datasets for path in files_of(dataset)))


def _datasets(loaders: Any) -> list[Any]:  # noqa: ANN401 - what Lightning takes: a loader, several, a data module
    parts = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return [part.dataset for part in parts if hasattr(part, "dataset")]


def _fit_datasets(trainer: Trainer) -> tuple[list[Any], list[Any]]:
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        return [getattr(datamodule, "train_data", None)], [getattr(datamodule, "val_data", None)]
    # Lightning has no public way
    loop = trainer.fit_loop
    return (
        _datasets(loop._data_source.instance),  # noqa: SLF001
        _datasets(loop.epoch_loop.val_loop._data_source.instance),  # noqa: SLF001
    )


def _current_datasets(trainer: Trainer) -> list[Any]:
    if trainer.state.fn == TrainerFn.FITTING:
        train, validation = _fit_datasets(trainer)
        return [*train, *validation]
    loaders = {
        TrainerFn.VALIDATING: trainer.val_dataloaders,
        TrainerFn.TESTING: trainer.test_dataloaders,
        TrainerFn.PREDICTING: trainer.predict_dataloaders,
    }
    return _datasets(loaders.get(trainer.state.fn))  # type: ignore[arg-type]


def _comes_from(exception: BaseException, module: str) -> bool:
    """Whether a module, or a part of it, is on an error's way up."""
    frame = exception.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith(module):
            return True
        frame = frame.tb_next
    return False
