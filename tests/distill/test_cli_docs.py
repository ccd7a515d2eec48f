"""docs/cli.md says what the parsers say; UPDATE_DOCS=1 writes its second half anew."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path

import pytest

from distill.commands.parser import COMMANDS, Parser, build_parser, parse, subparsers

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
MARK = "<!-- Below: written by"


@pytest.fixture(scope="module")
def parsers() -> dict[str, Parser]:
    return subparsers(build_parser(COMMANDS))


def test_the_page_is_what_the_parsers_say(parsers: dict[str, Parser]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    head = text[: text.index("\n", text.index(MARK)) + 1]
    expected = head + "".join(section(name, parser) for name, parser in parsers.items())
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(expected, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == expected, "run it with UPDATE_DOCS=1"


def section(name: str, parser: Parser) -> str:
    """Markdown of one command: summary, paragraph, examples, options."""
    examples = (parser.epilog or "").removeprefix("examples:\n").partition("\n\ndocumentation:")[0]
    about = " ".join((parser.description or "").split())
    summary = COMMANDS[name][1].replace("*", "\\*")
    lines = [f"\n## {name}\n", f"**{summary[0].upper()}{summary[1:]}.** {about}\n", "```bash"]
    lines += [line.removeprefix("  ") for line in examples.splitlines()]
    lines += ["```\n", "| Argument | |", "| --- | --- |"]
    for group in parser._action_groups:
        lines += [row(action) for action in group._group_actions if action.dest != "help"]
    return "\n".join(lines) + "\n"


def row(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
        name += f" {action.metavar or choices or action.dest.upper()}"
    required = " (required)" if action.option_strings and action.required else ""
    text = f"`{name}`{required}", (action.help or "").replace("|", "\\|")
    return f"| {text[0].replace('|', chr(92) + '|')} | {text[1]} |"


def test_every_argument_has_help(parsers: dict[str, Parser]) -> None:
    for name, parser in parsers.items():
        for action in parser._actions:
            assert action.help, f"{name}: {action.dest}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_real(name: str, parsers: dict[str, Parser]) -> None:
    """Each of the two or more examples is taken by the parser; recipes that they name exist."""
    text = (parsers[name].epilog or "").partition("\n\ndocumentation:")[0]
    lines = text.removeprefix("examples:\n").replace("\\\n", " ").splitlines()
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line.partition(" | ")[0].partition(" > ")[0], comments=True)
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        started = words.index("-m") + 2 if "torchrun" in words else words.index("turbo-distill") + 1
        assert words[started] == name
        args = parse(words[started:])
        assert args.command == name
        for word in words[started:]:
            if word.startswith("configs/"):
                assert (DOCS.parents[1] / word).is_file()


def test_json_keys_are_described_for_every_command() -> None:
    table = DOCS.read_text(encoding="utf-8").partition("## JSON")[2].partition("```")[0]
    assert set(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == COMMANDS.keys()
