"""The docs name only what exists: links, files, commands, options, messages; both READMEs agree."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from distill.commands.parser import COMMANDS, Parser, build_parser, parse, subparsers

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [
    *READMES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

LINK = re.compile(r"\]\(([^()\s]+)\)")
FILE = re.compile(r"\b(?:configs|workflows)/[\w.*/-]*\.(?:yaml|json)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
CALL = re.compile(r"(?:\bturbo-distill|\bpython -m distill|(?<=-m )distill) +(.*)")
VARIABLE = "\0"  # stands for what a message fills in


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Without fenced blocks, where brackets mean something else."""
    return FENCE.sub("", read(page))


# ---------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")
        copies = (f"{name}-{i}" for i in range(1, 99))
        found.add(name if name not in found else next(c for c in copies if c not in found))
    return found


def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} does not exist"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: there is no heading {link}"


def test_issue_forms_exist(page: Path) -> None:
    for form in re.findall(r"issues/new\?template=([\w.]+)", read(page)):
        assert (ROOT / ".github" / "ISSUE_TEMPLATE" / form).is_file()


def test_named_files_exist(page: Path) -> None:
    for name in FILE.findall(read(page)):
        assert list(ROOT.glob(name)), f"{page.name}: there is no {name}"


# ------------------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """What follows `turbo-distill`, and whether it is a whole command line."""
    text = read(page)
    for language, block in FENCE.findall(text):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if call := CALL.search(line):
                    yield call[1], True
    for code in INLINE.findall(FENCE.sub("", text)):
        if call := re.fullmatch(r"(?:UPDATE_\w+=1 )?turbo-distill (.+)", code):
            yield call[1], False


def words_of(call: str) -> list[str]:
    """As a shell would split it, up to a pipe, a redirection or a closing bracket."""
    words = shlex.split(re.split(r" [|>&]|\)\s", f"{call} ")[0], comments=True)
    return [word for word in words if word != "..."]


@cache
def parsers() -> dict[str, Parser]:
    return subparsers(build_parser(COMMANDS))


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_commands_and_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for call, whole in commands(page):
        words = words_of(call)
        if not words or not re.fullmatch(r"[a-z]+", words[0]):
            continue  # `turbo-distill --help`, `turbo-distill COMMAND --help`
        assert words[0] in COMMANDS, f"{page.name}: there is no command {call}"
        known = options_of(parsers()[words[0]])
        named = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert named <= known, f"{page.name}: {call}: there is no {named - known}"
        if whole and not named & {"-h", "--help"}:
            try:
                parse(words)
            except SystemExit:
                pytest.fail(f"{page.name}: {call}: {capsys.readouterr().err}")


def test_a_wrong_option_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "page.md"
    for text in ("`turbo-distill export --rnak 4`", "```bash\nturbo-distill bake base lora\n```\n"):
        wrong.write_text(text, encoding="utf-8")
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_commands_and_options_exist(wrong, capsys)


# ------------------------------------------------------------------------------------- messages


@cache
def texts() -> frozenset[str]:
    """Every text in the source, with VARIABLE where something is filled in."""
    found = set()
    for folder in ("nodes", "distill"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(read(file))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", VARIABLE) for part in node.values)
                    found.add("".join(p if isinstance(p, str) else VARIABLE for p in parts))
    return frozenset(found)


def test_quoted_messages_are_those_of_the_source() -> None:
    """Each sentence of a quotation, or piece between `...`, stands in the source."""
    quotes = re.findall(r"^> (.+)$", read(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(quotes) > 20
    for quote in quotes:
        pieces = [piece.strip(" .:;,()'") for piece in re.split(r"\.\.\.|(?<=[.;]) ", quote)]
        pieces = [piece for piece in pieces if len(piece) > 3]
        assert pieces, quote
        for piece in pieces:
            assert any(piece in text for text in texts()), f"no message has {piece!r}"


# -------------------------------------------------------------------------------- both languages


def shape(page: Path) -> dict[str, object]:
    """What has to be equal in both languages."""
    text = prose(page)
    rows = [len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    return {
        "heading levels": [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)],
        "rows of tables": rows,
        "links": sorted(LINK.findall(text.replace("README.zh.md", "README.md"))),
        "blocks": [block for _, block in FENCE.findall(read(page)) if "#" not in block],
    }


def test_both_readmes_say_as_much() -> None:
    english, chinese = map(shape, READMES)
    for key, value in english.items():
        if key == "links":  # anchors are in the page's own language
            value, chinese[key] = (
                sorted(str(link).partition("#")[0] for link in links)
                for links in (value, chinese[key])
            )
        assert chinese[key] == value, key


def test_the_readme_is_short() -> None:
    assert len(read(READMES[0]).splitlines()) <= 310
