"""Folders of pictures: every file in them is read, or named with a reason."""

from __future__ import annotations

import codecs
import io
import os
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from image_sources import everything, jpeg, tar_bytes
from PIL import Image

from distill.data.files import PICTURE_BYTES, TEXT_BYTES, list_files, read_file
from distill.data.sample import Problem, Sample
from distill.data.sources import open_images


def pair(folder: Path, name: str = "a.jpg", text: bytes = b"text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(jpeg())
    (folder / name).with_suffix(".txt").write_bytes(text)
    return folder


def problems(path: Path) -> dict[str, str]:
    return {p.item: p.reason for source in open_images(path) for p in source.entries()[1]}


def names(path: Path) -> list[str]:
    return [s.name for s in everything(path)[0] if not s.problem]


# Which files are pictures

KINDS = {
    "a.jfif": "JPEG",
    "a.JPE": "JPEG",
    "a.tif": "TIFF",
    "a.TIFF": "TIFF",
    "a.gif": "GIF",
    "a.webp": "WEBP",
    "a.dib": "BMP",
    "a.apng": "PNG",
    "a.photo": "PNG",
    "a": "JPEG",
    "a.v2": "JPEG",
    "a.dat": "TIFF",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_picture_is_one_by_content(tmp_path: Path, name: str, kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, kind)
    (tmp_path / name).write_bytes(data.getvalue())
    (tmp_path / "a.txt").write_text("text")
    samples, said = everything(tmp_path)
    assert samples == [Sample(name, data.getvalue(), "text")]
    assert not said


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    pair(tmp_path)
    for name in ("b.heic", "notes.md", "c.zip", "Thumbs.db"):
        (tmp_path / name).write_bytes(bytes(64))
    (tmp_path / "lonely.TXT").write_text("text")
    (tmp_path / "a.caption").write_text("another")
    (tmp_path / "a.npz").write_bytes(b"numbers")
    found = problems(tmp_path)
    assert found.keys() == {"b.heic", "notes.md", "c.zip", "Thumbs.db", "lonely.TXT"} | {
        "*.caption",
        "*.npz",
    }
    assert "no picture of a kind that is read (JPEG, PNG" in found["b.heic"]
    assert "belongs to no picture: expected lonely.png" in found["lonely.TXT"]
    assert found["*.npz"] == "1 files beside pictures are not read, e.g. a.npz"


def test_pictures_beside_archives(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "README.md").write_text("about")
    for name in ("b.tar", "deep/c.TAR"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes({"x.jpg": jpeg(), "x.txt": b"x"}))
    assert [type(s).__name__ for s in open_images(tmp_path)] == ["Archive", "Archive", "Folder"]
    assert names(tmp_path) == ["x", "x", "a.jpg"]
    assert "no picture" in problems(tmp_path)["README.md"]


def test_the_cache_is_no_data(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "cache" / "real").mkdir(parents=True)
    (tmp_path / "cache" / "real" / "0.safetensors").write_bytes(b"")
    (source,) = open_images(tmp_path, cache=tmp_path / "cache")
    assert source.entries()[1] == []


# Links, and what is no file


def test_links(tmp_path: Path) -> None:
    pair(tmp_path / "else", "b.jpg")
    pair(tmp_path / "else" / "deep", "c.jpg")
    top = pair(tmp_path / "set")
    (top / "more").symlink_to(tmp_path / "else")
    (top / "d.jpg").symlink_to(top / "a.jpg")
    (top / "d.txt").symlink_to(top / "a.txt")
    (top / "zero").mkdir()
    (top / "zero" / "up").symlink_to("..")
    (top / "same").symlink_to(top / "zero")
    (tmp_path / "else" / "home").symlink_to(top)
    (top / "gone.jpg").symlink_to("nowhere")
    (top / "round.jpg").symlink_to("round.jpg")
    assert names(top) == ["a.jpg", "d.jpg", "more/b.jpg", "more/deep/c.jpg"]
    found = problems(top)
    assert found.keys() == {"gone.jpg", "round.jpg"}
    assert all("a link to nothing" in reason for reason in found.values())


def test_links_that_multiply_are_followed_once(tmp_path: Path) -> None:
    """2 ** 20 ways lead to the last one."""
    folders = [pair(tmp_path / f"{i:02}") for i in range(20)]
    for here, there in pairwise(folders):
        for name in "xy":
            (here / name).symlink_to(there)
    assert len(list_files(folders[0]).files) == 40


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (os.mkfifo, "pipe"),
        (make_socket, "socket"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
    ],
)
@pytest.mark.parametrize("name", ["b.jpg", "b.txt", "b"])
def test_only_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], word: str, name: str
) -> None:
    pair(tmp_path)
    make(tmp_path / name)
    assert problems(tmp_path) == {name: f"is a {word}, not a file"}
    assert names(tmp_path) == ["a.jpg"]
    with pytest.raises(OSError, match=word):
        read_file(tmp_path / name, 100)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    pair(tmp_path, os.fsdecode(b"\xff.jpg"))
    assert names(tmp_path) == ["\udcff.jpg"]


