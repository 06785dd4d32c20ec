# SPDX-License-Identifier: Apache-2.0
"""Placeholder."""


def autoload() -> None:
    """Do nothing yet."""
