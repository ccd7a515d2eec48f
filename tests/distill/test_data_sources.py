"""Prompt files and image sources: what they hold, in which order, and what they say is wrong."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from image_sources import everything, jpeg, tar_bytes
from pyarrow import parquet

from distill.config import ConfigError
from distill.data.prompts import read_prompts
from distill.data.sample import Sample
from distill.data.sources import open_images

# Prompts


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cat\n\n  ein Hündchen \r\na cat\n".encode())
    assert read_prompts([path]) == (["a cat", "ein Hündchen"], [])


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"prompt": "a"}', '{"caption": "b"}', "{", '{"x": 1}', "[1]", '{"text": "  "}']
    path.write_text("\n".join(lines))
    prompts, problems = read_prompts([path])
    assert prompts == ["a", "b"]
    assert [p.item for p in problems] == ["line 3", "line 4", "line 5", "line 6"]
    path.write_text('{"prompt": "a", "zh": "b"}')
    assert read_prompts([path], "zh")[0] == ["b"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "caption": ["a", None, "b"]}), path)
    prompts, problems = read_prompts([path])
    assert prompts == ["a", "b"]
    assert [p.item for p in problems] == ["row 1"]
    with pytest.raises(ConfigError, match=r"'zh'.*found the columns id, caption"):
        read_prompts([path], "zh")
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ConfigError, match="no readable parquet"):
        read_prompts([path])


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read_prompts([path])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.txt", None, "gone.txt does not exist"),
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.jsonl", b'{"x": 1}', "line 1: has no text under prompt, caption, text"),
        ("p.txt", b"caf\xe9", "expected UTF-8, found byte 0xe9"),
        ("p.doc", b"a", ".jsonl"),
    ],
)
def test_unusable_prompt_files(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_prompts([path])
    assert words in str(error.value)
    assert str(path) in str(error.value)


# Folders


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.webp", "d.jpeg", "e.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.txt").write_text(" a b \n")
    (tmp_path / "a.caption").write_text("an a")
    (tmp_path / "sub/c.txt").write_text("a c")
    (tmp_path / "d.txt").write_text("\n")
    samples, _ = everything(tmp_path)
    assert samples == [
        Sample("a.PNG", b"a.PNG", "an a"),
        Sample("b.jpg", b"b.jpg", "a b"),
        Sample("d.jpeg", b"d.jpeg", problem="no caption: d.txt is empty"),
        Sample("e.jpg", b"e.jpg", problem="no caption: e.txt is missing"),
        Sample("sub/c.webp", b"sub/c.webp", "a c"),
    ]


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "a.txt").write_text("one")
    (source,) = open_images(tmp_path)
    before = source.entries()[0]
    (tmp_path / "a.txt").write_text("another")
    assert source.entries()[0] != before


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "does not exist"),
        ([], "holds no images"),
        (["a.jpg", "b.jpg"], "none of the 2 images"),
    ],
)
def test_unusable_folders(tmp_path: Path, files: list[str] | None, words: str) -> None:
    path = tmp_path / "photos"
    if files is not None:
        path.mkdir()
        for name in files:
            (path / name).write_bytes(b"1")
    with pytest.raises(ConfigError) as error:
        everything(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    path.write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"\.tar\.gz"):
        open_images(path)
    with pytest.raises(ConfigError, match="no file matches"):
        open_images(tmp_path / "*.tar")


def test_brackets_of_a_name_are_no_wildcard(tmp_path: Path) -> None:
    for name in ("set [2]", "set 2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(jpeg(0))
        (tmp_path / name / "a.txt").write_text("a letter")
    (source,) = open_images(tmp_path / "set [2]")
    assert source.label == str(tmp_path / "set [2]")
    (source,) = open_images(tmp_path / "set[ ]2")
    assert source.label == str(tmp_path / "set 2")


# Archives

FILES = {
    "./x/000.jpg": jpeg(0),
    "./x/000.txt": b"zero",
    "./x/001.png": b"one!",
    "./x/001.json": json.dumps({"caption": "one", "zh": "eins"}).encode(),
    "./x/002.seg.png": b"a mask",
    "./x/002.txt": b"no image",
    "./x/003.jpg": b"three",
}


@pytest.mark.parametrize("packed", [False, True])
def test_archive(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("000.tar.gz" if packed else "000.tar")
    path.write_bytes((gzip.compress if packed else bytes)(tar_bytes(FILES)))
    samples, problems = everything(tmp_path)
    assert not problems
    assert samples == [
        Sample("x/000", jpeg(0), "zero"),
        Sample("x/001", b"one!", "one"),
        Sample("x/002", problem="no image among .seg.png, .txt"),
        Sample("x/003", b"three", problem="no caption: 003.txt is missing"),
    ]
    (source,) = open_images(path)
    assert [s.name for s in source.read(["x/001", "x/003"])] == ["x/001", "x/003"]
    (source,) = open_images(path, "zh")
    assert next(iter(source.read(["x/001"]))).caption == "eins"


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_archive_gives_what_it_can(tmp_path: Path, packed: bool) -> None:
    files = {}
    for i in range(8):
        files |= {f"{i}.jpg": jpeg(i, (200, 200)), f"{i}.txt": b"text"}
    data = (gzip.compress if packed else bytes)(tar_bytes(files))
    path = tmp_path / "a.tar.gz"
    path.write_bytes(data[: len(data) * 3 // 5])
    samples, problems = everything(path)
    assert len(problems) == 1
    assert "damaged" in problems[0]
    good = [s for s in samples if not s.problem]
    assert 2 <= len(good) <= 5
    assert all(s.image == jpeg(int(s.name), (200, 200)) for s in good)
    assert all("damaged" in s.problem or "no caption" in s.problem for s in samples[len(good) :])


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>")
    samples, problems = everything(tmp_path)
    assert not samples
    assert "damaged after 0 samples" in problems[0]


# Hugging Face


def save_to_disk(path: Path) -> None:
    rows = {
        "image": [{"bytes": jpeg(i), "path": None} for i in range(3)],
        "text": ["zero", "", "two"],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))


def splits(path: Path) -> None:
    save_to_disk(path / "one")
    train = datasets.load_from_disk(str(path / "one"))
    datasets.DatasetDict({"test": train.select([0]), "train": train}).save_to_disk(str(path))


def parquet_files(path: Path) -> None:
    save_to_disk(path / "one")
    (path / "data").mkdir()
    train = datasets.load_from_disk(str(path / "one"))
    train.to_parquet(str(path / "data" / "train-00000.parquet"))


def imagefolder(path: Path) -> None:
    path.mkdir()
    lines = []
    for i, text in enumerate(("zero", "", "two")):
        (path / f"{i}.jpg").write_bytes(jpeg(i))
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": text}))
    (path / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("make", [save_to_disk, splits, parquet_files, imagefolder])
def test_datasets(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make(tmp_path / "set")
    samples, _ = everything(tmp_path / "set")
    assert [s.image for s in samples] == [jpeg(i) for i in range(3)]
    assert [s.caption for s in samples] == ["zero", "", "two"]
    assert samples[1].problem == "no caption: column 'text' is empty"
    (source,) = open_images(tmp_path / "set")
    assert [s.caption for s in source.read(["row 2"])] == ["two"]


def test_a_dataset_without_the_columns(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set")
    with pytest.raises(ConfigError, match=r"expected an image column.*found image, text"):
        everything(tmp_path / "set", "zh")


def test_datasets_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        everything(tmp_path)
