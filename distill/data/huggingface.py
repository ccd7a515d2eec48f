"""Images from a folder of the `datasets` library: saved with save_to_disk, or parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .captions import CAPTION_KEYS, caption_keys, usable_caption
from .files import PICTURE_BYTES, Listing, read_file, require_size, stamp_of_files
from .metadata import inside
from .prompts import optional
from .sample import Problem, Sample, not_read

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in SAVED)


def parquet_files(path: Path) -> list[Path]:
    return sorted((*path.glob("*.parquet"), *path.glob("data/*.parquet")))


@dataclass(frozen=True)
class Dataset:
    """Rows with an image and a text column; of several splits "train"."""

    path: Path
    listing: Listing
    key: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    @cached_property
    def _rows(self) -> tuple[Any, str, str]:
        """The rows with undecoded images, the image column and the caption column."""
        datasets = optional("datasets", f"data.images: {self.path}")
        broken = (OSError, ValueError, TypeError, LookupError, NotImplementedError)
        try:
            rows = _load(datasets, self.path)
            columns = list(rows.column_names)
            typed = [n for n, kind in rows.features.items() if isinstance(kind, datasets.Image)]
            image = next((n for n in (*typed, *IMAGE_COLUMNS) if n in columns), None)
            caption = next((n for n in caption_keys(self.key) if n in columns), None)
            if image is not None and caption is not None:
                rows = rows.select_columns([image, caption])
                return rows.cast_column(image, datasets.Image(decode=False)), image, caption
        except (*broken, datasets.exceptions.DatasetsError) as error:
            raise ConfigError(
                f"data.images: {self.path} is no readable `datasets` folder: {error}"
            ) from error
        raise ConfigError(
            f"data.images: {self.path}: expected an image column and a text column "
            f"({self.key or ', '.join(CAPTION_KEYS)}), found {', '.join(columns)}. Name the "
            "text column in data.caption_key."
        )

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        rows, image, caption = self._rows
        stamp = stamp_of_files(self.path, self.listing, image, caption)
        top = self.path.absolute()
        used = {Path(file["filename"]).absolute() for file in rows.cache_files}
        used |= set(map(Path.absolute, parquet_files(self.path)))
        left = [n for n in self.listing.files if top / n not in used and Path(n).name not in SAVED]
        problems = [Problem(self.label, *reason) for reason in self.listing.refused.items()]
        problems += not_read(self.label, left, "the rows of `datasets`")
        return [(f"row {i}", stamp) for i in range(len(rows))], problems

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        rows, image, caption = self._rows
        for name in names:
            try:
                row = rows[int(name.removeprefix("row "))]
                data = self._picture(row[image] or {})
            except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's too
                yield Sample(name, problem=f"cannot be read: {error}")
                continue
            yield Sample(name, data, **usable_caption(row[caption], f"column {caption!r}"))

    def _picture(self, value: dict[str, Any]) -> bytes:
        """Raises OSError."""
        data: bytes | None = value.get("bytes")
        if data is None:
            return read_file(inside(self.path, value.get("path")), PICTURE_BYTES)
        require_size(len(data), PICTURE_BYTES)
        return data


def _load(datasets: Any, path: Path) -> Any:
    if is_saved(path):
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, dict):
            return loaded
        if "train" in loaded or len(loaded) == 1:
            return loaded["train"] if "train" in loaded else next(iter(loaded.values()))
        raise ValueError(f"expected a split 'train', found {', '.join(loaded)}")
    files = [str(file) for file in parquet_files(path)]
    return datasets.load_dataset("parquet", data_files=files, split="train")
