"""A checkpoint is data: damage is found, and what is planted there is not run."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from distill.cli import main
from distill.config import Config, load_config
from distill.contract.metadata import read_lora
from distill.data.batch import Data
from distill.trainer import train
from distill.training.checkpoint import (
    STATE,
    Checkpoint,
    CheckpointError,
    DamagedCheckpoint,
    latest_checkpoint,
    load_checkpoint,
    load_method,
    newest_checkpoint,
    resume_checkpoint,
    save_checkpoint,
    saved_steps,
    whole_checkpoints,
)
from distill.training.engine import Engine
from distill.training.old_checkpoint import METADATA
from distill.training.run_dir import by_step, step_name
from distill.training.tensor_files import SUMS

TENSORS, OLD_TENSORS = "00000.safetensors", "__0_0.distcp"


@pytest.fixture(scope="module")
def trained(small_config_once: Callable[..., Config], data: Data) -> Config:
    """A run of four steps with a checkpoint after each second, and its LoRA."""
    stages = [{"method": "pcm", "steps": 4, "batch": 2, "lr": 1e-3, "points": 4, "ema": 0.9}]
    config = small_config_once(stages=stages, save_every=2, keep_checkpoints=0)
    train(config, data=data)
    return config


@pytest.fixture
def run(trained: Config, tmp_path: Path) -> Path:
    """The same, stopped before its LoRA was written."""
    folder = tmp_path / "run"
    shutil.copytree(trained.run_dir, folder)
    shutil.rmtree(folder / "lora")
    return folder


@pytest.fixture
def old_run(run: Path) -> Path:
    """The same, its checkpoints being of version 1."""
    for path in whole_checkpoints(run):
        make_old(path)
    return run


def make_old(path: Path) -> None:
    """Writes a checkpoint anew as version 1 had it."""
    from distill.training.tensor_files import read_sums, read_tensors

    tensors = read_tensors(path, read_sums(path))
    state = json.loads((path / STATE).read_text())
    shutil.rmtree(path)
    dcp.save(tensors, checkpoint_id=path)
    (path / STATE).write_text(json.dumps({**state, "version": 1}))


def resume(run: Path, data: Data) -> Path:
    config = load_config(run / "config.yaml").model_copy(update={"run_dir": run})
    return train(config, data=data, resume=True)


def same(a: Path, b: Path) -> bool:
    (one, _), (two, _) = read_lora(a), read_lora(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def lora_of(config: Config) -> Path:
    return config.run_dir / "lora" / f"{config.name}.safetensors"


# Damage


@pytest.mark.parametrize("name", [STATE, TENSORS, SUMS])
def test_a_flipped_bit_is_found_wherever_it_is(name: str, run: Path) -> None:
    newest = latest_checkpoint(run)
    assert newest is not None
    file = newest / name
    whole = file.read_bytes()
    for position in {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1}:
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match="step-000004: cannot be read"):
                load_checkpoint(newest)
    file.write_bytes(whole)
    assert load_checkpoint(newest).step == 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM = {"cut": cut, "flip": flip, "remove": Path.unlink, "folder": replace_by_folder}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
@pytest.mark.parametrize("name", [TENSORS, SUMS])
def test_the_one_before_a_damaged_one_is_taken(
    name: str,
    harm: Callable[[Path], object],
    run: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    harm(run / "checkpoints" / "step-000004" / name)
    found = newest_checkpoint(run)
    assert found is not None
    assert found[0].name == "step-000002"
    assert found[1].step == 2
    assert "step-000004: cannot be read" in caplog.text
    assert name in caplog.text
    assert "The one before it is taken: step-000002" in caplog.text


def test_a_run_goes_on_from_the_one_before(
    run: Path, data: Data, trained: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """And ends with the same LoRA; the damaged one neither counts nor stands in the way."""
    flip(run / "checkpoints" / "step-000004" / TENSORS)
    assert same(resume(run, data), lora_of(trained))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000004.damaged"]
    assert load_checkpoint(run / "checkpoints" / "step-000004").step == 4
    assert "is kept as step-000004.damaged" in caplog.text


def test_export_takes_the_one_before(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(run / "checkpoints" / "step-000004" / STATE)
    assert main(["export", str(run), "--out", str(tmp_path / "out.safetensors")]) == 0
    assert read_lora(tmp_path / "out.safetensors")[1]["ss_steps"] == "2"
    assert "The one before it is taken" in caplog.text
    assert (run / "checkpoints" / "step-000004").is_dir()  # exporting changes no run


def test_none_intact_is_not_none_there(run: Path, data: Data, tmp_path: Path) -> None:
    for path in whole_checkpoints(run):
        flip(path / TENSORS)
    with pytest.raises(CheckpointError, match=r"step-000004: .*No other checkpoint is intact"):
        resume(run, data)
    assert main(["export", str(run), "--out", str(tmp_path / "out.safetensors")]) == 2
    assert saved_steps(run) == [2, 4]  # nothing was renamed


def test_a_newer_release_s_checkpoint_is_not_passed_over(run: Path) -> None:
    from distill.training.tensor_files import read_sums, write_bytes, write_sums

    newest = run / "checkpoints" / "step-000004"
    state = json.dumps({"version": 3}).encode()
    write_sums(newest, {**read_sums(newest), STATE: write_bytes(newest / STATE, state)})
    with pytest.raises(CheckpointError, match=r"found 3\. Continue with the release") as caught:
        newest_checkpoint(run)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_a_disk_that_fails_for_now_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an earlier step would be taken, and the newest set aside, for a cable."""

    def unreachable(path: Path) -> bytes:
        raise TimeoutError(110, "Connection timed out", str(path))

    monkeypatch.setattr(Path, "read_bytes", unreachable)
    with pytest.raises(CheckpointError, match="Connection timed out") as caught:
        newest_checkpoint(run)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_a_state_of_another_recipe_is_named(
    run: Path, trained: Config, small_config: Callable[..., Config], data: Data
) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit this recipe .*start anew"):
        train(
            small_config(run_dir=run, adapter={"rank": 2}, **kept(trained, run)),
            data=data,
            resume=True,
        )


