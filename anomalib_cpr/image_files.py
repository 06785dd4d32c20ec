# SPDX-License-Identifier: Apache-2.0
"""Image files before they are read: which cannot be, and which would be read as something else than they show.

anomalib reads an image by ``PIL.Image.open(path).convert("RGB")``. A file that is cut off then fails without its name,
after everything before it; a grey image of 16 bits fails not at all, but is clipped at 255 and so all white, and a
float image of 0..1 is all black.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data.utils import LabelName
from anomalib.data.utils.image import is_image_file
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

NORMAL_FOLDERS = {"good", "ok"}  # of MVTec AD and of BTAD
SHOWN = 10  # files that a message names
THREADS = 8  # Pillow decodes without holding Python's lock, and a network drive answers several questions at a time
TAIL = 64  # bytes; writers may append a little after the end of an image
END_MARKS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
ORIENTATION = 0x0112  # EXIF tag
CLIPPED_MODES = ("I", "F")  # Pillow's modes I, I;16, I;16B, ... and F, whose conversion to RGB clips to 0..255


@dataclass(frozen=True)
class ImageFile:
    """What is known of a file.

    Attributes:
        path (str): Where it lies.
        size (tuple[int, int] | None): Height and width in pixels; None if it cannot be opened.
        mode (str): Pillow's name of its kind of pixels; empty if it cannot be opened.
        orientation (int): Of EXIF; 1 is upright, as the pixels are stored.
        problem (str | None): Why no right image can be read from it.
    """

    path: str
    size: tuple[int, int] | None = None
    mode: str = ""
    orientation: int = 1
    problem: str | None = None


def examine(path: str | Path, *, decode: bool = False) -> ImageFile:
    """Look at a file.

    Args:
        path (str | Path): The file.
        decode (bool): Read every pixel. Otherwise header and end of PNG and JPEG files have to do; pixels are read
            where these give a reason, and of other formats.

    Returns:
        ImageFile: What was found; nothing that is wrong with a file raises an error.
    """
    try:
        with Image.open(path) as image:
            height, width = image.height, image.width
            numbers = image.mode.partition(";")[0] in CLIPPED_MODES
            if decode or numbers or not _ends_well(path, image.format):
                image.load()
            problem = _clipping(image) if numbers else None
            # A PNG would be decoded in search of EXIF that may follow the pixels.
            orientation = image.getexif().get(ORIENTATION, 1) if decode or image.format != "PNG" else 1
            return ImageFile(str(path), (height, width), image.mode, int(orientation), problem)
    except Exception as error:  # decoders answer damaged files with any of a dozen errors
        return ImageFile(str(path), problem=_reason(path, error))


def examine_all(
    paths: Sequence[str], *, decode: bool = False, track: Callable[[Iterable], Iterable] = iter
) -> list[ImageFile]:
    """Look at many files at a time.

    Args:
        paths (Sequence[str]): The files.
        decode (bool): Read every pixel, see :func:`examine`.
        track (Callable): Wraps the iteration, for a progress bar.

    Returns:
        list[ImageFile]: One for each path, in their order.
    """
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        return list(track(pool.map(lambda path: examine(path, decode=decode), paths)))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, nobody waits for the rest


def complaint(files: Iterable[ImageFile], what: str, error: Exception | None = None) -> str | None:
    """One message about everything that is wrong.

    Args:
        files (Iterable[ImageFile]): From :func:`examine_all`.
        what (str): What the files are, e.g. "training images".
        error (Exception | None): What they led to, if it came to that.

    Returns:
        str | None: The message; None if nothing is wrong.
    """
    files = list(files)
    bad = [file for file in files if file.problem]
    if not bad:
        return None
    lines = [f"{len(bad)} of {len(files)} {what} cannot be used:"]
    lines += [f"  {file.path}: {file.problem}" for file in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  … and {len(bad) - SHOWN} more")
    lines.append("Repair or remove them. `anomalib-cpr check FOLDER` reads every pixel of all images in a folder.")
    if error is not None:
        last = str(error).strip().splitlines()[-1:]
        lines.append(f"The error was {type(error).__name__}: {''.join(last)}")
    return "\n".join(lines)


def files_of(dataset: Any) -> list[str]:  # noqa: ANN401 - any data set
    """Files that a data set of anomalib reads by Pillow, in the order of its items: images, then masks.

    Args:
        dataset (Any): A data set, a subset of one, or several in a row.

    Returns:
        list[str]: Paths; empty where it is not anomalib that reads them, or nothing is known.
    """
    items = _items(dataset)
    return [image for image, _ in items] + [mask for _, mask in items if mask]


def _items(dataset: Any) -> list[tuple[str, str]]:  # noqa: ANN401
    """Image and mask of each item; an empty path where it has no mask."""
    if isinstance(dataset, Subset):
        items = _items(dataset.dataset)
        return [items[index] for index in dataset.indices] if items else []
    if isinstance(dataset, ConcatDataset):
        return [item for part in dataset.datasets for item in _items(part)]
    reader = getattr(type(dataset), "__getitem__", None)
    if not getattr(reader, "__module__", "").startswith("anomalib."):
        return []  # it may read what Pillow cannot
    if hasattr(dataset, "image_filenames"):
        return [(str(path), "") for path in dataset.image_filenames]
    samples = getattr(dataset, "samples", {})
    images = [str(path) for path in samples.get("image_path", [])]
    masks, labels = samples.get("mask_path", [""] * len(images)), samples.get("label_index", [0] * len(images))
    # Masks of anomalous images only: anomalib opens no others.
    return [
        (image, str(mask) if label == LabelName.ABNORMAL and isinstance(mask, (str, Path)) else "")
        for image, mask, label in zip(images, masks, labels, strict=True)
    ]


def images_in(folder: str | Path) -> Iterator[str]:
    """Files below a folder whose names end like those of images, also links that lead nowhere.

    Args:
        folder (str | Path): A folder, or a file.

    Yields:
        str: Paths in alphabetical order. Links to folders are not followed, so loops end.
    """
    if not Path(folder).is_dir():
        yield str(folder)
        return
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (str(Path(parent) / name) for name in sorted(names) if is_image_file(name))


def missing_masks(root: str | Path) -> list[ImageFile]:
    """Defects without a mask, in folders of MVTec AD's layout.

    Args:
        root (str | Path): Where ``test/<defect>/<name>.png`` and ``ground_truth/<defect>/<name>_mask.png`` lie, or a
            folder above.

    Returns:
        list[ImageFile]: The masks that are missing.
    """
    found = []
    for test in sorted(Path(root).rglob("test")):
        truth = test.parent / "ground_truth"
        for defect in sorted(test.iterdir()) if truth.is_dir() or (test.parent / "train").is_dir() else []:
            if not defect.is_dir() or defect.name in NORMAL_FOLDERS:
                continue
            names = {path.stem.removesuffix("_mask") for path in (truth / defect.name).glob("*")}
            for image in sorted(defect.iterdir()):
                if is_image_file(image) and image.stem not in names:
                    mask = truth / defect.name / f"{image.stem}_mask.png"
                    found.append(ImageFile(str(mask), problem=f"the mask of {image} is missing."))
    return found


def _ends_well(path: str | Path, image_format: str | None) -> bool:
    """Whether the last bytes are known to be those of a complete file; formats without an end mark tell by decoding."""
    mark = END_MARKS.get(image_format or "")
    if mark is None:
        return False
    with Path(path).open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL))
        return mark in file.read()


def _clipping(image: Image.Image) -> str | None:
    """What the conversion to 8 bits would make of numbers that are not 0..255."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        return f"it has {int((~np.isfinite(values)).sum())} pixels that are NaN or infinite. Replace them by numbers."
    least, most = values.min(), values.max()
    way_out = "Convert it to 8 bits per channel."
    if least < 0 or most > 255:
        return f"its values, {least:g} to {most:g}, would be clipped to 0..255. {way_out}"
    if image.mode == "F" and 0 < most <= 1:
        return f"its values, {least:g} to {most:g}, are taken for 0..255, so it would be black. {way_out}"
    return None


def _reason(path: str | Path, error: Exception) -> str:
    file = Path(path)
    try:
        if file.stat().st_size == 0:
            return "it is empty (0 bytes)"
    except OSError as other:
        kind = "a link that leads nowhere" if file.is_symlink() else "not accessible"
        return f"it is {kind} ({other.strerror})"
    if isinstance(error, Image.UnidentifiedImageError):
        with file.open("rb") as stream:
            start = stream.read(16)
        return f"it is not an image that Pillow knows (it begins with {start!r})"
    return f"{type(error).__name__}: {error}"
