"""One WebDataset shard: the files of one name are one sample, wherever they stand in the archive.

A first pass makes an index of it, a second one reads pictures and captions by their position. What
is in memory: about 400 bytes of index per file for the last INDEXES archives; the captions of a
compressed archive that is not in order, EARLY_BYTES at most; and one sample.
"""

from __future__ import annotations

import bz2
import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from posixpath import basename, splitext
from typing import IO, Any, NamedTuple

from ..contract.shown import plain, shown
from .captions import CAPTION_SUFFIXES, read_caption
from .files import PICTURE_BYTES, TEXT_BYTES, file_stamp, require_size
from .images import HEAD_BYTES, IMAGE_SUFFIXES, shows_picture
from .sample import Problem, Sample, not_read

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2")
PACKED: dict[tuple[int, bytes], Any] = {  # by what stands where
    (0, b"\x1f\x8b"): gzip.open,
    (4, b"1AY&SY"): bz2.open,
}
NOT_UNPACKED = {b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
BROKEN_ARCHIVE = (tarfile.TarError, EOFError, OSError, RecursionError, ValueError, zlib.error)
HEADER_BYTES = 1 << 16  # of a long name or of extended attributes
EARLY_BYTES = 256 << 20
INDEXES = 16


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES)


class Span(NamedTuple):
    """Where the content of a file lies in the unpacked archive."""

    offset: int
    size: int
    number: int  # of the file in the archive


class Parts(NamedTuple):
    """A sample: its files by suffix, such as ".png" or ".seg.png"."""

    files: dict[str, Span]
    picture: str | None = None  # suffixes
    caption: str | None = None

    @property
    def start(self) -> int:
        """By which samples are ordered, so that pictures are read in one pass."""
        first = next(iter(self.files)) if self.picture is None else self.picture
        return self.files[first].offset

    @property
    def apart(self) -> bool:
        """Whether files of other samples stand between these."""
        numbers = [span.number for span in self.files.values()]
        return max(numbers) - min(numbers) >= len(numbers)


@dataclass
class Index:
    samples: dict[str, Parts] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)  # name, reason


@dataclass(frozen=True)
class Archive:
    path: Path
    key: str | None = None

    @property
    def label(self) -> str:
        return str(self.path)

    def _index(self) -> Index:
        return _index_of(self.path, file_stamp(self.path))

    def entries(self) -> tuple[list[tuple[str, str]], list[Problem]]:
        index, stamp = self._index(), file_stamp(self.path)
        problems = [Problem(self.label, *refused) for refused in index.refused]
        left = [
            name + suffix
            for name, parts in index.samples.items()
            if parts.picture is not None
            for suffix in parts.files
            if suffix not in (parts.picture, parts.caption)
        ]
        problems += not_read(self.label, left, "pictures")
        return [(name, stamp) for name in index.samples], problems

    def read(self, names: Sequence[str]) -> Iterator[Sample]:
        samples = self._index().samples
        with _unpacked(self.path) as file:
            early = Early(file, [samples[name] for name in names if name in samples])
            for name in names:
                if name in samples:
                    yield self._sample(file, name, samples[name], early)
                else:
                    yield Sample(name, problem="cannot be read: the archive changed meanwhile")

    def _sample(self, file: IO[bytes], name: str, parts: Parts, early: Early) -> Sample:
        if parts.picture is None:
            kinds = ", ".join(sorted(filter(None, parts.files)))
            return Sample(name, problem=f"no image among {kinds or 'files without a suffix'}")
        wanted = [(parts.files[s], s) for s in (parts.picture, parts.caption) if s is not None]
        content: dict[str | None, bytes] = {}
        for span, suffix in sorted(wanted):  # in their order, so that nothing is unpacked twice
            try:
                if suffix == parts.picture:
                    content[suffix] = _read(file, span, PICTURE_BYTES)
                else:
                    content[suffix] = early(span) if parts.apart else _read(file, span, TEXT_BYTES)
            except OSError as error:
                what = "" if suffix == parts.picture else f"the caption {basename(name)}{suffix} "
                return Sample(name, problem=f"{what}cannot be read: {error}")
        file_name = basename(name) + (parts.caption or CAPTION_SUFFIXES[0])
        try:
            caption = read_caption(content.get(parts.caption), file_name, self.key)
        except ValueError as error:
            return Sample(name, problem=str(error))
        return Sample(name, content[parts.picture], **caption)


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as packed:
        head = packed.read(tarfile.BLOCKSIZE)
        packed.seek(0)
        unpack = next((u for (at, mark), u in PACKED.items() if head.startswith(mark, at)), None)
        if unpack is None:
            yield packed
        else:
            with unpack(packed) as file:
                yield file


def _read(file: IO[bytes], span: Span, limit: int) -> bytes:
    """Raises OSError."""
    require_size(span.size, limit)
    try:
        file.seek(span.offset)
        data = file.read(span.size)
        if len(data) < span.size:
            raise EOFError(f"{span.size - len(data)} bytes are missing")
    except BROKEN_ARCHIVE as error:
        raise OSError(f"the archive is damaged: {error}") from error
    return data


