"""What strangers wrote is shown short, and cannot steer a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.contract.shown import SHOWN_CHARACTERS, first_line, plain, printable, shown

MOST = 10 * SHOWN_CHARACTERS  # escapes are longer than what they stand for

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


@given(VALUES)
def test_any_value_is_shown_on_one_line(value: Any) -> None:
    text = shown(value)
    assert text
    assert text.isprintable()
    assert len(text) <= MOST


@given(st.text(st.characters()))
def test_any_text_is_plain_on_one_line(text: str) -> None:
    assert plain(text).isprintable()
    assert len(plain(text)) <= MOST
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n one\x1b[31m\ntwo"), r"one\x1b[31m"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (ValueError("  "), "ValueError"),
        (ValueError("x" * 1000), "x" * SHOWN_CHARACTERS + "..."),
    ],
)
def test_the_first_line_of_an_error(error: BaseException, text: str) -> None:
    assert first_line(error) == text


@pytest.mark.parametrize("text", ["", "a", "狐 é", "x" * SHOWN_CHARACTERS])
def test_what_is_short_and_printable_stays(text: str) -> None:
    assert shown(text) == repr(text)
    assert plain(text) == printable(text) == text


@pytest.mark.parametrize(
    "value",
    ["x" * 1_000_000, ["x" * 1_000_000] * 10, 10**4000, [[[[[["x" * 99] * 9] * 9] * 9] * 9] * 9]],
    ids=["text", "list", "number", "nested"],
)
def test_what_is_long_is_cut(value: Any) -> None:
    assert "..." in shown(value)
    assert len(shown(value)) <= SHOWN_CHARACTERS + 5


@pytest.mark.parametrize("letter", ["\x1b", "\n", "\r", "\x07", "\x9b", "\u202e", "\ud800", "\0"])
def test_what_a_terminal_would_obey_is_written_out(letter: str) -> None:
    for text in (shown(letter), plain(letter), printable(letter)):
        assert letter not in text
        assert "\\" in text
