"""Pictures, captions and prompts from strangers, through `prepare` with the tiny model."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import numpy as np
import pyarrow
import pytest
from hostile import Failed, Limits, Refused, Surface, check, command, few, row
from mutations import damaged
from PIL import Image
from pyarrow import parquet

from distill.config import ConfigError
from distill.data import builder
from distill.data.images import BROKEN_IMAGE, decode_image
from distill.data.prompts import read_prompts

CAPTION = "a red letter K"
WORDS = CAPTION.encode()


class Prepared(NamedTuple):
    count: int  # of pictures, or of prompts
    reasons: list[str]  # "item: reason"


def prepare(source: Path, what: str = "images") -> Prepared:
    cache = source.parent / "cache"
    settings = ("model.path=tiny", "model.dtype=float32", "data.resolution=64")
    paths = (f"data.{what}={source}", f"data.cache={cache}", "data.dtype=float32")
    report = json.loads(command("prepare", *settings, *paths, "--json"))
    lines = (cache / "quarantine.jsonl").read_text(encoding="utf-8").split("\n")
    problems = [json.loads(line) for line in lines if line]
    assert report["set_aside"] == len(problems)
    count = report["real_images" if what == "images" else "prompts"]
    return Prepared(count, [f"{p['item']}: {p['reason']}" for p in problems])


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries and the VAE are loaded before the attempts fork off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "load_vae", lru_cache(builder.load_vae))
        prepare(put({})(tmp_path_factory.mktemp("warm")))
        yield


PREPARE = Surface("prepare data.images", prepare, (Refused,), Limits(cpu_s=10, wall_s=30))
DECODE = Surface("decode_image", decode_image, BROKEN_IMAGE)
PROMPTS = Surface("read_prompts", lambda path: read_prompts([path]), (ConfigError,))


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(data, **{"format": "PNG", **options})
    return data.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
    """A grey PNG that says it has this size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = [head, *extra, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


PNG = picture()
JPEG = picture(format="JPEG")
BOMB = png(13_000, 13_000, bytes(13_000 * 13_001))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


# ------------------------------------------------------------------------------ folders of pictures


def put(files: Mapping[str | bytes, bytes | Callable[[bytes], object]]) -> Callable[[Path], Path]:
    """A row's folder: one good picture, and these; a function makes the file itself."""

    def make(folder: Path) -> Path:
        folder = folder / "set"
        folder.mkdir()
        for name, content in {"good.png": PNG, "good.txt": WORDS, **files}.items():
            path = os.path.join(os.fsencode(folder), os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if callable(content):
                content(path)
            else:
                Path(os.fsdecode(path)).write_bytes(content)
        return folder

    return make


def pair(image: Any, caption: Any = WORDS, name: str = "a.png") -> Callable[[Path], Path]:
    """A row's folder with a picture, and its caption beside it."""
    return put({name: image, str(Path(name).with_suffix(".txt")): caption})


def link(target: str) -> Callable[[bytes], None]:
    return lambda path: os.symlink(target, path)


def item(name: str, make: Any, used: int, reason: str | None = None, marks: Any = ()) -> Any:
    """used: pictures beside the good one; reason: pattern of "item: reason"."""
    return pytest.param(make, used, reason, id=name, marks=marks)


ITEMS = [
    item("plain", pair(PNG), 1),
    item("empty", pair(b""), 0, "a.png: .*empty"),
    item("zeros", pair(b"\0" * 4096), 0, "a.png: .*no picture"),
    item("cut short", pair(PNG[:2000]), 0, "a.png: .*truncated"),
    item("a web page", pair(b"<!DOCTYPE html><html></html>"), 0, "a.png: .*no picture"),
    item("PostScript", pair(POSTSCRIPT, name="a.jpg"), 0, "a.jpg: .*no picture"),
    item("Photoshop", pair(b"8BPS\0\1" + b"\0" * 100), 0, "a.png: .*no picture"),
    item("a picture of another kind", pair(picture(format="ICO")), 0, "a.png: .*no picture"),
    item("JPEG under another name", pair(JPEG), 1),
    item("grey and transparent", pair(picture("LA")), 1),
    item("black and white", pair(picture("1")), 1),
    item("CMYK", pair(picture("CMYK", format="JPEG"), name="a.jpg"), 1),
    item("16 bits", pair(picture("I;16")), 1),
    item("fractions", pair(picture("F", format="TIFF"), name="a.tiff"), 1),
    item("GIF", pair(picture("P", format="GIF"), name="a.gif"), 1),
    item("a name in capitals", pair(PNG, name="A.PNG"), 1),
    item("says it is 4 billion wide", pair(png(2**31 - 1, 2**31 - 1, b"")), 0, "a.png: .*"),
    item("no width at all", pair(png(0, 0, b"")), 0, "a.png: "),
    item("530 KB that are 170 million pixels", pair(BOMB), 0, "a.png: .*pixels"),
    item("a line", pair(png(20_000, 1, bytes(20_001))), 0, "a.png: too small"),
    item(
        "a bomb of text",
        pair(png(64, 64, bytes(65 * 64), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))))),
        0,
        "a.png: ",
    ),
    item(
        "a bomb of a profile",
        pair(png(64, 64, bytes(65 * 64), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**28))))),
        0,
        "a.png: .*too large",
    ),
    # captions
    item("no caption", put({"a.png": PNG}), 0, r"a.png: no caption: a\.txt is missing"),
    item("an empty caption", pair(PNG, b" \r\n"), 0, "a.png: no caption"),
    item("a caption with a byte order mark", pair(PNG, b"\xef\xbb\xbf" + WORDS), 1),
    item("a caption with CRLF", pair(PNG, WORDS + b"\r\n"), 1),
    item("a caption in UTF-16", pair(PNG, CAPTION.encode("utf-16")), 1),
    item("a caption in GBK", pair(PNG, "红色字母".encode("gbk")), 0, r"a\.txt.*UTF-8"),
    item("a caption of zeros", pair(PNG, b"\0" * 100), 0, "a.(png|txt): "),
    item("a caption of a megabyte", pair(PNG, b"word " * 200_000), 0, "word"),
    item("a caption that is a folder", pair(PNG, os.mkdir), 0, "a.png: no caption"),
    item("a caption that is a pipe", pair(PNG, os.mkfifo), 0, "a.png: no caption"),
    item("a caption that links to itself", pair(PNG, link("a.txt")), 0, "a.png: "),
    item("a caption with escapes", pair(PNG, b"\x1b[31m"), 0, r"\x1b\[31m: "),
    item("a caption in capitals", put({"a.png": PNG, "a.TXT": WORDS}), 1),
    # files that are none
    item("a folder", pair(os.mkdir), 0, "a.txt: belongs to no picture"),
    item("a pipe", pair(os.mkfifo), 0, "a.png: "),
    item("a device", pair(link("/dev/zero")), 0, "a.png: "),
    item("a link to itself", pair(link("a.png")), 0, "a.png: "),
    item("a link to nowhere", pair(link("nowhere")), 0, "a.png: "),
    item("a folder that links to its parent", put({"deep/up": link("..")}), 0),
    # names
    item(
        "a name that is not UTF-8",
        put({b"\xff.png": PNG, b"\xff.txt": WORDS}),
        1,
    ),
    item("a name that is not UTF-8, without a caption", put({b"\xff.png": PNG}), 0, ".*no caption"),
    item("a name of two lines", pair(PNG, name="a\nb.png"), 1),
    item("a name with dots", pair(PNG, name="photo.v2.a.png"), 1),
    item(
        "a name of nothing but its suffix", put({".png": PNG, ".txt": WORDS}), 0, ".png: no caption"
    ),
    item("a long name", pair(PNG, name="x" * 250 + ".png"), 1),
]


