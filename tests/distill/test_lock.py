"""One writer per folder: processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.utils.lock import OWNER, FolderInUse, single_writer

HOLDER = """
import signal, sys, time
from pathlib import Path
from distill.utils.lock import single_writer
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
with single_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
Hold = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that writes to a folder."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_is_told_who_the_first_is(hold: Hold, tmp_path: Path) -> None:
    first = hold(tmp_path)
    host = os.uname().nodename
    with (
        pytest.raises(FolderInUse, match=rf"process {first.pid} on {host} \(-c .*is writing to it"),
        single_writer(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / OWNER).read_text())["pid"] == first.pid  # it is still the first's


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_leaves_nothing(
    number: int, hold: Hold, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = hold(tmp_path)
    first.send_signal(number)
    first.wait(30)
    assert not (tmp_path / OWNER).exists()
    with single_writer(tmp_path):
        pass
    assert not caplog.records


def test_a_killed_process_is_told_and_its_place_taken(
    hold: Hold, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = hold(tmp_path)
    first.kill()
    first.wait(30)
    with single_writer(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    assert f"process {first.pid} on" in caplog.text
    assert "ended without releasing it; taken over" in caplog.text


def test_a_number_given_to_another_process_is_no_owner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A dead owner's pid may be alive again: here it is this test's own."""
    owner = {"pid": os.getpid(), "host": os.uname().nodename, "since": "then", "program": "train"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    with single_writer(tmp_path):
        pass
    assert "taken over" in caplog.text


def test_of_many_that_find_a_dead_owner_one_wins(hold: Hold, tmp_path: Path) -> None:
    hold(tmp_path).kill()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    rivals = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(4)
    ]
    losers = 0
    while losers < 3:
        losers = sum(rival.poll() is not None for rival in rivals)
    winner = next(rival for rival in rivals if rival.poll() is None)
    assert winner.stdout
    assert winner.stdout.readline() == "held\n"
    for rival in rivals:
        rival.kill()
        rival.communicate()


def test_another_machines_lock_is_not_taken_over(tmp_path: Path) -> None:
    owner = {"pid": 7, "host": "elsewhere", "since": "2026-01-01 00:00:00 UTC", "program": "train"}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    with (
        pytest.raises(FolderInUse, match="process 7 on elsewhere") as caught,
        single_writer(tmp_path),
    ):
        pass
    assert f"delete {tmp_path / OWNER} and start again" in str(caught.value)
    (tmp_path / OWNER).unlink()
    with single_writer(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', "[" * 100_000])
def test_an_owner_that_cannot_be_read_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text(content)
    with single_writer(tmp_path):
        pass


def test_an_error_inside_releases_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), single_writer(tmp_path / "new"):
        raise ZeroDivisionError
    with single_writer(tmp_path / "new"):
        pass


@pytest.mark.parametrize(
    ("before", "now", "taken"),
    [("job 7", "job 7", True), ("job 7", "job 8", False), ("", "", False)],
)
def test_another_machine_of_the_same_launch(
    before: str, now: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun may make another machine's process the first one when it starts them again."""
    owner = {"pid": 1, "host": "node9", "since": "then", "program": "train", "launch": before}
    (tmp_path / OWNER).write_text(json.dumps(owner))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", now or "none")
    if taken:
        with single_writer(tmp_path):
            assert json.loads((tmp_path / OWNER).read_text())["launch"] == now
        return
    with pytest.raises(FolderInUse, match=r"on node9 .* delete"), single_writer(tmp_path):
        pass
