# SPDX-License-Identifier: Apache-2.0
"""How a model matches and scores: what its thresholds belong to, and its checkpoints therefore remember."""

from collections.abc import Container, Mapping
from typing import Any

from .scoring import PAPER_SIGMA, SIGMA
from .torch_model import CprModel

# The paper's, and what a checkpoint was scored with that does not say.
PAPER_SETTINGS: dict[str, Any] = {
    "k": 10,
    "window_sizes": [3, 1],
    "blur_sigma": PAPER_SIGMA,
    "follow_edges": False,
    "coherent_matching": False,
    "unaligned_matching": False,
    "relative_to_image": False,
}

# What a training begins with; it decides anew on all but the blur, outlines and relative distances.
TRAINING_SETTINGS: dict[str, Any] = {
    **PAPER_SETTINGS,
    "blur_sigma": SIGMA,
    "follow_edges": True,
    "coherent_matching": True,
    "relative_to_image": True,
}


def settings_of(model: CprModel) -> dict[str, Any]:
    """Read the settings.

    Args:
        model (CprModel): The model.

    Returns:
        dict[str, Any]: By name of the argument; plain values, for a checkpoint.
    """
    return {**{name: getattr(model, name) for name in PAPER_SETTINGS}, "window_sizes": list(model.window_sizes)}


def apply_settings(model: CprModel, settings: Mapping[str, Any], given: Container[str] = ()) -> None:
    """Match and score as a checkpoint says; where it says nothing, as the paper does.

    Args:
        model (CprModel): The model.
        settings (Mapping[str, Any]): From a checkpoint; may hold other things.
        given (Container[str]): Names of the settings that stay as they are.
    """
    for name, papers in PAPER_SETTINGS.items():
        if name not in given:
            value = settings.get(name, papers)
            setattr(model, name, tuple(value) if name == "window_sizes" else value)
    if model.coherent_matching and model.unaligned_matching:  # they exclude each other, and one of them is given
        setattr(model, "unaligned_matching" if "coherent_matching" in given else "coherent_matching", False)
