# SPDX-License-Identifier: Apache-2.0
"""CPR (Cascade Patch Retrieval) for anomalib.

Importing this package costs next to nothing, because torch does it at each of its own imports (see ``_autoload``):
classes are loaded when they are first asked for.
"""

from importlib import import_module

from ._autoload import on_package_import

__version__ = "0.1.0"

__all__ = ["Cpr", "CprModel", "DrawnParts", "ExplanationVisualizer", "MVTec"]

_HOMES = {
    "Cpr": "lightning_model",
    "CprModel": "torch_model",
    "DrawnParts": "drawn_data",
    "MVTec": "mvtec",
    "ExplanationVisualizer": "explain_visualizer",
}


def __getattr__(name: str) -> object:
    """Load a public class when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public classes, loaded or not."""
    return sorted({*globals(), *__all__})


on_package_import()
