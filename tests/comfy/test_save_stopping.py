"""Pictures that are on their way to the disk when ComfyUI is stopped, restarted or killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without a word")

# A process that leaves while six pictures are under way, in the way of its last argument.
LEAVE = """
import importlib, os, signal, sys, time, types
from pathlib import Path
import torch

root, output, finish_s, way = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
for name, folder in (("pack", root), ("pack.nodes", root / "nodes")):  # without ComfyUI
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(folder)]
writer = importlib.import_module("pack.nodes.png_writer")
stopping = importlib.import_module("pack.nodes.stopping")
if way == "handled":
    def own_handler(*_):
        print("own handler", len(list(output.glob("*.png"))), flush=True)
        sys.exit(3)
    signal.signal(signal.SIGTERM, own_handler)
signal.signal(signal.SIGHUP, signal.SIG_IGN if way == "ignored" else signal.SIG_DFL)  # nohup
files = writer.PngWriter(finish_s=finish_s)
stopping.before_stop(files.finish)
if way.startswith("hung disk"):
    writer.write_png = lambda *job: time.sleep(600)
for image in torch.rand(6, 500, 500, 3):
    path, _ = writer.reserve(output, "x", 1)
    files.submit(path, writer.to_picture(image), compress_level=9)
print(len(list(output.glob("*.png"))), flush=True)
if way == "ignored":
    os.kill(os.getpid(), signal.SIGHUP)
    print("stays")
elif way == "forked":
    if not os.fork():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    print("child", os.waitstatus_to_exitcode(os.wait()[1]), len(list(output.glob("*.png"))))
elif way in ("terminated", "handled", "hung up", "hung disk, terminated"):
    os.kill(os.getpid(), signal.SIGHUP if way == "hung up" else signal.SIGTERM)
    time.sleep(600)
elif way == "replaced":
    os.execv(sys.executable, [sys.executable, "-c", "print('another')"])
elif way == "interrupted":
    raise KeyboardInterrupt
elif way in ("left", "hung disk, left"):
    sys.exit(4)
"""


@pytest.fixture
def leave(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(way: str, finish_s: float = 60) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LEAVE, str(ROOT), str(tmp_path), str(finish_s), way]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert int(done.stdout.split()[0]) < 6, "all were done before the end: nothing was tested"
        return done

    return run


def assert_all_written(folder: Path, count: int) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        f"x_{number:05}_.png" for number in range(1, count + 1)
    ]
    for path in folder.iterdir():
        with Image.open(path) as image:
            image.load()  # raises for a cut-off file


@pytest.mark.parametrize(
    ("way", "code", "said"),
    [
        ("interrupted", None, ""),  # Ctrl-C, as people leave ComfyUI
        ("left", 4, ""),  # as ComfyUI-Manager leaves where something else starts ComfyUI again
        pytest.param("terminated", -signal.SIGTERM, "", marks=POSIX),  # docker stop, systemd
        pytest.param("hung up", -1, "", marks=POSIX),  # a terminal that is closed
        pytest.param("handled", 3, "own handler 6", marks=POSIX),
        pytest.param("ignored", 0, "stays", marks=POSIX),  # nohup
        pytest.param("replaced", 0, "another", marks=POSIX),  # ComfyUI-Manager's restart
        pytest.param("forked", 0, f"child {-signal.SIGTERM}", marks=POSIX),
    ],
)
def test_every_file_is_finished(
    way: str, code: int | None, said: str, leave: Any, tmp_path: Path
) -> None:
    done = leave(way)
    assert code is None or done.returncode == code
    assert said in done.stdout
    assert_all_written(tmp_path, 6)


@pytest.mark.parametrize(
    "way", ["hung disk, left", pytest.param("hung disk, terminated", marks=POSIX)]
)
def test_a_disk_that_hangs_holds_nothing_up(way: str, leave: Any, tmp_path: Path) -> None:
    done = leave(way, finish_s=0.5)  # which gives up before the disk does
    assert done.returncode in (4, -signal.SIGTERM)
    assert "not written within 0.5 s:" in done.stderr
    assert "x_00006_.png" in done.stderr


# ----------------------------------------------------------------------------------- a real server


@pytest.fixture
def noise_prompt() -> Callable[[ComfyServer], dict[str, Any]]:
    """Six large noisy pictures at the slowest level: seconds of writing."""

    def build(server: ComfyServer) -> dict[str, Any]:
        pixels = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3), np.uint8)
        Image.fromarray(pixels).save(server.base / "input" / "noise.png")
        inputs = {"compress_level": 9, "filename_prefix": "stop/x", "background": True}
        return {
            "load": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
            "six": {
                "class_type": "RepeatImageBatch",
                "inputs": {"image": ["load", 0], "amount": 6},
            },
            "save": {
                "class_type": "TurboDistillSaveImage",
                "inputs": {"images": ["six", 0], **inputs},
            },
        }

    return build


@pytest.mark.slow
@POSIX
def test_a_server_that_is_stopped_writes_every_picture(
    comfyui_path: Path, noise_prompt: Any
) -> None:
    """By SIGTERM, as docker stop and systemd do it."""
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        server.queue(noise_prompt(server))
        folder = server.base / "output" / "stop"
        assert len(list(folder.glob("*.png"))) < 6
        server._process.terminate()
        assert server._process.wait(10) == -signal.SIGTERM
        assert_all_written(folder, 6)


@pytest.mark.slow
@POSIX
def test_what_a_killed_server_left_is_gone_after_the_next_start(
    comfyui_path: Path, noise_prompt: Any
) -> None:
    with ComfyServer(comfyui_path, pack=ROOT) as killed:
        output = killed.base / "output"
        killed.queue(noise_prompt(killed))
        killed._process.kill()
        killed._process.wait()
        left = list((output / "stop").glob("*.tmp"))
        assert left
        shared = ("--cpu", "--output-directory", str(output))
        with ComfyServer(comfyui_path, pack=ROOT, arguments=shared) as server:
            deadline = time.monotonic() + 20
            while any(path.exists() for path in left) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not any(path.exists() for path in left)
            written = len(list((output / "stop").iterdir()))
            shown = server.queue(noise_prompt(server))["outputs"]["save"]["images"]
            assert shown[0]["filename"] == f"x_{written + 1:05}_.png"