@pytest.mark.parametrize(("make", "used", "reason"), few(ITEMS))
def test_a_picture(
    make: Callable[[Path], Path], used: int, reason: str | None, tmp_path: Path
) -> None:
    found = check(PREPARE, make(tmp_path))
    assert found.count == 1 + used, found
    assert bool(found.reasons) == (reason is not None), found.reasons
    assert reason is None or any(re.match(reason, line, re.DOTALL) for line in found.reasons)


def junk(folder: Path) -> Path:
    (folder / "set").mkdir()
    (folder / "set" / "notes.md").write_text("nothing to see")
    return folder / "set"


SOURCES = [
    row("an empty folder", lambda folder: folder, "holds no images"),
    row("no picture among the files", junk, "holds no images"),
    row("a device", lambda _: Path("/dev/null"), "dev/null"),
    row("a pipe", lambda folder: os.mkfifo(folder / "a.tar") or folder / "a.tar", r"a\.tar"),
]


@pytest.mark.parametrize(("make", "refused"), few(SOURCES))
def test_a_source(make: Callable[[Path], Path], refused: str | None, tmp_path: Path) -> None:
    check(PREPARE, make(tmp_path), refused)


# ------------------------------------------------------------------------------------- archives


def tar(
    *members: tuple[str, bytes | tarfile.TarInfo], mode: str = "w", good: bool = True
) -> Callable[[Path], Path]:
    """A row's archive of these; a TarInfo goes in as it is."""

    def make(folder: Path) -> Path:
        path = folder / ("set.tar.gz" if mode.endswith("gz") else "set.tar")
        first = (("good.png", PNG), ("good.txt", WORDS)) if good else ()
        with tarfile.open(path, mode) as archive:
            for name, content in (*first, *members):
                info = tarfile.TarInfo(name)
                if isinstance(content, tarfile.TarInfo):
                    archive.addfile(content)
                else:
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        return path

    return make


