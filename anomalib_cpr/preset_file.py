# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr preset``: the configuration of a published size, for an installation without a clone."""

import argparse
import sys
from pathlib import Path

import yaml

from .presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options.

    Args:
        parser (argparse.ArgumentParser): Of the subcommand.
    """
    parser.epilog = (
        "anomalib-cpr preset cpr_faster --output faster.yaml && anomalib train --config faster.yaml --data ..."
    )
    parser.add_argument("name", choices=PRESETS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of the standard output")


def run(arguments: argparse.Namespace) -> int:
    """Write the configuration.

    Args:
        arguments (argparse.Namespace): Of :func:`add_arguments`.

    Returns:
        int: Exit code.
    """
    text = configuration(arguments.name)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.write_text(text)
    return 0


def configuration(name: str) -> str:
    """YAML for ``anomalib train --config``.

    Args:
        name (str): Of :data:`PRESETS`.

    Returns:
        str: The model with its arguments.
    """
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in PRESETS[name].items()}
    content = {"model": {"class_path": f"{__package__}.Cpr", "init_args": arguments}}
    return yaml.safe_dump(content, sort_keys=False)
