"""PNG files written in the background: names taken at once, bounded memory, errors kept until told.

Knows nothing of ComfyUI. `concurrent.futures` joins its threads when the interpreter ends, so every
picture that was handed over is on disk by then.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

WORKERS = 2  # zlib runs without the GIL; more would take cores from the next picture
LIMIT_BYTES = 256 * 2**20  # of pictures that wait: 21 of 2048 x 2048
TEMPORARY = ".tmp"


class SaveError(OSError):
    """A picture that could not be written: names the file and the cause."""


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Bytes as core's SaveImage makes them, on the tensor's own device.

    images: [..., H, W, C] in [0, 1]; times 255, cut off at both ends, the fraction dropped.
    """
    if images.dtype == torch.bfloat16:  # too coarse for 255 steps; core cannot save it at all
        images = images.float()
    return images.mul(255.0).clamp_(0, 255).to(torch.uint8)


def to_picture(image: torch.Tensor) -> Image.Image:
    """[H, W, 3] or [H, W, 4] in [0, 1] as a PIL image. Raises TypeError for other shapes."""
    return Image.fromarray(to_uint8(image).cpu().numpy())


def reserve(folder: Path, stem: str, counter: int) -> tuple[Path, int]:
    """The first free `stem`_00001_.png from `counter` on, and its number; nobody else gets it.

    Creates the temporary file that the picture is written to. Its name carries the number, so that
    core's own counter (folder_paths.get_save_image_path) and other processes see it too.
    """
    while True:
        path = folder / f"{stem}_{counter:05}_.png"
        try:
            temporary_of(path).open("xb").close()
        except FileExistsError:
            counter += 1
            continue
        if not path.exists():
            return path, counter
        temporary_of(path).unlink()
        counter += 1


def temporary_of(path: Path) -> Path:
    """Where a picture is written before it is renamed."""
    return path.with_name(path.name + TEMPORARY)


class PngWriter:
    """A few threads that write reserved files.

    `submit` waits while `limit_bytes` of pictures are under way: memory stays bounded.
    """

    def __init__(self, workers: int = WORKERS, limit_bytes: int = LIMIT_BYTES) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="turbo-distill-png")
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition()
        self._bytes = 0
        self._pending: dict[Path, Future[None]] = {}
        self._failures: dict[Path, SaveError] = {}

    def submit(
        self,
        path: Path,
        picture: Image.Image,
        metadata: PngInfo | None = None,
        compress_level: int = 1,
        on_error: Callable[[SaveError], None] | None = None,
    ) -> None:
        """Writes `picture` to the reserved `path` soon. on_error: called from a thread."""
        size = picture.width * picture.height * len(picture.getbands())
        job = (path, picture, metadata, compress_level, size, on_error)
        with self._changed:
            self._changed.wait_for(
                lambda: not self._bytes or self._bytes + size <= self._limit_bytes
            )
            self._pending[path] = self._pool.submit(self._write, *job)
            self._bytes += size

    def pending(self, path: Path) -> Future[None] | None:
        """What is done or failed once `path` is no longer being written; None if it is not."""
        with self._changed:
            return self._pending.get(path)

    def failure(self, path: Path) -> SaveError | None:
        """Why `path` was not written, until `raise_failures` has told it."""
        with self._changed:
            return self._failures.get(path)

    def flush(self) -> None:
        """Waits for every file. Raises SaveError like `raise_failures`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
        self.raise_failures()

    def raise_failures(self) -> None:
        """Raises one SaveError for all files that failed since the last call, if any."""
        with self._changed:
            failures, self._failures = list(self._failures.values()), {}
        if failures:
            raise SaveError("\n".join(map(str, failures))) from failures[0]

    def _write(
        self,
        path: Path,
        picture: Image.Image,
        metadata: PngInfo | None,
        compress_level: int,
        size: int,
        on_error: Callable[[SaveError], None] | None,
    ) -> None:
        failure = None
        try:
            write_png(path, picture, metadata, compress_level)
        except Exception as error:  # whatever a codec or a disk comes up with: a person is told
            failure = SaveError(f"{path} was not written. {type(error).__name__}: {error}")
            failure.__cause__ = error
            logging.error("Turbo Distill: %s", failure)
            if on_error is not None:
                on_error(failure)
        finally:
            with self._changed:
                if failure is not None:
                    self._failures[path] = failure
                self._bytes -= size
                del self._pending[path]
                self._changed.notify_all()


def write_png(
    path: Path, picture: Image.Image, metadata: PngInfo | None, compress_level: int
) -> None:
    """Fills the reserved temporary file and renames it; on failure nothing is left."""
    temporary = temporary_of(path)
    try:
        picture.save(temporary, "PNG", pnginfo=metadata, compress_level=compress_level)
        os.replace(temporary, path)
    except BaseException:
        # not after the renaming: the name may be somebody else's by then, see `reserve`
        temporary.unlink(missing_ok=True)
        raise
