"""Rows of strangers: what a metadata file or a table names is read only inside its own folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from image_sources import everything, jpeg
from pyarrow import parquet

from distill.config import ConfigError
from distill.data.metadata import inside
from distill.data.sources import open_images

GOOD = {"file_name": "good.jpg", "text": "good"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    path.mkdir()
    for place in (path / "good.jpg", tmp_path / "secret.jpg", path / "unnamed.jpg"):
        place.write_bytes(jpeg())
    os.mkfifo(path / "pipe.jpg")
    return path


def lines(folder: Path, *rows: object) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder


OUTSIDE = "is outside the data set's folder"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file_name": "../secret.jpg", "text": "t"}, OUTSIDE),
        ({"file_name": "x/../../secret.jpg", "text": "t"}, OUTSIDE),
        ({"file_name": "/etc/passwd", "text": "t"}, OUTSIDE),
        ({"file_name": "file:///etc/passwd", "text": "t"}, OUTSIDE),
        ({"file_name": ".", "text": "t"}, OUTSIDE),
        ({"file_name": "pipe.jpg", "text": "t"}, "is a pipe, not a file"),
        ({"file_name": "gone.jpg", "text": "t"}, "cannot be read"),
        ({"file_name": "a\0b", "text": "t"}, "expected the name of a file"),
        ({"file_name": "", "text": "t"}, "expected the name of a file"),
        ({"file_name": 5, "text": "t"}, "expected the name of a file, found 5"),
        ({"text": "t"}, "expected the name of a file, found None"),
        ({"file_name": "good.jpg", "text": 5}, "column 'text' is no text but int"),
        ({"file_name": "good.jpg", "text": None}, "column 'text' is missing"),
        ({"file_name": "good.jpg", "text": "\ud800"}, "column 'text' holds half a letter"),
        ("[" * 200_000, "line 2 is not JSON: its brackets are nested too deeply"),
        ("1" * 5000, "line 2 is not JSON"),
        ("5", "line 2 is no JSON object"),
        ('{"text": "\udcff"}', "line 2 expected UTF-8, found byte 0xff; save the file as UTF-8"),
    ],
)
def test_a_bad_row_is_set_aside(folder: Path, row: object, reason: str) -> None:
    samples, said = everything(lines(folder, GOOD, row, GOOD))
    assert [s.caption for s in samples if not s.problem] == ["good", "good"]
    assert reason in samples[1].problem
    assert "no row of metadata.jsonl names it" in said
    assert "is a pipe, not a file" in said


def test_links_in_the_folder_are_its_owners(folder: Path) -> None:
    (folder / "link.jpg").symlink_to("../secret.jpg")
    samples, _ = everything(lines(folder, {"file_name": "link.jpg", "text": "t"}))
    assert samples[0].image == jpeg()
    assert inside(folder, str(folder / "good.jpg")) == folder / "good.jpg"


def as_csv(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,text\ngood.jpg,"7, in words"\n../x.jpg,t\n')


def as_parquet(folder: Path) -> None:
    table = {"file_name": ["good.jpg", "../x.jpg"], "text": ["7, in words", "t"]}
    parquet.write_table(pyarrow.table(table), folder / "metadata.parquet")


@pytest.mark.parametrize("write", [as_csv, as_parquet])
def test_other_tables(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder)
    samples, _ = everything(folder)
    assert (samples[0].image, samples[0].caption) == (jpeg(), "7, in words")
    assert OUTSIDE in samples[1].problem


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", b'{"a": 1}', "expected 'file_name' and a text column .*found a"),
        ("metadata.jsonl", b"{", "First problem: line 1 is not JSON"),
        ("metadata.csv", b"\xff", "expected UTF-8"),
        ("metadata.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_a_file_without_rows(folder: Path, name: str, content: bytes, words: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        everything(folder)


# Tables of the datasets library


def table(folder: Path, images: list[object], captions: list[object]) -> Path:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {"image": pyarrow.array(images, kind), "text": captions}
    parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def test_rows_of_parquet(folder: Path, tmp_path: Path) -> None:
    places = ["../secret.jpg", str(tmp_path / "secret.jpg"), "pipe.jpg", "good.jpg", None]
    images: list[object] = [{"bytes": None, "path": place} for place in places]
    images += [None, {"bytes": jpeg(1), "path": "/anything/at/all.jpg"}]
    samples, said = everything(table(folder, images, ["t"] * len(images)))
    reasons = [OUTSIDE, OUTSIDE, "is a pipe", "", "found None", "found None", ""]
    for sample, reason in zip(samples, reasons, strict=True):
        assert reason in sample.problem
        assert bool(sample.problem) == bool(reason)
    assert [s.image for s in samples if not s.problem] == [jpeg(), jpeg(1)]
    assert "2 files beside the rows of `datasets` are not read, e.g. good.jpg" in said


def test_numbers_as_captions(folder: Path) -> None:
    samples, _ = everything(table(folder, [{"bytes": jpeg(), "path": None}], [5]))
    assert samples[0].problem == "no caption: column 'text' is no text but int"


@pytest.mark.parametrize("content", [b"PAR1junk", b"", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_table_that_is_damaged(folder: Path, content: bytes) -> None:
    (folder / "train.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match="no readable `datasets` folder"):
        everything(folder)


def test_splits_that_are_not_read_are_named(folder: Path) -> None:
    rows = {"image": [{"bytes": jpeg(), "path": None}], "text": ["t"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(folder / "both"))
    (source,) = open_images(folder / "both")
    entries, problems = source.entries()
    assert len(entries) == 1
    assert [(p.item, p.reason.rpartition("/")[0]) for p in problems] == [
        ("*.arrow", "1 files beside the rows of `datasets` are not read, e.g. test")
    ]
