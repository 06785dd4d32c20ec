# SPDX-License-Identifier: Apache-2.0
"""Published results, to stand beside measured ones. Each set names where it was published; values are 0..1."""

from typing import Any

# Categories in the order of the tables below.
MVTEC_AD = (
    "carpet", "grid", "leather", "tile", "wood", "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill",
    "screw", "toothbrush", "transistor", "zipper",
)  # fmt: skip


def _by_category(values: str) -> dict[str | None, float]:
    mean, *others = map(float, values.split())
    return {None: mean, **dict(zip(MVTEC_AD, others, strict=True))}


# label, class of the model, data set, source, metric -> category (None: the mean) -> value
PUBLISHED: tuple[dict[str, Any], ...] = (
    {
        "label": "CPR, published",
        "class": "Cpr",
        "data": "MVTecAD",
        "source": "arXiv 2308.06748 (means; DenseNet-201, 384 channels); the authors' checkpoints (categories)",
        "metrics": {
            "image_AUROC": {None: 0.997, "bottle": 1.0, "cable": 0.9931, "capsule": 0.9944},
            "pixel_AUROC": {None: 0.992, "bottle": 0.9946, "cable": 0.9934, "capsule": 0.9926},
            "AUPRO": {None: 0.978, "bottle": 0.981, "cable": 0.9503, "capsule": 0.9628},
            "pixel_AP": {None: 0.827, "bottle": 0.9273, "cable": 0.8437, "capsule": 0.6005},
        },
    },
    {
        "label": "CPR-Fast, published",
        "class": "Cpr",
        "data": "MVTecAD",
        "source": "leaderboard entry of the authors, 64 channels and a backbone that they do not name",
        "metrics": {
            "image_AUROC": {None: 0.997},
            "pixel_AUROC": {None: 0.992},
            "AUPRO": {None: 0.977},
            "pixel_AP": {None: 0.823},
        },
    },
    {
        "label": "CPR-Faster, published",
        "class": "Cpr",
        "data": "MVTecAD",
        "source": "leaderboard entry of the authors, 16 channels and a backbone that they do not name",
        "metrics": {
            "image_AUROC": {None: 0.994},
            "pixel_AUROC": {None: 0.99},
            "AUPRO": {None: 0.973},
            "pixel_AP": {None: 0.806},
        },
    },
    {
        "label": "CPR, published",
        "class": "Cpr",
        "data": "BTech",
        "source": "arXiv 2308.06748 (mean)",
        "metrics": {
            "image_AUROC": {None: 0.948},
            "pixel_AUROC": {None: 0.984},
            "AUPRO": {None: 0.851},
            "pixel_AP": {None: 0.703},
        },
    },
    {
        "label": "PatchCore, published",
        "class": "Patchcore",
        "data": "MVTecAD",
        "source": "README of anomalib 2.7's PatchCore (Wide ResNet-50, torchvision weights)",
        "metrics": {
            "image_AUROC": _by_category(
                "0.980 0.984 0.959 1.000 1.000 0.989 1.000 0.990 0.982 1.000 0.994 0.924 0.960 0.933 1.000 0.982"
            ),
            "pixel_AUROC": _by_category(
                "0.980 0.988 0.968 0.991 0.961 0.934 0.984 0.988 0.988 0.987 0.989 0.980 0.989 0.988 0.981 0.983"
            ),
        },
    },
    {
        "label": "PaDiM, published",
        "class": "Padim",
        "data": "MVTecAD",
        "source": "README of anomalib 2.7's PaDiM (Wide ResNet-50, torchvision weights)",
        "metrics": {
            "image_AUROC": _by_category(
                "0.950 0.995 0.942 1.0 0.974 0.993 0.999 0.878 0.927 0.964 0.989 0.939 0.845 0.942 0.976 0.882"
            ),
            "pixel_AUROC": _by_category(
                "0.979 0.991 0.970 0.993 0.955 0.957 0.985 0.970 0.988 0.985 0.982 0.966 0.988 0.991 0.976 0.986"
            ),
        },
    },
)


def find(model: str, data: str) -> list[dict[str, Any]]:
    """Published results of a model on a data set.

    Args:
        model (str): Class of the model, with or without its module.
        data (str): Class of the data module, with or without its module; the old name MVTec counts as MVTecAD.

    Returns:
        list[dict]: Entries of :data:`PUBLISHED`.
    """
    own, where = model.rpartition(".")[2], data.rpartition(".")[2]
    where = {"MVTec": "MVTecAD", "BTAD": "BTech"}.get(where, where)
    return [entry for entry in PUBLISHED if entry["class"] == own and entry["data"] == where]
