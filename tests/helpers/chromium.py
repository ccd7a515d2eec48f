"""Chromium: the one of `playwright install chromium`, else one on PATH, or what CHROMIUM_PATH says.

Without one the tests skip and say so; with REQUIRE_CHROMIUM=1 they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)


def find_chromium(playwright: Any) -> str | None:
    """The program to start, or None. Raises ValueError where CHROMIUM_PATH leads nowhere."""
    if chosen := os.environ.get("CHROMIUM_PATH"):
        if shutil.which(chosen) is None:
            raise ValueError(f"CHROMIUM_PATH is {chosen!r}, which is no program.")
        return chosen
    if Path(playwright.chromium.executable_path).is_file():
        return str(playwright.chromium.executable_path)
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def start_chromium() -> Iterator[Any]:
    """A running headless Chromium."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="browser tests need: pip install -e '.[browser]'"
    )
    with api.sync_playwright() as playwright:
        program = find_chromium(playwright)
        if program is None:
            stop = pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip
            stop(
                "no Chromium: run `playwright install chromium`, install your system's, or set "
                "CHROMIUM_PATH"
            )
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()
