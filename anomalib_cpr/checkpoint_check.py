# SPDX-License-Identifier: Apache-2.0
"""Refuses checkpoints that are damaged, foreign or crafted, before anything of them is taken over.

``load_state_dict`` copies what fits and then complains about the rest, which would leave a model that is half the one
and half the other. So everything is looked at first.
"""

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals
from torch import Tensor

from .messages import first_line
from .reference_bank import AVERAGED, COLOUR_SCALE

SHOWN = 3  # problems that a message names
MODEL = "model."
BANK = "model.bank."
FILE_KEY = "file_key"  # in place of descriptors that lie in a file of their own
WAY_OUT = "Copy it again, or take an earlier checkpoint."
OF_THE_AUTHORS = "One of the CPR authors becomes a checkpoint by `anomalib-cpr import-checkpoint`."
CODEBOOK = "model.global_retriever.codebook"
# key of the checkpoint -> types of its values
OWN_VALUES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "seed": (int, type(None)),
    "kind": (str, type(None)),
    "training_images": (int, type(None)),
    "held_out": (list,),
    "k": (int,),
    "window_sizes": (list,),
    "blur_sigma": (int, float),
    "follow_edges": (bool,),
    "coherent_matching": (bool,),
    "unaligned_matching": (bool,),
    "relative_to_image": (bool,),
    "training_paths": (list,),
}


def check_file(path: str | Path) -> None:
    """Refuse a file that is not a complete checkpoint of tensors and plain values.

    Nothing in it is run. Tensors are read only to compare them with their checksums, which torch itself does not: a bit
    that flipped on a disk would be a weight like any other.

    Args:
        path (str | Path): A local file; what is not one is left to Lightning, which reads from other places too.

    Raises:
        ValueError: If it cannot be loaded.
    """
    if not Path(path).is_file():
        return
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} ({Path(path).stat().st_size:,} bytes) is not a complete checkpoint: it was cut off, or is a file "
            f"of another kind. {WAY_OUT}"
        )
    try:
        with anomalib_safe_globals():
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged file is answered with any of a dozen
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is not None:
            raise ValueError(
                f"{path} was not loaded: it asks for {wanted[1]}, and a file that asks for more than tensors and plain "
                "values can run code. Use a checkpoint that `anomalib train --model Cpr` wrote."
            ) from error
        raise ValueError(f"{path} is damaged ({first_line(error)}). {WAY_OUT}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: its part {damaged} does not match its checksum. {WAY_OUT}")
    if not isinstance(content, Mapping) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise ValueError(
            f"{path} is not a checkpoint of anomalib: it has no state_dict and version of Lightning. {OF_THE_AUTHORS}"
        )
    _check_origin(content["state_dict"], str(path))


def _check_origin(state: object, what: str) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{what} has no state dict of tensors: it is damaged, or not a checkpoint of anomalib.")
    if CODEBOOK not in state:
        raise ValueError(
            f"{what} is not a checkpoint of Cpr: it has no {CODEBOOK}. Was it written by another model? "
            f"{OF_THE_AUTHORS}"
        )


def check_content(checkpoint: Mapping[str, Any], newest_format: int) -> None:
    """Refuse what is not a checkpoint of Cpr, is of a later version, or holds values that no training leaves.

    Args:
        checkpoint (Mapping[str, Any]): What was loaded.
        newest_format (int): Latest format that this version of the package reads.

    Raises:
        ValueError: If something is wrong with it.
    """
    state = checkpoint.get("state_dict", {})
    _check_origin(state, "This")
    _check_own_values(checkpoint.get("cpr", {}), newest_format)
    for name, value in state.items():
        if name.startswith(MODEL) and not is_finite(value):
            raise ValueError(
                f"The checkpoint is damaged, or its training diverged: numbers in {name} are NaN or infinite. "
                "Take an earlier checkpoint, or train anew with a smaller learning_rate."
            )
    problem = _odd_bank(state)
    if problem:
        raise ValueError(f"The checkpoint's reference bank is damaged: {problem}")


