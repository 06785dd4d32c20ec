import pytest
import torch

from anomalib_cpr.foreground import Discriminant
from anomalib_cpr.kinds import DEFAULT_STEPS, KNOWN_CATEGORIES, PAPER_STEPS, kind_from_features, known_kind


class MVTecAD: ...


class MVTec(MVTecAD): ...


class BTech: ...


class Folder: ...


@pytest.mark.parametrize(
    ("datamodule", "category", "kind"),
    [
        (MVTecAD(), "screw", "object"),
        (MVTec(), "carpet", "texture"),
        (BTech(), "01", "object"),
        (BTech(), "02", "texture"),
        (Folder(), "screw", None),
        (MVTecAD(), "unheard_of", None),
        (None, None, None),
    ],
)
def test_known_by_name(datamodule, category, kind):
    assert known_kind(datamodule, category) == kind


def test_lists_are_complete():
    counts = {name: len(categories) for name, categories in KNOWN_CATEGORIES.items()}
    assert counts == {"MVTecAD": 15, "BTech": 3, "MVTec3D": 10}
    assert sum(kind == "object" for kind in KNOWN_CATEGORIES["MVTecAD"].values()) == 10
    assert PAPER_STEPS == {"object": 40_000, "texture": 500}
    assert DEFAULT_STEPS == {"object": 1_000, "texture": 500}, "at most a fortieth"


@pytest.mark.parametrize(
    ("ring", "centre", "kind"), [(0.99, 0.1, "object"), (0.6, 0.55, "texture"), (0.9, 0.61, "texture")]
)
def test_from_features(ring, centre, kind):
    decided, reason = kind_from_features(Discriminant(torch.zeros(1), 0.0, ring, centre))
    assert decided == kind
    assert f"{ring:.0%}" in reason


def test_border_like_the_middle_is_a_texture():
    assert kind_from_features(None)[0] == "texture"
