# SPDX-License-Identifier: Apache-2.0
"""Make the package's classes available under anomalib's own names.

What anomalib looks at:

- ``get_model("cpr")``, ``list_models()`` and the command line: the subclasses of ``AnomalibModule`` that exist.
- ``get_model({"class_path": "Cpr"})``, also in the YAML of ``anomalib benchmark``: attributes of ``anomalib.models``.
- ``get_model({"class_path": "anomalib_cpr.Cpr"})``: the set ``anomalib.models.ALLOWED_MODULES``.
- ``get_datamodule({"class_path": "MVTec"})``: attributes of ``anomalib.data``.
"""

import logging
import sys
from importlib import import_module
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]

logger = logging.getLogger(PACKAGE)

# name -> (module of anomalib that gets it, module of this package that defines it)
PUBLISHED = {
    "MVTec": ("anomalib.data", "mvtec"),
    "DrawnParts": ("anomalib.data", "drawn_data"),
    "Cpr": ("anomalib.models", "lightning_model"),
}

_failures: dict[str, str] = {}


def register() -> None:
    """Publish the classes in those modules of anomalib that are imported.

    Nothing that anomalib has by itself is replaced, and whatever cannot be published leaves anomalib as it was, with
    one warning. Call it as often as you like.
    """
    models = sys.modules.get("anomalib.models")
    if models is not None and isinstance(getattr(models, "ALLOWED_MODULES", None), set):
        models.ALLOWED_MODULES.add(PACKAGE)
    for name, (host, home) in PUBLISHED.items():
        module = sys.modules.get(host)
        # An existing name is left alone before anything is imported: a second subclass of AnomalibModule called `Cpr`
        # would take `get_model("cpr")` away from anomalib's own.
        if module is not None and not hasattr(module, name) and name not in _failures:
            _publish(module, name, home)


def failures() -> dict[str, str]:
    """Say what could not be published.

    Returns:
        dict[str, str]: Reason for each class that could not be imported.
    """
    return dict(_failures)


def _publish(module: ModuleType, name: str, home: str) -> None:
    """Import one class and set it as attribute of anomalib's module."""
    try:
        value = getattr(import_module(f"{PACKAGE}.{home}"), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken installation must not take anomalib with it
        _failures[name] = f"{type(error).__name__}: {error}"
        logger.warning(
            "%s is not available in %s (%s). anomalib's own classes are not affected. "
            "Run `anomalib-cpr doctor` to see what to do.",
            name,
            module.__name__,
            _failures[name],
        )
        return
    if hasattr(module, name):  # the import above may have come here by itself
        return
    setattr(module, name, value)
    names = getattr(module, "__all__", None)
    if isinstance(names, list) and name not in names:
        names.append(name)
