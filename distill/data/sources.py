"""Real images with captions: folders, WebDataset shards; `datasets` folders in huggingface.py."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..config import ConfigError
from .captions import CAPTION_SUFFIXES, caption_file, caption_of, usable_caption
from .sample import IMAGE_SUFFIXES, ImageSource, Problem, Sample, file_stamp

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
BROKEN_ARCHIVE = (tarfile.TarError, EOFError, OSError, zlib.error)


def open_images(path: Path, key: str | None = None) -> list[ImageSource]:
    """The sources at `path`; what does not exist as it is written may be a name with wildcards.

    Raises ConfigError if there is none.
    """
    if not path.exists() and any(letter in path.name for letter in "*?["):
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise ConfigError(f"data.images: no file matches {path}.")
        return [source for match in found for source in open_images(match, key)]
    if not path.exists():
        raise ConfigError(
            f"data.images: {path} does not exist. Expected a folder of images with .txt captions, "
            "WebDataset shards (.tar, .tar.gz) or a folder of Hugging Face datasets."
        )
    if path.is_file():
        if not path.name.endswith(ARCHIVE_SUFFIXES):
            raise ConfigError(
                f"data.images: {path}: expected a folder or an archive "
                f"({', '.join(ARCHIVE_SUFFIXES)}), found a file of another kind."
            )
        return [Archive(path, key)]
    archives = sorted(p for p in path.iterdir() if p.name.endswith(ARCHIVE_SUFFIXES))
    if archives:
        return [Archive(archive, key) for archive in archives]
    from .huggingface import Dataset, is_dataset

    return [Dataset(path, key)] if is_dataset(path) else [Folder(path)]


@dataclass(frozen=True)
class Folder:
    """Images in a folder and below, each with a text file of the same name beside it."""

    path: Path

    @property
    def label(self) -> str:
        return str(self.path)

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        images = sorted(
            path.relative_to(self.path)
            for path in self.path.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not images:
            raise ConfigError(
                f"data.images: {self.path} holds no images ({', '.join(IMAGE_SUFFIXES)})."
            )
        captions = {name: caption_file(self.path / name) for name in images}
        if not any(path.is_file() for path in captions.values()):
            raise ConfigError(
                f"data.images: none of the {len(images)} images in {self.path} has a caption; "
                f"expected a text file beside each, e.g. {captions[images[0]]}."
            )
        return [
            (n.as_posix(), f"{file_stamp(self.path / n)} {file_stamp(captions[n])}") for n in images
        ], []

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        for name in names:
            path, caption = self.path / name, caption_file(self.path / name)
            try:
                text = caption.read_text(encoding="utf-8-sig") if caption.is_file() else None
                yield Sample(name, path.read_bytes(), **usable_caption(text, caption.name))
            except (OSError, UnicodeDecodeError) as error:
                yield Sample(name, problem=f"cannot be read: {error}")


@dataclass(frozen=True)
class Archive:
    """One WebDataset shard: files of one name up to the first dot are one sample."""

    path: Path
    key: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        names: dict[str, None] = {}
        problems = []
        try:
            with tarfile.open(self.path) as archive:
                names.update(
                    (_split(member.name)[0], None) for member in archive if member.isfile()
                )
        except BROKEN_ARCHIVE as error:
            reason = f"the archive is damaged after {len(names)} samples: {error}"
            problems.append(Problem(self.label, "", reason))
        stamp = file_stamp(self.path)
        return [(name, stamp) for name in names], problems

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        left = dict.fromkeys(names)
        for name, files in self._groups(set(names)):
            if name in left:  # else it came before: files of one name lie side by side
                del left[name]
                yield self._sample(name, files)
        for name in left:
            yield Sample(name, problem="cannot be read: the archive is damaged")

    def _groups(self, wanted: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        name = ""
        files: dict[str, bytes] = {}
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    key, suffix = _split(member.name)
                    if not member.isfile():
                        continue
                    if key != name:
                        if name in wanted:
                            yield name, files
                        name, files = key, {}
                    if key in wanted:
                        content = archive.extractfile(member)
                        files[suffix] = content.read() if content else b""
        except BROKEN_ARCHIVE:
            return
        if name in wanted:
            yield name, files

    def _sample(self, name: str, files: dict[str, bytes]) -> Sample:
        image = next((files[s] for s in IMAGE_SUFFIXES if s in files), None)
        if image is None:
            return Sample(name, problem=f"no image among {', '.join(sorted(files)) or 'no files'}")
        try:
            text = next(
                (files[s].decode("utf-8-sig") for s in CAPTION_SUFFIXES if s in files), None
            )
            if text is None and ".json" in files:
                text = caption_of(json.loads(files[".json"]), self.key)
        except ValueError as error:
            return Sample(name, problem=f"the caption cannot be read: {error}")
        return Sample(name, image, **usable_caption(text, f"{PurePosixPath(name).name}.txt"))


def _split(member: str) -> tuple[str, str]:
    """ "a/b.seg.png" -> ("a/b", ".seg.png"), as WebDataset does."""
    path = PurePosixPath(member)
    base, dot, suffix = path.name.partition(".")
    return str(path.with_name(base)) if base else member, (dot + suffix).lower()