class Early:
    """The captions of samples whose files stand apart, read in one pass beforehand: to and fro
    would unpack a compressed archive anew for each.
    """

    def __init__(self, file: IO[bytes], samples: list[Parts]) -> None:
        self._found: dict[Span, bytes | OSError] = {}
        left = EARLY_BYTES
        for span in sorted(p.files[p.caption] for p in samples if p.caption and p.apart):
            try:
                require_size(span.size, TEXT_BYTES)
                if span.size > left:
                    raise OSError(f"and {EARLY_BYTES >> 20} MiB of others stand apart; sort them")
                self._found[span] = _read(file, span, TEXT_BYTES)
                left -= span.size
            except OSError as error:
                self._found[span] = error

    def __call__(self, span: Span) -> bytes:
        """Raises OSError."""
        found = self._found[span]
        if isinstance(found, OSError):
            raise found
        return found


# The index


class _Headers:
    """What tarfile sees of an archive: headers, whose sizes are a stranger's to choose."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise OSError(f"a header of {size} bytes; up to {HEADER_BYTES} are read")
        return self._read(size)


@lru_cache(INDEXES)
def _index_of(path: Path, stamp: str) -> Index:
    """stamp: tells a changed archive from the one before."""
    index = Index()
    files: dict[str, Span] = {}
    pictures: set[str] = set()
    damage = ""
    try:
        with _unpacked(path) as file:
            for member in _members(file):
                name = str(PurePosixPath(member.name))
                if member.isdir():
                    continue
                if member.issym() or member.islnk():
                    target = plain(member.linkname)
                    index.refused.append((name, f"is a link to {target}; {_DEREFERENCE}"))
                elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
                    index.refused.append((name, "is a device, a pipe or a sparse file"))
                else:
                    if name in files:
                        index.refused.append((name, "stands there twice; the last one is read"))
                    files[name] = Span(member.offset_data, member.size, len(files))
                    if shows_picture(name, partial(_head, file, member)):
                        pictures.add(name)
    except BROKEN_ARCHIVE as error:
        damage = f": {error}"
    index.samples = _group(files, pictures)
    if damage:
        count = len(index.samples)
        index.refused.append(("", f"the archive is damaged after {count} samples{damage}"))
    elif not files:
        index.refused.append(("", "the archive holds no files"))
    return index


_DEREFERENCE = "pack the file itself: tar --dereference --hard-dereference"


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Raises one of BROKEN_ARCHIVE also where tarfile takes damage for the end."""
    head = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    if kind := next((name for mark, name in NOT_UNPACKED.items() if head.startswith(mark)), None):
        raise tarfile.ReadError(f"it is packed with {kind}; use gzip, or none")
    at = -1
    with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            archive.members.clear()  # it would keep all of them
            if member.size < 0 or archive.offset <= at:
                raise tarfile.ReadError(f"{shown(member.name)} has a size of {member.size}")
            at = archive.offset
            yield member
    file.seek(archive.offset)
    end = file.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it breaks off without its end mark")
    if end[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"expected a header at byte {archive.offset}")
    if end.strip(b"\0"):
        raise tarfile.ReadError("more follows behind its end, perhaps another archive")


def _head(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(min(member.size, HEAD_BYTES))


def _group(files: dict[str, Span], pictures: set[str]) -> dict[str, Parts]:
    """Samples in the order of their pictures.

    A name ends at its last dot where picture and caption have it in common ("photo.v2.a.png",
    "photo.v2.a.txt"); else at its first dot, as WebDataset does ("000.png", "000.seg.png").
    """
    texts = {splitext(n)[0] for n in files if splitext(n)[1].lower() in CAPTION_SUFFIXES}
    pictured = {splitext(n)[0] for n in pictures}
    grouped: dict[str, dict[str, Span]] = {}
    images: dict[str, list[str]] = {}
    for name, span in files.items():
        key = _key(name, texts, pictured)
        parts = grouped.setdefault(key, {})
        suffix = name[len(key) :]
        suffix = suffix if suffix.lower() in parts else suffix.lower()
        parts[suffix] = span
        if name in pictures and suffix.count(".") < 2:
            images.setdefault(key, []).append(suffix)
    samples = {}
    for key, parts in grouped.items():
        caption = next((s for s in CAPTION_SUFFIXES if s in parts), None)
        picture = min(images.get(key, ()), key=_rank, default=None)
        samples[key] = Parts(parts, picture, caption)
    return dict(sorted(samples.items(), key=lambda sample: sample[1].start))


def _rank(suffix: str) -> int:
    return IMAGE_SUFFIXES.index(suffix) if suffix in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES)


def _key(name: str, texts: set[str], pictures: set[str]) -> str:
    base = splitext(name)[0]
    first = name[: len(name) - len(basename(name))] + _up_to_dot(basename(name))
    if base == first:
        return first
    longer = base
    while longer != first:
        if longer in texts and longer in pictures:
            return longer
        longer = splitext(longer)[0] if "." in basename(longer)[1:] else first
    known = base in texts or base in pictures
    return base if known and first not in texts and first not in pictures else first


def _up_to_dot(name: str) -> str:
    """A leading dot is part of the name."""
    return name[:1] + name[1:].partition(".")[0]
