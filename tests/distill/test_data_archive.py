"""WebDataset shards: in any order, with any names, damaged or made to do harm."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import everything, jpeg, tar_bytes

from distill.data.files import PICTURE_BYTES, TEXT_BYTES
from distill.data.sample import Sample
from distill.data.sources import open_images

PAIR = {"a.jpg": jpeg(), "a.txt": b"an a"}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "a.tar": bytes,
    "a.TAR": bytes,
    "a.tar.gz": gzip.compress,
    "a.tgz": gzip.compress,
    "a.tar.bz2": bz2.compress,
}


def archive(folder: Path, content: bytes, name: str = "a.tar") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


@pytest.mark.parametrize("name", PACKERS)
def test_files_of_a_sample_may_stand_anywhere(tmp_path: Path, name: str) -> None:
    """As plain `tar cf` makes it: all pictures, then all captions, some of them the other way."""
    letters = "cabd"
    files = {"d.txt": b"text d"} | {f"{n}.jpg": jpeg(ord(n)) for n in letters}
    files |= {f"{n}.txt": f"text {n}".encode() for n in sorted(letters)}
    path = archive(tmp_path, PACKERS[name](tar_bytes(files)), name)
    samples, problems = everything(path)
    assert samples == [Sample(n, jpeg(ord(n)), f"text {n}") for n in letters]
    assert not problems
    (source,) = open_images(path)
    assert [s.caption for s in source.read(["a", "d"])] == ["text a", "text d"]


FIELDS = {"a.jpg": jpeg(), "a.json": b'{"text": "j"}', "a.seg.png": b"mask", "b.c.txt": b"b c"}
FIELDS |= {"b.c.jpg": jpeg(1), "d.npy": b"numbers"}


@given(st.permutations(sorted(FIELDS)), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_order_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], packed: bool
) -> None:
    data = tar_bytes({name: FIELDS[name] for name in order})
    path = archive(tmp_path_factory.mktemp("a"), gzip.compress(data) if packed else data)
    samples, problems = everything(path)
    assert sorted(samples, key=lambda s: s.name) == [
        Sample("a", jpeg(), "j"),
        Sample("b.c", jpeg(1), "b c"),
        Sample("d", problem="no image among .npy"),
    ]
    assert problems == ["1 files beside pictures are not read, e.g. a.seg.png"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["photo.v2.a.png", "photo.v2.a.txt", "photo.v2.b.png", "photo.v2.b.txt"], "ok ok"),
        (["photo.v2.a.png", "photo.v2.b.png", "photo.v2.b.TXT"], "photo.v2.a.txt ok"),
        (["0.png", "0.txt", "0.seg.png"], "ok"),
        (["0.seg.png", "0.txt"], "no image among .seg.png, .txt"),
        (["0.jpg", "0.png", "0.txt"], "ok"),
        (["0.JPG", "0.Caption"], "ok"),
        (["d.x/0.jpg", "d.x/0.txt", "d.y/0.jpg", "d.y/0.txt"], "ok ok"),
        (["0.jfif", "0.txt", "1.TIF", "1.txt", "2.unknown", "2.txt", "3", "3.txt"], "ok ok ok ok"),
        (["0.JPG", "0.jpg", "0.txt"], "ok"),
        (["README"], "no image among files without a suffix"),
    ],
)
def test_names(tmp_path: Path, names: list[str], expected: str) -> None:
    def content(name: str) -> bytes:
        return b"text" if name.lower().endswith((".txt", ".caption", "readme")) else jpeg()

    samples, _ = everything(archive(tmp_path, tar_bytes({n: content(n) for n in names})))
    found = [s.problem.removeprefix("no caption: ").removesuffix(" is missing") for s in samples]
    assert " ".join(reason or "ok" for reason in found) == expected


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    samples, _ = everything(
        archive(tmp_path, tar_bytes({"\udcff.jpg": jpeg(), "\udcff.txt": b"t"}))
    )
    assert samples == [Sample("\udcff", jpeg(), "t")]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (special("b.jpg", tarfile.SYMTYPE, "/etc/passwd"), "is a link to /etc/passwd"),
        (special("b.jpg", tarfile.LNKTYPE, "a.jpg"), "tar --dereference"),
        (special("b.jpg", tarfile.FIFOTYPE), "is a device, a pipe"),
        (special("b.jpg", tarfile.CHRTYPE), "is a device, a pipe"),
        ((tarfile.TarInfo("a.jpg"), b"older"), "stands there twice; the last one is read"),
    ],
)
def test_what_is_no_file_is_named(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes], reason: str
) -> None:
    pair = [(tarfile.TarInfo(name), content) for name, content in PAIR.items()]
    samples, problems = everything(archive(tmp_path, tar_of(member, *pair)))
    assert samples == [Sample("a", jpeg(), "an a")]
    (found,) = problems
    assert reason in found


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"[" * 200_000, "the caption a.json cannot be read: its brackets are nested"),
        ("a.json", b"1" * 5000, "the caption a.json cannot be read"),
        ("a.json", b"5", "no caption: a.json has no text under prompt, caption, text"),
        ("a.json", b'{"text": "\\ud800"}', "no caption: a.json holds half a letter"),
        ("a.txt", "红".encode("gbk"), "the caption a.txt cannot be read: expected UTF-8, found"),
        ("a.txt", b"\0" * 9, "save a.txt as UTF-8"),
        ("a.txt", b"x" * (TEXT_BYTES + 1), "the caption a.txt cannot be read: has 1 MiB"),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_bad_caption_is_named(
    tmp_path: Path, name: str, content: bytes, reason: str, apart: bool
) -> None:
    between = {"b.jpg": jpeg(), "b.txt": b"b"}
    files = {"a.jpg": jpeg()} | (between if apart else {}) | {name: content} | between
    samples, _ = everything(archive(tmp_path, gzip.compress(tar_bytes(files))))
    found = {s.name: s.problem for s in samples}
    assert reason in found["a"]
    assert found["b"] == ""


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path, b"")
    info = tarfile.TarInfo("a.jpg")
    info.size = PICTURE_BYTES + 512
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.seek(info.size, os.SEEK_CUR)  # a hole
        file.write(tar_bytes({"b.jpg": jpeg(), "b.txt": b"b"}))
    samples, problems = everything(path)
    assert samples[0].problem == "cannot be read: has 256 MiB; up to 256 MiB are read"
    assert samples[1] == Sample("b", jpeg(), "b")
    assert not problems


def long_header(size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT)


def negative() -> bytes:
    info = tarfile.TarInfo("b.jpg")
    buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = b"\xff" * 11 + b"\x00"  # a size of -256
    buffer[148:156] = b" " * 8
    buffer[148:155] = b"%06o\0" % sum(buffer)
    return bytes(buffer) + bytes(1024)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"", "breaks off without its end mark"),
        (b"\xff" * 1024, "expected a header at byte"),
        (bytes(1024) + b"more", "more follows behind its end"),
        (long_header(1 << 30), f"a header of {1 << 30} bytes"),
        (long_header(1) + bytes(512), "damaged"),
        (long_header(0) * 2000, "damaged"),
        (negative(), "damaged"),
    ],
    ids=["cut", "junk", "second archive", "long name", "bad name", "many names", "negative size"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damage_behind_a_sample(tmp_path: Path, tail: bytes, reason: str, packed: bool) -> None:
    end = sum(512 + -(-len(content) // 512) * 512 for content in PAIR.values())
    data = tar_bytes(PAIR)[:end] + tail
    samples, problems = everything(archive(tmp_path, gzip.compress(data) if packed else data))
    assert samples[0] == Sample("a", jpeg(), "an a")
    assert "the archive is damaged after" in problems[-1]
    assert reason in problems[-1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the archive is damaged after 0 samples"),
        (b"junk" * 1000, "the archive is damaged after 0 samples"),
        (bytes(10240), "the archive holds no files"),
        (b"\x1f\x8bjunk", "the archive is damaged after 0 samples"),
        (b"PK\x03\x04", "packed with zip"),
        (b"\xfd7zXZ\0", "packed with xz"),
        (b"\x28\xb5\x2f\xfd", "packed with zstd"),
    ],
)
def test_nothing_in_it(tmp_path: Path, content: bytes, reason: str) -> None:
    samples, problems = everything(archive(tmp_path, content))
    assert not samples
    (found,) = problems
    assert reason in found
