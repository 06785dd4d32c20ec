# SPDX-License-Identifier: Apache-2.0
"""Make the package known to anomalib without an import by the user.

anomalib has no entry points for plugins, but torch has: at the end of ``import torch`` it calls every entry point of
the group ``torch.backends``, here :func:`autoload`. An exception at that moment would make torch unimportable, and a
slow import would slow torch down, so this module needs nothing but the standard library and does nothing but wait:
the real work, :func:`anomalib_cpr.registration.register`, runs when ``anomalib.models`` or ``anomalib.data`` has been
imported.

A module can be in three states when the hook arrives::

    not imported       -> a finder on sys.meta_path waits for it
    half imported      -> its spec is watched (anomalib.models imports torch, so this is the usual case)
    imported           -> registration at once

``ANOMALIB_CPR_AUTOLOAD=0`` turns the hook off. An explicit ``import anomalib_cpr`` registers nevertheless.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.partition(".")[0]
HOSTS = ("anomalib.data", "anomalib.models")
SWITCH = "ANOMALIB_CPR_AUTOLOAD"


def autoload() -> None:
    """Prepare the registration; torch calls this at the end of ``import torch``. Raises nothing."""
    try:
        if is_enabled():
            install()
        elif not _waiting_finders():
            # torch's look at the entry point has put the package into sys.modules unregistered. Removed, a later
            # `import anomalib_cpr` of the user's executes it again, and registers.
            for name in [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]:
                del sys.modules[name]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it is, torch must stay importable
        _log_quietly(error)


def on_package_import() -> None:
    """Prepare the registration when the package is imported, unless it is torch that imports it and may not."""
    try:
        if is_enabled() or not _is_half_imported(sys.modules.get("torch")):
            install()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the package itself must stay importable, for `anomalib-cpr doctor`
        _log_quietly(error)


def is_enabled() -> bool:
    """Tell whether the environment allows the hook.

    Returns:
        bool: False if ``ANOMALIB_CPR_AUTOLOAD`` is ``0``, ``false``, ``no`` or ``off``.
    """
    return os.environ.get(SWITCH, "1").strip().lower() not in {"0", "false", "no", "off"}


def install() -> None:
    """Wait for the modules of anomalib that are not imported yet, and register with those that are. Idempotent."""
    if any(name not in sys.modules for name in HOSTS) and not _waiting_finders():
        sys.meta_path.insert(0, _HostFinder())
    _register_when_possible()


class _HostFinder:
    """Find the modules of anomalib as everybody else would, and watch their import."""

    package = PACKAGE  # finders are recognised by this, also those of another copy of this module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the spec of one of anomalib's modules.

        Args:
            fullname (str): Name of the module.
            path (Sequence[str] | None): Search path of its package.
            target (ModuleType | None): Module to be reloaded.

        Returns:
            ModuleSpec | None: What the other finders found; None for all other modules.
        """
        if fullname not in HOSTS:
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None:
                _watch(spec)
                return spec
        return None


def _waiting_finders() -> list[object]:
    """Finders of this package on ``sys.meta_path``."""
    return [finder for finder in sys.meta_path if getattr(finder, "package", None) == PACKAGE]


def _watch(spec: ModuleSpec) -> None:
    """Call :func:`_register_when_possible` as soon as the import of the spec's module has ended.

    The import system sets ``spec._initializing`` to False at that moment, whoever began the import and however long
    ago. This is the only trace of the end of an import that is already under way.
    """
    plain = type(spec)
    if hasattr(plain, "watched_by_cpr"):
        return

    class WatchedSpec(plain):  # type: ignore[misc, valid-type]
        watched_by_cpr = True

        @property
        def _initializing(self) -> bool:
            return self.__dict__.get("_initializing", False)

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__dict__["_initializing"] = value
            if not value:
                self.__class__ = plain  # type: ignore[assignment]
                _register_quietly()

    try:
        spec.__class__ = WatchedSpec
    except TypeError as error:  # a spec class of somebody else's, with another memory layout
        _log_quietly(error)


def _register_quietly() -> None:
    """Register, and never let an exception into the import that has just ended."""
    try:
        _register_when_possible()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # anomalib's import must not fail because of a plugin
        _log_quietly(error)


def _register_when_possible() -> None:
    """Register with the imported modules, or come back when the imports under way have ended.

    Own modules count as well: with ``import anomalib_cpr.lightning_model``, anomalib is imported in the middle of it,
    and ``Cpr`` exists only at its end.
    """
    busy = [
        module
        for name, module in list(sys.modules.items())
        if (name in HOSTS or name.startswith(f"{PACKAGE}.")) and _is_half_imported(module)
    ]
    for module in busy:
        if module.__spec__ is not None:
            _watch(module.__spec__)
    if busy or not any(name in sys.modules for name in HOSTS):
        return

    from .registration import register  # noqa: PLC0415 - only needed once anomalib is there

    register()
    if all(name in sys.modules for name in HOSTS):
        for finder in _waiting_finders():
            sys.meta_path.remove(finder)  # type: ignore[arg-type]


def _is_half_imported(module: ModuleType | None) -> bool:
    """Tell whether the import of a module has begun and not ended."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _log_quietly(error: BaseException) -> None:
    """Leave a trace for those who look for it."""
    import logging  # noqa: PLC0415 - not needed unless something is wrong

    logging.getLogger(PACKAGE).debug("anomalib_cpr could not prepare its registration.", exc_info=error)
