"""Paths and names as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distill.utils.values import NAME_BYTES, file_name, user_path, with_home


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_home_is_expanded_as_in_a_shell(home: Path) -> None:
    assert user_path("~") == home
    assert user_path("~/a b#c") == home / "a b#c"
    assert user_path(Path("~/x")) == home / "x"
    assert with_home("~/models/q") == str(home / "models" / "q")
    for text in ("Qwen/Qwen-Image-2512", "tiny", "./here", "a/~/b", "x~"):
        assert with_home(text) == text


@given(st.text(min_size=1))
def test_a_path_reads_back_to_itself(text: str) -> None:
    try:
        path = user_path(text)
    except ValueError:
        assert "\0" in text or not text.isprintable()
    else:
        assert user_path(str(path)) == path
        if not text.startswith(("~", "./~", ".//")):
            assert path == Path(text)


def test_a_folder_whose_name_begins_like_a_home_stays_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert user_path("./~x") == home / "~x"


@pytest.mark.parametrize("text", ["", "a\0b", "photos\udcff"])
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        user_path(text)


@pytest.mark.parametrize("text", ["s3://bucket/run", "hf://datasets/x", "file:///tmp/x", "GS://b"])
def test_an_address_is_no_path(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a local path, found an address: .*mount it"):
        user_path(text)
    assert user_path("c:/runs") == Path("c:/runs")
    assert user_path("./s3:/x") == Path("s3:/x")


@pytest.mark.parametrize(
    "name",
    ["turbo", "007", "on", "2024-11-26", "qwen v2.1", "set #2", "@home", "红色", "console", "a~",
     "-x", "a <b>& c", "x" * NAME_BYTES],
)  # fmt: skip
def test_names_of_files(name: str) -> None:
    assert file_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", ".hidden", "~x", "a/b", "a\\b", "../a", "/a", "C:x", "a:b", "a\nb", "a\tb",
     "a\0b", "a\x7fb", " a", "a ", "a.", "CON", "nul", "Aux.v2", "com1", "LPT9.x", "a\udcff",
     "x" * (NAME_BYTES + 1), "ü" * (NAME_BYTES // 2 + 1)],
)  # fmt: skip
def test_what_is_no_name_of_a_file(name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        file_name(name)


@given(st.text(min_size=1, max_size=NAME_BYTES // 4))
def test_a_name_that_is_accepted_makes_files(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    try:
        file_name(name)
    except ValueError:
        assume(False)
    path = tmp_path_factory.mktemp("names") / f"{name}.workflow.json"
    path.write_text("")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
