"""The command line: `turbo-distill COMMAND ...`. Each command is a module with `add_arguments` and
`run`.

Exit codes: 0 done, 1 a check failed, 2 bad input (one message on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

# name -> (module, one line of help); modules are imported only when their command runs
COMMANDS = {
    "demo": ("demo", "distil the embedded tiny model and draw with it, in minutes on a CPU"),
    "prepare": ("prepare", "embed prompts and encode images into the cache that training reads"),
    "train": ("train", "run a recipe (configs/*.yaml) and write the LoRA"),
    "inspect": ("inspect", "show what a LoRA file holds and how it wants to be sampled"),
    "bake": ("bake", "merge a LoRA into its base model and fold it: two thirds of the size"),
    "export": ("export_command", "write a LoRA in another spelling, precision or rank"),
    "sample": ("sample_command", "draw images with LoRAs, as they were trained to be sampled"),
    "eval": ("evaluation.command", "measure a LoRA against its teacher on the same noise"),
    "tiny": ("tiny.command", "train the embedded tiny model anew"),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The whole command list, with the arguments of the chosen command only: so `--help` needs no
    torch.
    """
    parser = argparse.ArgumentParser(
        prog="turbo-distill",
        description="Distils Qwen-Image into a 2-step LoRA for ComfyUI.",
        epilog="Start with `turbo-distill demo`. Each command explains itself with --help.",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="log what is going on, and show tracebacks"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen:
            importlib.import_module(f".{module}", __package__).add_arguments(command)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Takes `key=value` words behind options too, where argparse gives up on them."""
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (late and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    # diffusers 0.42 warns on import that torchao 0.18 lacks tensor classes which nothing here uses
    logging.getLogger("diffusers.quantizers.torchao").setLevel(logging.ERROR)
    chosen = next((word for word in argv if word in COMMANDS), None)
    args = parse(build_parser(chosen), argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s"
    )
    command = importlib.import_module(f".{COMMANDS[args.command][0]}", __package__)
    try:
        return command.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if args.verbose:
            raise
        sys.stderr.write(f"turbo-distill {args.command}: {error}\n")
        return 2
