# SPDX-License-Identifier: Apache-2.0
"""``anomalib-cpr explain``: which references were retrieved, what was matched, what the score is made of.

:func:`explain` takes the cascade apart for one image. It computes the matching anew, slowly and with positions; scores
and maps come from the model itself, so what is explained is what is predicted.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .alignment import spread
from .coarse_to_fine import cells_around
from .coherence import coherent_distance
from .colours import distance_to_colours
from .command_arguments import existing_file
from .feature_extractor import STRIDES
from .gallery_pictures import ImageReader, find_training_images, identify_gallery, image_files, reference_pictures
from .global_retrieval import assign_words, histogram_distance
from .lightning_model import Cpr
from .matching import PIECE, covers
from .quantisation import restore
from .relative import share_that_counts
from .scoring import fuse
from .torch_model import CprModel
from .unaligned import ON_THE_WHOLE, distance_to_several, ranks_on_the_whole, to_several_references

logger = logging.getLogger(__name__)

PATCHES = 4
# A further hot patch is shown if it is at least so hot, compared with the hottest.
LEAST_SHARE = 0.4
# A distance up to so many times the largest of good parts at the same place is called usual.
USUAL = 1.5
# Training images among which the usual distance to the nearest neighbour is looked up.
SURVEYED = 512
EVERYWHERE = slice(None)


@dataclass(frozen=True)
class Match:
    """Where the patches of a query find their best match, at one scale.

    Attributes:
        distance (Tensor): Smallest cosine distance, 0..2, ``(height, width)``.
        reference (Tensor): Rank of the reference on which it lies, 0 being the most similar one.
        row (Tensor): Row of the matching cell on that reference.
        column (Tensor): Column of it.
        per_reference (Tensor): Smallest distance to each reference, ``(k, height, width)``.
    """

    distance: Tensor
    reference: Tensor
    row: Tensor
    column: Tensor
    per_reference: Tensor


@dataclass(frozen=True)
class PatchAtScale:
    """A patch and its best match, at one scale; cells are (row, column).

    Attributes:
        cell (tuple[int, int]): On the query.
        match (tuple[int, int]): On the reference.
        reference (int): Rank of the reference.
        distance (float): Cosine distance, 0..2.
        per_reference (list[float]): Smallest distance to each reference.
        on_good_parts (list[float]): What the references themselves show at this place, each compared with its own
            references: the distance that is normal here.
    """

    cell: tuple[int, int]
    match: tuple[int, int]
    reference: int
    distance: float
    per_reference: list[float]
    on_good_parts: list[float]


@dataclass(frozen=True)
class HotPatch:
    """One of the places where the anomaly map peaks.

    Attributes:
        pixel (tuple[int, int]): Row and column of the peak, in pixels.
        value (float): Of the anomaly map there.
        scales (list[PatchAtScale]): The comparison at each scale, finest first.
        own_foreground (float): Foreground of the query there, 0..1.
        reference_foreground (float): Largest foreground of the references there.
        cause (str): "background", "colour", "references", "usual" or "unmatched".
        verdict (str): The cause in words, with its numbers.
    """

    pixel: tuple[int, int]
    value: float
    scales: list[PatchAtScale]
    own_foreground: float
    reference_foreground: float
    cause: str
    verdict: str


@dataclass(frozen=True)
class Explanation:
    """All that a prediction was made of.

    Attributes:
        score (float): Image score, 0..1, as the model gives it.
        anomaly_map (Tensor): Of shape ``(height, width)``, as the model gives it.
        references (list[int]): Indices of the references in the gallery, the most similar first.
        histogram_distances (list[float]): Of the references.
        usual_distances (Tensor): Distance of training images to their nearest neighbour, sorted.
        unlike (float): Share of training images whose nearest neighbour is nearer than the query's, 0..1.
        words (Tensor): Word map of the query, ``(height / 4, width / 4)``.
        foreground (Tensor): Of the query, ``(height / 4, width / 4)``.
        reference_foregrounds (Tensor): ``(k, height / 4, width / 4)``.
        matches (list[Match]): Per scale, finest first.
        distances (list[Tensor]): What the map is made of, per scale, ``(height, width)``: those of the matches, or,
            with coherent matching, those on which neighbours agree; with unaligned matching, means over references;
            then those of colours, if they count.
        shares (list[float]): By which these were multiplied, since they are judged relative to the image; 1 if they are
            not.
        patches (list[HotPatch]): The hottest first.
    """

    score: float
    anomaly_map: Tensor
    references: list[int]
    histogram_distances: list[float]
    usual_distances: Tensor
    unlike: float
    words: Tensor
    foreground: Tensor
    reference_foregrounds: Tensor
    matches: list[Match]
    distances: list[Tensor]
    shares: list[float]
    patches: list[HotPatch]


def best_matches(
    queries: Sequence[Tensor], references: Sequence[Tensor], windows: Sequence[int], on_the_whole: bool = False
) -> list[Match]:
    """Compare every patch with every reference and every place of the window, and remember the best.

    The same as :func:`anomalib_cpr.coarse_to_fine.match_scales`, without its economy: from coarse to fine where both
    windows cover the map.

    Args:
        queries (Sequence[Tensor]): Unit descriptors of strides 4 and 8, ``(channels, height_i, width_i)``.
        references (Sequence[Tensor]): Unit descriptors, ``(k, channels, height_i, width_i)``.
        windows (Sequence[int]): Sides in cells, odd.
        on_the_whole (bool): At stride 8, the best match lies on one of those references that fit as a whole.

    Returns:
        list[Match]: Distances and positions, of strides 4 and 8. Of equally good matches the nearest reference wins.
    """
    similarity, row, column = _search(queries[1], references[1], windows[1])
    if all(covers(window, query) for window, query in zip(windows, queries, strict=True)):
        fine = _search_below(queries[0], references[0], row * queries[1].shape[-1] + column)
    else:
        fine = _search(queries[0], references[0], windows[0])
    ranks = ranks_on_the_whole(1 - similarity[None])[0] if on_the_whole else None
    return [_nearest(*fine), _nearest(similarity, row, column, ranks)]


def _search(query: Tensor, references: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest similarity on each reference, and row and column where it is, ``(k, height, width)`` each."""
    height, width = query.shape[-2:]
    if covers(window, query):
        cells = query.float().flatten(1).T
        found = [
            [(some @ reference).max(1) for some in cells.split(PIECE)] for reference in references.float().flatten(2)
        ]
        similarity, place = (
            torch.stack([torch.cat([piece[part] for piece in pieces]) for pieces in found]).unflatten(
                1, (height, width)
            )
            for part in (0, 1)
        )
        return similarity, place // width, place % width
    radius = window // 2
    shifts = list(product(range(-radius, radius + 1), repeat=2))
    padded = F.pad(references.float(), (radius, radius, radius, radius))
    inside = F.pad(torch.ones(height, width, dtype=torch.bool, device=query.device), (radius,) * 4)
    candidates = []
    for down, right in shifts:
        seen = (slice(radius + down, radius + down + height), slice(radius + right, radius + right + width))
        similarity = torch.einsum("chw,kchw->khw", query.float(), padded[:, :, seen[0], seen[1]])
        candidates.append(similarity.masked_fill(~inside[seen], -2.0))
    best = torch.stack(candidates).max(0)
    shift = torch.tensor(shifts, device=query.device)[best.indices]
    row, column = torch.meshgrid(
        torch.arange(height, device=query.device), torch.arange(width, device=query.device), indexing="ij"
    )
    return best.values, row + shift[..., 0], column + shift[..., 1]


