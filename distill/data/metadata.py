"""An imagefolder of the `datasets` library: images, and a metadata file with a row for each.

Read here, for that library gives up a whole folder for one bad row, and older ones follow a row out
of the folder.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ConfigError
from ..contract.shown import shown
from .captions import CAPTION_KEYS, caption_keys, parse_json, text_lines, usable_caption
from .files import PICTURE_BYTES, Listing, read_file, stamp_of_files
from .prompts import optional
from .sample import Problem, Sample

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE = "file_name"  # alone, or behind the name of a column: "image_file_name"


def metadata_file(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def inside(folder: Path, name: object) -> Path:
    """The file that a row names. Raises OSError where it would lie outside the folder.

    Links in the folder may lead out of it: they are its owner's, as in the hub's cache.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise OSError(f"expected the name of a file, found {shown(name)}")
    top = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(top, name))
    if "://" in name or not path.startswith(os.path.join(top, "")):
        raise OSError(
            f"{shown(name)} is outside the data set's folder {folder}; only files in it are read"
        )
    return Path(path)


class Row(NamedTuple):
    file: object = None
    caption: object = None
    problem: str = ""


@dataclass(frozen=True)
class Metadata:
    path: Path
    listing: Listing
    key: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def file(self) -> Path:
        file = metadata_file(self.path)
        assert file is not None  # else it would be another source
        return file

    @cached_property
    def _table(self) -> tuple[list[dict[str, Any] | str], str, str]:
        """Rows or why they are none; the columns of files and of captions."""
        try:
            rows = list(_rows(self.file, self.label))
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError(f"data.images: {self.file} cannot be read: {error}") from error
        columns = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)
        image = next((n for n in columns if n == FILE or str(n).endswith(f"_{FILE}")), None)
        caption = next((n for n in caption_keys(self.key) if n in columns), None)
        if image is None or caption is None:
            first = next((f" First problem: {row}." for row in rows if isinstance(row, str)), "")
            raise ConfigError(
                f"data.images: {self.file}: expected {FILE!r} and a text column "
                f"({self.key or ', '.join(CAPTION_KEYS)}), found {', '.join(map(str, columns))}. "
                f"Name the text column in data.caption_key.{first}"
            )
        return rows, image, caption

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        rows, image, caption = self._table
        column = image.removesuffix(FILE).removesuffix("_") or "image"
        stamp = stamp_of_files(self.path, self.listing, column, caption)
        named = {self.file.name, *map(self._name, rows)}
        unread = self.listing.refused | {
            name: f"no row of {self.file.name} names it"
            for name in self.listing.files
            if name not in named
        }
        problems = [Problem(self.label, *reason) for reason in unread.items()]
        return [(f"row {i}", stamp) for i in range(len(rows))], problems

    def _name(self, row: dict[str, Any] | str) -> str:
        """Of its file, from the folder."""
        try:
            file = inside(self.path, "" if isinstance(row, str) else row.get(self._table[1]))
        except OSError:
            return ""
        return Path(os.path.relpath(file, os.path.abspath(self.path))).as_posix()

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        rows, image, caption = self._table
        for name in names:
            row = rows[int(name.removeprefix("row "))]
            if isinstance(row, str):
                yield Sample(name, problem=row)
                continue
            try:
                data = read_file(inside(self.path, row.get(image)), PICTURE_BYTES)
            except OSError as error:
                yield Sample(name, problem=f"cannot be read: {error}")
                continue
            yield Sample(name, data, **usable_caption(row.get(caption), f"column {caption!r}"))


def _rows(file: Path, label: str) -> Iterator[dict[str, Any] | str]:
    """Raises OSError, ValueError or csv.Error where the whole file is unusable."""
    if file.suffix == ".parquet":
        parquet = optional("pyarrow.parquet", f"data.images: {label}")
        yield from parquet.read_table(file).to_pylist()
    elif file.suffix == ".csv":
        yield from csv.DictReader(_whole(text_lines(file)))
    else:
        for number, line in enumerate(text_lines(file), 1):
            if isinstance(line, ValueError):
                yield f"line {number} {line}"
            elif line.strip():
                yield _json_row(number, line)


def _whole(lines: Iterable[str | ValueError]) -> Iterator[str]:
    for line in lines:
        if isinstance(line, ValueError):
            raise line
        yield line


def _json_row(number: int, line: str) -> dict[str, Any] | str:
    try:
        row = parse_json(line)
    except ValueError as error:
        return f"line {number} is not JSON: {error}"
    return row if isinstance(row, dict) else f"line {number} is no JSON object"
