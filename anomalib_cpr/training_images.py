# SPDX-License-Identifier: Apache-2.0
"""The training images, each decoded once and kept in memory as the pre-processor leaves them."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data.utils import read_image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .appearance import rotate
from .augmentation import hand_over
from .memory import available_bytes, scarcity

logger = logging.getLogger(__name__)

DEVICE_SHARE = 0.2  # of the free memory of a device that training images may take: the bank and the steps need the rest


class TrainingImages:
    """Images in 0..1, and the normalisation that the backbone expects.

    Args:
        images (Tensor): Of shape ``(count, 3, height, width)``, float32 in 0..1.
        normalize (v2.Normalize | None): Normalisation of the pre-processor; None if it has none.
        paths (Sequence[str]): Where each image was read from, as far as that is known.
        copies (int): So many consecutive images show one photograph, see :func:`with_turned_copies`.
    """

    def __init__(
        self, images: Tensor, normalize: v2.Normalize | None, paths: Sequence[str] = (), copies: int = 1
    ) -> None:
        self.images = images
        self.paths = list(paths)
        self.copies = copies
        self._normalize = normalize
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Number of images."""
        return self.images.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.images.shape[-2:]
        return height, width

    @property
    def photographs(self) -> "TrainingImages":
        """The images without their turned copies, in the same memory."""
        if self.copies == 1:
            return self
        return TrainingImages(self.images[:: self.copies], self._normalize, self.paths[:: self.copies])

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images as the pre-processor does: ``(batch, 3, height, width)`` in 0..1 to the same shape."""
        if self._normalize is None:
            return images
        # As v2.Normalize, which brings mean and deviation to a GPU in each call, and waits there for all work at hand.
        if images.device not in self._statistics:
            mean, deviation = torch.tensor([self._normalize.mean, self._normalize.std], device=images.device)
            self._statistics[images.device] = (mean[:, None, None], deviation[:, None, None])
        mean, deviation = self._statistics[images.device]
        return images.sub(mean).div_(deviation)

    def to_device(self, device: torch.device) -> None:
        """Move the images to where the steps take them from, if they leave most of its memory free.

        Args:
            device (torch.device): Where the model is.
        """
        available = available_bytes(device)
        if available is not None and self.images.nbytes <= DEVICE_SHARE * available:
            self.images = self.images.to(device)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Images in 0..1 on a device, ``(len(indices), 3, height, width)``."""
        return self.images[indices if self.images.device.type == "cpu" else hand_over(indices, device)].to(device)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """All images in order, normalised, ``(batch, 3, height, width)`` each."""
        for images in self.images.split(batch_size):
            yield self.normalize(images.to(device))


