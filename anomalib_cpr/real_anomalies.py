# SPDX-License-Identifier: Apache-2.0
"""A few known defects as teachers, beside the synthetic ones: used as queries, and pasted onto others.

Source: the semi-supervised mode of CPR's code (``--n-anomaly 10``; github.com/flyinghu123/CPR), with its values.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.data.utils import read_image, read_mask
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision import tv_tensors

from .anomaly_sources import TEXTURE_SUFFIXES as IMAGE_SUFFIXES
from .appearance import PHOTOMETRIC_OPERATIONS, change_appearance

QUERY_PROBABILITY = 0.025
PASTE_PROBABILITY = 0.2
MOST_PASTED = 5
APPEARANCE_PROBABILITY = 0.5
PLACE_PROBABILITY = 0.9
SCALES = (0.5, 1.5)
OPACITIES = (0.5, 1.0)
# The authors shuffle the defects with this seed before they take the first ones.
CHOICE_SEED = 42


@dataclass(frozen=True)
class KnownAnomalies:
    """Known defects, as training uses them.

    Attributes:
        images (Tensor): Colours in 0..1, ``(count, 3, height, width)``, CPU.
        masks (Tensor): Where the defects are, bool, ``(count, 1, height, width)``, CPU.
        foregrounds (Tensor): ``(count, 1, height / 4, width / 4)``.
        neighbours (Tensor): Indices of their references, the most similar first, ``(count, k)``, CPU.
    """

    images: Tensor
    masks: Tensor
    foregrounds: Tensor
    neighbours: Tensor

    def draw_queries(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Decide which queries of a batch are known defects.

        Args:
            batch_size (int): Number of queries.
            generator (torch.Generator): On the CPU.

        Returns:
            tuple[Tensor, Tensor]: Whether each query is replaced, bool, and by which defect, ``(batch_size,)`` each.
        """
        replaced = torch.rand(batch_size, generator=generator) < QUERY_PROBABILITY
        return replaced, torch.randint(len(self.images), (batch_size,), generator=generator)

    def paste(self, queries: Tensor, anomalies: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Paste one to five defects onto a fifth of the queries.

        Args:
            queries (Tensor): Colours in 0..1, ``(batch, 3, height, width)``.
            anomalies (Tensor): Masks, bool, ``(batch, 1, height, width)``.
            generator (torch.Generator): On the CPU; every choice comes from it.

        Returns:
            tuple[Tensor, Tensor]: Queries and masks with the pasted defects, of the same shapes.
        """
        queries, anomalies = queries.clone(), anomalies.clone()
        chance = torch.rand(len(queries), generator=generator)
        for index in (chance < PASTE_PROBABILITY).nonzero().flatten().tolist():
            count = int(torch.randint(1, MOST_PASTED + 1, (), generator=generator))
            for which in torch.randint(len(self.images), (count,), generator=generator).tolist():
                defect, mask = self.images[which].to(queries.device), self.masks[which].to(queries.device)
                appearance, placed, turn, scale, down, right, opacity = torch.rand(7, generator=generator).tolist()
                if appearance < APPEARANCE_PROBABILITY:
                    # It is turned as a whole below, so its appearance is changed by the other nine operations.
                    defect = change_appearance(defect[None], generator, PHOTOMETRIC_OPERATIONS)[0]
                if placed < PLACE_PROBABILITY:
                    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * scale
                    defect, mask = place(defect, mask, 360 * turn, scale, (down, right))
                opacity = OPACITIES[0] + (OPACITIES[1] - OPACITIES[0]) * opacity
                queries[index] = torch.where(mask, torch.lerp(queries[index], defect, opacity), queries[index])
                anomalies[index] |= mask
        return queries, anomalies


def place(
    image: Tensor, mask: Tensor, degrees: float, scale: float, position: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Turn and scale a defect about its centre, and move it to any place where it stays within the image.

    Args:
        image (Tensor): Of shape ``(3, height, width)``.
        mask (Tensor): Where the defect is, bool, ``(1, height, width)``.
        degrees (float): Angle; positive ones turn counterclockwise.
        scale (float): Factor of the size.
        position (tuple[float, float]): Where between the first and the last possible row and column, 0..1.

    Returns:
        tuple[Tensor, Tensor]: Image and mask, bilinear, of the same shapes; outside the old image there is 0.
    """
    height, width = mask.shape[-2:]
    rows, columns = (axis.double() for axis in mask[0].cpu().nonzero(as_tuple=True))
    if not len(rows):
        return image, mask
    down, right = float(rows.mean()), float(columns.mean())
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x = right + scale * (cosine * (columns - right) + sine * (rows - down))
    y = down + scale * (cosine * (rows - down) - sine * (columns - right))
    shift_x = _shift(float(x.min()), float(x.max()), width, position[1])
    shift_y = _shift(float(y.min()), float(y.max()), height, position[0])

    # Where each new pixel comes from: the inverse of the above.
    to_x = (torch.arange(width, device=image.device) - right - shift_x)[None, :] / scale
    to_y = (torch.arange(height, device=image.device) - down - shift_y)[:, None] / scale
    source_x, source_y = right + cosine * to_x - sine * to_y, down + sine * to_x + cosine * to_y
    grid = torch.stack([(2 * source_x + 1) / width - 1, (2 * source_y + 1) / height - 1], dim=-1)[None]
    both = torch.cat([image, mask.to(image.dtype)])[None]
    moved = F.grid_sample(both, grid.to(image.dtype), mode="bilinear", align_corners=False)[0]
    return moved[:-1], moved[-1:] > 0.5


def _shift(first: float, last: float, side: int, position: float) -> float:
    first, last = max(0.0, first), min(side - 1.0, last)
    return -first + position * (side - 1 - last + first)


# --- where they come from


def read_folder(
    folder: str | Path, masks: str | Path | None, transform: Callable[..., Any]
) -> tuple[Tensor, Tensor, list[str]]:
    """Read defects and masks from two folders with the same names.

    The mask of ``scratch/000.png`` is ``scratch/000.png`` or ``scratch/000_mask.png``, of any image format, in the
    folder of masks. So both halves of MVTec AD's layout fit: ``test/scratch`` with ``ground_truth/scratch``.

    Args:
        folder (str | Path): Images, searched recursively.
        masks (str | Path | None): Masks; values above 0 are defects. None: the folder ``masks`` beside the images'.
        transform (Callable): What the pre-processor does before its normalisation, for images and masks.

    Returns:
        tuple[Tensor, Tensor, list[str]]: Images, masks and paths; see :class:`KnownAnomalies`.

    Raises:
        FileNotFoundError: If a folder or a mask is missing.
        ValueError: If there is no image, or a mask is empty.
    """
    folder = Path(folder).expanduser()
    masks = Path(masks).expanduser() if masks is not None else folder.parent / "masks"
    for path, name in ((folder, "known_anomalies"), (masks, "known_anomaly_masks")):
        if not path.is_dir():
            raise FileNotFoundError(
                f"{name}={str(path)!r} is not a folder. Give one with images of defects and one with masks."
            )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"known_anomalies={str(folder)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    items = []
    for file in files:
        inner = file.relative_to(folder).parent
        stems = {file.stem, f"{file.stem}_mask"}
        found = [path for path in sorted((masks / inner).glob("*")) if path.stem in stems and path != file]
        if not found:
            raise FileNotFoundError(
                f"The known anomaly {file} has no mask: expected {file.stem}.png or {file.stem}_mask.png in "
                f"{masks / inner}."
            )
        image, mask = (read(path, as_tensor=True) for read, path in ((read_image, file), (read_mask, found[0])))
        items.append((cast("Tensor", image), cast("Tensor", mask), str(file)))
    return _stack(items, transform)


def read_from_test_set(
    dataset: Any,  # noqa: ANN401
    choice: int | Sequence[int],
    transform: Callable[..., Any],
) -> tuple[Tensor, Tensor, list[str]]:
    """Take defects from a test set.

    Args:
        dataset (Any): anomalib's test set.
        choice (int | Sequence[int]): Indices into it; or how many defects to choose by chance, always the same ones.
        transform (Callable): What the pre-processor does before its normalisation, for images and masks.

    Returns:
        tuple[Tensor, Tensor, list[str]]: Images, masks and paths; see :class:`KnownAnomalies`.

    Raises:
        ValueError: If an index is out of range or of a good image, there are fewer defects, or masks are missing.
    """
    samples = dataset.samples
    if isinstance(choice, int):
        # Sorted, because the order of a test set is that of a file system or of a split.
        order = samples.loc[samples.label_index == 1].sort_values("image_path").index.to_numpy()
        if not 1 <= choice < len(order):
            raise ValueError(
                f"known_anomalies={choice}: the test set has {len(order)} defects, and one must stay to test."
            )
        indices = np.random.RandomState(CHOICE_SEED).permutation(order)[:choice].tolist()
    else:
        indices = list(choice)
    items = []
    for index in indices:
        if not 0 <= index < len(samples):
            raise ValueError(f"known_anomalies: index {index} is outside the test set of {len(samples)} images.")
        item = dataset[index]
        if not bool(item.gt_label):
            raise ValueError(f"known_anomalies: image {index} of the test set, {item.image_path}, has no defect.")
        if item.gt_mask is None:
            raise ValueError(f"known_anomalies: image {index} of the test set, {item.image_path}, has no mask.")
        items.append((item.image, item.gt_mask, item.image_path))
    return _stack(items, transform)


def _stack(
    items: Iterable[tuple[Tensor, Tensor, str]], transform: Callable[..., Any]
) -> tuple[Tensor, Tensor, list[str]]:
    images, masks, paths = [], [], []
    for image, mask, path in items:
        plane = mask.as_subclass(torch.Tensor).reshape(1, *mask.shape[-2:]) > 0
        image, plane = transform(tv_tensors.Image(image), tv_tensors.Mask(plane.to(torch.uint8)))  # noqa: PLW2901
        if not plane.any():
            raise ValueError(f"The mask of the known anomaly {path} is empty.")
        images.append(image.as_subclass(torch.Tensor).float().expand(3, -1, -1))
        masks.append(plane.as_subclass(torch.Tensor) > 0)
        paths.append(path)
    return torch.stack(images), torch.stack(masks), paths


# --- leaving the test set


def in_test_set(datamodule: Any, paths: Sequence[str]) -> list[str]:  # noqa: ANN401
    """Those of some files that are test images too.

    Args:
        datamodule (Any): anomalib's data module, set up, or None.
        paths (Sequence[str]): Image files.

    Returns:
        list[str]: A part of the paths.
    """
    samples = [dataset.samples for dataset in _evaluated(datamodule)]
    tested = {Path(path).resolve() for one in samples for path in one.image_path}
    return [path for path in paths if Path(path).resolve() in tested]


def hold_out(datamodule: Any, paths: Sequence[str]) -> int:  # noqa: ANN401
    """Take known defects out of validation and test set, until :func:`give_back`.

    Args:
        datamodule (Any): anomalib's data module, set up.
        paths (Sequence[str]): Of the defects. On another machine, folder and file name must be the same.

    Returns:
        int: How many images left the test set.
    """
    names = {_name(path) for path in paths}
    left = 0
    for dataset in _evaluated(datamodule):
        # Beside a held-out set, what was held out before counts as well: two models may differ in what they know.
        samples = vars(dataset).setdefault("cpr_samples_before", dataset.samples)
        keep = [_name(path) not in names for path in samples.image_path]
        dataset.samples = samples[keep].reset_index(drop=True)
        left = len(keep) - sum(keep)
    return left


def give_back(datamodule: Any) -> None:  # noqa: ANN401
    """Undo :func:`hold_out`.

    Args:
        datamodule (Any): anomalib's data module.
    """
    for dataset in _evaluated(datamodule):
        samples = vars(dataset).pop("cpr_samples_before", None)
        if samples is not None:
            dataset.samples = samples


def _evaluated(datamodule: Any) -> list[Any]:  # noqa: ANN401
    found = [getattr(datamodule, name, None) for name in ("val_data", "test_data")]
    return list({id(dataset): dataset for dataset in found if dataset is not None}.values())


def _name(path: str | Path) -> tuple[str, ...]:
    return Path(path).parts[-2:]
