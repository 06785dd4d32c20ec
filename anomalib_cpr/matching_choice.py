# SPDX-License-Identifier: Apache-2.0
"""How many references, in windows or over the whole map? Whatever tells weak anomalies from good images best.

The paper's ten references suffice where among the training images ten lie like any other. Where parts come turned or
loose, a good patch finds its match only among more of them. That shows in the learned metric, from good images alone:
each is scored as if it was not in the bank, as it is and with a weak synthetic anomaly on it. Anomalies as plain as
those of the training stand out anyway; weak ones must rise above what good images differ by.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .alignment import spread
from .coarse_to_fine import match_scales
from .global_retrieval import histogram_distance
from .matching import WHOLE_MAP
from .scoring_settings import PAPER_SETTINGS
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .torch_model import CprModel, full_precision
from .training_images import TrainingImages

ASKED_IMAGES = 24
WEAK_OPACITY = (0.1, 0.5)  # in training 0.5..1
SMALL_AREA = 0.0005  # in training 0.001
MOST_REFERENCES = 80  # whose matching takes four to nine times as long as that of ten
# Chosen on drawn parts of 160 and 320 pixels (results/separation.json): the best number of references has 1.4 to 1.5
# times the contrast of ten on loose tablets and 2.3 to 2.7 times the separation on turned gears, but at most 1.16 times
# either on bracket and fabric. Screw, of MVTec AD, has 0.71 times the contrast and 1.53 times the separation with 80.
CLEAR_CONTRAST = 1.25
CLEAR_SEPARATION = 1.5
ALMOST = 0.25  # of a step below the best, at which fewer references will do: half of them take half the time
# The whole map takes about five times as long as windows do.
MOST_ANYWHERE = 40
ENOUGH_IMAGES = 20  # of fewer, even aligned ones, some have no like


class Matching(NamedTuple):
    """How patches are matched.

    Attributes:
        k (int): Number of references.
        window_sizes (tuple[int, int]): Side of the windows at strides 4 and 8, in cells.
    """

    k: int
    window_sizes: tuple[int, int]

    def __str__(self) -> str:
        """Say it in words."""
        where = "over the whole map" if is_anywhere(self.window_sizes) else f"in windows of {list(self.window_sizes)}"
        return f"{self.k} references {where}"


USUAL_MATCHING = Matching(PAPER_SETTINGS["k"], tuple(PAPER_SETTINGS["window_sizes"]))
LEAST = 0.05  # heads that tell less apart tell nothing of references either


class Evidence(NamedTuple):
    """How plainly weak anomalies stand out from good images.

    Some parts need more references because all their patches find better ones then, others because a few patches of a
    few good images find none among ten: the former shows in the mean of the scores, the latter in their spread.

    Attributes:
        contrast (float): What anomalies add to the scores of good images, in proportion to these scores.
        separation (float): The same in proportion to their standard deviation.
    """

    contrast: float
    separation: float

    def __str__(self) -> str:
        """Both, without words."""
        return f"{self.contrast:.2f} / {self.separation:.1f}"


def evidence_of(good: Tensor, anomalous: Tensor) -> Evidence:
    """What anomalies add to the scores of good images.

    Args:
        good (Tensor): Scores of good images, at least two, ``(images,)``.
        anomalous (Tensor): Scores of the same images with an anomaly, ``(images,)``.

    Returns:
        Evidence: Both 0 where anomalies change nothing.
    """
    added = (anomalous - good).double().mean()
    good = good.double()
    return Evidence(float(added / good.mean().clamp_min(1e-9)), float(added / good.std().clamp_min(1e-9)))


def steps_ahead(one: Evidence, other: Evidence) -> tuple[float, float]:
    """How far one is ahead of the other, in steps of which one makes it clearly better, and one less clearly worse.

    Args:
        one (Evidence): Of one way of matching.
        other (Evidence): Of another, on the same images.

    Returns:
        tuple[float, float]: By contrast and by separation.
    """
    contrast = max(one.contrast, LEAST) / max(other.contrast, LEAST)
    separation = max(one.separation, LEAST) / max(other.separation, LEAST)
    return math.log(contrast, CLEAR_CONTRAST), math.log(separation, CLEAR_SEPARATION)


def is_clearly_better(one: Evidence, other: Evidence) -> bool:
    """Clearly better by contrast or by separation, and not clearly worse by the other.

    Args:
        one (Evidence): Of one way of matching.
        other (Evidence): Of another, on the same images.
    """
    steps = steps_ahead(one, other)
    return max(steps) >= 1 and min(steps) > -1


def best_of(found: Iterable[Evidence]) -> Evidence:
    """The best contrast and the best separation, be they of one way of matching or of two.

    Args:
        found (Iterable[Evidence]): At least one.
    """
    return Evidence(*(max(values) for values in zip(*found, strict=True)))


def candidates(usual: Matching, available: int, *, more_references: bool, whole_map: bool) -> list[Matching]:
    """What is worth asking for.

    Args:
        usual (Matching): What is taken without evidence.
        available (int): How many references an image of the training can have: all but itself.
        more_references (bool): Ask for twice as many, again and again, up to 80 or all; over the whole map to 40.
        whole_map (bool): Ask for the whole map as well.

    Returns:
        list[Matching]: The usual one first, those over the whole map last.
    """
    found = _doubled(usual, min(available, MOST_REFERENCES) if more_references else usual.k)
    if whole_map:
        anywhere = Matching(usual.k, (WHOLE_MAP, WHOLE_MAP))
        found += _doubled(anywhere, min(available, MOST_ANYWHERE) if more_references else usual.k)
    return found


def _doubled(matching: Matching, most: int) -> list[Matching]:
    """A matching, and with twice as many references, again and again, up to ``most``."""
    found = [matching]
    while found[-1].k < most:
        found.append(matching._replace(k=min(2 * found[-1].k, most)))
    return found


def is_anywhere(window_sizes: Sequence[int]) -> bool:
    """Whether patches are searched for over the whole map.

    Args:
        window_sizes (Sequence[int]): Side of the windows at strides 4 and 8, in cells.

    Returns:
        bool: False if one of the scales has a window.
    """
    return min(window_sizes) >= WHOLE_MAP


def choose(found: Mapping[Matching, Evidence]) -> Matching:
    """What is clearly better than the usual matching, with no more references than it takes.

    The whole map, which takes about five times as long, has to be clearly better than windows with any number.

    Args:
        found (Mapping[Matching, Evidence]): Of :func:`candidates`, in their order.

    Returns:
        Matching: One of them.
    """
    usual = next(iter(found))
    windows = {one: evidence for one, evidence in found.items() if one.window_sizes == usual.window_sizes}
    anywhere = {one: evidence for one, evidence in found.items() if one not in windows}
    chosen = _fewest_references(windows, found[usual], usual)
    return _fewest_references(anywhere, best_of(windows.values()), chosen)


def _fewest_references(options: Mapping[Matching, Evidence], other: Evidence, otherwise: Matching) -> Matching:
    """The fewest that are almost as far ahead of the other as the best, where one is clearly better."""
    ahead = {
        one: max(steps_ahead(evidence, other))
        for one, evidence in options.items()
        if is_clearly_better(evidence, other)
    }
    enough = max(ahead.values(), default=0.0) - ALMOST
    return min((one for one, value in ahead.items() if value >= enough), key=lambda one: one.k, default=otherwise)


@torch.no_grad()
def compare_matchings(
    model: CprModel,
    images: TrainingImages,
    in_bank: Tensor,
    synthesise: SyntheticAnomalyGenerator,
    generator: torch.Generator,
    options: Sequence[Matching],
    track: Callable[[Iterable], Iterable] = iter,
) -> dict[Matching, Evidence]:
    """How plainly weak anomalies stand out under each way of matching.

    Args:
        model (CprModel): With heads as they are to be used, and a bank of these images.
        images (TrainingImages): The good images.
        in_bank (Tensor): Which of them the bank holds, in its order, ``(count,)``, CPU.
        synthesise (SyntheticAnomalyGenerator): Makes the anomalies.
        generator (torch.Generator): On the CPU; every choice comes from it.
        options (Sequence[Matching]): Ways to compare, those with the same windows side by side.
        track (Callable): Wraps the iteration, for a progress bar.

    Returns:
        dict[Matching, Evidence]: In the order of the options; empty if not even two anomalies found a place.
    """
    was_training = model.training
    model.eval()
    try:
        device = model.foreground_estimator.projection.weight.device
        photographs = in_bank.to(device) // images.copies
        scores: dict[Matching, list[Tensor]] = {option: [] for option in options}
        for image in track(spread(len(images), ASKED_IMAGES).tolist()):
            good = images.take(torch.tensor([image]), device)
            features = model.feature_extractor(images.normalize(good))
            anomalous, mask = synthesise(good, model.foreground_estimator(features[0].float()), generator)
            if not mask.any():
                continue
            others = photographs != image // images.copies
            with_anomaly = model.feature_extractor(images.normalize(anomalous))
            both = [torch.cat(scale) for scale in zip(features, with_anomaly, strict=True)]
            for option, score in _scores(model, both, images.size, others, options):
                scores[option].append(score.cpu())
    finally:
        model.train(was_training)
    pairs = {option: torch.stack(found) for option, found in scores.items() if len(found) > 1}
    return {option: evidence_of(*found.T) for option, found in pairs.items()}


def held_out_references(model: CprModel, features: Tensor, others: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """What :meth:`CprModel.retrieve` finds where some images of the bank are not there.

    Args:
        model (CprModel): With a bank.
        features (Tensor): F1 of shape ``(batch, channels, height, width)``.
        others (Tensor): Which images of the bank are there, bool, ``(gallery,)``.
        most (int): Number of references, or as many as there are.

    Returns:
        tuple[Tensor, Tensor]: Indices into the bank, ``(batch, k)``, the most similar first; foregrounds of queries and
            references, ``(batch, 1 + k, height, width)``.
    """
    distances = histogram_distance(model.global_retriever(features), model.bank.histograms)
    # Stable, so that the first ten are those of a search for ten, whatever equals there are.
    ordered = distances.masked_fill_(~others, float("inf")).sort(dim=1, stable=True).indices
    references = ordered[:, : min(most, int(others.sum()))]
    own = model.foreground_estimator(features.float())
    return references, torch.cat([own, model.bank.foregrounds_of(references)], dim=1)


def _scores(
    model: CprModel,
    features: Sequence[Tensor],
    size: tuple[int, int],
    others: Tensor,
    options: Sequence[Matching],
) -> Iterator[tuple[Matching, Tensor]]:
    """Scores of images whose F1 and F2 are given, with ``others`` (bool, of the bank) as their possible references."""
    descriptors = model.describe_scales(features)
    with full_precision(features[0].device):
        most = max(option.k for option in options)
        references, foregrounds = held_out_references(model, features[0], others, most)
        for windows, ways in groupby(options, key=lambda option: option.window_sizes):
            asked = list(ways)
            chosen = references[:, : max(option.k for option in asked)]
            found = match_scales(descriptors, model.bank.descriptors, chosen, windows, model.bank.scales)
            for option in asked:  # the matches with ten references are among those with twenty
                nearest = [distance[:, : option.k] for distance in found]
                own_foregrounds = foregrounds[:, : 1 + nearest[0].shape[1]]
                _, score = model.scorer(
                    nearest,
                    own_foregrounds,
                    size,
                    relative=model.relative_to_image,
                    unaligned=model.unaligned_matching,
                )
                yield option, score
