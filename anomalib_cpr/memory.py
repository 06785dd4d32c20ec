# SPDX-License-Identifier: Apache-2.0
"""How much memory there is, what to do where it is not enough, and what becomes of memory that is freed."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

TIGHT = 0.8  # share of the available memory from which on a warning is due: other things need some, too
_SMALLER_BANK = (
    "bank_dtype='float16', 'int8' or 'int4' takes a half, a quarter or an eighth of float32, descriptor_channels=64 a "
    "sixth of 384, max_references=N keeps N training images that represent all, and bank_file=FILE leaves it on disk"
)
_ON_HOST = "; bank_on_host=True leaves the bank in main memory"
_CONTROL_GROUP = Path("/sys/fs/cgroup")
_MEMORY_INFO = Path("/proc/meminfo")

# Of glibc's mallopt, see mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # all blocks from the heap, which never shrinks
# Where glibc's own rule ends in a process that has freed a large block; any use of mallopt turns that rule off.
_LARGEST_THRESHOLD = 32 * 1024 * 1024
_RETURN = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: _LARGEST_THRESHOLD, _TRIM_THRESHOLD: 2 * _LARGEST_THRESHOLD}
_kept = False


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken.

    Args:
        device (torch.device): A CUDA device has its own memory; any other is taken for the CPU.

    Returns:
        int | None: Bytes; of main memory, what the control group of a container allows if that is less. None where the
            system does not tell (only Linux does).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        entries = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines())
        available = int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    allowed = _allowed_by_control_group()
    return available if allowed is None else min(available, allowed)


def smaller_bank(device: torch.device) -> str:
    """Ways out where the reference bank does not fit, for a message.

    Args:
        device (torch.device): Where it was to be.

    Returns:
        str: A clause.
    """
    return _SMALLER_BANK if device.type == "cpu" else _SMALLER_BANK + _ON_HOST


def _allowed_by_control_group() -> int | None:
    try:
        limit = (_CONTROL_GROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CONTROL_GROUP / "memory.current").read_text(encoding="ascii"))
        lines = (_CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        reclaimable = int(dict(line.split() for line in lines).get("inactive_file", 0))
        return None if limit == "max" else max(0, int(limit) - used + reclaimable)
    except (OSError, ValueError):
        return None


def scarcity(needed: float, device: torch.device, what: str, way_out: str) -> str | None:
    """Say that something may not fit into memory.

    Args:
        needed (float): Bytes.
        device (torch.device): Where.
        what (str): That needs them.
        way_out (str): What to do.

    Returns:
        str | None: The warning; None if there is enough, or if that is not known.
    """
    available = available_bytes(device)
    if available is None or needed <= TIGHT * available:
        return None
    return (
        f"{what} will take {needed / 1e6:.0f} MB, and {available / 1e6:.0f} MB are free on {device}. Training may end "
        f"for want of memory: {way_out}."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is about memory; torch says so in different ways.

    Args:
        error (BaseException): Any.

    Returns:
        bool: Whether there was too little of it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def keep_freed_memory() -> None:
    """Let the process keep main memory that it frees, for its next step, until :func:`return_freed_memory`.

    glibc returns large blocks to the system at once, and the pages of the next step have to be cleared anew: a third of
    a training step with 384 channels and 32 pairs. Does nothing where the C library is another one, or where the
    user has set glibc's variables.
    """
    global _kept  # noqa: PLW0603 - as the C library is one for the process
    if not _kept and (library := _glibc()) is not None:
        for parameter, value in _KEEP.items():
            library.mallopt(parameter, value)
        _kept = True


def return_freed_memory() -> None:
    """Return kept memory to the system, now and in future; nothing happens if none was kept."""
    global _kept  # noqa: PLW0603 - as the C library is one for the process
    if _kept and (library := _glibc()) is not None:
        for parameter, value in _RETURN.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
        _kept = False


@cache
def _glibc() -> ctypes.CDLL | None:
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return None
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of no name
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None  # macOS, musl
