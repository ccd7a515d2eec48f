"""The parser: the list of commands, help, errors that end with the way out."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from ..contract.hints import did_you_mean
from ..utils.terminal import paint

# name -> (module, one line of help); modules are imported only when their command runs
COMMANDS = {
    "demo": ("demo", "distil the embedded tiny model and draw with it, in minutes on a CPU"),
    "prepare": ("prepare", "embed prompts and encode images into the cache that training reads"),
    "train": ("train", "run a recipe (configs/*.yaml) and write the LoRA"),
    "report": ("report", "one HTML page about a run: curves, previews, gates, files"),
    "sample": ("sample", "draw images with LoRAs, as they were trained to be sampled"),
    "eval": ("eval", "measure a LoRA against its teacher on the same noise"),
    "inspect": ("inspect", "show what a LoRA file holds and how it wants to be sampled"),
    "stamp": ("stamp", "write schedule, model and alpha into a copy of a LoRA"),
    "export": ("export", "write a LoRA in another spelling, precision or rank"),
    "bake": ("bake", "merge a LoRA into its base model and fold it: two thirds of the size"),
    "tiny": ("tiny", "train the embedded tiny model anew"),
    "completion": ("completion", "write the script with which a shell completes this command"),
}
DOCS = "https://github.com/turbo-distill/turbo-distill/blob/main/docs"
ABOUT = """\
Distils Qwen-Image into a LoRA that draws in 2 steps, and draws with it, measures
it and packs it for ComfyUI. `turbo-distill COMMAND --help` explains a command and
shows examples."""
EPILOG = f"""\
first steps:
  turbo-distill demo                                   # minutes on a CPU, nothing to download
  turbo-distill train configs/tiny_cpu.yaml --dry-run  # the plan of a recipe
  turbo-distill sample LORA --prompt "a red letter K" --out pictures

exit codes:
  0    done
  1    the run failed: a check was not passed, memory or disk ran out, training diverged
  2    wrong usage or input: an option, a recipe, a file
  130  interrupted (Ctrl-C); 143 after SIGTERM. Training saves a checkpoint first

Results go to stdout, progress and messages to stderr; --json makes the result one
JSON document. NO_COLOR turns colours off, FORCE_COLOR turns them on.

documentation: {DOCS}/cli.md"""
USAGE, FAILURE, INTERRUPTED = 2, 1, 130
VERBOSE = "log what is going on, and show tracebacks"


class Parser(argparse.ArgumentParser):
    """argparse with errors in red that end with the way out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.stderr.write(paint(f"{self.prog}: {message}", "red", sys.stderr) + "\n")
        sys.stderr.write(f"`{self.prog} --help` explains it and shows examples.\n")
        raise SystemExit(USAGE)


def build_parser(chosen: Iterable[str] = ()) -> Parser:
    """The whole command list, with the arguments of the chosen commands only: so `--help` needs no
    torch.
    """
    parser = Parser(prog="turbo-distill", description=ABOUT, epilog=EPILOG)
    parser.add_argument("-v", "--verbose", action="store_true", help=VERBOSE)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )
    wanted = set(chosen)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in wanted:
            explain(command, name, importlib.import_module(f".{module}", __package__))
    return parser


def explain(parser: Parser, name: str, module: Any) -> None:
    """Fills in a command's arguments, paragraph and examples."""
    parser.description = module.ABOUT
    examples = "\n".join(f"  {line}" for line in module.EXAMPLES.splitlines())
    parser.epilog = f"examples:\n{examples}\n\ndocumentation: {DOCS}/cli.md#{name}"
    module.add_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON document; messages go to stderr"
    )
    output.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=VERBOSE
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Takes `key=value` words behind options too, where argparse gives up on them."""
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser({chosen} & COMMANDS.keys() if chosen else ())
    if chosen is not None and chosen not in COMMANDS:
        parser.error(f"there is no command {chosen!r}.{did_you_mean(chosen, COMMANDS)}")
    args, rest = parser.parse_known_args(argv)
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (late and not hasattr(args, "overrides")):
        command = subparsers(parser)[args.command]
        hints = did_you_mean(rest[0].partition("=")[0], command._option_string_actions)
        command.error(f"unrecognized arguments: {' '.join(rest)}.{hints}")
    if late:
        args.overrides = [*args.overrides, *late]
    return args


def subparsers(parser: argparse.ArgumentParser) -> dict[str, Parser]:
    """The parsers of the commands, by name."""
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)
