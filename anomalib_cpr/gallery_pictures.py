# SPDX-License-Identifier: Apache-2.0
"""Pictures of the gallery, which a checkpoint names but does not hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .global_retrieval import assign_words
from .progress import progress_bar
from .torch_model import CprModel
from .training_images import read_colours, split_transform, turn

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def find_training_images(paths: Sequence[str], folder: Path | None = None) -> list[Path | None]:
    """Find the files of the training images.

    Args:
        paths (Sequence[str]): Where they were when the model was trained.
        folder (Path | None): Where they are now, if they were moved. Files are recognised by their names; where nothing
            is known of them, all images of the folder are meant.

    Returns:
        list[Path | None]: One for each path, None where the file was not found; or the files of the folder.

    Raises:
        FileNotFoundError: If a folder is given that does not exist.
    """
    if folder is None:
        return [Path(path) if Path(path).is_file() else None for path in paths]
    by_name = {file.name: file for file in image_files(folder)}
    return [by_name.get(Path(path).name) for path in paths] if paths else list(by_name.values())


@torch.no_grad()
def identify_gallery(model: CprModel, reader: "ImageReader", files: Sequence[Path | None]) -> list[Path | None]:
    """Tell which file is which image of the gallery.

    A model that keeps only some of its training images (``max_references``) does not say which; their histograms do.

    Args:
        model (CprModel): The fitted model.
        reader (ImageReader): Of its pre-processor.
        files (Sequence[Path | None]): Of the training images.

    Returns:
        list[Path | None]: One for each image of the gallery.
    """
    gallery = model.bank.histograms
    if len(files) == len(gallery):
        return list(files)
    known = [file for file in files if file is not None]
    if not known:
        return [None] * len(gallery)
    track = progress_bar("Looking for the references", len(known), enabled=True)
    own = torch.cat(
        [
            model.global_retriever(model.feature_extractor.finest(reader.normalize(reader.copies(file))))
            for file in track(known)
        ]
    )
    nearest = torch.cdist(gallery.flatten(1).float(), own.flatten(1).float(), p=1).argmin(1)
    return [known[int(index) // len(reader.angles)] for index in nearest]


def image_files(path: Path) -> list[Path]:
    """The image files of a folder, sorted; a file stands for itself.

    Args:
        path (Path): File or folder.

    Returns:
        list[Path]: The files.

    Raises:
        FileNotFoundError: If there is no such path, or no image in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"There are no images in {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return files


class ImageReader:
    """Reads image files as the model sees them.

    Args:
        pre_processor (nn.Module | None): The model's.
        device (torch.device): Where normalised images are wanted.
        rotations (Sequence[float]): Angles of the turned copies that the gallery holds too, in degrees.
    """

    def __init__(self, pre_processor: nn.Module | None, device: torch.device, rotations: Sequence[float] = ()) -> None:
        self.resize, self._normalize = split_transform(getattr(pre_processor, "transform", None))
        self.device = device
        self.angles = (0.0, *rotations)

    def colours(self, file: Path) -> Tensor:
        """Resized image in 0..1, ``(3, height, width)``, on the CPU."""
        return self.resize(read_colours(file)[None])[0]

    def copies(self, file: Path) -> Tensor:
        """The image and its turned copies in 0..1, ``(len(angles), 3, height, width)``, on the CPU."""
        colours = self.colours(file)
        return torch.stack([turn(colours, degrees) if degrees else colours for degrees in self.angles])

    def normalize(self, colours: Tensor) -> Tensor:
        """As the backbone expects it: ``(3, height, width)`` or a batch to ``(batch, 3, height, width)``."""
        image = (colours if colours.ndim == 4 else colours[None]).to(self.device)
        return image if self._normalize is None else self._normalize(image)

    def denormalize(self, image: Tensor) -> Tensor:
        """Colours in 0..1 of a normalised image, ``(3, height, width)``, on the CPU."""
        image = image.detach().float().cpu()
        if self._normalize is not None:
            mean, std = (torch.tensor(value)[:, None, None] for value in (self._normalize.mean, self._normalize.std))
            image = image * std + mean
        return image.clamp(0, 1)


@dataclass(frozen=True)
class ReferencePicture:
    """What can be shown of a reference.

    Attributes:
        name (str): Of the file.
        colours (Tensor | None): In 0..1, ``(3, height, width)``; None where the file was not found.
        words (Tensor | None): Its word map.
        as_trained (bool): Whether the picture gives the histograms that the gallery holds.
    """

    name: str
    colours: Tensor | None = None
    words: Tensor | None = None
    as_trained: bool = True


@torch.no_grad()
def reference_pictures(
    model: CprModel, reader: ImageReader, files: Sequence[Path | None], references: Sequence[int]
) -> list[ReferencePicture]:
    """Read the references, and make sure that they are the images of the training.

    Args:
        model (CprModel): The fitted model.
        reader (ImageReader): Of its pre-processor.
        files (Sequence[Path | None]): Of the whole gallery.
        references (Sequence[int]): Indices into the gallery.

    Returns:
        list[ReferencePicture]: One per reference.
    """
    pictures = []
    for index in references:
        file = files[index]
        if file is None:
            pictures.append(ReferencePicture(name=f"training image {index}"))
            continue
        copies = reader.copies(file)
        features = model.feature_extractor.finest(reader.normalize(copies)).float()
        own = model.global_retriever(features)
        # Other hardware moves a few cells to another word; another image moves most of them.
        differences = (own - model.bank.histograms[index].to(own)).abs().sum((1, 2)) / (2 * own.shape[1])
        copy = int(differences.argmin())
        words = assign_words(features, model.global_retriever.codebook)[copy].cpu()
        angle = f", turned by {reader.angles[copy]:g}°" if copy else ""
        pictures.append(
            ReferencePicture(file.name + angle, copies[copy], words, as_trained=float(differences[copy]) < 0.05)
        )
    return pictures
