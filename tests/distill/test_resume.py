"""A run that is cut off and continued ends with the file of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import trainer
from distill.config import Config, ConfigError, EngineSection, save_config
from distill.contract.metadata import read_lora
from distill.data.batch import Batch, Data
from distill.trainer import train
from distill.training import checkpoint as checkpoints
from distill.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from distill.training.run_start import differences
from distill.utils.lock import OWNER, FolderInUse, single_writer
from distill.utils.rng import Rng

RUN_SMALL = Path(__file__).parents[1] / "helpers" / "run_small.py"

# 9 steps in stages of 3, 4 and 2; checkpoints after 2, 4, 6, 8 and 9
PCM = {"method": "pcm", "batch": 4, "lr": 1e-3, "points": 4, "warmup": 3}
DMD2 = {
    "method": "dmd2",
    "batch": 2,
    "lr": 1e-3,
    "fake_lr": 1e-3,
    "fake_updates": 2,
    "fake_warmup": 1,
    "fake_warmup_updates": 3,
}
GAN = {"features": "latent", "width": 8, "real_ratio": 1.0, "ramp": 2}
RECIPE = [
    {**PCM, "steps": 3, "target": "ema"},
    {**DMD2, "steps": 4, "batch": 1, "accumulate": 2},
    {**DMD2, "steps": 2, "batch": 1, "accumulate": 2, "fake_accumulate": 1, "gan": GAN},
]


def content(lora: Path) -> tuple[dict[str, str], bytes]:
    """The file's header without its date, and all bytes after the header."""
    _, metadata = read_lora(lora)
    file = lora.read_bytes()
    tensors = file[8 + int.from_bytes(file[:8], "little") :]
    return {k: v for k, v in metadata.items() if k != "modelspec.date"}, tensors


class Crash(BaseException):
    """Like a power cut: nothing catches it."""


@dataclass(frozen=True)
class CrashingData:
    good: Data
    step: int

    @property
    def negative(self):
        return self.good.negative

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        if rng.step == self.step:
            raise Crash
        return self.good.batch(rng, batch_size)


@pytest.fixture(scope="module")
def kept() -> list[Any]:
    return []


@pytest.fixture
def uninterrupted(
    small_config: Callable[..., Config], data: Data, tmp_path: Path, kept: list[Any]
) -> tuple[dict[str, str], bytes]:
    """The LoRA of RECIPE in one go; made once."""
    if not kept:
        config = small_config(run_dir=tmp_path / "whole", stages=RECIPE, save_every=2)
        kept.append(content(train(config, data=data)))
    return kept[0]


@pytest.mark.parametrize(
    "step", [s if s in (1, 3, 5, 8) else pytest.param(s, marks=pytest.mark.slow) for s in range(9)]
)
def test_cut_off_at_any_step(
    step: int, small_config: Callable[..., Config], data: Data, uninterrupted: tuple
) -> None:
    config = small_config(stages=RECIPE, save_every=2)
    with pytest.raises(Crash):
        train(config, data=CrashingData(data, step))
    assert content(train(config, data=data, resume=True)) == uninterrupted


def test_cut_off_exactly_between_stages(
    small_config: Callable[..., Config], data: Data, uninterrupted: tuple
) -> None:
    config = small_config(stages=RECIPE, save_every=1, keep_checkpoints=1)
    for step in (3, 7):
        with pytest.raises(Crash):
            train(config, data=CrashingData(data, step), resume=step > 3)
        newest = latest_checkpoint(config.run_dir)
        assert newest is not None
        assert load_checkpoint(newest).step == step
    _, tensors = content(train(config, data=data, resume=True))
    assert tensors == uninterrupted[1]


