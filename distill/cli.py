"""The command line: `turbo-distill COMMAND ...`.

A command is a module with `ABOUT` (a paragraph), `EXAMPLES` (lines that work), `add_arguments` and
`run`, which returns a `Result`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import time
import traceback
from collections.abc import Sequence

from .commands.parser import COMMANDS, FAILURE, INTERRUPTED, USAGE, build_parser, parse
from .commands.result import Result, show, show_failure
from .training.signals import Stopped
from .utils.terminal import LogFormatter, paint

# What the user can mend by another argument; any other OSError is the machine's trouble
WRONG_PATH = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def start_logging(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(sys.stderr))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Raises SystemExit for wrong usage and --help."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        build_parser().print_help(sys.stderr)
        return USAGE
    # diffusers 0.42 warns on import that torchao 0.18 lacks tensor classes which nothing here uses
    logging.getLogger("diffusers.quantizers.torchao").setLevel(logging.ERROR)
    args = parse(argv)
    start_logging(args.verbose)
    command = importlib.import_module(f".commands.{COMMANDS[args.command][0]}", __package__)
    started, stdout = time.monotonic(), sys.stdout
    # With --json stdout is for the document alone, whatever a library prints
    only = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    try:
        with only:
            result: Result = command.run(args)
        show(result, args.command, time.monotonic() - started, stdout, args.json)
        return result.code
    except Stopped as stopped:  # training has said so itself
        show_failure(stopped, args.command, int(stopped.code or 0), stdout, args.json)
        raise
    except KeyboardInterrupt as error:
        sys.stderr.write(paint("interrupted", "red", sys.stderr) + "\n")
        show_failure(error, args.command, INTERRUPTED, stdout, args.json)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        if args.verbose:
            traceback.print_exc()
        text = f"turbo-distill {args.command}: {error}"
        sys.stderr.write(paint(text, "red", sys.stderr) + "\n")
        code = USAGE if isinstance(error, (ValueError, *WRONG_PATH)) else FAILURE
        show_failure(error, args.command, code, stdout, args.json)
        return code
