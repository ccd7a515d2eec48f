"""Turbo Save Image against core's SaveImage: names, bytes, time; and what happens when it fails."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
PROMPT = {"1": {"class_type": "KSampler", "inputs": {"text": "ein Brot für 你"}}}
EXTRA = {"workflow": {"nodes": [1, 2]}, "note": "b"}


@pytest.fixture
def core_save(output: Path) -> Callable[..., list[dict[str, str]]]:
    """Core's SaveImage: (images, prefix) -> what it shows."""
    from nodes import SaveImage

    def save(images: torch.Tensor, prefix: str, **metadata: Any) -> list[dict[str, str]]:
        return SaveImage().save_images(images, prefix, **metadata)["ui"]["images"]

    return save


@pytest.fixture
def writer(pack: Any) -> Any:
    return pack("nodes.png_writer").PngWriter()


@pytest.fixture
def save(pack: Any, writer: Any, output: Path) -> Callable[..., list[dict[str, str]]]:
    """Ours: (images, prefix, prompt, extra_pnginfo, compress_level); not flushed."""
    nodes = pack("nodes.save")

    def run(
        images: torch.Tensor,
        prefix: str,
        prompt: Any = None,
        extra_pnginfo: Any = None,
        compress_level: int = 1,
        on_error: Any = None,
    ) -> list[dict[str, str]]:
        metadata = nodes.png_metadata(prompt, extra_pnginfo)
        saving = nodes.Saving(prefix, metadata, compress_level, on_error)
        return nodes.save_images(images, saving, writer)

    return run


def noise(count: int = 2, height: int = 24, width: int = 40, channels: int = 3) -> torch.Tensor:
    """Images with values on, just below and beyond every limit of a byte."""
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, height, width, channels, generator=generator) * 1.2 - 0.1
    steps = torch.arange(256) / 255
    images.view(-1)[:768] = torch.cat((steps, steps.nextafter(torch.tensor(0.0)), -steps))
    return images


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------- as core saves them


@pytest.mark.parametrize("channels", [3, 4])
def test_files_are_those_of_core_byte_for_byte(
    core_save: Any, save: Any, writer: Any, output: Path, channels: int
) -> None:
    images = noise(channels=channels)
    prefix = "deep/%width%x%height%/shot_%batch_num%"
    shown = core_save(images, prefix, prompt=PROMPT, extra_pnginfo=EXTRA)
    expected = files(output)
    for path in output.rglob("*.png"):
        path.unlink()
    assert save(images, prefix, PROMPT, EXTRA, compress_level=4) == shown
    writer.flush()
    assert files(output) == expected
    assert len(expected) == 2


def test_half_precision_images_too(core_save: Any, save: Any, writer: Any, output: Path) -> None:
    images = noise().half()
    core_save(images, "core")
    save(images, "ours", compress_level=4)
    writer.flush()
    for number in (1, 2):
        core = (output / f"core_0000{number}_.png").read_bytes()
        assert (output / f"ours_0000{number}_.png").read_bytes() == core


def test_the_cheap_level_holds_the_same_pixels_and_texts(
    core_save: Any, save: Any, writer: Any, output: Path
) -> None:
    images = noise(1)
    core_save(images, "core", prompt=PROMPT, extra_pnginfo=EXTRA)
    save(images, "ours", PROMPT, EXTRA)
    writer.flush()
    with (
        Image.open(output / "core_00001_.png") as core,
        Image.open(output / "ours_00001_.png") as ours,
    ):
        assert np.array_equal(np.asarray(core), np.asarray(ours))
        assert ours.text == core.text
        assert json.loads(ours.text["prompt"]) == PROMPT
        assert json.loads(ours.text["workflow"]) == EXTRA["workflow"]


