"""Images from a folder of the `datasets` library: saved with save_to_disk, parquet files, or an
imagefolder with a metadata file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .captions import CAPTION_KEYS, usable_caption
from .prompts import optional
from .sample import Problem, Sample, file_stamp

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def is_dataset(path: Path) -> bool:
    return (
        any((path / name).is_file() for name in (*SAVED, *METADATA))
        or next(path.glob("*.parquet"), None) is not None
        or next(path.glob("data/*.parquet"), None) is not None
    )


@dataclass(frozen=True)
class Dataset:
    """Rows with an image and a text column; of several splits "train"."""

    path: Path
    key: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    @cached_property
    def _rows(self) -> tuple[Any, str, str]:
        """The rows with undecoded images, the image column and the caption column."""
        datasets = optional("datasets", f"data.images: {self.path}")
        try:
            rows = _load(datasets, self.path)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"data.images: {self.path} is no readable `datasets` folder: {error}"
            ) from error
        columns = list(rows.column_names)
        typed = [n for n, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        image = next((n for n in (*typed, *IMAGE_COLUMNS) if n in columns), None)
        caption = next(
            (n for n in ((self.key,) if self.key else CAPTION_KEYS) if n in columns), None
        )
        if image is None or caption is None:
            raise ConfigError(
                f"data.images: {self.path}: expected an image column and a text column "
                f"({self.key or ', '.join(CAPTION_KEYS)}), found {', '.join(columns)}. Name the "
                "text column in data.caption_key."
            )
        return rows.cast_column(image, datasets.Image(decode=False)), image, caption

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        rows, image, caption = self._rows
        files = sorted(f for f in self.path.rglob("*") if f.is_file())
        text = "\n".join((image, caption, *(f"{f.name} {file_stamp(f)}" for f in files)))
        stamp = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return [(f"row {i}", stamp) for i in range(len(rows))], []

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        rows, image, caption = self._rows
        for name in names:
            row = rows[int(name.removeprefix("row "))]
            value = row[image] or {}
            try:
                data = value.get("bytes") or Path(value.get("path") or "").read_bytes()
            except OSError as error:
                yield Sample(name, problem=f"cannot be read: {error}")
                continue
            yield Sample(name, data, **usable_caption(row[caption], f"column {caption!r}"))


def _load(datasets: Any, path: Path) -> Any:
    if any((path / name).is_file() for name in SAVED):
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, dict):
            return loaded
        if "train" in loaded or len(loaded) == 1:
            return loaded["train"] if "train" in loaded else next(iter(loaded.values()))
        raise ValueError(f"expected a split 'train', found {', '.join(loaded)}")
    files = sorted(map(str, (*path.glob("*.parquet"), *path.glob("data/*.parquet"))))
    if files and not any((path / name).is_file() for name in METADATA):
        return datasets.load_dataset("parquet", data_files=files, split="train")
    return datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