def kept(config: Config, run: Path) -> dict[str, Any]:
    """Keys of `config`, and a run folder that claims to be of another rank."""
    text = (run / "config.yaml").read_text().replace("rank: 4", "rank: 2")
    (run / "config.yaml").write_text(text)
    return {"stages": [stage.model_dump() for stage in config.stages], "save_every": 2}


# Two ranks

TWO_RANKS = """
import sys
from pathlib import Path
import torch
from distill.training import checkpoint, tensor_files
from distill.training.checkpoint import Checkpoint, save_checkpoint
from distill.training.engine import Engine

run, broken = Path(sys.argv[1]), sys.argv[2] == "broken"
engine = Engine.start()
divided = tensor_files.divided
checkpoint.divided = lambda tensors: divided(tensors, 100)  # several files
if broken and engine.rank == 1:
    def fail(*args):
        raise OSError(28, "No space left on device")
    checkpoint.write_tensors = fail
adapters = {"student": {str(i): torch.full((20,), i) for i in range(5)}}
try:
    save_checkpoint(run, Checkpoint(7, 0, 0, adapters, {"rank": "any"}), engine)
except OSError as error:
    sys.stdout.write(f"rank {engine.rank}: {error}\\n")
engine.stop()
"""


@pytest.mark.parametrize("disk", ["whole", "broken"])
def test_two_ranks_share_the_files(disk: str, tmp_path: Path) -> None:
    """And both stop where one of them cannot write."""
    (tmp_path / "two.py").write_text(TWO_RANKS)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "two.py"), str(tmp_path / "run"), disk],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    if disk == "broken":
        for rank in (0, 1):
            assert f"rank {rank}: {tmp_path}/run/checkpoints/step-000007: " in ended.stdout
        assert ended.stdout.count("No space left on device") == 2
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
        return
    path = tmp_path / "run" / "checkpoints" / "step-000007"
    assert len(list(path.glob("*.safetensors"))) == 5
    loaded = load_checkpoint(path)
    assert [int(t[0]) for t in loaded.adapters["student"].values()] == [0, 1, 2, 3, 4]
    assert loaded.method == {"rank": "any"}


