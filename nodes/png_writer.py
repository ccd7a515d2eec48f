"""PNG files written in the background: names taken at once, bounded memory, errors kept until told.

Knows nothing of ComfyUI. When the interpreter ends, what was handed over is finished first.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..distill.contract.files import MARK, full_disk_named, is_leftover, new_mark

WORKERS = 2  # zlib runs without the GIL; more would take cores from the next picture
LIMIT_BYTES = 256 * 2**20  # of pictures that wait: 21 of 2048 x 2048
FINISH_S = 8  # docker stop kills after 10
HASTY_LEVEL = 1  # of compression, when there is only that long
KEPT_FAILURES = 1000
TEMPORARY = ".tmp"
_RESERVED = re.compile(r".*_\d{5,}_\.png\.tmp")
_SIGNATURE = b"\x89PNG"


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
    core's own counter (folder_paths.get_save_image_path) and other processes see it too; in it
    stands whose it is, for `sweep`.
    """
    while True:
        path = folder / f"{stem}_{counter:05}_.png"
        try:
            with temporary_of(path).open("x", encoding="ascii") as file:
                file.write(new_mark())
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


@dataclass
class Job:
    """A picture for a reserved file."""

    path: Path
    picture: Image.Image
    metadata: PngInfo | None
    compress_level: int
    on_error: Callable[[SaveError], None] | None
    done: Future[None] = field(default_factory=Future)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.picture.width * self.picture.height * len(self.picture.getbands())


class PngWriter:
    """A few threads that write reserved files.

    `submit` waits while `limit_bytes` of pictures are under way: memory stays bounded. The threads
    do not keep the interpreter from ending, `finish` does: for a time, as a disk may hang.
    """

    def __init__(
        self,
        workers: int = WORKERS,
        limit_bytes: int = LIMIT_BYTES,
        finish_s: float = FINISH_S,
    ) -> None:
        self._workers = workers
        self._limit_bytes = limit_bytes
        self._finish_s = finish_s
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._started = 0
        self._bytes = 0
        self._hasty = False
        self._process = os.getpid()
        self._pending: dict[Path, Future[None]] = {}
        self._failures: dict[Path, SaveError] = {}
        atexit.register(self.finish)

    def submit(
        self,
        path: Path,
        picture: Image.Image,
        metadata: PngInfo | None = None,
        compress_level: int = 1,
        on_error: Callable[[SaveError], None] | None = None,
    ) -> None:
        """Writes `picture` to the reserved `path` soon. on_error: called from a thread."""
        job = Job(path, picture, metadata, compress_level, on_error)
        with self._changed:
            self._changed.wait_for(
                lambda: not self._bytes or self._bytes + job.size <= self._limit_bytes
            )
            if self._started < self._workers:  # raises when Python is ending; nothing waits then
                name = f"turbo-distill-png-{self._started}"
                threading.Thread(target=self._work, name=name, daemon=True).start()
                self._started += 1
            self._failures.pop(path, None)  # of an earlier picture of this name
            self._pending[path] = job.done
            self._bytes += job.size
            self._jobs.put(job)

    def pending(self, path: Path) -> Future[None] | None:
        """What is done or failed once `path` is no longer being written; None if it is not."""
        with self._changed:
            return self._pending.get(path)

    def failure(self, path: Path) -> SaveError | None:
        """Why `path` was not written, until `raise_failures` has told it."""
        with self._changed:
            return self._failures.get(path)

    def flush(self, paths: Collection[Path] | None = None) -> None:
        """Waits for these files, or for every one. Raises SaveError like `raise_failures`."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pending
                if paths is None
                else self._pending.keys().isdisjoint(paths)
            )
        self.raise_failures(paths)

    def finish(self) -> None:
        """Hurries and waits for every file before the process ends, for at most `finish_s`; logs
        what there was no time for.
        """
        if os.getpid() != self._process:  # a fork has none of the threads
            return
        with self._changed:
            self._hasty = True
            finished = self._changed.wait_for(lambda: not self._pending, self._finish_s)
            self._hasty = False
            if not finished:
                logging.error(
                    "Turbo Distill: not written within %g s: %s",
                    self._finish_s,
                    ", ".join(map(str, self._pending)),
                )

    def raise_failures(self, paths: Collection[Path] | None = None) -> None:
        """Raises one SaveError for those of these files, or of all, that failed and were not told
        yet.
        """
        with self._changed:
            told = sorted(path for path in self._failures if paths is None or path in paths)
            failures = [self._failures.pop(path) for path in told]
        if failures:
            raise SaveError("\n".join(map(str, failures))) from failures[0]

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                self._write(job)
            except Exception as error:  # of on_error; a thread that ended would write no more
                job.done.set_exception(error)
            else:
                job.done.set_result(None)
            del job  # its picture, while there is no next

    def _write(self, job: Job) -> None:
        failure = None
        try:
            level = min(job.compress_level, HASTY_LEVEL) if self._hasty else job.compress_level
            write_png(job.path, job.picture, job.metadata, level)
        except Exception as error:  # whatever a codec or a disk comes up with: a person is told
            failure = SaveError(f"{job.path} was not written. {type(error).__name__}: {error}")
            failure.__cause__ = error
            logging.error("Turbo Distill: %s", failure)
            if job.on_error is not None:
                job.on_error(failure)
        finally:
            with self._changed:
                if failure is not None:
                    self._failures[job.path] = failure
                    for path in list(self._failures)[:-KEPT_FAILURES]:
                        del self._failures[path]
                self._bytes -= job.size
                del self._pending[job.path]
                self._changed.notify_all()


def write_png(
    path: Path, picture: Image.Image, metadata: PngInfo | None, compress_level: int
) -> None:
    """Fills the reserved temporary file and renames it; on failure nothing is left."""
    temporary = temporary_of(path)
    try:
        png = io.BytesIO()  # until it is complete, the file says whose it is
        picture.save(png, "PNG", pnginfo=metadata, compress_level=compress_level)
        with full_disk_named(path, len(png.getbuffer())):
            temporary.write_bytes(png.getbuffer())
            os.replace(temporary, path)
    except BaseException:
        # not after the renaming: the name may be somebody else's by then, see `reserve`
        temporary.unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------- left behind


def sweep(folder: Path, *, deep: bool = False) -> int:
    """Removes what `reserve` left in a folder, or in those below it too, in processes that have
    ended; returns how many. Files of other programs stay, and those that will be finished.
    """
    removed = 0
    for parent, folders, names in os.walk(folder):
        if not deep:
            folders.clear()
        for name in filter(_RESERVED.fullmatch, names):
            path = Path(parent, name)
            try:
                if _is_left(path):
                    path.unlink()
                    removed += 1
                    logging.info("Turbo Distill: removed %s, left by a server that ended.", path)
            except OSError as error:  # finished meanwhile, or not ours to remove
                logging.info("Turbo Distill: %s could not be removed: %s", path, error)
    return removed


def _is_left(path: Path) -> bool:
    """Whether a file of such a name is ours, and nobody will finish it."""
    with path.open("rb") as file:
        start = file.read(80)
    if not start or start.startswith(_SIGNATURE):  # of the moments before and after the mark
        return is_leftover(path, "")
    mark = start.decode("ascii", "replace")
    return MARK.fullmatch(mark) is not None and is_leftover(path, mark)
