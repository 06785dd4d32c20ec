# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-cpr``: what goes beside anomalib's own commands.

Each subcommand is a module with ``add_arguments(parser)`` and ``run(arguments) -> int``, named in :data:`COMMANDS`.
A module with ``TAKES_REST = True`` finds the arguments that argparse does not know in ``arguments.rest``.
Only the module of the command that was asked for is imported, so ``doctor`` works where the others cannot be imported.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__

# name -> (module of this package, what `anomalib-cpr --help` says about it)
COMMANDS = {
    "doctor": ("doctor", "check the installation: versions, registration with anomalib, weights, devices"),
    "check": ("check", "find images that cannot be read, or would be read as something else, before a training"),
    "import-checkpoint": ("import_checkpoint", "turn a checkpoint of the CPR authors into one of anomalib"),
    "ablation": ("ablation", "train short variants on drawn data, one thing changed at a time; or print their table"),
    "profile-training": ("training_profile", "measure what a training step costs, and on what the time goes"),
    "speed": ("speed", "measure latency, throughput and memory of CPR and its peers"),
    "inspect": ("inspection", "show what a training would learn from: pairs, anomalies, foreground, neighbours"),
    "explain": ("explain", "show why an image got its score: references, matches, foreground, maps"),
    "benchmark": ("benchmark", "compare models on data sets: quality, time, memory; one process per job, resumable"),
    "report": ("report", "write the report of a benchmark anew, as Markdown and HTML"),
    "preset": ("preset_file", "write the configuration of a published size, for `anomalib train --config`"),
    "bank": ("bank_accuracy", "measure what a coarser or smaller reference bank costs in accuracy"),
    "galleries": ("gallery_speed", "measure search and inference with large galleries"),
    "parity": ("parity", "compare exported models with their checkpoint: scores, maps, references, latency, size"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv (Sequence[str] | None): Arguments; those of the process by default.

    Returns:
        int: Exit code of the process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="anomalib-cpr",
        description="Tools of the CPR model for anomalib. Training, testing and export: see `anomalib --help`.",
    )
    parser.add_argument("--version", action="version", version=f"anomalib-cpr {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    run, takes_rest = None, False
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if argv[:1] == [name]:
            module = import_module(f"{__package__}.{module_name}")
            module.add_arguments(subparser)
            run, takes_rest = module.run, getattr(module, "TAKES_REST", False)
    arguments, arguments_rest = parser.parse_known_args(argv)
    if arguments_rest and not takes_rest:
        parser.error(f"unrecognized arguments: {' '.join(arguments_rest)}")
    arguments.rest = arguments_rest
    if run is None:
        parser.print_help()
        return 2
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
