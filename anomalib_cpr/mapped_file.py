# SPDX-License-Identifier: Apache-2.0
"""Tensors in a file that is mapped into memory: the system reads what is used and forgets what is not.

Such a file has a header of one page, JSON, that says which tensors lie where and to what they belong, and then the
tensors. It is written beside its place and moved there when it is complete.
"""

import errno
import glob
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAGIC = "anomalib-cpr bank 1"
PAGE = 4096


def create(path: Path, parts: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Tensor]:
    """Begin a file. What is written into its tensors goes to the disk, not into memory.

    Args:
        path (Path): Where it will be after :func:`complete`; its folder is made.
        parts (Mapping[str, tuple[Sequence[int], torch.dtype]]): Shape ``(images, channels, height, width)`` and type of
            each tensor.

    Returns:
        dict[str, Tensor]: The tensors, all zeros, channels last in memory.

    Raises:
        OSError: If the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    header: dict[str, Any] = {"magic": MAGIC, "parts": {}}
    end = PAGE
    for name, (shape, dtype) in parts.items():
        header["parts"][name] = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "start": end}
        size = dtype.itemsize * torch.Size(shape).numel()
        end += -(-size // PAGE) * PAGE
    try:
        with _unfinished(path).open("wb") as file:
            file.write(json.dumps(header).encode().ljust(PAGE))
            file.truncate(end)
            _take_room(file, end)
    except OSError as error:
        discard(path)
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"{error.strerror}: the file of the reference bank, {path}, takes {end / 1e6:.0f} MB, and its disk has "
            f"{free / 1e6:.0f} MB left. Make room, or give another bank_file, bank_dtype or max_references",
        ) from error
    return _tensors(_unfinished(path), header, shared=True)


def complete(path: Path, key: str) -> dict[str, Tensor]:
    """Put the file that :func:`create` began into its place.

    Args:
        path (Path): The place. A file that is there is replaced; who has mapped it keeps what it mapped.
        key (str): By which it is recognised later.

    Returns:
        dict[str, Tensor]: Its tensors.
    """
    with _unfinished(path).open("r+b") as file:
        header = json.loads(file.read(PAGE)) | {"key": key}
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(PAGE))
        file.flush()
        os.fsync(file.fileno())  # what is named complete is on the disk
    _unfinished(path).replace(path)
    return read(path)[1]


def read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Map a file.

    Args:
        path (Path): Of :func:`complete`.

    Returns:
        tuple[str, dict[str, Tensor]]: Its key and its tensors. Nothing that is written into them reaches the file.

    Raises:
        ValueError: If it is no such file, or cut off.
    """
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(PAGE))
            if header["magic"] != MAGIC:
                raise KeyError(MAGIC)  # noqa: TRY301 - one message for all that it is not
            return header["key"], _tensors(path, header, shared=False)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a complete file of descriptors.") from error


def _tensors(path: Path, header: dict[str, Any], *, shared: bool) -> dict[str, Tensor]:
    size = path.stat().st_size
    bytes_of_file = torch.from_file(str(path), shared=shared, size=size, dtype=torch.uint8)
    tensors = {}
    for name, part in header["parts"].items():
        dtype = getattr(torch, part["dtype"])
        images, channels, height, width = part["shape"]
        count = dtype.itemsize * images * channels * height * width
        flat = bytes_of_file[part["start"] : part["start"] + count].view(dtype)
        tensors[name] = flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return tensors


def discard(path: Path) -> None:
    """Remove what :func:`create` began.

    Args:
        path (Path): As given to it. A complete file there stays.
    """
    with suppress(OSError):  # Windows keeps what is still mapped
        _unfinished(path).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    # Of this process: two that load one checkpoint both write the file, and the last to be complete stays.
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished files of this process, and of processes of this machine that were killed."""
    before = f"{path.name}.{platform.node()}."
    for file in path.parent.glob(f"{glob.escape(before)}*.part"):
        number = file.name.removeprefix(before).removesuffix(".part")
        ended = Path("/proc").is_dir() and not Path("/proc", number).exists()
        if number.isdigit() and (int(number) == os.getpid() or ended):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _take_room(file: BinaryIO, size: int) -> None:
    """Let the disk keep the blocks: writing to a mapped page that has none kills the process once the disk is full."""
    if not hasattr(os, "posix_fallocate"):  # Windows, macOS
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # a file system that cannot
            raise