RESUMES = """
import sys
from pathlib import Path
from distill.training.checkpoint import load_checkpoint, resume_checkpoint
from distill.training.engine import Engine

def held() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

engine = Engine.start()
engine.barrier()
before = held()
checkpoint = resume_checkpoint(Path(sys.argv[1]), engine)
sum(float(t.sum()) for tensors in checkpoint.adapters.values() for t in tensors.values())
mapped = held() - before
if sys.argv[2:] == ["copied"]:
    checkpoint = load_checkpoint(Path(sys.argv[1]) / "checkpoints" / "step-000007")
    mapped = held() - before
sys.stdout.write(f"rank {engine.rank} holds {mapped:.0f} MiB\\n")
engine.stop()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ranks_that_resume_hold_no_copy(tmp_path: Path) -> None:
    """256 MiB of tensors: two ranks read all of them, out of one copy in the page cache."""
    adapters = {"student": {str(i): torch.full((1 << 22,), float(i)) for i in range(16)}}
    alone = Engine(0, 1, torch.device("cpu"))
    save_checkpoint(tmp_path / "run", Checkpoint(7, 0, 0, adapters, {}), alone)
    (tmp_path / "resumes.py").write_text(RESUMES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def measured(*words: str) -> list[float]:
        ended = subprocess.run(
            [*command, str(tmp_path / "resumes.py"), str(tmp_path / "run"), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert ended.returncode == 0, ended.stderr
        return [float(n) for n in re.findall(r"holds (\d+) MiB", ended.stdout)]

    resumed, copied = measured(), measured("copied")
    assert len(resumed) == len(copied) == 2
    assert max(resumed) < 32
    assert min(copied) > 250


def test_what_is_resumed_on_a_cpu_needs_no_file(trained: Config, tmp_path: Path) -> None:
    """An optimiser keeps what it is given: copies, for the files may go."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    checkpoint = resume_checkpoint(tmp_path / "run", Engine(0, 1, torch.device("cpu")))
    assert checkpoint is not None
    kept: dict[str, Any] = {}

    class Method:
        def state_dict(self) -> dict[str, Any]:
            return kept

        def load_state_dict(self, state: dict[str, Any]) -> None:
            kept.update(state)

    load_method(Method(), checkpoint.method, torch.device("cpu"))
    ours, theirs = (
        next(iter(state["student"]["adam"]["state"].values()))["exp_avg_sq"]
        for state in (kept, checkpoint.method)
    )
    assert torch.equal(ours, theirs)
    assert ours.data_ptr() != theirs.data_ptr()


# Names


def test_a_count_of_steps_needs_no_file_on_any_device(trained: Config) -> None:
    """An optimiser on a GPU, for which meta stands in, takes counts over as they are."""
    engine = Engine(0, 1, torch.device("cpu"))
    checkpoint = resume_checkpoint(trained.run_dir, engine)
    assert checkpoint is not None
    saved = checkpoint.method["student"]
    states = saved["adam"]["state"]
    parameters = [
        torch.nn.Parameter(
            torch.zeros(states[i]["exp_avg_sq"].shape if i in states else 1, device="meta")
        )
        for i in saved["adam"]["param_groups"][0]["params"]
    ]
    beta1 = saved["adam"]["param_groups"][0]["betas"][0]
    adam = torch.optim.AdamW(parameters, betas=(beta1, 0.999))

    class Method:
        def state_dict(self) -> dict[str, Any]:
            return adam.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            adam.load_state_dict(state["student"]["adam"])

    load_method(Method(), checkpoint.method, torch.device("meta"))
    files = {key: x.data_ptr() for key, x in _steps(saved["adam"]["state"]).items()}
    mine = {key: x.data_ptr() for key, x in _steps(adam.state_dict()["state"]).items()}
    assert files.keys() == mine.keys()
    assert not set(files.values()) & set(mine.values())


def _steps(states: dict[int, dict[str, torch.Tensor]]) -> dict[int, torch.Tensor]:
    return {key: state["step"] for key, state in states.items()}


def test_an_old_one_that_cannot_be_removed_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk where a file that is mapped stays; the new one is whole."""
    engine = Engine(0, 1, torch.device("cpu"))
    checkpoint = load_checkpoint(latest_checkpoint(run) or run)
    remove = shutil.rmtree

    def refuse(path: Path, **keys: Any) -> None:
        if Path(path).name.startswith("step-"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, **keys)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    path = save_checkpoint(run, replace(checkpoint, step=99), engine, keep=1)
    assert latest_checkpoint(run) == path
    assert "could not be removed" in caplog.text


def test_names_that_are_no_steps(run: Path) -> None:
    folder = run / "checkpoints"
    for name in (
        "step-000010.old",
        "step-000008.bak",
        "step-0000010",
        "step-10",
        "step-",
        "step-x",
    ):
        shutil.copytree(folder / "step-000004", folder / name)
    (folder / "step-000099").write_text("a file")
    (folder / "step-000098").mkdir()
    (folder / "step-٠٠٠٠٩٧").mkdir()
    assert saved_steps(run) == [2, 4]
    assert main(["report", str(run)]) == 0


def test_steps_beyond_six_digits_are_the_newest(run: Path) -> None:
    folder = run / "checkpoints"
    for step in (999_999, 1_000_000, 12_345_678):
        shutil.copytree(folder / "step-000004", folder / step_name(step))
    assert saved_steps(run) == [2, 4, 999_999, 1_000_000, 12_345_678]
    newest = latest_checkpoint(run)
    assert newest is not None
    assert newest.name == "step-12345678"


def test_by_step_with_a_suffix(tmp_path: Path) -> None:
    for name in ("step-1000000.png", "step-000200.png", "step-000300.png.bak", "step-000100"):
        (tmp_path / name).touch()
    assert list(by_step(tmp_path, ".png")) == [200, 1_000_000]
    assert list(by_step(tmp_path)) == [100]
    assert by_step(tmp_path / "none") == {}


# Checkpoints of version 1, which hold a pickle


def test_an_old_run_goes_on(
    old_run: Path, data: Data, trained: Config, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(old_run / "checkpoints" / "step-000004")
    assert same(resume(old_run, data), lora_of(trained))
    assert "step-000002 is of version 1, without checksums" in caplog.text
    assert (old_run / "checkpoints" / "step-000004" / SUMS).is_file()


def test_an_old_one_is_read_exactly(trained: Config, old_run: Path) -> None:
    new = load_checkpoint(trained.run_dir / "checkpoints" / "step-000004")
    old = load_checkpoint(old_run / "checkpoints" / "step-000004")
    assert pickle.dumps(plain(old)) == pickle.dumps(plain(new))


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return plain(vars(value)) if hasattr(value, "__dataclass_fields__") else value


class Payload:
    """Whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def plant(path: Path, name: str, marker: Path) -> None:
    """Into one file of a checkpoint. Where the file says where tensors lie, it says so of it."""
    payload = {"/adapters": Payload(marker)}
    if name != OLD_TENSORS or not (path / name).exists():
        (path / name).write_bytes(pickle.dumps(payload))
        return
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    (path / name).write_bytes(buffer.getvalue())
    metadata = pickle.loads((path / METADATA).read_bytes())
    for stored in metadata.storage_data.values():
        stored.offset, stored.length = 0, len(buffer.getvalue())
    (path / METADATA).write_bytes(pickle.dumps(metadata))


