"""Files appear whole or not at all; what killed processes left goes, and a full disk is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.contract import files
from distill.contract.files import NoRoomError, written_whole
from distill.contract.metadata import write_lora
from distill.contract.spec import TurboSpec
from distill.utils.files import create_file, replace_text

WRITE = """
import sys, time
from pathlib import Path
from distill.contract.files import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has written nothing yet."""
    monkeypatch.setattr(files, "_swept", set())


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is in the middle of writing `model`."""
    command = [sys.executable, "-c", WRITE, str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB; skipped where one may not mount it."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def write_large_lora(path: Path) -> None:
    tensors = {
        f"diffusion_model.x.lora_{half}.weight": torch.zeros(shape)
        for half, shape in (("down", (8, 40_000)), ("up", (40_000, 8)))
    }
    write_lora(
        path,
        tensors,
        spec=TurboSpec(family="qwen-image", base="base", nodes=(1.0, 0.0)),
        title="large",
    )


# ------------------------------------------------------------------------------------- left behind


def test_what_a_killed_process_left_is_removed(
    other: subprocess.Popen[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (left,) = temporaries(tmp_path)
    other.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    other.wait()
    if os.name == "nt":  # whether a process lives is not asked there, only how old its file is
        os.utime(left, (0, 0))
    replace_text(tmp_path / "another", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["another"]
    assert f"removed {left} (4 B), left by a process that was killed" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="there the file's age decides")
def test_a_living_process_keeps_its_own_however_old(
    other: subprocess.Popen[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own,) = temporaries(tmp_path)
    os.utime(own, (0, 0))
    replace_text(tmp_path / "another", "x")
    assert own.is_file()
    assert caplog.text == ""


def test_two_writers_in_one_process_keep_theirs(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a") as first:
        first.write_text("a")
        files.sweep_once(tmp_path)
        with written_whole(tmp_path / "a") as second:
            second.write_text("b")
        assert first.is_file()
    assert (tmp_path / "a").read_text() == "a"


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    replace_text(tmp_path / ("ü" * 127), "x")
    assert [len(path.name) for path in tmp_path.iterdir()] == [127]


@pytest.mark.parametrize("mark", ["000000-1-00000000-0", "0123abcd"])
def test_what_may_be_of_another_computer_is_named_and_goes_when_old(
    mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f".model.safetensors.{mark}.tmp"
    left.write_bytes(bytes(2_500_000))
    replace_text(tmp_path / "another", "x")
    assert left.is_file()
    assert f"{left} (2.5 MB) was left by a process that was killed, unless" in caplog.text
    monkeypatch.setattr(files, "_swept", set())
    os.utime(left, (0, 0))
    replace_text(tmp_path / "another", "x")
    assert not left.exists()


def test_a_process_that_took_the_id_of_an_ended_one_removes_its_files(tmp_path: Path) -> None:
    """As after os.exec, which keeps the id."""
    place, pid, session, count = files.new_mark().split("-")
    left = tmp_path / f".x.{place}-{pid}-{'0' * len(session)}-{count}.tmp"
    left.touch()
    replace_text(tmp_path / "another", "x")
    assert not left.exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = (".x.tmp", "x.0123abcd.tmp", ".editor.swp.tmp", ".step-000003.tmp")
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    replace_text(tmp_path / "another", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*names, "another"))


# ----------------------------------------------------------------------------------- appeared since


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appeared_meanwhile_is_not_replaced(
    hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")  # as on FAT

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "x"
    with pytest.raises(FileExistsError, match=r"x appeared while it was being written"):
        create_file(path, lambda temporary: (temporary.touch(), path.write_text("of another")))
    assert path.read_text() == "of another"
    create_file(tmp_path / "y", lambda temporary: temporary.write_text("mine"))
    assert (tmp_path / "y").read_text() == "mine"
    assert not temporaries(tmp_path)


# --------------------------------------------------------------------------------------- full disks


def write_bytes(path: Path) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(bytes(2_000_000))


def write_known_bytes(path: Path) -> None:
    with written_whole(path, size=2_000_000) as temporary:
        temporary.touch()


def write_tensors(path: Path) -> None:
    with written_whole(path) as temporary:
        save_file({"x": torch.zeros(500_000)}, temporary)


@pytest.mark.parametrize("write", [write_bytes, write_known_bytes, write_tensors, write_large_lora])
def test_a_full_disk_is_named_with_path_and_bytes(
    write: Callable[[Path], None], small_disk: Path
) -> None:
    path = small_disk / "model.safetensors"
    with pytest.raises(NoRoomError) as caught:
        write(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: no space left: it needs ")
    assert f"B, and {small_disk} has " in text
    assert list(small_disk.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(NoRoomError, match=r"x: no space left: it needs 3\.0 MB") as caught,
        written_whole(tmp_path / "x", size=3_000_000),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_left_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), written_whole(tmp_path / "x"):
        raise PermissionError(13, "Permission denied")


@pytest.mark.skipif(os.name == "nt", reason="named pipes of POSIX")
def test_a_pipe_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            files.open_regular(path)
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        files.open_regular(tmp_path)
