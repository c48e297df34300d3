"""The commands of `python -m bikernels_torch`, one module each: `add_arguments(parser)` and `run(options) -> int`.

Every command prints text, or with --json one JSON object. Exit codes: 0 all is well, 1 it is not (a bit differs, an
output varies), 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import audit, bench, doctor

COMMANDS = {"doctor": doctor, "audit": audit, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (those of the process by default) name, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bikernels_torch", description="Batch-invariant PyTorch.")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        text = (command.__doc__ or "").strip()
        subparser = subparsers.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return int(options.run(options))