def commands(run: Path, out: Path, data: Data) -> dict[str, Callable[[], object]]:
    return {
        "resume": lambda: resume(run, data),
        "export": lambda: main(["export", str(run), "--out", str(out)]),
        "sample": lambda: main(["sample", str(run), "--prompt", "a cat", "--out", str(out)]),
    }


@pytest.mark.parametrize("command", ["resume", "export", "sample"])
@pytest.mark.parametrize("name", [TENSORS, STATE, SUMS])
def test_nothing_planted_is_run(
    name: str, command: str, run: Path, data: Data, tmp_path: Path, capsys: Any
) -> None:
    assert_refused(run, name, command, data, tmp_path, capsys)


@pytest.mark.parametrize("command", ["resume", "export", "sample"])
@pytest.mark.parametrize("name", [METADATA, OLD_TENSORS, STATE])
def test_nothing_planted_in_an_old_one_is_run(
    name: str, command: str, old_run: Path, data: Data, tmp_path: Path, capsys: Any
) -> None:
    message = assert_refused(old_run, name, command, data, tmp_path, capsys)
    if name == METADATA:
        assert ".metadata asks for io.open, which no checkpoint needs" in message
        assert "nothing of it was run" in message


def assert_refused(
    run: Path, name: str, command: str, data: Data, tmp_path: Path, capsys: Any
) -> str:
    marker = tmp_path / "it_ran"
    for path in whole_checkpoints(run):
        plant(path, name, marker)
    start = commands(run, tmp_path / "out.safetensors", data)[command]
    if command == "resume":
        with pytest.raises(CheckpointError, match="step-000004: ") as caught:
            start()
        message = str(caught.value)
    else:
        assert start() == 2
        message = capsys.readouterr().err
    assert "step-000004: " in message
    assert not marker.exists()
    assert main(["report", str(run)]) == 0  # which reads no checkpoint
    assert not marker.exists()
    return message


def test_what_lies_beside_is_not_opened(run: Path, tmp_path: Path) -> None:
    """The files of version 1 beside those of version 2."""
    for name in (METADATA, OLD_TENSORS):
        plant(run / "checkpoints" / "step-000004", name, tmp_path / "it_ran")
    assert main(["export", str(run), "--out", str(tmp_path / "out.safetensors")]) == 0
    assert not (tmp_path / "it_ran").exists()


def test_the_payload_would_run(old_run: Path, tmp_path: Path) -> None:
    """Else the tests above show nothing: torch's own reader runs it."""
    path = old_run / "checkpoints" / "step-000004"
    plant(path, METADATA, tmp_path / "it_ran")
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch says afterwards
        dcp.FileSystemReader(path).read_metadata().storage_data  # noqa: B018
    assert (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("part", ["../outside", "/etc/hostname"])
def test_an_old_one_reads_files_of_its_folder_alone(part: str, old_run: Path) -> None:
    path = old_run / "checkpoints" / "step-000004"
    metadata = pickle.loads((path / METADATA).read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = part
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is damaged"):
        load_checkpoint(path)