def is_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor; without a second one, as large as a bank, on the way.

    Args:
        value (Tensor): Of any type and shape.

    Returns:
        bool: True for whole numbers and for empty tensors.
    """
    return not value.is_floating_point() or not value.numel() or all(bound.isfinite() for bound in value.aminmax())


def _check_own_values(own: object, newest_format: int) -> None:
    """Refuse what this package never writes beside the state."""
    values: Mapping[str, Any] = own if isinstance(own, Mapping) else {"format": own}
    odd = [
        f"{name} is {values[name]!r}"
        for name, types in OWN_VALUES.items()
        if name in values and type(values[name]) not in types
    ]
    if odd:
        raise ValueError(f"The checkpoint is damaged: its {', '.join(odd)}.")
    if values.get("kind") not in {None, "object", "texture"}:
        raise ValueError(f"The checkpoint is damaged: its kind is {values['kind']!r}, not 'object' or 'texture'.")
    windows = values.get("window_sizes", [1, 1])
    if len(windows) != 2 or not all(type(side) is int and side > 0 and side % 2 for side in windows):
        raise ValueError(f"The checkpoint is damaged: its window_sizes are {windows!r}, not two odd numbers.")
    if values.get("k", 1) < 1:
        raise ValueError(f"The checkpoint is damaged: its k is {values['k']}, not 1 or more.")
    if not 0 < values.get("blur_sigma", 1) < math.inf:
        raise ValueError(f"The checkpoint is damaged: its blur_sigma is {values['blur_sigma']!r}, not above 0.")
    if not 1 <= values.get("format", 1) <= newest_format:
        raise ValueError(
            f"The checkpoint has format {values['format']}, this anomalib_cpr reads 1 to {newest_format}. "
            "Upgrade anomalib_cpr."
        )


def misfit(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], hyper_parameters: Mapping[str, Any] | None = None
) -> str | None:
    """Compare names and shapes, except those of the reference bank, which takes any number of images.

    Args:
        state (Mapping[str, Tensor]): Of the checkpoint.
        expected (Mapping[str, Tensor]): Of the model.
        hyper_parameters (Mapping[str, Any] | None): Of the checkpoint, to be named.

    Returns:
        str | None: What does not fit, and the way out.
    """
    problems = [f"{name} is missing" for name in expected if name not in state and not name.startswith(BANK)]
    problems += [f"{name} is unknown" for name in state if name not in expected and not name.startswith(BANK)]
    problems += [
        f"{name} has shape {list(value.shape)}, the model's {list(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and not name.startswith(BANK) and value.shape != expected[name].shape
    ]
    if not problems:
        return None
    names = ("backbone", "layers", "descriptor_channels", "codebook_size", "blocks")
    given = hyper_parameters or {}
    known = ", ".join(f"{name}={given[name]!r}" for name in names if name in given)
    more = "; …" if len(problems) > SHOWN else ""
    return (
        f"The checkpoint does not fit the model: {'; '.join(problems[:SHOWN])}{more}. "
        f"Give Cpr the arguments of its training{f' ({known})' if known else ''}, or use Cpr.load_from_checkpoint, "
        "which takes them from the file."
    )


def _odd_bank(state: Mapping[str, Tensor]) -> str | None:
    """What no training would leave in a bank, whatever its configuration."""
    bank = {name.removeprefix(BANK): value for name, value in state.items() if name.startswith(BANK)}
    histograms, foregrounds = bank.get("histograms"), bank.get("foregrounds")
    in_a_file = FILE_KEY in bank
    complete = in_a_file or {"descriptors_1", "descriptors_2"} <= bank.keys()
    if histograms is None or foregrounds is None or not complete:
        return f"it holds only {', '.join(bank) or 'nothing'}."
    if histograms.numel() and histograms.ndim == 3 and (histograms.min() < 0 or histograms.sum(-1).max() > 1 + 1e-3):
        return "its histograms are not shares of visual words."
    maps = [value for name, value in bank.items() if name not in {"histograms", FILE_KEY, AVERAGED, COLOUR_SCALE}]
    if in_a_file or any(value.ndim != 4 for value in maps):  # the bank itself refuses what does not fit its file
        return None
    return _odd_sizes(bank)


def _odd_sizes(bank: Mapping[str, Tensor]) -> str | None:
    fine, coarse, foregrounds = (bank[name] for name in ("descriptors_1", "descriptors_2", "foregrounds"))
    if not len(fine):
        return None
    cells = fine.shape[-2:]
    of_foregrounds = coarse.shape[-2:] if foregrounds.dtype == torch.uint8 else cells  # those of 4-bit banks are coarse
    if tuple(2 * side for side in coarse.shape[-2:]) != cells or foregrounds.shape[-2:] != of_foregrounds:
        return (
            f"descriptors of {cells[0]}x{cells[1]} and {coarse.shape[-2]}x{coarse.shape[-1]} cells and foregrounds of "
            f"{foregrounds.shape[-2]}x{foregrounds.shape[-1]} are not of one image size."
        )
    for scale, descriptors in (("scales_1", fine), ("scales_2", coarse)):
        if scale in bank and tuple(bank[scale].shape) != (len(descriptors), 1, *descriptors.shape[-2:]):
            return f"{scale} has shape {tuple(bank[scale].shape)}, which is not one factor per descriptor."
    return None
