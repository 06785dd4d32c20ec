# SPDX-License-Identifier: Apache-2.0
"""What several subcommands are told: files, as types of argparse that tell a slip before any work, and data modules."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser


def existing_file(text: str) -> Path:
    """A file that is going to be read.

    Args:
        text (str): As typed.

    Returns:
        Path: The file.

    Raises:
        ArgumentTypeError: If there is none.
    """
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist, or is not a file.")
    return path


def output_file(text: str) -> Path:
    """A file that is going to be written when all is done; its folder is made now, so that nothing is lost then.

    Args:
        text (str): As typed.

    Returns:
        Path: The file.

    Raises:
        ArgumentTypeError: If it cannot be written there.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}.") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder.")
    return path


def read_datamodule(command: str, argv: Sequence[str]) -> AnomalibDataModule:
    """Make a data module of ``--data`` and ``--data.*``, as anomalib's command line does.

    Args:
        command (str): Name of the subcommand, for messages.
        argv (Sequence[str]): Arguments.

    Returns:
        AnomalibDataModule: The data module.
    """
    parser = ArgumentParser(prog=f"anomalib-cpr {command}")
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    return parser.instantiate_classes(parser.parse_args(list(argv))).data