def test_metadata_can_be_switched_off(
    save: Any, writer: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_metadata", True)
    save(noise(1), "bare", PROMPT, EXTRA)
    writer.flush()
    with Image.open(output / "bare_00001_.png") as image:
        assert image.text == {}


def test_a_folder_outside_is_refused(save: Any, output: Path) -> None:
    with pytest.raises(Exception, match="outside the output folder"):
        save(noise(1), "../elsewhere/x")
    assert files(output.parent) == {}


def test_the_node(pack: Any, output: Path, run_node: Any) -> None:
    images = noise(3)
    (passed,) = run_node(pack("nodes.save").TurboSaveImage, images=images, filename_prefix="n")
    assert passed is images
    # no server that could wait for a file, so it is there already
    assert sorted(files(output)) == [f"n_0000{number}_.png" for number in (1, 2, 3)]


# ------------------------------------------------------------------------- in the background


class Gate:
    """Holds every picture that is being written until it is opened."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.started = 0
        write = module.write_png

        def held(*job: Any) -> None:
            self.started += 1
            assert self.open.wait(20)
            write(*job)

        monkeypatch.setattr(module, "write_png", held)


@pytest.fixture
def gate(pack: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(pack("nodes.png_writer"), monkeypatch)
    yield gate
    gate.open.set()


def test_saves_in_quick_succession_never_collide(
    core_save: Any, save: Any, writer: Any, output: Path, gate: Gate
) -> None:
    first = save(noise(2), "a/x")
    second = save(noise(2), "a/x")
    between = core_save(noise(1), "a/x")  # core's own node must not take a promised name either
    assert not list(output.rglob("*_0000[1234]_.png")), "nothing is written yet"
    gate.open.set()
    writer.flush()
    names = [shown["filename"] for shown in first + second + between]
    assert names == [f"x_0000{number}_.png" for number in range(1, 6)]
    assert sorted(path.name for path in (output / "a").iterdir()) == names


def test_batch_numbers_never_overwrite(save: Any, writer: Any, output: Path) -> None:
    for _ in range(2):
        save(noise(1), "b_%batch_num%")
    writer.flush()
    assert sorted(files(output)) == ["b_0_00001_.png", "b_0_00002_.png"]


def test_a_name_that_was_reserved_again_is_left_alone(
    pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, rename = pack("nodes.png_writer"), os.replace
    path, _ = writer.reserve(tmp_path, "x", 1)

    def rename_then_reserve(source: Path, target: Path) -> None:
        rename(source, target)
        writer.temporary_of(path).open("xb").close()  # another save, at this very moment

    monkeypatch.setattr(writer.os, "replace", rename_then_reserve)
    writer.write_png(path, Image.new("RGB", (2, 2)), None, 1)
    assert path.is_file()
    assert writer.temporary_of(path).is_file()


def test_no_half_file_is_ever_seen(save: Any, writer: Any, output: Path, gate: Gate) -> None:
    save(noise(1), "x")
    assert [path.suffix for path in output.iterdir()] == [".tmp"]
    gate.open.set()
    writer.flush()
    assert [path.name for path in output.iterdir()] == ["x_00001_.png"]


def test_memory_is_bounded(pack: Any, output: Path, gate: Gate) -> None:
    module = pack("nodes.png_writer")
    picture = Image.new("RGB", (100, 100))  # 30,000 bytes
    writer = module.PngWriter(workers=1, limit_bytes=70_000)
    done = []

    def submit(count: int) -> None:
        for number in range(count):
            path, _ = module.reserve(output, f"m{number}", 1)
            writer.submit(path, picture)
            done.append(number)

    thread = threading.Thread(target=submit, args=(3,))
    thread.start()
    thread.join(0.3)
    assert done == [0, 1], "the third waits: three are more than the limit"
    gate.open.set()
    thread.join(20)
    writer.flush()
    assert len(files(output)) == 3


def test_one_picture_above_the_limit_passes(pack: Any, output: Path) -> None:
    module = pack("nodes.png_writer")
    writer = module.PngWriter(limit_bytes=10)
    path, _ = module.reserve(output, "big", 1)
    writer.submit(path, Image.new("RGB", (100, 100)))
    writer.flush()
    assert path.is_file()


# ------------------------------------------------------------------------- when it fails


def test_an_error_is_told_at_once_and_once(
    save: Any, writer: Any, output: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    save(noise(1), "x/f", on_error=told.append)
    path = output / "x" / "f_00001_.png"
    path.mkdir()  # in the way of the file
    (path / "something").touch()
    gate.open.set()
    with pytest.raises(OSError, match=r"f_00001_\.png was not written.*Error: "):
        writer.flush()
    assert "f_00001_.png was not written" in str(told[0])
    assert "f_00001_.png was not written" in caplog.text
    assert not list(output.rglob("*.tmp")), "the temporary file is gone"
    save(noise(1), "x/f")
    writer.flush()
    assert (output / "x" / "f_00002_.png").is_file()


@pytest.fixture
def full_disk(pack: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No picture can be written until the test ends."""

    def full(*job: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pack("nodes.png_writer"), "write_png", full)
        yield


def wait_for_failures(writer: Any, *paths: Path) -> None:
    while not all(map(writer.failure, paths)):
        time.sleep(0.01)


def test_an_error_is_raised_for_its_own_pictures_only(
    pack: Any, writer: Any, output: Path, full_disk: None
) -> None:
    nodes = pack("nodes.save")
    mine, theirs = nodes.Saving("mine"), nodes.Saving("theirs")
    nodes.save_images(noise(2), mine, writer)
    wait_for_failures(writer, output / "mine_00001_.png", output / "mine_00002_.png")
    assert nodes.save_images(noise(1), theirs, writer)
    with pytest.raises(OSError, match=r"(?s)mine_00001_.*No space left.*mine_00002_.*No space"):
        nodes.save_images(noise(1), mine, writer)
    with pytest.raises(OSError, match=r"^[^\n]*theirs_00001_[^\n]*$"):
        writer.flush(theirs.paths)


def test_waiting_for_ones_own_pictures_waits_for_no_others(
    pack: Any, writer: Any, output: Path, gate: Gate
) -> None:
    nodes = pack("nodes.save")
    mine, theirs = nodes.Saving("mine"), nodes.Saving("theirs")
    nodes.save_images(noise(1), theirs, writer)
    nodes.finish(False, mine, writer)  # returns, though nothing is written
    nodes.save_images(noise(1), mine, writer)
    gate.open.set()
    nodes.finish(False, mine, writer)
    assert (output / "mine_00001_.png").is_file()


def test_failures_that_nobody_asks_for_do_not_pile_up(
    pack: Any, writer: Any, output: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack("nodes.png_writer"), "KEPT_FAILURES", 2)
    nodes = pack("nodes.save")
    for prefix in "abc":
        nodes.save_images(noise(1), nodes.Saving(prefix), writer)
        wait_for_failures(writer, output / f"{prefix}_00001_.png")
    assert writer.failure(output / "a_00001_.png") is None
    assert writer.failure(output / "b_00001_.png") is not None


def test_a_full_disk_is_named_with_path_and_bytes(
    pack: Any, writer: Any, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pack("nodes.png_writer")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("Linux has it")
    monkeypatch.setattr(module, "temporary_of", lambda path: path.with_suffix(".link"))
    path = output / "x_00001_.png"
    path.with_suffix(".link").symlink_to(full)
    with pytest.raises(OSError, match=rf"{path}: no space left: it needs \d+ B, and {output} has"):
        module.write_png(path, Image.new("RGB", (2, 2)), None, 1)


def test_a_callback_that_fails_does_not_end_the_writing(
    pack: Any, save: Any, writer: Any, output: Path, gate: Gate
) -> None:
    def broken(error: Exception) -> None:
        raise RuntimeError("the event loop is closed")

    shown = [save(noise(1), name, on_error=broken) for name in "abcd"]
    for (image,) in shown[:3]:
        (output / image["filename"]).mkdir()
    gate.open.set()
    with pytest.raises(OSError, match=r"a_00001_\.png was not written"):
        writer.flush()
    assert (output / "d_00001_.png").is_file()


# ----------------------------------------------------------------------------- left by the killed

OTHER_PROCESS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from distill.contract.files import new_mark
print(new_mark(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process, and the mark of its files."""
    command = [sys.executable, "-c", OTHER_PROCESS, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


@pytest.mark.skipif(os.name == "nt", reason="there the file's age decides")
def test_what_a_killed_server_left_goes_and_takes_no_number(
    pack: Any, save: Any, writer: Any, output: Path, other_process: Any
) -> None:
    process, mark = other_process
    (output / "x_00007_.png.tmp").write_text(mark)
    assert pack("nodes.png_writer").sweep(output) == 0, "its process lives"
    process.kill()
    process.wait()
    save(noise(1), "x")
    writer.flush()
    assert [path.name for path in output.iterdir()] == ["x_00001_.png"]


PNG = b"\x89PNG\r\n\x1a\n half"


@pytest.mark.parametrize(
    ("name", "content", "hours", "goes"),
    [
        ("x_00007_.png.tmp", b"000000-1-00000000-0", 0, False),  # of another computer
        ("x_00007_.png.tmp", b"000000-1-00000000-0", 2, True),
        ("x_00007_.png.tmp", b"", 0, False),
        ("x_00007_.png.tmp", b"", 2, True),
        ("x_00007_.png.tmp", PNG, 0, False),
        ("x_00007_.png.tmp", PNG, 2, True),
        ("x_00007_.png.tmp", b"anything else", 2, False),
        ("x_00007_.png", PNG, 2, False),
        ("x.png.tmp", PNG, 2, False),
        ("x_00007_.jpg.tmp", b"", 2, False),
    ],
)
def test_only_what_surely_is_nobodys_goes(
    name: str, content: bytes, hours: int, goes: bool, pack: Any, tmp_path: Path
) -> None:
    path = tmp_path / "deep" / "er" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))
    sweep = pack("nodes.png_writer").sweep
    assert sweep(tmp_path) == 0
    assert sweep(tmp_path, deep=True) == goes
    assert path.exists() != goes


# ----------------------------------------------------------------------------------- a real server


def view(server: ComfyServer, image: dict[str, str], root: str = "/view") -> bytes:
    url = f"{server.url}{root}?{urllib.parse.urlencode(image)}"
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


@pytest.fixture
def slow_prompt(server: ComfyServer) -> dict[str, Any]:
    """Three large noisy pictures at the slowest level: seconds of writing."""
    pixels = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8)
    Image.fromarray(pixels).save(server.base / "input" / "noise.png")
    inputs = {"compress_level": 9, "filename_prefix": "slow/x", "background": True}
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
        "three": {
            "class_type": "RepeatImageBatch",
            "inputs": {"image": ["load", 0], "amount": 3},
        },
        "save": {
            "class_type": "TurboDistillSaveImage",
            "inputs": {"images": ["three", 0], **inputs},
        },
    }


def test_view_waits_for_a_file_that_is_being_written(
    server: ComfyServer, slow_prompt: dict[str, Any]
) -> None:
    shown = server.queue(slow_prompt)["outputs"]["save"]["images"]
    written = list((server.base / "output" / "slow").glob("*.png"))
    assert len(written) < 3, "all were written before the prompt was done: nothing was tested"
    expected = (server.base / "input" / "noise.png").read_bytes()
    for root in ("/view", "/api/view"):
        for image in reversed(shown):
            with (
                Image.open(io.BytesIO(view(server, image, root))) as got,
                Image.open(io.BytesIO(expected)) as original,
            ):
                assert np.array_equal(np.asarray(got), np.asarray(original))
    thumbnail = view(server, {**shown[0], "preview": "webp;50"})
    assert thumbnail[8:12] == b"WEBP"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        view(server, {**shown[0], "filename": "another.png"})


def test_a_program_that_reads_the_folder_can_have_it_wait(
    server: ComfyServer, slow_prompt: dict[str, Any]
) -> None:
    slow_prompt["save"]["inputs"].update(filename_prefix="read/x", background=False)
    server.queue(slow_prompt)
    assert len(list((server.base / "output" / "read").glob("*.png"))) == 3


def test_a_picture_that_fails_later_is_shown_for_its_prompt_and_tried_again(
    server: ComfyServer, slow_prompt: dict[str, Any], listen: Any
) -> None:
    folder = server.base / "output" / "gone"
    slow_prompt["save"]["inputs"]["filename_prefix"] = "gone/x"

    def remove() -> None:
        while not list(folder.glob("*_00003_*")):
            time.sleep(0.001)
        shutil.rmtree(folder)

    thread = threading.Thread(target=remove)
    thread.start()
    messages = listen(server, slow_prompt, "execution_error", "execution_success")
    thread.join()
    error = messages["execution_error"][0]
    assert error["node_id"] == "save"
    assert error["prompt_id"] == messages["execution_success"][0]["prompt_id"]
    assert "was not written. FileNotFoundError" in error["exception_message"]
    (shown,) = (message["output"]["images"] for message in messages["executed"])
    for image in shown:
        with pytest.raises(urllib.error.HTTPError, match="500") as answer:
            view(server, image)
        assert "was not written" in answer.value.read().decode()
    others = {**slow_prompt, "save": {**slow_prompt["save"]}}
    others["save"]["inputs"] = {**slow_prompt["save"]["inputs"], "filename_prefix": "next/x"}
    assert len(server.images(server.queue(others))) == 3, "somebody else's prompt is none of it"
    for _ in range(2):  # written when queued again, and cached from then on
        assert len(server.images(server.queue(slow_prompt))) == 3
        assert len(list(folder.iterdir())) == 3


def test_view_does_not_wait_for_a_disk_that_hangs(
    pack: Any, save: Any, output: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch, writer: Any
) -> None:
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    nodes = pack("nodes.save")
    monkeypatch.setattr(nodes, "VIEW_S", 0.2)
    monkeypatch.setattr(nodes, "WRITER", writer)
    (shown,) = save(noise(1), "x")

    async def found(request: web.Request) -> web.Response:
        return web.Response(text="the file")

    async def answers() -> list[tuple[int, str]]:
        app = web.Application(middlewares=[nodes.hold_view])
        app.router.add_get("/view", found)
        async with TestClient(TestServer(app)) as client:
            hung = await client.get("/view", params=shown)
            gate.open.set()
            writer.flush()
            written = await client.get("/view", params=shown)
            return [(answer.status, await answer.text()) for answer in (hung, written)]

    (status, text), then = asyncio.run(answers())
    assert status == 504
    assert f"{output / shown['filename']} is not written after 0.2 s" in text
    assert then == (200, "the file")


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """A background job of a shell ignores Ctrl-C, and hands that on to the processes it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_stopping_the_server_finishes_every_file(
    comfyui_path: Path, slow_prompt: dict[str, Any], server: ComfyServer, heard_interrupts: None
) -> None:
    with ComfyServer(comfyui_path, pack=ROOT) as own:
        shutil.copy(server.base / "input" / "noise.png", own.base / "input")
        own.queue(slow_prompt)
        folder = own.base / "output" / "slow"
        assert len(list(folder.glob("*.png"))) < 3
        own._process.send_signal(signal.SIGINT)  # Ctrl-C
        own._process.wait(60)
        assert sorted(path.suffix for path in folder.iterdir()) == [".png"] * 3


# ------------------------------------------------------------------------------------------- speed


@pytest.mark.slow
def test_the_node_returns_five_times_sooner_than_core(
    core_save: Any, save: Any, writer: Any, output: Path
) -> None:
    """Four pictures of 2048 x 2048 in turns, and the very same pixels on disk."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 128, 128, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(2048, 2048), mode="bicubic")
    images = (
        smooth.movedim(1, -1) + torch.rand(4, 2048, 2048, 3, generator=generator) / 50
    ).contiguous()
    seconds: dict[Any, list[float]] = {core_save: [], save: []}
    for turn in range(3):
        for arm, prefix in ((core_save, f"core{turn}"), (save, f"ours{turn}")):
            start = time.perf_counter()
            arm(images, prefix, prompt=PROMPT, extra_pnginfo=EXTRA)
            seconds[arm].append(time.perf_counter() - start)
            writer.flush()  # the next turn starts with idle cores
    core, ours = (statistics.median(seconds[arm]) for arm in (core_save, save))
    assert core > 5 * ours, f"core {core:.2f} s, ours {ours:.2f} s"
    for number in (1, 4):
        with (
            Image.open(output / f"core0_0000{number}_.png") as expected,
            Image.open(output / f"ours0_0000{number}_.png") as found,
        ):
            assert np.array_equal(np.asarray(found), np.asarray(expected))
