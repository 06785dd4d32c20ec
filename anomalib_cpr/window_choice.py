# SPDX-License-Identifier: Apache-2.0
"""Windows, or the whole map? Whichever tells weak anomalies from good images better in the learned metric.

Asked only where :mod:`anomalib_cpr.alignment` suspects that parts lie anywhere. Anomalies as plain as those of the
training stand out under any window; weak ones must rise above what good images differ by anyway, which is what the
choice of windows changes. The good images are those of the training, each without itself among its references.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .alignment import generous_window, surveyed
from .feature_extractor import STRIDES
from .matching import WHOLE_MAP, match
from .synthetic_anomalies import SyntheticAnomalyGenerator
from .torch_model import CprModel, full_precision
from .training_images import TrainingImages

Windows = tuple[int, int]

ASKED_IMAGES = 24
WEAK_OPACITY = (0.1, 0.5)  # in training 0.5..1
SMALL_AREA = 0.0005  # in training 0.001


def separation(good: Tensor, anomalous: Tensor) -> float:
    """How far anomalies raise scores, in standard deviations of the scores of good images.

    Args:
        good (Tensor): Scores of good images, ``(images,)``.
        anomalous (Tensor): Scores of the same images with an anomaly, ``(images,)``.

    Returns:
        float: 0 where anomalies change nothing.
    """
    return float(((anomalous - good).mean() / good.std().clamp_min(1e-9)).double())


def candidates(windows: Windows, size: tuple[int, int]) -> list[Windows]:
    """The usual windows, windows of a tenth of the image each way, and the whole map.

    Args:
        windows (Windows): The usual ones, at strides 4 and 8.
        size (tuple[int, int]): Height and width of the images in pixels.

    Returns:
        list[Windows]: The usual ones first, the whole map last.
    """
    generous = [
        max(usual, generous_window(max(size) // stride)) for usual, stride in zip(windows, STRIDES, strict=True)
    ]
    return [windows, (generous[0], generous[1]), (WHOLE_MAP, WHOLE_MAP)]


def choose(separations: Mapping[Windows, float]) -> Windows:
    """The whole map where it separates at least as well as any window, the usual windows otherwise.

    On loose drawn tablets it is 1.04 to 1.25 times as good. Turned parts and a texture come near: weak anomalies do not
    foresee defects that are the right thing in the wrong place. So this confirms or refutes what is suspected, no more.

    Args:
        separations (Mapping[Windows, float]): Of :func:`candidates`, in their order.

    Returns:
        Windows: The first or the last of them. Windows between them raise image scores of turned parts a little, and
            cost aligned ones a tenth of pixel AP (a drawn bracket: 0.85 to 0.75 with 5 and 3 cells), which weak
            anomalies do not foresee.
    """
    usual, *others, whole = separations
    best_window = max(separations[windows] for windows in (usual, *others))
    return whole if separations[whole] >= best_window else usual


@torch.no_grad()
def compare_windows(
    model: CprModel,
    images: TrainingImages,
    neighbours: Tensor,
    synthesise: SyntheticAnomalyGenerator,
    generator: torch.Generator,
    options: Sequence[Windows],
    track: Callable[[Iterable], Iterable] = iter,
) -> dict[Windows, float]:
    """Separation of good images and weak anomalies under each choice of windows.

    Args:
        model (CprModel): With heads as they are to be used.
        images (TrainingImages): The good images.
        neighbours (Tensor): Indices of the references of each image, ``(images, k)``, CPU.
        synthesise (SyntheticAnomalyGenerator): Makes the anomalies.
        generator (torch.Generator): On the CPU; every choice comes from it.
        options (Sequence[Windows]): Windows to compare.
        track (Callable): Wraps the iteration, for a progress bar.

    Returns:
        dict[Windows, float]: In the order of the options; empty if no anomaly found a place.
    """
    was_training = model.training
    model.eval()
    try:
        device = model.foreground_estimator.projection.weight.device
        scores: dict[Windows, list[Tensor]] = {windows: [] for windows in options}
        for image, others in track(list(zip(*surveyed(neighbours, ASKED_IMAGES), strict=True))):
            good = images.take(torch.tensor([image]), device)
            foreground = model.foreground_estimator(model.feature_extractor(images.normalize(good))[0].float())
            anomalous, mask = synthesise(good, foreground, generator)
            if not mask.any():
                continue
            of_pair, foregrounds = _described(model, images.normalize(torch.cat([good, anomalous])))
            of_others, other_foregrounds = _described(model, images.normalize(images.take(others, device)))
            every = torch.arange(len(others), device=device).expand(2, -1)
            with full_precision(device):
                around = torch.cat([foregrounds, other_foregrounds[:, 0].expand(2, -1, -1, -1)], dim=1)
                for windows, found in scores.items():
                    scales = zip(of_pair, of_others, windows, strict=True)
                    distances = [match(pair, gallery, every, window) for pair, gallery, window in scales]
                    found.append(model.scorer(distances, around, images.size)[1].cpu())
    finally:
        model.train(was_training)
    pairs = {windows: torch.stack(found) for windows, found in scores.items() if len(found) > 1}
    return {windows: separation(*found.T) for windows, found in pairs.items()}


def _described(model: CprModel, images: Tensor) -> tuple[list[Tensor], Tensor]:
    features = model.feature_extractor(images)
    return model.describe(features), model.foreground_estimator(features[0].float())
