# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr check``: reads every pixel of the images in folders, and says what is wrong with them."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from .image_files import ImageFile, examine_all, images_in, missing_masks
from .progress import progress_bar

MASK_FOLDERS = {"ground_truth", "gt", "mask", "masks"}
LARGE_SHARE = 0.5  # of an image that a defect hardly covers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``anomalib-cpr check``.

    Args:
        parser (argparse.ArgumentParser): To be extended.
    """
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of images, or single files")


def check(folders: list[Path]) -> tuple[list[ImageFile], list[str]]:
    """Read all images of some folders.

    Args:
        folders (list[Path]): Folders, with all folders in them, or files.

    Returns:
        tuple[list[ImageFile], list[str]]: All files, and remarks on what can be read but should be looked at.

    Raises:
        FileNotFoundError: If a folder does not exist, or there is no image in any.
    """
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist.")
    paths = list(dict.fromkeys(path for folder in folders for path in images_in(folder)))
    if not paths:
        raise FileNotFoundError(f"There are no images in {', '.join(map(str, folders))}.")
    files = examine_all(paths, decode=True, track=progress_bar("Reading", len(paths), enabled=True))
    remarks = []
    images = [file for file in files if file.size and not _is_mask(file.path)]
    sizes = Counter(file.size for file in images if file.size)
    if len(sizes) > 1:
        listing = ", ".join(f"{h}x{w} ({count})" for (h, w), count in sizes.most_common(5))
        remarks.append(
            f"Images of {len(sizes)} sizes (height x width): {listing}{', …' if len(sizes) > 5 else ''}. All are "
            "stretched to the size of the model."
        )
    turned = [file.path for file in images if file.orientation != 1]
    if turned:
        remarks.append(
            f"Images with an EXIF rotation, which anomalib ignores ({len(turned)}): {_some(turned)}. Rotate the "
            "pixels, if these lie in another direction than the rest."
        )
    remarks += _remarks_on_masks([file for file in files if file.size and not file.problem and _is_mask(file.path)])
    for folder in folders:
        files += missing_masks(folder)
    return files, remarks


def _remarks_on_masks(masks: list[ImageFile]) -> list[str]:
    empty, large, other = [], [], []
    for mask in masks:
        with Image.open(mask.path) as image:
            share = float((np.asarray(image.convert("L")) > 0).mean())
        if share == 0:
            empty.append(mask.path)
        if share > LARGE_SHARE:
            large.append(mask.path)
        image_size = _size_of_image(mask.path)
        if image_size is not None and image_size != mask.size:
            other.append(mask.path)
    remarks = []
    if empty:
        remarks.append(f"Empty masks, where nothing counts as found ({len(empty)}): {_some(empty)}.")
    if large:
        remarks.append(f"Masks that cover most of the image; are they inverted ({len(large)})? {_some(large)}.")
    if other:
        remarks.append(f"Masks of another size than their image, which are stretched ({len(other)}): {_some(other)}.")
    return remarks


def _size_of_image(mask: str) -> tuple[int, int] | None:
    """Size of the image that a mask of MVTec AD's layout belongs to; None where there is no such image."""
    path = Path(mask)
    folder = path.parents[2] / "test" / path.parent.name if len(path.parents) > 2 else path.parent
    for image in folder.glob(f"{path.stem.removesuffix('_mask')}.*"):
        return examine_all([str(image)])[0].size
    return None


def _is_mask(path: str) -> bool:
    return not MASK_FOLDERS.isdisjoint(Path(path).parts)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0 if all images can be read, 1 if not, 2 if there are none.
    """
    try:
        files, remarks = check(arguments.folders)
    except FileNotFoundError as error:
        print(f"anomalib-cpr check: {error}")
        return 2
    bad = [file for file in files if file.problem]
    for file in bad:
        print(f"{file.path}: {file.problem}")
    for remark in remarks:
        print(f"Note: {remark}")
    print(f"{len(files)} files, {len(bad)} to repair or remove." if bad else f"{len(files)} files, all can be read.")
    return 1 if bad else 0
