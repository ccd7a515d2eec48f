"""YAML as people write it: what a scalar is, and what a document may not be."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.utils.yaml12 import YAMLTextError, as_typed, core, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("FALSE", False),
        ("7", 7),
        ("-7", -7),
        ("007", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
    ],
)
def test_words_and_numbers_of_the_core_schema(text: str, value: Any) -> None:
    found = core(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["on", "off", "yes", "No", "y", "2024-11-26", "2024-11-26 10:00:00", "1:30", "190:20:30.15",
     "1_000", "2024_11", "0b11", "1e", "inf", "nan", "tRue", "0o8", "+.nan", "=", "١"],
)  # fmt: skip
def test_what_yaml_1_1_would_turn_into_something_is_text(text: str) -> None:
    assert core(text) == text
    assert type(read_yaml(f"key: {text}")["key"]) is str


def test_scalars_keep_their_text() -> None:
    values = read_yaml("{a: 007, b: '007', c: word, d: , 1: x, on: y}")
    assert (values["a"], values["a"].value) == ("007", 7)
    assert type(values["b"]) is type(values["c"]) is str
    assert values["d"].value is None
    assert list(values) == ["a", "b", "c", "d", "1", "on"]


@pytest.mark.parametrize(
    "text", ["set #2", "@home", "a: b", "'a' #'b'", "'a", "007", "[a, b]", "", " x ", "{"]
)
def test_what_was_typed_stays_readable(text: str) -> None:
    assert as_typed(text) == text
    assert type(as_typed("plain words")) is str
    assert as_typed("[1, x]").value == ["1", "x"]
    assert as_typed("'set #2'") == as_typed('"set #2"') == "set #2"
    assert type(as_typed("'007'")) is str


def test_aliases_are_copies_and_merge_keys_give_way() -> None:
    values = read_yaml("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: {<<: [{x: 5}, *a]}")
    values["a"]["x"] = "changed"
    assert values["b"] == {"x": "1", "y": "2"}
    assert values["c"] == {"x": "1", "y": "3"}
    assert values["d"] == {"x": "5", "y": "2"}


def bomb(kind: str) -> str:
    """Every line holds the one above ten times."""
    item = {"list": "[{}]", "mapping": "{{k: [{}]}}"}[kind]
    lines = ["a0: &a0 x"]
    for i in range(1, 20):
        lines.append(f"a{i}: &a{i} " + item.format(", ".join([f"*a{i - 1}"] * 10)))
    return "\n".join(lines)


HOSTILE = {
    "twice": ("seed: 1\nname: x\nseed: 2", "line 3: the key 'seed' stands in line 1 already"),
    "twice below": ("a:\n  b: 1\n  'b': 2", "line 3: the key 'b' stands in line 2 already"),
    "bomb": (bomb("list"), "at most 20,000 values"),
    "bomb of mappings": (bomb("mapping"), "at most 20,000 values"),
    "many": ("[" + "1," * 400_000 + "]", "at most 20,000 values"),
    "within itself": ("a: &a [*a]", "levels of nesting"),
    "merged into itself": ("a: &a {<<: *a}", "levels of nesting"),
    "deep lists": ("a: " + "[" * 400_000, "line 1: expected at most 20 levels of nesting"),
    "deep mappings": ("{a: " * 200_000, "levels of nesting"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(900)), "levels of nesting"),
    "deep dashes": ("- " * 400_000, "levels of nesting"),
    "code": ("a: !!python/object/apply:os.system [id]", "without a tag"),
    "tagged mapping": ("!!set {x}", "without a tag"),
    "tagged number": ("a: !!int '7'", "without a tag"),
    "long tag": ("!" * 100_000, "without a tag"),
    "no escape": ('a:\n  "\\UFFFFFFFF"', "line 2: "),
    "no version": (f"%YAML {'9' * 5000}.1\n---\na: 1", "line 1: "),
    "control": ("a: 1\nb: \x07", "line 2: the character U+0007"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: expected a single document"),
    "no alias": ("a: *b", "line 1: found undefined alias"),
    "list as key": ("[a]: 1", "expected a word as key"),
    "merged number": ("<<: 3", "expected a mapping behind <<"),
    "open": ("a: [", "line 1: "),
    "tab": ("a:\n\tb: 1", "line 2: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused_is_one_line_and_soon(name: str) -> None:
    text, words = HOSTILE[name]
    started = time.process_time()
    with pytest.raises(YAMLTextError) as error:
        read_yaml(text, "recipe.yaml")
    assert time.process_time() - started < 10
    message = str(error.value)
    assert message.startswith("recipe.yaml, line ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 300


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab0 1.e-:,[]{}#&*!|>'\"%@`?\n\t~<\\\u2028\0")))
def test_nothing_else_escapes(text: str) -> None:
    assert as_typed(text) == text or text[0] in "'\""
    with contextlib.suppress(YAMLTextError):
        assert isinstance(read_yaml(text), str | list | dict | None)
