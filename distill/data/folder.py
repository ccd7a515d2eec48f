"""Images in a folder and below, each with a text file of the same name beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from posixpath import basename, splitext

from ..config import ConfigError
from .captions import CAPTION_SUFFIXES, read_caption
from .files import PICTURE_BYTES, TEXT_BYTES, Listing, file_stamp, read_file
from .images import HEAD_BYTES, IMAGE_SUFFIXES, NO_PICTURE, shows_picture
from .sample import Problem, Sample, not_read


@dataclass(frozen=True)
class Folder:
    path: Path
    listing: Listing  # of it, without what is read otherwise
    key: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    @cached_property
    def captions(self) -> dict[str, str]:
        """The caption file of every picture; the usual one where there is none."""
        texts: dict[tuple[str, str], str] = {}
        for name in self.listing.files:
            base, suffix = splitext(name)
            kind = suffix.lower()
            if kind in CAPTION_SUFFIXES and (kind == suffix or (base, kind) not in texts):
                texts[base, kind] = name
        found = {}
        for name in self.listing.files:
            if self._is_picture(name):
                base = splitext(name)[0]
                names = ((stem, suffix) for stem in (base, name) for suffix in CAPTION_SUFFIXES)
                found[name] = next((texts[n] for n in names if n in texts), f"{base}.txt")
        return found

    def _is_picture(self, name: str) -> bool:
        try:
            return shows_picture(name, lambda: _head(self.path / name))
        except OSError:
            return True  # why it cannot be read is told when it is

    def require_pictures(self) -> None:
        """Raises ConfigError where there is nothing to read."""
        if not self.captions:
            raise ConfigError(
                f"data.images: {self.path} holds no images ({', '.join(IMAGE_SUFFIXES)})."
            )
        if not any(caption in self.listing.files for caption in self.captions.values()):
            first = self.path / next(iter(self.captions.values()))
            raise ConfigError(
                f"data.images: none of the {len(self.captions)} images in {self.path} has a "
                f"caption; expected a text file beside each, e.g. {first}."
            )

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        stamps = (
            (name, file_stamp(self.path / name), file_stamp(self.path / caption))
            for name, caption in self.captions.items()
        )
        return [(name, f"{image} {text}") for name, image, text in stamps], self._problems()

    def _problems(self) -> list[Problem]:
        used = {*self.captions, *self.captions.values()}
        bases = {base for name in self.captions for base in (name, splitext(name)[0])}
        beside, reasons = [], dict(self.listing.refused)
        for name in self.listing.files.keys() - used:
            base, suffix = splitext(name)
            if base in bases:
                beside.append(name)
            elif suffix.lower() in CAPTION_SUFFIXES:
                reasons[name] = f"belongs to no picture: expected {basename(base)}.png or the like"
            else:
                reasons[name] = NO_PICTURE
        alone = [Problem(self.label, *reason) for reason in sorted(reasons.items())]
        return alone + not_read(self.label, sorted(beside), "pictures")

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        for name in names:
            try:
                image = read_file(self.path / name, PICTURE_BYTES)
            except OSError as error:
                yield Sample(name, problem=f"cannot be read: {error.strerror or error}")
                continue
            file = self.captions[name]
            try:
                there = file in self.listing.files
                data = read_file(self.path / file, TEXT_BYTES) if there else None
                yield Sample(name, image, **read_caption(data, basename(file), self.key))
            except OSError as error:
                problem = f"the caption cannot be read: {error.strerror or error}"
                yield Sample(name, problem=problem, culprit=file)
            except ValueError as error:
                yield Sample(name, problem=str(error), culprit=file)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