def test_the_log_has_every_line_once(small_config: Callable[..., Config], data: Data) -> None:
    config = small_config(save_every=3, log_every=1)
    with pytest.raises(Crash):
        train(config, data=CrashingData(data, 5))
    train(config, data=data, resume=True)
    lines = (config.run_dir / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_nothing_saved_yet_means_from_the_start(
    small_config: Callable[..., Config], data: Data
) -> None:
    config = small_config()
    with pytest.raises(Crash):
        train(config, data=CrashingData(data, 4))
    assert latest_checkpoint(config.run_dir) is None
    assert train(config, data=data, resume=True).is_file()


def test_a_finished_run_says_so(
    small_config: Callable[..., Config],
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small_config()
    path = train(config, data=data)
    monkeypatch.setattr(trainer, "load_transformer", None)  # not even the base is read
    assert train(config, resume=True) == path
    assert "finished" in caplog.text


def test_killed_before_the_export(small_config: Callable[..., Config], data: Data) -> None:
    config = small_config()
    path = train(config, data=data)
    before = content(path)
    path.unlink()
    assert content(train(config, data=data, resume=True)) == before


def test_only_the_newest_checkpoints_are_kept(
    small_config: Callable[..., Config], data: Data
) -> None:
    config = small_config(save_every=1, keep_checkpoints=2)
    train(config, data=data)
    names = sorted(p.name for p in (config.run_dir / "checkpoints").iterdir())
    assert names == ["step-000007", "step-000008"]


def test_half_written_checkpoints_are_ignored_and_removed(
    small_config: Callable[..., Config], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(save_every=3)

    def power_cut(*args: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_finish", power_cut)
        with pytest.raises(Crash):
            train(config, data=data)
    folder = config.run_dir / "checkpoints"
    assert [p.name for p in folder.iterdir()] == [".step-000003.tmp"]
    (folder / "step-000099").mkdir()  # copied by hand, incomplete
    assert latest_checkpoint(config.run_dir) is None
    train(config, data=data, resume=True)
    assert not (folder / ".step-000003.tmp").exists()


def test_a_damaged_checkpoint_is_named(small_config: Callable[..., Config], data: Data) -> None:
    config = small_config(save_every=4, keep_checkpoints=1)
    train(config, data=data)
    newest = latest_checkpoint(config.run_dir)
    assert newest is not None
    for part in newest.glob("*.safetensors"):
        part.write_bytes(part.read_bytes()[:100])
    (config.run_dir / "lora" / "turbo.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-000008: cannot be read .* start anew"):
        train(config, data=data, resume=True)


def test_a_changed_configuration_is_refused(
    small_config: Callable[..., Config], data: Data
) -> None:
    config = small_config(log_every=4)
    train(config, data=data)
    stages = [{**config.stages[0].model_dump(), "lr": 5e-4, "batch": 8}]
    with pytest.raises(ConfigError) as caught:
        train(small_config(stages=stages), data=data, resume=True)
    message = str(caught.value)
    assert "stages.0.lr: 0.001 -> 0.0005" in message
    assert "stages.0.samples per update: 4 -> 8" in message
    assert "log_every" not in message


def test_ranks_may_change_if_the_samples_per_step_do_not(
    small_config: Callable[..., Config],
) -> None:
    def config(batch: int, world: int) -> Config:
        stages = [{"method": "pcm", "steps": 8, "batch": batch}]
        return small_config(stages=stages, engine=EngineSection(world=world).model_dump())

    assert differences(config(4, 2), config(8, 1)) == []
    assert differences(config(4, 2), config(4, 1)) == ["  stages.0.samples per update: 8 -> 4"]


def test_run_folders_are_not_overwritten(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    train(small_config(), data=data)
    with pytest.raises(ConfigError, match=r"already holds a run\. Continue it with --resume"):
        train(small_config(), data=data)
    with pytest.raises(ConfigError, match=r"nothing to resume\. Leave out --resume"):
        train(small_config(run_dir=tmp_path / "other"), data=data, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        train(small_config(run_dir=tmp_path / "file"), data=data)


@pytest.mark.parametrize("resume", [False, True])
def test_one_run_writes_to_a_folder(
    resume: bool, small_config: Callable[..., Config], data: Data
) -> None:
    config = small_config()
    if resume:
        with pytest.raises(Crash):
            train(config, data=CrashingData(data, 0))
    with single_writer(config.run_dir):
        before = sorted(config.run_dir.glob("*"))
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on .* is writing to it"):
            train(config, data=data, resume=resume)
        assert sorted(config.run_dir.glob("*")) == before


def test_what_cannot_begin_makes_no_folder(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(small_config(run_dir=tmp_path / "typo"), data=data, resume=True)
    assert not (tmp_path / "typo").exists()


def test_state_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match=r"/method/heads/0: .* found object"):
        checkpoints._take_tensors({"method": {"heads": [object()]}}, {})


def test_nested_state_survives() -> None:
    adam = {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 1e-3, "fused": None}]}
    state = {"adam": adam}
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(checkpoints._take_tensors(state, tensors)))
    assert list(tensors) == ["/adam/state/0/step"]
    assert checkpoints._put_tensors(tree, tensors) == state


# Processes of their own


def run_small(config: Path, *args: str, **trouble: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RUN_SMALL": json.dumps(trouble), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(RUN_SMALL), str(config), *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def recipe_file(small_config: Callable[..., Config], tmp_path: Path) -> Path:
    config = small_config(stages=RECIPE, save_every=2, log_every=1)
    save_config(config, tmp_path / "recipe.yaml")
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "saved"), [(signal.SIGKILL, -9, 4), (signal.SIGTERM, 143, 6)]
)
def test_signals(number: int, code: int, saved: int, recipe_file: Path, tmp_path: Path) -> None:
    """SIGKILL in the sixth step loses what came after the last checkpoint, SIGTERM nothing."""
    whole = run_small(recipe_file, f"run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    first = run_small(recipe_file, signal=number, step=5)
    assert first.returncode == code, first.stderr
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"step-{saved:06d}"
    if number == signal.SIGTERM:
        assert "SIGTERM: saved step 6; continue with --resume" in first.stderr
    second = run_small(recipe_file, "--resume")
    assert second.returncode == 0, second.stderr
    a, b = (Path(run.stdout.splitlines()[-1]) for run in (whole, second))
    assert content(a) == content(b)


@pytest.mark.slow
def test_two_that_resume_one_run(small_config: Callable[..., Config], tmp_path: Path) -> None:
    """The second is told who the first is, and leaves log and checkpoints alone."""
    stages = [{**PCM, "steps": 100_000, "batch": 2}]
    save_config(small_config(stages=stages, log_every=1, save_every=2), tmp_path / "long.yaml")
    begun = run_small(tmp_path / "long.yaml", signal=signal.SIGTERM, step=3)
    assert begun.returncode == 143, begun.stderr
    first = subprocess.Popen(
        [sys.executable, str(RUN_SMALL), str(tmp_path / "long.yaml"), "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        log = tmp_path / "run" / "log.jsonl"
        deadline = time.monotonic() + 200
        while log.read_text().count("\n") < 6 and time.monotonic() < deadline:
            time.sleep(0.1)
        second = run_small(tmp_path / "long.yaml", "--resume")
        assert second.returncode == 2
        assert f"process {first.pid} on {os.uname().nodename}" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.send_signal(signal.SIGTERM)
    assert first.wait(200) == 143
    assert not (tmp_path / "run" / OWNER).exists()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_a_full_disk(recipe_file: Path, tmp_path: Path) -> None:
    """The checkpoint that does not fit leaves nothing, the one before it stays."""
    result = run_small(recipe_file, step=2, file_limit=60_000)
    assert result.returncode == 1
    assert "step-000004: the checkpoint of step 4 could not be written" in result.stderr
    assert "File too large" in result.stderr
    assert "step-000002 is intact: free some space" in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "run" / "lora").exists()
    again = run_small(recipe_file, "--resume")
    assert again.returncode == 0, again.stderr
