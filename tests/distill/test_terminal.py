"""Colours, durations and progress."""

from __future__ import annotations

import io
import logging

import pytest

from distill.utils import progress as progress_module
from distill.utils import terminal
from distill.utils.progress import progress
from distill.utils.terminal import LogFormatter, duration, has_colours, paint, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "on_terminal", "in_file"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),  # the empty value does not count
        ({"FORCE_COLOR": "1"}, True, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_where_colours_are(environment: dict[str, str], on_terminal: bool, in_file: bool) -> None:
    assert has_colours(Terminal(), environment) is on_terminal
    assert has_colours(io.StringIO(), environment) is in_file


def test_paint() -> None:
    assert paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    assert paint("x", "red", io.StringIO()) == "x"
    assert paint("", "red", Terminal()) == ""


def test_the_log_shows_its_level_by_colour() -> None:
    def shown(level: int) -> str:
        record = logging.LogRecord("x", level, "", 0, "%d left", (3,), None)
        return LogFormatter(Terminal()).format(record)

    assert shown(logging.INFO) == "3 left"
    assert shown(logging.WARNING) == "\x1b[33m3 left\x1b[0m"
    assert shown(logging.ERROR) == "\x1b[31m3 left\x1b[0m"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.4, "12 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
     (3599.7, "1 h 00 min"), (22_320, "6 h 12 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(n) for n in (512, 1300, 1.3e6, 40.86e9)] == [
        "512 B",
        "1.3 kB",
        "1.3 MB",
        "40.9 GB",
    ]


def test_in_a_file_progress_is_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 4))  # seconds
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with progress(total=5, what="drawing", unit="image", done=1) as bar:
        for _ in range(4):
            bar.update()
            bar.refresh()
            bar.set_postfix({"loss": "0.5"})
        bar.write("a message")  # to stdout; it must not disturb the lines
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text
    assert all(line.startswith("drawing: ") for line in lines)
    assert 3 <= len(lines) < 8  # fewer than there were changes
    assert lines[-1].startswith("drawing: 5 of 5 images (100 %)")
    assert "left" in lines[-1]
    assert "loss=0.5" in lines[-1]


def test_on_a_terminal_progress_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(terminal.os, "environ", {})
    monkeypatch.setattr(progress_module.sys, "stderr", screen)
    for _ in progress(range(3), what="drawing", unit="image"):
        pass
    assert "\r" in screen.getvalue()
    assert "drawing: 100%" in screen.getvalue()
    assert "image/s" in screen.getvalue()


def test_hidden_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2], hidden=True)) == [1, 2]
    assert capsys.readouterr().err == ""
