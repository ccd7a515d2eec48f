"""Pictures and archives to read, and all that a source says of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from distill.data.sample import Sample
from distill.data.sources import open_images


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


def everything(path: Path, key: str | None = None) -> tuple[list[Sample], list[str]]:
    samples, problems = [], []
    for source in open_images(path, key):
        entries, found = source.entries()
        problems += [p.reason for p in found]
        samples += source.read([name for name, _ in entries])
    return samples, problems


def tar_bytes(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()