@pytest.mark.parametrize(("name", "size"), [("a.jpg", PICTURE_BYTES), ("a.txt", TEXT_BYTES)])
def test_what_is_too_large_is_not_read(tmp_path: Path, name: str, size: int) -> None:
    pair(tmp_path)
    os.truncate(tmp_path / name, size + 1)
    ((sample,), _) = everything(tmp_path)
    assert f"up to {size >> 20} MiB are read" in sample.problem
    assert (sample.culprit or sample.name) == name


# Captions

TEXT = "ein rotes Haus\nzwei 红"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode() + b"\r\n",
        TEXT.replace("\n", "\r").encode("utf-16"),
    ],
)
def test_captions_as_editors_save_them(tmp_path: Path, data: bytes) -> None:
    pair(tmp_path, text=data)
    ((sample,), _) = everything(tmp_path)
    assert sample.caption == TEXT
    (tmp_path / "b.tar").write_bytes(tar_bytes({"c.jpg": jpeg(), "c.txt": data}))
    assert [s.caption for s in everything(tmp_path)[0]] == [TEXT, TEXT]


@pytest.mark.parametrize(
    "data", ["红色".encode("gbk"), "é".encode("latin-1"), "ab".encode("utf-16-le"), b"\xff\xfea"]
)
def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path, data: bytes) -> None:
    pair(tmp_path / "sub", text=data)
    ((sample,), _) = everything(tmp_path)
    assert sample.culprit == "sub/a.txt"
    assert sample.problem.startswith("the caption a.txt cannot be read: expected UTF-8, found ")
    assert sample.problem.endswith("; save a.txt as UTF-8")


@pytest.mark.parametrize(
    ("image", "caption"),
    [
        ("photo.v2.a.png", "photo.v2.a.txt"),
        ("photo.v2.a.png", "photo.v2.a.TXT"),
        ("photo.png", "photo.Txt"),
        ("photo.png", "photo.CAPTION"),
        ("photo.png", "photo.png.txt"),
        ("photo.png", "photo.json"),
    ],
)
def test_names_of_captions(tmp_path: Path, image: str, caption: str) -> None:
    text = '{"caption": "this"}' if caption.endswith("json") else "this"
    (tmp_path / image).write_bytes(jpeg())
    (tmp_path / caption).write_text(text)
    (tmp_path / "photo.v2.b.png").write_bytes(jpeg(1))
    (tmp_path / "photo.v2.b.txt").write_text("other")
    found = {s.name: s.caption for s in everything(tmp_path)[0]}
    assert found == {image: "this", "photo.v2.b.png": "other"}


def test_the_usual_caption_comes_first(tmp_path: Path) -> None:
    pair(tmp_path)
    for name in ("a.TXT", "a.caption", "a.json", "a.jpg.txt"):
        (tmp_path / name).write_text("other")
    ((sample,), said) = everything(tmp_path)
    assert sample.caption == "text"
    assert len(said) == 4


def test_a_problem_is_counted_by_source(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "b.md").write_text("")
    (source,) = open_images(tmp_path)
    (problem,) = source.entries()[1]
    assert isinstance(problem, Problem)
    assert (problem.source, problem.item) == (str(tmp_path), "b.md")
