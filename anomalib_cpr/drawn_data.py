# SPDX-License-Identifier: Apache-2.0
"""A data set that draws itself: for a first try, for demonstrations and for tests, without a download."""

import json
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from anomalib.data import MVTecAD
from anomalib.data.utils import TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from lightning.pytorch.utilities import rank_zero_info
from torchvision.transforms.v2 import Transform
from tqdm.auto import tqdm

from anomalib_cpr import drawing

STAMP = "drawn.json"


class DrawnParts(MVTecAD):
    """Data module of drawn parts, in the layout of MVTec AD.

    The images are drawn the first time they are needed, in a few seconds, and are the same on every run. The
    categories:

    - ``bracket``: a steel plate that always lies the same way up; dents, missing holes, scratches, stains.
    - ``gear``: a brass gear at any angle; broken teeth, contamination, cracks, scratches.
    - ``fabric``: a woven texture; cuts, missing threads, stains, threads of the wrong colour.
    - ``pills``: nine tablets in a tray; chipped, cracked, soiled, of the wrong colour.
    - ``loose_brackets``, ``loose_gears``: two or three of them at random places, brackets at any angle; the same
      defects, of one of them.

    Args:
        root (Path | str | None): Folder of the data set; a folder per category is drawn into it. ``None`` stands for
            the folder where anomalib keeps its data sets.
            Defaults to ``"./datasets/DrawnParts"``.
        category (str): ``"bracket"``, ``"gear"``, ``"fabric"``, ``"pills"``, ``"loose_brackets"`` or ``"loose_gears"``.
            Defaults to ``"bracket"``.
        train_batch_size (int): Training batch size.
            Defaults to ``8``.
        eval_batch_size (int): Validation and test batch size.
            Defaults to ``8``.
        num_workers (int): Number of processes that read images.
            Defaults to ``0``.
        train_augmentations (Transform | None): Augmentations of the training images.
            Defaults to ``None``.
        val_augmentations (Transform | None): Augmentations of the validation images.
            Defaults to ``None``.
        test_augmentations (Transform | None): Augmentations of the test images.
            Defaults to ``None``.
        augmentations (Transform | None): Augmentations where none of the above are given.
            Defaults to ``None``.
        test_split_mode (TestSplitMode | str): How the test set is made.
            Defaults to ``TestSplitMode.FROM_DIR``.
        test_split_ratio (float): Share of the images in a test set that is split off.
            Defaults to ``0.2``.
        val_split_mode (ValSplitMode | str): How the validation set is made.
            Defaults to ``ValSplitMode.SAME_AS_TEST``.
        val_split_ratio (float): Share of the images in a validation set that is split off.
            Defaults to ``0.5``.
        seed (int | None): Seed of the splits. It does not change the images.
            Defaults to ``None``.
        train_images (int): Number of good training images, at least 2.
            Defaults to ``60``.
        image_size (int | tuple[int, int]): Height and width in pixels, which must be equal, at least 64.
            Defaults to ``256``.
        drawing_seed (int): Seed of the images, not negative.
            Defaults to ``0``.
        good_test_images (int): Number of good test images, at least 1.
            Defaults to ``12``.
        defective_test_images (int): Number of test images of each kind of defect, at least 1.
            Defaults to ``7``.

    Raises:
        ValueError: If there is no such category, or a number is too small.

    Example:
        >>> from anomalib_cpr import DrawnParts
        >>> datamodule = DrawnParts(category="gear")
        >>> datamodule.setup()  # doctest: +SKIP
        >>> len(datamodule.train_data), len(datamodule.test_data)  # doctest: +SKIP
        (60, 40)
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/DrawnParts",
        category: str = "bracket",
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
        train_images: int = 60,
        image_size: int | tuple[int, int] = 256,
        drawing_seed: int = 0,
        good_test_images: int = 12,
        defective_test_images: int = 7,
    ) -> None:
        super().__init__(
            root=resolve_dataset_root(root, "DrawnParts"),
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        # anomalib.data.get_datamodule() makes a pair of every `image_size`.
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height != width:
            raise ValueError(f"Invalid image_size=({height}, {width}); parts are drawn on squares.")
        drawing.check(category, size=height, seed=drawing_seed)
        if train_images < 2:
            raise ValueError(f"Invalid train_images={train_images}; expected 2 or more.")
        if min(good_test_images, defective_test_images) < 1:
            raise ValueError(f"Invalid {good_test_images=}, {defective_test_images=}; expected 1 or more.")
        self.train_images = train_images
        self.image_size = height
        self.drawing_seed = drawing_seed
        self.good_test_images = good_test_images
        self.defective_test_images = defective_test_images

    def prepare_data(self) -> None:
        """Draw the category, unless the folder already holds these images.

        The images appear all at once: two processes may do this at the same time, and one that is interrupted leaves
        nothing half-done. Images drawn with other arguments, or by another version, are replaced.

        Raises:
            FileExistsError: If the folder holds files that were not drawn by this data module. They stay as they are.
        """
        arguments = {
            "category": self.category,
            "train_images": self.train_images,
            "good_test_images": self.good_test_images,
            "defective_test_images": self.defective_test_images,
            "image_size": self.image_size,
            "seed": self.drawing_seed,
            "version": drawing.VERSION,
        }
        # A link is followed, so that what it points to is replaced and not the link.
        write_drawings((self.root / self.category).resolve(), arguments)

    def _setup(self, _stage: str | None = None) -> None:
        # Lightning calls prepare_data() in one process per machine, and whoever calls setup() by hand may not call it
        # at all. What is there is not drawn twice.
        self.prepare_data()
        super()._setup(_stage)


class _Part(NamedTuple):
    split: str
    defect: str
    number: int

    @property
    def image(self) -> str:
        return f"{self.split}/{self.defect}/{self.number:03}.png"

    @property
    def mask(self) -> str | None:
        return None if self.defect == drawing.GOOD else f"ground_truth/{self.defect}/{self.number:03}_mask.png"


def write_drawings(target: Path, arguments: dict[str, Any]) -> None:
    """Draw one category into a folder, unless the folder already holds it.

    Args:
        target (Path): Folder of the category.
        arguments (dict[str, Any]): ``category``, ``train_images``, ``good_test_images``, ``defective_test_images``,
            ``image_size``, ``seed`` and ``version``.

    Raises:
        FileExistsError: If the folder holds files that were not drawn here.
    """
    if _is_complete(target, arguments):
        return
    _check_replaceable(target)  # before the time is spent
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving it there is one step on the same disk. mkdtemp() would make it private.
    work = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    try:
        work.mkdir()
        _draw_all(work, arguments)
        _install(work, target, arguments)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rank_zero_info(f"Drew {arguments['category']} into {target}.")


def _parts(arguments: dict[str, Any]) -> Iterator[_Part]:
    yield from (_Part("train", drawing.GOOD, number) for number in range(arguments["train_images"]))
    yield from (_Part("test", drawing.GOOD, number) for number in range(arguments["good_test_images"]))
    for defect in drawing.DEFECTS[arguments["category"]]:
        yield from (_Part("test", defect, number) for number in range(arguments["defective_test_images"]))


def _draw_all(folder: Path, arguments: dict[str, Any]) -> None:
    """Draw the images and, last, the stamp that says what they are."""
    parts, files = list(_parts(arguments)), []
    size, seed = arguments["image_size"], arguments["seed"]
    for part in tqdm(parts, desc=f"Drawing {arguments['category']}", delay=1, leave=False, dynamic_ncols=True):
        drawn = drawing.draw(arguments["category"], part.defect, part.number, split=part.split, size=size, seed=seed)
        pictures = {part.image: cv2.cvtColor(drawn.image, cv2.COLOR_RGB2BGR)}
        if part.mask:
            pictures[part.mask] = drawn.mask
        for name, picture in pictures.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # imwrite() reports a full disk by a return value only, and cannot open every path on Windows.
            (folder / name).write_bytes(cv2.imencode(".png", picture)[1].tobytes())
            files.append(name)
    (folder / STAMP).write_text(json.dumps({"arguments": arguments, "files": files}, indent=1), encoding="utf-8")


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    """What was drawn into a folder; None if nothing was."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(stamp, dict) and "arguments" in stamp and isinstance(stamp.get("files"), list)
    return stamp if is_ours else None


