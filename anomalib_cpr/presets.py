# SPDX-License-Identifier: Apache-2.0
"""The published sizes of the model, as arguments of :class:`CprModel`; ``configs/model`` holds the same as YAML.

The authors' standard model has 384 channels; CPR-Fast has 64 and CPR-Faster 16, with lighter backbones that they do not
name. Here the fast one keeps DenseNet-201, whose accuracy is known, and the faster one has EfficientNet-B0, the
lightest of the three backbones that the authors offer.
"""

from typing import Any

_DENSENET = {"backbone": "densenet201", "layers": ("features.denseblock1", "features.denseblock2")}

PRESETS: dict[str, dict[str, Any]] = {
    "cpr": {**_DENSENET, "descriptor_channels": 384},
    "cpr_fast": {**_DENSENET, "descriptor_channels": 64},
    "cpr_faster": {"backbone": "efficientnet_b0", "layers": ("blocks.1", "blocks.2"), "descriptor_channels": 16},
}
