"""Sizes: the model's own, scaled ones, the nearest, and how an image comes to fit."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from distill.contract.known import QWEN_SIZES
from distill.data.images import BROKEN_IMAGE, FORMATS, PIXELS, decode_image, fit, is_picture
from distill.models.qwen_image import FAMILY
from distill.models.sizes import nearest, upscale


def test_the_models_own_sizes_stay() -> None:
    assert FAMILY.buckets(1328) == QWEN_SIZES


@pytest.mark.parametrize(
    ("resolution", "sizes"),
    [
        (
            1024,
            (
                (1024, 1024),
                (1280, 720),
                (720, 1280),
                (1136, 848),
                (848, 1136),
                (1216, 816),
                (816, 1216),
            ),
        ),
        (512, ((512, 512), (640, 352), (352, 640), (560, 432), (432, 560), (608, 400), (400, 608))),
        (64, ((64, 64), (80, 48), (48, 80), (64, 48), (48, 64))),
    ],
)
def test_scaled_sizes(resolution: int, sizes: tuple[tuple[int, int], ...]) -> None:
    assert FAMILY.buckets(resolution) == sizes


@given(st.integers(256, 4096))
def test_scaled_sizes_are_whole_tokens_next_to_the_exact_ones(resolution: int) -> None:
    sizes = FAMILY.buckets(resolution)
    assert len(sizes) == len(QWEN_SIZES)
    for size, exact in zip(sizes, QWEN_SIZES, strict=True):
        for side, pixels in zip(size, exact, strict=True):
            assert side % 16 == 0
            assert abs(side - pixels * resolution / 1328) <= 8


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((500, 500), (1328, 1328)),
        ((1920, 1080), (1664, 928)),
        ((1080, 1920), (928, 1664)),
        ((3000, 100), (1664, 928)),
        ((4000, 3000), (1472, 1104)),
        ((3000, 4000), (1104, 1472)),
        ((6000, 4000), (1584, 1056)),
        ((2, 3), (1056, 1584)),
        ((1150, 1000), (1328, 1328)),
        ((1160, 1000), (1472, 1104)),  # sqrt(4/3) = 1.1547 lies between
    ],
)
def test_the_nearest_size(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest(size, QWEN_SIZES) == bucket


def test_fit_crops_the_centre() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = (10, 200, 30)
    image = fit(Image.fromarray(pixels), (32, 32))
    assert tuple(image.shape) == (3, 32, 32)
    assert image.float().mean(dim=(1, 2)).tolist() == pytest.approx([10, 200, 30], abs=1)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(FAMILY.buckets(64)))
def test_fit_always_gives_the_size(width: int, height: int, bucket: tuple[int, int]) -> None:
    image = Image.new("RGB", (width, height), (7, 8, 9))
    fitted = fit(image, bucket)
    assert tuple(fitted.shape) == (3, bucket[1], bucket[0])
    assert fitted.flatten(1).float().mean(1).tolist() == pytest.approx([7, 8, 9], abs=0.01)


def test_upscale() -> None:
    assert upscale((128, 64), (64, 64)) == 1
    assert upscale((128, 32), (64, 64)) == 2
    assert upscale((256, 128), (64, 64)) == 0.5


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_transparency_becomes_white_and_rotation_is_undone() -> None:
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert decode_image(encoded(clear, "PNG")).getpixel((3, 3)) == (255, 255, 255)
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    assert decode_image(encoded(turned, "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (8, 8))
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(image, kind)).mode == "RGB"


def test_sixteen_bit_greys_keep_their_range() -> None:
    image = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert decode_image(encoded(image, "PNG")).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("damage", ["empty", "truncated", "zeros", "text"])
def test_a_broken_image_raises(damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG")
    broken = {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "zeros": bytes(len(data)),
        "text": b"<html>404</html>",
    }[damage]
    with pytest.raises(BROKEN_IMAGE):
        decode_image(broken)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_is_known_by_its_beginning(kind: str) -> None:
    data = encoded(Image.new("RGB", (8, 8), "white"), kind)
    assert is_picture(data[:16])
    assert decode_image(data).getpixel((4, 4)) == (255, 255, 255)


def test_the_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode_image(data).getpixel((4, 4)) == (255, 255, 255)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PCX", "SGI", "PDF"])
def test_other_kinds_are_not_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        pytest.fail("a program was started for a picture")

    monkeypatch.setattr(subprocess, "Popen", started)
    data = POSTSCRIPT if kind == "EPS" else encoded(Image.new("RGB", (8, 8)), kind)
    assert not is_picture(data[:16])
    with pytest.raises(ValueError, match=r"no picture of a kind that is read \(JPEG, PNG"):
        decode_image(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (head, b"IDAT", b"IEND")
    )


@pytest.mark.parametrize("size", [(13_000, 13_000), (9_460, 9_460), (100_000, 900)])
def test_the_header_says_that_a_picture_is_too_large(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"megapixels; up to 89 are read. Scale it down"):
        decode_image(png_header(*size))


BOMB = """
import resource, sys
from io import BytesIO
import numpy as np
from PIL import Image
from distill.data.images import decode_image
data = BytesIO()
Image.new(sys.argv[1], (9_400, 9_400)).save(data, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode_image(data.getvalue())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "L"])
def test_the_largest_picture_takes_a_gibibyte(mode: str) -> None:
    """On top of the one that it is made from, which is there before."""
    command = [sys.executable, "-c", BOMB, mode]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown * 1024 <= 12 * PIXELS