def _is_complete(folder: Path, arguments: dict[str, Any]) -> bool:
    stamp = _read_stamp(folder)
    return bool(stamp and stamp["arguments"] == arguments and all((folder / name).is_file() for name in stamp["files"]))


def _foreign_files(folder: Path) -> list[str]:
    """What would be destroyed, other than drawings, if the folder was replaced."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [folder.name]
    stamp = _read_stamp(folder)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return sorted(found - {STAMP, *stamp["files"]} if stamp else found)


def _check_replaceable(folder: Path) -> None:
    """Raise if replacing the folder would destroy anything but drawings."""
    foreign: list[str] = []
    for _ in range(5):
        try:
            foreign = _foreign_files(folder)
        except FileNotFoundError as error:
            foreign = [str(error.filename)]
        if not foreign:
            return
        time.sleep(0.02)  # another process may be replacing the folder just now
    msg = (
        f"{folder} holds files that DrawnParts has not drawn, e.g. {foreign[0]}, and is left as it is. "
        "Choose another root, or move the files away."
    )
    raise FileExistsError(msg)


def _install(work: Path, target: Path, arguments: dict[str, Any]) -> None:
    """Move the drawn folder to its place."""
    old = work.with_name(f"{work.name}-old")
    for _ in range(10):
        if _is_complete(target, arguments):
            return  # another process was faster
        _check_replaceable(target)
        try:
            if target.exists():
                target.rename(old)
            work.rename(target)
        except OSError as error:  # another process has moved the target, or put its own there, since the check
            failure = error
        else:
            return
        finally:
            shutil.rmtree(old, ignore_errors=True)
    raise failure