def _search_below(query: Tensor, references: Tensor, parents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same at stride 4, around the matches of stride 8, whose cells are given, ``(k, height / 2, width / 2)``."""
    width = query.shape[-1]
    around = cells_around(parents.shape[-2], parents.shape[-1]).to(query.device)
    cells = references.float().flatten(2)
    similarity, place = [], []
    for reference, parent in zip(cells, parents, strict=True):
        window = around[parent.repeat_interleave(2, 0).repeat_interleave(2, 1)]  # (height, width, 16)
        best = torch.einsum("chw,chwn->hwn", query.float(), reference[:, window]).max(2)
        similarity.append(best.values)
        place.append(window.gather(2, best.indices[..., None])[..., 0])
    places = torch.stack(place)
    return torch.stack(similarity), places // width, places % width


def _nearest(similarity: Tensor, row: Tensor, column: Tensor, ranks: Tensor | None = None) -> Match:
    """The best of the matches on each reference, or on some of them."""
    ranks = torch.arange(len(similarity), device=similarity.device) if ranks is None else ranks.sort().values
    best = similarity[ranks].max(0)
    reference = ranks[best.indices]
    return Match(
        distance=(1 - best.values).clamp(0, 2),
        reference=reference,
        row=row.gather(0, reference[None])[0],
        column=column.gather(0, reference[None])[0],
        per_reference=(1 - similarity).clamp(0, 2),
    )


def peaks(anomaly_map: Tensor, count: int) -> list[tuple[int, int]]:
    """Places where a map is largest, far enough from one another to be told apart.

    Args:
        anomaly_map (Tensor): Of shape ``(height, width)``.
        count (int): At most so many.

    Returns:
        list[tuple[int, int]]: Row and column, the largest first; none that is below 40 % of the largest.
    """
    remaining = anomaly_map.clone()
    height, width = remaining.shape
    reach = max(2, max(height, width) // 12)
    found: list[tuple[int, int]] = []
    highest = float(remaining.max())
    for _ in range(count):
        index = int(remaining.argmax())
        row, column = index // width, index % width
        value = float(remaining[row, column])
        if value <= 0 or value < LEAST_SHARE * highest:
            break
        found.append((row, column))
        remaining[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = 0
    return found


@torch.no_grad()
def explain(model: CprModel, image: Tensor, patches: int = PATCHES, copies: int = 1) -> Explanation:
    """Take a prediction apart.

    Args:
        model (CprModel): A fitted model, in evaluation mode.
        image (Tensor): One normalised image of shape ``(1, 3, height, width)``.
        patches (int): Hot patches to be followed to their match.
        copies (int): So many consecutive images of the bank show one photograph (``Cpr.copies_in_bank``).

    Returns:
        Explanation: On the CPU.

    Raises:
        RuntimeError: If the model was not fitted.
        ValueError: If there is not exactly one image, or its size is not that of the training.
    """
    if image.shape[0] != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}: one image at a time can be explained.")
    prediction = model(image)
    features = model.feature_extractor(image)
    retriever, bank = model.global_retriever, model.bank
    chosen, foregrounds = model.retrieve(features[0])
    references = chosen[0]
    distances = histogram_distance(retriever(features[0]), bank.histograms)[0, references]
    usual = usual_distances(bank.histograms, copies)

    queries = model.describe(features, image)
    matches = best_matches(
        [query[0] for query in queries[: len(STRIDES)]],
        [stored_descriptors(model, scale, references) for scale in (0, 1)],
        model.window_sizes,
        on_the_whole=model.unaligned_matching,
    )
    shown = [match.distance for match in matches]
    if model.coherent_matching:
        shown = [coherent_distance(match.per_reference[None])[0, 0] for match in matches]
    elif model.unaligned_matching:
        to_each = [one.per_reference[None] for one in matches]
        if model.colour_matching:
            to_each.append(model.match(queries, chosen)[-1])
        shown = [distance[0, 0] for distance in to_several_references(to_each)]
    shares = [1.0] * len(shown)
    if model.relative_to_image and model.unaligned_matching:
        shares[: len(STRIDES)] = [
            float(share_that_counts(distance[None, None] * 0.5)) for distance in shown[: len(STRIDES)]
        ]
    elif model.relative_to_image:
        size = (image.shape[-2], image.shape[-1])
        shares = [float(share_that_counts(fuse([match.distance[None, None] for match in matches], size)))] * len(shown)
    foreground, reference_foregrounds = foregrounds[0, 0], foregrounds[0, 1:]
    anomaly_map = prediction.anomaly_map[0, 0].float()
    unlike = float((usual < distances[0].cpu()).float().mean())
    hot = [
        _follow(
            model,
            pixel,
            float(anomaly_map[pixel]),
            references,
            matches,
            [distance * share for distance, share in zip(shown, shares, strict=True)],
            foreground,
            reference_foregrounds,
            unlike,
            copies,
        )
        for pixel in peaks(anomaly_map, patches)
    ]
    return Explanation(
        score=float(prediction.pred_score[0]),
        anomaly_map=anomaly_map.cpu(),
        references=references.tolist(),
        histogram_distances=distances.tolist(),
        usual_distances=usual,
        unlike=unlike,
        words=assign_words(features[0].float(), retriever.codebook)[0].cpu(),
        foreground=foreground.cpu(),
        reference_foregrounds=reference_foregrounds.cpu(),
        matches=[Match(**{name: value.cpu() for name, value in vars(match).items()}) for match in matches],
        distances=[distance.cpu() for distance in shown],
        shares=shares,
        patches=hot,
    )


def stored_descriptors(
    model: CprModel, scale: int, images: Tensor, rows: slice = EVERYWHERE, columns: slice = EVERYWHERE
) -> Tensor:
    """Descriptors of some images of the gallery, whatever type they are stored in.

    Args:
        model (CprModel): The fitted model.
        scale (int): 0 for stride 4, 1 for stride 8.
        images (Tensor): Indices of shape ``(count,)``.
        rows (slice): Cells that are wanted; all of them, of 80 images, are a lot to copy.
        columns (slice): The same.

    Returns:
        Tensor: Float32, ``(count, channels, height, width)``, on the device of the indices.
    """
    held, factors = model.bank.descriptors[scale][..., rows, columns], model.bank.scales[scale]
    factors = None if factors is None else factors[..., rows, columns]
    chosen = images.to(held.device)
    return restore(held[chosen], None if factors is None else factors[chosen], model.bank.channels).to(images.device)


def foreground_in_use(explanation: Explanation) -> Tensor:
    """Foreground by which the map was multiplied: the largest of query and references, in pixels as the scorer does it.

    Args:
        explanation (Explanation): From :func:`explain`.

    Returns:
        Tensor: Of the shape of the anomaly map.
    """
    foregrounds = torch.cat([explanation.foreground[None], explanation.reference_foregrounds])
    size = (explanation.anomaly_map.shape[0], explanation.anomaly_map.shape[1])
    return F.interpolate(foregrounds[None], size, mode="bilinear")[0].amax(0)


def usual_distances(histograms: Tensor, copies: int = 1) -> Tensor:
    """Distance of training images to their nearest neighbour: what a query's distance is to be compared with.

    Args:
        histograms (Tensor): Of the gallery, ``(gallery, blocks, words)``. Of more than 512, so many are looked at.
        copies (int): So many consecutive images show one photograph, and do not count as each other's neighbours.

    Returns:
        Tensor: Sorted, on the CPU; empty if there is only one photograph.
    """
    count = len(histograms)
    if count <= copies:
        return torch.zeros(0)
    chosen = spread(count, SURVEYED).to(histograms.device)
    nearest = []
    for part in chosen.split(64):
        distances = _distances_to_others(histograms, part, copies)
        nearest.append(distances.amin(1))
    return torch.cat(nearest).sort().values.cpu()


def _distances_to_others(histograms: Tensor, chosen: Tensor, copies: int) -> Tensor:
    """Histogram distances of chosen images to all, infinite to the own photograph: ``(chosen, gallery)``."""
    distances = histogram_distance(histograms[chosen], histograms)
    photographs = torch.arange(len(histograms), device=histograms.device) // copies
    return distances.masked_fill_(photographs[chosen, None] == photographs, float("inf"))


def _follow(
    model: CprModel,
    pixel: tuple[int, int],
    value: float,
    references: Tensor,
    matches: Sequence[Match],
    distances: Sequence[Tensor],
    foreground: Tensor,
    reference_foregrounds: Tensor,
    unlike: float,
    copies: int,
) -> HotPatch:
    """Follow a hot pixel to the cells and matches that made it hot."""
    fine, weight = distances[0], torch.maximum(foreground, reference_foregrounds.amax(0))
    enlarged = [F.interpolate(distance[None, None], fine.shape, mode="bilinear")[0, 0] for distance in distances]
    # The map is smoothed or follows edges: its peak lies within two cells of the cell that contributes most.
    row, column = pixel[0] // 4, pixel[1] // 4
    top, left = max(0, row - 2), max(0, column - 2)
    together = torch.stack(enlarged).amax(0) if model.unaligned_matching else fine + enlarged[1]
    nearby = (together * weight)[top : row + 3, left : column + 3]
    row, column = top + int(nearby.argmax()) // nearby.shape[1], left + int(nearby.argmax()) % nearby.shape[1]

    scales = []
    for level, (match, coarser) in enumerate(zip(matches, (1, 2), strict=True)):
        cell = min(row // coarser, match.distance.shape[0] - 1), min(column // coarser, match.distance.shape[1] - 1)
        scales.append(
            PatchAtScale(
                cell=cell,
                match=(int(match.row[cell]), int(match.column[cell])),
                reference=int(match.reference[cell]),
                distance=float(match.distance[cell]),
                per_reference=match.per_reference[:, cell[0], cell[1]].tolist(),
                on_good_parts=_distances_on_good_parts(model, references, level, cell, copies),
            )
        )
    own, others = float(foreground[row, column]), float(reference_foregrounds[:, row, column].max())
    colour = None
    if len(enlarged) > len(STRIDES) and int(torch.stack([one[row, column] for one in enlarged]).argmax()) > 1:
        usual = _colours_on_good_parts(model, references, (row // 2, column // 2), copies)
        colour = float(enlarged[-1][row, column])
        colour = colour if colour > USUAL * max(usual, default=0.0) else None
    cause, verdict = _judge(scales, own, others, unlike, colour)
    return HotPatch(pixel, value, scales, own, others, cause, verdict)


def _distances_on_good_parts(
    model: CprModel, references: Tensor, level: int, cell: tuple[int, int], copies: int
) -> list[float]:
    """What each reference shows at a place when it is the query, compared with its own references."""
    histograms = model.bank.histograms
    if len(histograms) <= copies:
        return []
    distances = _distances_to_others(histograms, references, copies)
    neighbours = distances.topk(min(model.k, len(histograms) - copies), dim=1, largest=False).indices
    row, column = cell
    radius = model.window_sizes[level] // 2
    rows = slice(max(0, row - radius), row + radius + 1)
    columns = slice(max(0, column - radius), column + radius + 1)
    below = level == 0 and all(map(covers, model.window_sizes, model.bank.descriptors))
    found = []
    for image, others in zip(references.split(1), neighbours, strict=True):
        patch = _descriptor_of(model, level, image, row, column)
        if below:
            parent = _descriptor_of(model, 1, image, row // 2, column // 2)
            cells = _cells_below_matches(model, parent, others)
        else:
            cells = stored_descriptors(model, level, others, rows, columns).flatten(2)
        found.append(float((1 - torch.einsum("c,kcn->kn", patch, cells).max()).clamp(0, 2)))
    return found


def _colours_on_good_parts(model: CprModel, references: Tensor, cell: tuple[int, int], copies: int) -> list[float]:
    """The same of colours: how far that of a cell of stride 8 is from those anywhere on the nearest images."""
    bank, (row, column) = model.bank, cell
    if len(bank.histograms) <= copies:
        return []
    distances = _distances_to_others(bank.histograms, references, copies)
    neighbours = distances.topk(min(ON_THE_WHOLE, len(bank.histograms) - copies), dim=1, largest=False).indices
    own = bank.colours[references, :, row : row + 1, column : column + 1]
    found = distance_to_several(distance_to_colours(own, bank.colours, neighbours))
    return (found * bank.colour_scale).flatten().tolist()


def _descriptor_of(model: CprModel, level: int, image: Tensor, row: int, column: int) -> Tensor:
    """Descriptor of one cell of an image of the gallery: ``(channels,)``."""
    return stored_descriptors(model, level, image, slice(row, row + 1), slice(column, column + 1)).flatten()


def _cells_below_matches(model: CprModel, parent: Tensor, others: Tensor) -> Tensor:
    """Of some images, the cells of stride 4 where a descriptor of stride 8 finds its match: ``(k, channels, 16)``."""
    coarse = stored_descriptors(model, 1, others)
    places = torch.einsum("c,kcn->kn", parent, coarse.flatten(2)).argmax(1)
    around = cells_around(coarse.shape[-2], coarse.shape[-1]).to(places.device)[places]
    return stored_descriptors(model, 0, others).flatten(2).gather(2, around[:, None].expand(-1, coarse.shape[1], -1))


def _judge(
    scales: Sequence[PatchAtScale], own: float, others: float, unlike: float, colour: float | None = None
) -> tuple[str, str]:
    """Name what made a patch hot; ``colour`` is the distance of its colour where that is what counts most."""
    total = sum(scale.distance for scale in scales)
    good = [sum(parts) for parts in zip(*(scale.on_good_parts for scale in scales), strict=True)]
    usual = f"good parts {min(good):.2f}..{max(good):.2f} here" if good else "nothing to compare with"
    if own < 0.5:
        whose = f"only references see the part here ({others:.1f})" if others >= 0.5 else f"references {others:.1f}"
        return "background", f"background: own foreground {own:.1f}, {whose}"
    if colour is not None:
        return "colour", f"a colour that the references have nowhere: distance {colour:.2f}, of descriptors {total:.2f}"
    if good and total <= USUAL * max(good):
        return "usual", f"as on good parts: distance {total:.2f}, {usual}"
    if unlike >= 0.99:
        return "references", f"references differ from the image: distance {total:.2f}, {usual}"
    return "unmatched", f"no match: distance {total:.2f}, {usual}"


# --- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser (argparse.ArgumentParser): Parser of the subcommand.
    """
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images to be explained, or folders")
    parser.add_argument("--ckpt", type=existing_file, required=True, metavar="FILE", help="checkpoint of a trained Cpr")
    parser.add_argument("-o", "--output", type=Path, default=Path("explanations"), help="folder of the pictures")
    parser.add_argument(
        "--train-images", type=Path, metavar="FOLDER", help="where the training images are, if they were moved"
    )
    parser.add_argument(
        "--mask", type=existing_file, metavar="FILE", help="true mask of the defect, outlined in the picture"
    )
    parser.add_argument("--patches", type=int, default=PATCHES, help="hot patches to follow (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Explain images and save the pictures.

    Args:
        arguments (argparse.Namespace): Parsed arguments, see :func:`add_arguments`.

    Returns:
        int: 0.
    """
    from .explain_picture import save_explanation  # noqa: PLC0415 - matplotlib takes a second

    images = [file for path in arguments.images for file in image_files(path)]
    if arguments.mask is not None and len(images) != 1:
        raise SystemExit(f"--mask belongs to one image, {len(images)} were given.")
    module = load(arguments.ckpt, torch.device(arguments.device))
    reader = ImageReader(module.pre_processor, module.device, module.rotations)
    files = find_training_images(module.training_paths, arguments.train_images)
    files = identify_gallery(module.model, reader, files)
    if not any(files):
        print("The training images were not found: references are shown without picture. See --train-images.")
    for file in images:
        colours = reader.colours(file)
        explanation = explain(module.model, reader.normalize(colours), arguments.patches, module.copies_in_bank)
        mask = None
        if arguments.mask is not None:
            mask = reader.colours(arguments.mask)[0] > 0.5
        target = unused_name(arguments.output, file)
        save_explanation(
            explanation,
            colours,
            reference_pictures(module.model, reader, files, explanation.references),
            target,
            codebook=module.model.global_retriever.codebook,
            title="/".join(file.parts[-3:]),
            mask=mask,
            threshold=pixel_threshold(module),
        )
        print(f"{target}: score {explanation.score:.3f}")
        for number, patch in enumerate(explanation.patches, 1):
            print(f"  {number}. {patch.verdict}")
    return 0


def load(checkpoint: Path, device: torch.device) -> Cpr:
    """Load a trained model for inference.

    Args:
        checkpoint (Path): Of a finished training.
        device (torch.device): Where to put it.

    Returns:
        Cpr: In evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"--ckpt {checkpoint}: there is no such file.")
    module = cast("Cpr", Cpr.load_from_checkpoint(checkpoint, map_location="cpu", evaluator=False, visualizer=False))
    return module.to(device).eval()


def pixel_threshold(module: Cpr) -> float | None:
    """Threshold of raw maps that validation has set; None if there is none.

    Args:
        module (Cpr): The trained model.
    """
    threshold = getattr(module.post_processor, "_pixel_threshold", None)
    return float(threshold) if threshold is not None and bool(torch.isfinite(threshold)) else None


def unused_name(folder: Path, file: Path) -> Path:
    """Name for the picture of an image: its last two folders tell images of the same name apart.

    Args:
        folder (Path): For the picture.
        file (Path): The image.
    """
    parts = [part for part in file.resolve().parts[-3:-1] if part not in {"/", "\\"}]
    return folder / ("_".join([*parts, file.stem]) + ".png")
