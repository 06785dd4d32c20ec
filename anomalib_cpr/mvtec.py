# SPDX-License-Identifier: Apache-2.0
"""MVTec AD under the name that it had before anomalib 2."""

from anomalib.data import MVTecAD


class MVTec(MVTecAD):
    """MVTec AD data module: the old name of :class:`anomalib.data.MVTecAD`, with the same arguments.

    anomalib has dropped this name, but commands and configurations that say ``--data MVTec`` are still around. It is a
    class of its own, because the command line finds data modules by the names of their classes.

    Example:
        >>> from anomalib_cpr import MVTec
        >>> MVTec(category="cable").category
        'cable'
    """
