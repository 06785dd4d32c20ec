# SPDX-License-Identifier: Apache-2.0
"""What torch calls at the end of ``import torch``: a guard around :mod:`anomalib_cpr._autoload`.

It lies outside the package, because Python runs ``anomalib_cpr/__init__.py`` before any module in it: a package that
a crashed upgrade has left damaged or without its files would otherwise make torch unimportable.
"""


def autoload() -> None:
    """Make the package known to anomalib. Raises nothing."""
    try:
        from anomalib_cpr._autoload import autoload as own  # noqa: PLC0415 - inside the guard

        own()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        import logging  # noqa: PLC0415 - torch has imported it; without an error it is not needed

        logging.getLogger("anomalib_cpr").warning(
            "anomalib-cpr is installed, but damaged (%s: %s): the model Cpr is not available, everything else is. "
            "Install it anew, or uninstall it.",
            type(error).__name__,
            error,
        )
