"""YAML 1.2 (core schema) as people write it by hand, with the text of every value kept.

What a value means is for the type of its key to say: 2024_11 is a name where a name belongs. By
itself PyYAML speaks YAML 1.1, which makes numbers, dates and booleans of such words.
"""

from __future__ import annotations

import re
from typing import Any, Final, NoReturn

import yaml

from ..contract.shown import plain

DEPTH: Final = 20  # brackets in brackets
VALUES: Final = 20_000  # in one document, an alias counted as all that it stands for

# https://yaml.org/spec/1.2.2/#103-core-schema
WORDS: Final = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
INTEGERS: Final = {10: r"[-+]?[0-9]{1,4000}", 8: r"0o[0-7]+", 16: r"0x[0-9a-fA-F]+"}
FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
QUOTED: Final = re.compile(r"""'([^']|'')*'|"([^"\\]|\\.)*\"""", re.DOTALL)

PLAIN: Final = "plain"  # tag of a scalar without quotes and without a tag of its own
TAGS: Final = (PLAIN, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")))


class YAMLTextError(ValueError):
    """Text that cannot be read; the message is one line with source and line number."""


class Written(str):
    """A value as it was written, and what YAML takes it for."""

    value: Any

    def __new__(cls, text: str, value: Any) -> Written:
        written = super().__new__(cls, text)
        written.value = value
        return written


def read_yaml(text: str, source: str = "YAML") -> Any:
    """One document: dicts, lists, str for what is text anyhow, `Written` for every other scalar;
    None if it is empty. Aliases become copies.

    Raises YAMLTextError.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character U+{error.character:04X} is not allowed"
        raise YAMLTextError(f"{source}, line {line}: {what}") from error
    try:
        root = loader.get_single_node()
        return None if root is None else loader.build(root, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise YAMLTextError(f"{source}, line {line}: {plain(problem)}") from error
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, a version beyond all
        raise YAMLTextError(f"{source}, line {loader.line + 1}: {plain(str(error))}") from error


def as_typed(text: str) -> str:
    """What stands behind `key=` on a command line: `Written` where YAML makes something else of it
    than this text. A word wholly in quotes is what stands between them.
    """
    try:
        value = read_yaml(text)
    except YAMLTextError:
        return text
    value = value.value if isinstance(value, Written) else value
    if QUOTED.fullmatch(text) and isinstance(value, str):
        return value
    return text if value == text else Written(text, value)


def core(text: str) -> Any:
    """A plain scalar by the core schema; its text where it is neither word nor number."""
    if text in WORDS:
        return WORDS[text]
    for base, digits in INTEGERS.items():
        if re.fullmatch(digits, text):
            return int(text, 0 if base != 10 else 10)
    if FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if NOT_FINITE.fullmatch(text) else text


class _Loader(yaml.SafeLoader):
    """PyYAML's syntax without its schema, and with limits."""

    yaml_implicit_resolvers = {None: [(PLAIN, re.compile(""))]}  # noqa: RUF012, as in PyYAML
    depth = 0
    nodes = 0  # read
    values = 0  # built of them

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        _check(self.depth, self.nodes, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def build(self, node: yaml.Node, depth: int) -> Any:
        """The value of a node. Each alias is built anew: what one of them is set to is its own."""
        self.values += 1
        _check(depth, self.values, node.start_mark)  # here aliases count, also within themselves
        if node.tag not in TAGS:
            _fail(f"expected a value without a tag, found {node.tag!r}", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, depth + 1) for item in node.value]
        value = core(node.value) if node.tag == PLAIN else node.value
        return value if isinstance(value, str) else Written(node.value, value)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        """`<<` takes over the keys of other mappings, as in YAML 1.1, for recipes use it."""
        own: dict[str, Any] = {}
        taken: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _fail("expected a word as key, found a list or a mapping", key.start_mark)
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                _fail(f"the key {name!r} stands in line {lines[name]} already", key.start_mark)
            lines[name] = line
            value = self.build(item, depth + 1)
            if name == "<<" and key.tag == PLAIN:
                for other in reversed(value if isinstance(value, list) else [value]):
                    if not isinstance(other, dict):
                        _fail("expected a mapping behind <<", item.start_mark)
                    taken |= other
            else:
                own[name] = value
        return taken | own


def _check(depth: int, count: int, mark: yaml.Mark) -> None:
    if depth > DEPTH:
        _fail(f"expected at most {DEPTH} levels of nesting", mark)
    if count > VALUES:
        _fail(f"expected at most {VALUES:,} values, aliases counted", mark)


def _fail(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