def special(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def raw(change: Callable[[bytes], bytes], suffix: str = ".tar") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        whole = tar(("a.png", PNG), ("a.txt", WORDS))(folder).read_bytes()
        (folder / "set.tar").unlink()
        (folder / f"set{suffix}").write_bytes(change(whole))
        return folder / f"set{suffix}"

    return make


def zeros(folder: Path) -> Path:
    """3 MB that are 700."""
    with gzip.open(folder / "set.tar.gz", "wb", 1) as file:
        info = tarfile.TarInfo("a.png")
        info.size = 700 * 2**20
        file.write(info.tobuf())
        for _ in range(700 >> 4):
            file.write(bytes(2**24))
    return folder / "set.tar.gz"


A = ("a.png", PNG), ("a.txt", WORDS)
ARCHIVES = [
    item("plain", tar(*A), 1),
    item("all pictures first", tar(A[0], ("b.png", JPEG), A[1], ("b.txt", WORDS)), 2, None),
    item(
        "names with dots",
        tar(*((f"p.v2.{n}{s}", c) for n in "ab" for s, c in ((".png", PNG), (".txt", WORDS)))),
        2,
        None,
    ),
    item("a name from the root", tar(("/a.png", PNG), ("/a.txt", WORDS)), 1),
    item("a name from above", tar(("../a.png", PNG), ("../a.txt", WORDS)), 1),
    item(
        "a name that is not UTF-8",
        tar(("\udcff.png", PNG), ("\udcff.txt", WORDS)),
        1,
    ),
    item("a link", tar(special("a.png", tarfile.SYMTYPE, "/etc/passwd"), A[1]), 0, "a: no image"),
    item(
        "a hard link", tar(special("a.png", tarfile.LNKTYPE, "/etc/passwd"), A[1]), 0, "a: no image"
    ),
    item("a pipe", tar(special("a.png", tarfile.FIFOTYPE), A[1]), 0, "a: no image"),
    item("a device", tar(special("a.png", tarfile.CHRTYPE), A[1]), 0, "a: no image"),
    item("a folder", tar(special("a.png", tarfile.DIRTYPE), A[1]), 0, "a: no image"),
    item("the same name twice", tar(*A, *A), 1, "a.png: stands there twice"),
    item("a deep JSON", tar(A[0], ("a.json", b"[" * 200_000)), 0, "a: .*caption"),
    item("a JSON number of 5000 digits", tar(A[0], ("a.json", b"1" * 5000)), 0, "a: .*caption"),
    item("a JSON that is a number", tar(A[0], ("a.json", b"5")), 0, "a: no caption"),
    item(
        "a JSON with half a pair of surrogates",
        tar(A[0], ("a.json", b'{"text": "\\ud800"}')),
        0,
        ".*",
    ),
    item("a caption in GBK", tar(A[0], ("a.txt", "红色字母".encode("gbk"))), 0, "a: .*caption"),
    item("cut short", raw(lambda whole: whole[:-5000]), 0, ": .*damaged"),
    item(
        "a damaged header",
        raw(lambda whole: whole[:15_000] + b"\xff" * 512 + whole[15_512:]),
        0,
        ".*",
    ),
    item(
        "a picture of a gigabyte that is not there",
        tar(A[1], special("a.png", tarfile.REGTYPE)),
        0,
        "a: .*",
    ),
]


@pytest.mark.parametrize(("make", "used", "reason"), few(ARCHIVES))
def test_an_archive(
    make: Callable[[Path], Path], used: int, reason: str | None, tmp_path: Path
) -> None:
    test_a_picture(make, used, reason, tmp_path)


ONLY = [
    row("empty", tar(good=False), r"set\.tar"),
    row("no bytes", raw(lambda whole: b""), r"set\.tar"),
    row("junk", raw(lambda whole: b"junk" * 1000), r"set\.tar"),
    row("zeros", raw(lambda whole: bytes(100_000)), r"set\.tar"),
    row("a zip", raw(lambda whole: b"PK\x03\x04" + whole), r"set\.tar"),
    row("gzip in name only", raw(lambda whole: b"\x1f\x8b" + whole, ".tar.gz"), r"set\.tar"),
    row("3 MB that are 700", zeros, "archive is damaged"),
]


@pytest.mark.parametrize(("make", "refused"), few(ONLY))
def test_an_archive_of_nothing(
    make: Callable[[Path], Path], refused: str | None, tmp_path: Path
) -> None:
    check(PREPARE, make(tmp_path), refused)


# ---------------------------------------------------------------------------------------- prompts


def lines(content: str | bytes, name: str = "prompts.txt") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make


def table(**columns: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        parquet.write_table(pyarrow.table(columns), folder / "prompts.parquet")
        return folder / "prompts.parquet"

    return make


GOOD = '{"text": "a red letter K"}\n'
NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(),
    1,
    [None, pyarrow.py_buffer(struct.pack("<ii", 0, 2)), pyarrow.py_buffer(b"\xff\xfe")],
)
PROMPT_ROWS = [
    row("plain", lines(CAPTION)),
    row("empty", lines(""), "holds no prompt"),
    row("not UTF-8", lines(b"\xff\xfe"), "UTF-8"),
    row("zeros", lines(b"\0" * 100), r"prompts\.txt"),
    row("a line of ten megabytes", lines("word " * 2_000_000)),
    row("deep JSON", lines(GOOD + "[" * 200_000, "p.jsonl")),
    row("a JSON number of 5000 digits", lines(GOOD + "1" * 5000, "p.jsonl")),
    row("JSON that is no object", lines(GOOD + "5\nnull\n[]\n", "p.jsonl")),
    row("JSON of no text alone", lines("5\n", "p.jsonl"), "holds no prompt"),
    row("a pipe", lambda folder: os.mkfifo(folder / "p.txt") or folder / "p.txt", "is no file"),
    row("a folder", lambda folder: (folder / "p.txt").mkdir() or folder / "p.txt", "is no file"),
    row("parquet", table(text=[CAPTION])),
    row("parquet with numbers", table(text=[1, 2]), "holds no prompt"),
    row("parquet with nothing", table(text=[None, None]), "holds no prompt"),
    row("parquet without rows", table(text=pyarrow.array([], pyarrow.string())), "holds no prompt"),
    row("parquet without columns", table(), r"prompts\.parquet"),
    row("parquet of structs", table(text=[{"a": 1}]), "holds no prompt"),
    row("parquet that is not UTF-8", table(text=NOT_UTF8), r"prompts\.parquet"),
    row(
        "parquet with two columns of a name",
        lambda folder: parquet.write_table(
            pyarrow.Table.from_arrays([pyarrow.array([CAPTION])] * 2, ["text", "text"]),
            folder / "p.parquet",
        )
        or folder / "p.parquet",
    ),
]


@pytest.mark.parametrize(("make", "refused"), few(PROMPT_ROWS))
def test_a_prompt_file(make: Callable[[Path], Path], refused: str | None, tmp_path: Path) -> None:
    found = check(PROMPTS, make(tmp_path), refused)
    assert refused or found[0]


PREPARE_PROMPTS = Surface(
    "prepare data.prompts", lambda path: prepare(path, "prompts"), (Refused, Failed)
)


@pytest.mark.parametrize(
    "text",
    few(["\x1b[31m", "\u202e", "x" * 100_000, "\ud800"]),
    ids=["escapes", "right to left", "long", "surrogate"],
)
def test_a_prompt_that_no_encoder_knows(text: str, tmp_path: Path) -> None:
    path = lines(GOOD + json.dumps({"text": text}), "p.jsonl")(tmp_path)
    found = check(PREPARE_PROMPTS, path)
    assert (found.count, len(found.reasons)) == (1, 1)


# --------------------------------------------------------------------------------- any damage

COUNTS = [15, pytest.param(300, marks=pytest.mark.slow)]
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "x"  # turned on its side
FORMATS = {
    "PNG": picture(exif=EXIF),
    "JPEG": picture(format="JPEG", exif=EXIF),
    "WEBP": picture(format="WEBP", exif=EXIF),
    "BMP": picture(format="BMP"),
    "TIFF": picture(format="TIFF", compression="tiff_lzw"),
    "GIF": picture("P", format="GIF"),
}


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", few([*FORMATS]))
def test_damaged_pictures(kind: str, count: int) -> None:
    data = FORMATS[kind]
    hostile.survive(DECODE, damaged(data, head=200), bytes, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_damaged_prompts(name: str, count: int, tmp_path: Path) -> None:
    whole = (GOOD * 3).encode()
    if name.endswith("parquet"):
        whole = table(text=[CAPTION, "b"])(tmp_path).read_bytes()

    def put(example: bytes) -> Path:
        return lines(example, name)(tmp_path)

    hostile.survive(PROMPTS, damaged(whole), put, count, count < 1000)
