# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr galleries``: what a large gallery costs, and whether its search finds the true nearest.

The histograms are synthetic: mixtures of a few prototypes, counted from as many cells as a block has at 320 px; those
of the queries are disturbed in some blocks, as by a defect. Descriptors lie in a file, as with ``bank_file``.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .command_arguments import output_file
from .global_retrieval import SHORTLIST, GlobalRetriever, nearest_of_many, roots_of
from .presets import PRESETS
from .reference_bank import DTYPES, PARTS, BankDtype, ReferenceBank
from .speed import OtherWork, describe_environment
from .speed_models import Setting, random_cpr
from .torch_model import CprModel

BLOCKS, WORDS, CELLS = 25, 12, 256
QUERIES = 50


@dataclass(frozen=True)
class GalleryResult:
    """One gallery.

    Attributes:
        images (int): In the gallery.
        histograms_mb (float): Memory of histograms, and of their roots where they are used.
        exact_ms (float): Search for one query by the robust distance to all images, median.
        shortlist_ms (float | None): Search by shortlist, median; None where the gallery is not larger than it.
        recall (float | None): Share of the true K nearest that the shortlist finds.
        bank_mb (float | None): Size of the bank on disk; None where it was not made.
        inference_ms (float | None): Whole inference of one image with that bank, median.
        inference_from_disk_ms (float | None): The same when none of the descriptors' file is in memory yet; None where
            the system cannot be asked to forget it.
    """

    images: int
    histograms_mb: float
    exact_ms: float
    shortlist_ms: float | None
    recall: float | None
    bank_mb: float | None
    inference_ms: float | None
    inference_from_disk_ms: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser (argparse.ArgumentParser): Of the subcommand.
    """
    parser.add_argument(
        "--images", nargs="+", type=int, default=[100, 1000, 10_000, 100_000], help="sizes of galleries"
    )
    parser.add_argument("--disturbed", type=int, default=3, help="blocks of a query, of 25, that a defect disturbs")
    parser.add_argument("--preset", choices=PRESETS, default="cpr_faster", help="model of the whole inference")
    parser.add_argument("--bank-dtype", choices=DTYPES, default="int4")
    parser.add_argument("--size", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--k", type=int, default=10, help="references per image")
    parser.add_argument("--disk-mb", type=float, default=2000, help="no whole inference with larger banks")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to put the banks meanwhile (default: as tempfile)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")


def run(arguments: argparse.Namespace) -> int:
    """Measure, show, write.

    Args:
        arguments (argparse.Namespace): Of :func:`add_arguments`.

    Returns:
        int: Exit code.
    """
    if min(arguments.images) <= arguments.k:
        raise SystemExit(f"--images {min(arguments.images)}: must be more than --k {arguments.k}.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console, others = Console(width=120), OtherWork()
    results = []
    with torch.inference_mode():
        model = random_cpr(
            PRESETS[arguments.preset],
            Setting(arguments.size, arguments.k, arguments.k + 1),
            arguments.bank_dtype,
            torch.device("cpu"),
        )
        for count in arguments.images:
            console.print(f"{count} images")
            results.append(measure(count, model, arguments))
    _show(results, arguments, console)
    others.warn(console)
    if arguments.json:
        options = argparse.Namespace(**vars(arguments), precision="float32", gallery=None, cuda_graphs=False)
        environment = {**describe_environment(options, torch.device("cpu")), **others.so_far()}
        for name in ("disturbed", "preset", "bank_dtype"):
            environment[name] = getattr(arguments, name)
        content = {"environment": environment, "rows": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def synthetic_histograms(count: int, disturbed: int, generator: torch.Generator) -> Tensor:
    """Histograms of images that resemble one another more or less.

    Args:
        count (int): Number of images.
        disturbed (int): Blocks of each image in which half of the cells show one other word.
        generator (torch.Generator): Of the choices.

    Returns:
        Tensor: Of shape ``(count, 25, 12)``.
    """
    prototypes = torch.rand(64, BLOCKS, WORDS, generator=torch.Generator().manual_seed(0)) ** 4
    prototypes /= prototypes.sum(-1, keepdim=True)
    first, second = torch.randint(len(prototypes), (2, count), generator=generator)
    share = torch.rand(count, 1, 1, generator=generator)
    cells = torch.poisson(CELLS * (share * prototypes[first] + (1 - share) * prototypes[second]), generator=generator)
    histograms = cells / cells.sum(-1, keepdim=True).clamp_min(1)
    for image in range(count if disturbed else 0):
        blocks = torch.randperm(BLOCKS, generator=generator)[:disturbed]
        word = torch.eye(WORDS)[torch.randint(WORDS, (disturbed,), generator=generator)]
        histograms[image, blocks] = 0.5 * histograms[image, blocks] + 0.5 * word
    return histograms


def measure(count: int, model: CprModel, arguments: argparse.Namespace) -> GalleryResult:
    """Time one gallery.

    Args:
        count (int): Number of images.
        model (CprModel): Of the whole inference; its bank is replaced.
        arguments (argparse.Namespace): Of the command.

    Returns:
        GalleryResult: The figures.
    """
    generator = torch.Generator().manual_seed(1)
    gallery = synthetic_histograms(count, 0, generator)
    queries = synthetic_histograms(QUERIES, arguments.disturbed, generator)
    query, roots, k = queries[:1], roots_of(gallery), arguments.k
    exact = _median(lambda: GlobalRetriever.nearest(query, gallery, k), arguments.rounds)
    short = recall = None
    if count > SHORTLIST:
        short = _median(lambda: nearest_of_many(query, gallery, roots, k), arguments.rounds)
        hits = []
        for one in queries.split(1):
            true, found = GlobalRetriever.nearest(one, gallery, k), nearest_of_many(one, gallery, roots, k)
            hits.append(float((true[:, :, None] == found[:, None]).any(-1).float().mean()))
        recall = statistics.mean(hits)
    used = gallery.nbytes + (roots.nbytes if count > 2 * SHORTLIST else 0)
    bank_mb = inference = from_disk = None
    cells = [(arguments.size // stride,) * 2 for stride in (4, 8)]
    if model.bank.size_for(count, cells) <= arguments.disk_mb:
        bank_mb, inference, from_disk = _whole(gallery, model, arguments)
    return GalleryResult(count, used / 1e6, exact, short, recall, bank_mb, inference, from_disk)


def _whole(gallery: Tensor, model: CprModel, arguments: argparse.Namespace) -> tuple[float, float, float | None]:
    """Size of the bank, and time of an inference with its descriptors in a file: read before, and never read before."""
    images = torch.rand(4, 1, 3, arguments.size, arguments.size)
    number = iter(range(10**9))
    small = model.bank
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        try:
            model.bank = bank = in_a_file(small, gallery, Path(folder) / "descriptors.bank")
            time_ms = _median(lambda: model(images[next(number) % 4]), arguments.rounds)
            state, cold = bank.state_dict(), []
            for image in [images[index % 4] for index in range(arguments.rounds)]:
                bank.clear()  # what is mapped is not forgotten
                if not _forget(bank.file):
                    break
                bank.load_state_dict(state)
                _ = bank.roots  # computed once per gallery, not per image
                start = time.perf_counter()
                model(image)
                cold.append(1e3 * (time.perf_counter() - start))
            return bank.megabytes, time_ms, statistics.median(cold) if cold else None
        finally:
            model.bank = small


def in_a_file(bank: ReferenceBank, gallery: Tensor, path: Path) -> ReferenceBank:
    """A large bank that repeats the images of a small one, with histograms of its own.

    Args:
        bank (ReferenceBank): The small one.
        gallery (Tensor): Histograms of the large one, ``(gallery, blocks, words)``.
        path (Path): File of the large one's descriptors.

    Returns:
        ReferenceBank: Complete; its descriptors were never in memory as a whole.
    """
    blocks, words = round(gallery.shape[1] ** 0.5), gallery.shape[2]
    large = ReferenceBank(bank.channels, words, blocks, cast("BankDtype", bank.bank_dtype), file=path)
    large.averaged, large.coloured, large.colour_scale = bank.averaged, bank.coloured, bank.colour_scale
    large.histograms = gallery
    large.foregrounds = bank.foregrounds[torch.arange(len(gallery)) % len(bank)]
    large.allocate(len(gallery), [(held.shape[-2], held.shape[-1]) for held in bank.descriptors])
    for name in PARTS:
        if name in dict(bank.named_buffers()):
            held, own = getattr(large, name), getattr(bank, name)
            for start in range(0, len(held), len(own)):
                held[start : start + len(own)] = own[: len(held) - start]
    if bank.coloured:
        large.colours = bank.colours[torch.arange(len(gallery)) % len(bank)]
    large.keep(torch.arange(len(gallery)))
    return large


def _forget(path: Path | None) -> bool:
    """Ask the system to drop what it holds of a file in memory; whether it can be asked."""
    if path is None or not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _median(call: Callable[[], Any], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _show(results: list[GalleryResult], arguments: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"{arguments.preset}, {arguments.bank_dtype} bank, K {arguments.k}")
    for name in (
        "images",
        "histograms MB",
        "exact ms",
        "shortlist ms",
        "recall",
        "bank MB",
        "inference ms",
        "from disk ms",
    ):
        table.add_column(name, justify="right", no_wrap=True)

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for row in results:
        numbers = ((row.histograms_mb, 1), (row.exact_ms, 2), (row.shortlist_ms, 2), (row.recall, 4))
        whole = ((row.bank_mb, 0), (row.inference_ms, 1), (row.inference_from_disk_ms, 1))
        table.add_row(str(row.images), *(show(*number) for number in (*numbers, *whole)))
    console.print(table)