@contextmanager
def _workers_mourned() -> Iterator[None]:
    """Say what to do where a process that reads images dies; of itself it leaves only its number.

    Around everything, because the signal of its death may arrive while something else is done.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" not in text or not ("exited unexpectedly" in text or "killed by signal" in text):
            raise
        raise RuntimeError(
            f"A process that reads training images died: {text.strip()} Often memory, or shared memory (/dev/shm), ran "
            "out: use fewer (num_workers of the data module; with 0, the main process reads, and names what it cannot "
            "read). Nothing was trained yet."
        ) from error


@_workers_mourned()
def load_training_images(
    loader: DataLoader,
    transform: nn.Module | None,
    seed: int,
    track: Callable[[Iterable], Iterable] = iter,
) -> TrainingImages:
    """Read every image of a data loader once.

    The data module's own augmentations are respected: they are drawn once per image, from the seed, as for anomalib's
    other models with a memory bank.

    Args:
        loader (DataLoader): The user's training loader; its data set and number of workers are used.
        transform (nn.Module | None): Transform of the pre-processor. Its final normalisation is kept apart.
        seed (int): Of the random augmentations.
        track (Callable): Wraps the iteration, for a progress bar.

    Returns:
        TrainingImages: The images.

    Raises:
        ValueError: If there are fewer than two images, or the images differ in size.
        RuntimeError: If an image cannot be read; names the file.
    """
    dataset = _RepeatableDataset(loader.dataset, seed)
    if len(dataset) == 0:
        raise ValueError("There are no training images. Check `root`, `category` and the folder of good images.")
    resize, normalize = split_transform(transform)
    reader = DataLoader(
        dataset, batch_size=None, num_workers=loader.num_workers, generator=torch.Generator().manual_seed(seed)
    )
    images: Tensor | None = None
    paths: list[str] = []
    count = 0
    for index, (image, anomalous) in enumerate(track(reader)):
        if anomalous:
            continue
        paths.append(dataset.path(index))
        prepared = resize(image[None]).float()
        if images is None:
            needed = len(dataset) * prepared[0].nbytes
            warning = scarcity(needed, torch.device("cpu"), "The training images", "train on fewer or smaller images")
            if warning:
                logger.warning(warning)
            images = torch.empty(len(dataset), *prepared.shape[1:])
        if prepared.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"Training images differ in size after pre-processing: {tuple(prepared.shape[-2:])} and "
                f"{tuple(images.shape[-2:])}. Let the pre-processor resize them: "
                "Cpr.configure_pre_processor((320, 320))."
            )
        images[count] = prepared[0]
        count += 1
    if count < len(dataset):
        logger.warning(
            "%d of %d training images are labelled anomalous and are left out.", len(dataset) - count, len(dataset)
        )
    if images is None or count < 2:
        raise ValueError(
            f"There is only {count} training image without anomaly; CPR compares images with one another and needs at "
            "least 2, better 50 or more."
            if count
            else "All training images are labelled anomalous; CPR learns from good ones."
        )
    return TrainingImages(images[:count], normalize, paths)


def with_turned_copies(images: TrainingImages, rotations: Sequence[float]) -> TrainingImages:
    """Add copies of the images, turned by some angles.

    A part that lies at any angle finds references at nearly its own angle only among many images, and a few degrees
    more are cells beside the window at the ends of a long part. Copies fill the gaps.

    Args:
        images (TrainingImages): The images.
        rotations (Sequence[float]): Angles in degrees, counter-clockwise.

    Returns:
        TrainingImages: Each image, followed by its copies.
    """
    if not rotations:
        return images
    copies = 1 + len(rotations)
    turned = images.images.new_empty(len(images) * copies, *images.images.shape[1:])
    turned[::copies] = images.images
    for place, degrees in enumerate(rotations, start=1):
        for index, image in enumerate(images.images):  # one at a time: all at once take as much memory again
            turned[index * copies + place] = turn(image, degrees)
    paths = [path for path in images.paths for _ in range(copies)]
    return TrainingImages(turned, images._normalize, paths, copies)  # noqa: SLF001


def turn(image: Tensor, degrees: float) -> Tensor:
    """Turn an image about its centre; what comes in at the corners is the image mirrored at its edges.

    Args:
        image (Tensor): Of shape ``(channels, height, width)``.
        degrees (float): Angle, counter-clockwise.

    Returns:
        Tensor: Same shape.
    """
    size = (image.shape[-2], image.shape[-1])
    return rotate(image[None], image.new_tensor([degrees]), size, outside="reflection")[0]


def read_colours(file: str | Path) -> Tensor:
    """Read an image file as anomalib's data sets do.

    Args:
        file (str | Path): The file.

    Returns:
        Tensor: Colours in 0..1, ``(3, height, width)``.
    """
    image = torch.as_tensor(read_image(file, as_tensor=True)).as_subclass(Tensor).float()
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def split_transform(transform: nn.Module | None) -> tuple[Callable[[Tensor], Tensor], v2.Normalize | None]:
    """Part a pre-processor's transform into what comes before its final normalisation, and the normalisation.

    Augmentation and synthetic anomalies belong between the two: they work on colours in 0..1.

    Args:
        transform (nn.Module | None): The transform, usually a Compose.

    Returns:
        tuple[Callable[[Tensor], Tensor], v2.Normalize | None]: Both parts; None if it ends otherwise.
    """
    parts = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform] if transform else []
    normalize = parts.pop() if parts and isinstance(parts[-1], v2.Normalize) else None
    return (v2.Compose(parts) if parts else v2.Identity()), normalize


class _RepeatableDataset(Dataset):
    """Yields image and label, the same for any number of workers; names a file that cannot be read."""

    def __init__(self, dataset: Any, seed: int) -> None:  # noqa: ANN401 - any map-style data set of image items
        samples = getattr(dataset, "samples", None)
        if samples is not None and "mask_path" in samples and samples["mask_path"].isna().any():
            # With pandas 3, anomalib 2.7's MVTec3D leaves the mask of a training image NaN, which its own validation
            # then refuses. Good images have no mask.
            dataset.samples = samples.fillna({"mask_path": ""})
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        state = random.getstate(), np.random.get_state()  # noqa: NPY002 - augmentations may use the global generators
        try:
            with torch.random.fork_rng(devices=[]):
                seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
                item = self.dataset[index]
        except Exception as error:
            raise RuntimeError(
                f"Training image {self.path(index)} cannot be read: {error}. Repair or remove it."
            ) from error
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
        image = item.image
        if image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        return image.as_subclass(Tensor), bool(item.gt_label) if item.gt_label is not None else False

    def path(self, index: int) -> str:
        """File of an image, or its number where the data set does not tell."""
        samples = getattr(self.dataset, "samples", None)
        if samples is not None and "image_path" in samples:
            return str(samples.iloc[index].image_path)
        return f"number {index}"
