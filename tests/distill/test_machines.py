"""Several machines: a torchrun agent for each, here all on one, that meet over TCP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import Config, ConfigError, save_config
from distill.contract.metadata import read_lora
from distill.data.batch import Data
from distill.trainer import train
from distill.training.checkpoint import saved_steps
from distill.training.engine import Engine
from distill.training.run_start import check_shared

RUN_SMALL = Path(__file__).parents[1] / "helpers" / "run_small.py"
DMD2 = {"method": "dmd2", "steps": 6, "lr": 3e-4, "fake_lr": 3e-4, "fake_updates": 2,
        "fake_warmup": 0}  # fmt: skip

Agent = subprocess.Popen
Start = Callable[..., list[Agent]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts agents of two ranks in all."""
    begun: list[Agent] = []

    def agents(
        *words: str,
        machines: int = 2,
        restarts: int = 0,
        cwds: tuple[Path | None, ...] = (None, None),
        **trouble: Any,
    ) -> list[Agent]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = [f"--nnodes={machines}", f"--nproc-per-node={2 // machines}", "--rdzv-id=turbo",
                 "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                 f"--max-restarts={restarts}"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUN_SMALL": json.dumps(trouble)}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *flags, str(RUN_SMALL), *words],
                env=environment,
                cwd=cwd,
            )
            for cwd in cwds[:machines]
        ]
        begun.extend(started)
        return started

    yield agents
    for agent in begun:
        if agent.poll() is None:
            lose(agent)
            agent.wait()


def lose(agent: Agent) -> None:
    """As if power failed: a worker outlives its agent, so both are killed."""
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for pid in (agent.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)


def ended(agents: list[Agent]) -> list[int]:
    return [agent.wait(timeout=580) for agent in agents]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return read_lora(config.run_dir / "lora" / "turbo.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def recipe(small_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """Four samples per update; written to NAME.yaml."""

    def make(name: str, batch: int = 2, **keys: Any) -> Config:
        values = {"stages": [{**DMD2, "batch": batch}], "save_every": 1, "keep_checkpoints": 0}
        engine = {"timeout_s": 60}
        config = small_config(run_dir=tmp_path / name, **{**values, "engine": engine, **keys})
        save_config(config, tmp_path / f"{name}.yaml")
        return config

    return make


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 2])
def test_two_machines_are_one_with_two_ranks(
    shard: int, recipe: Callable[..., Config], start: Start, data: Data, tmp_path: Path
) -> None:
    engine = {"timeout_s": 60, "shard": shard}
    one, two = recipe("one", engine=engine), recipe("two", engine=engine)
    assert ended(start(str(tmp_path / "one.yaml"), machines=1)) == [0]
    assert ended(start(str(tmp_path / "two.yaml"))) == [0, 0]
    assert same(weights(one), weights(two))
    alone = recipe("alone", batch=4)
    train(alone, data=data)
    ours, theirs = weights(two), weights(alone)
    # a step of bf16, in which the file is written, where a sum was rounded otherwise
    assert all(torch.allclose(ours[key].float(), theirs[key].float(), 1e-2, 1e-5) for key in ours)


@pytest.mark.slow
def test_a_machine_is_lost_and_both_start_again(
    recipe: Callable[..., Config], start: Start, tmp_path: Path
) -> None:
    """Agent and worker are killed at once; the other machine ends by itself."""
    stages = [{**DMD2, "steps": 20, "batch": 2}]
    whole, cut = recipe("whole", stages=stages), recipe("cut", stages=stages)
    assert ended(start(str(tmp_path / "whole.yaml"))) == [0, 0]
    agents = start(str(tmp_path / "cut.yaml"), "--resume-if-begun")
    deadline = time.monotonic() + 300
    while len(saved_steps(cut.run_dir)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    lose(agents[1])
    assert 0 not in ended(agents)
    assert 2 <= max(saved_steps(cut.run_dir)) < 20
    assert ended(start(str(tmp_path / "cut.yaml"), "--resume-if-begun")) == [0, 0]
    assert same(weights(cut), weights(whole))


@pytest.mark.slow
def test_torchrun_restarts_what_died(
    recipe: Callable[..., Config], start: Start, tmp_path: Path
) -> None:
    """One command: a worker is killed in the fourth step, all are started again and go on."""
    whole, cut = recipe("whole"), recipe("cut")
    assert ended(start(str(tmp_path / "whole.yaml"))) == [0, 0]
    trouble = {"signal": signal.SIGKILL, "step": 3, "rank": 1, "once": True}
    words = (str(tmp_path / "cut.yaml"), "--resume-if-begun")
    assert ended(start(*words, restarts=2, **trouble)) == [0, 0]
    assert same(weights(cut), weights(whole))
    steps = [json.loads(s)["step"] for s in (cut.run_dir / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


@pytest.mark.slow
def test_machines_that_share_no_disk(
    recipe: Callable[..., Config], start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same relative path, which is another folder for each."""
    recipe("two")
    text = (tmp_path / "two.yaml").read_text().replace(str(tmp_path / "two"), "runs/two")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "two.yaml").write_text(text)
    agents = start("two.yaml", cwds=(tmp_path / "here", tmp_path / "there"))
    assert 0 not in ended(agents)
    assert "run_dir: runs/two of" in capfd.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))
    shutil.rmtree(tmp_path / "here")


class _Ranks(Engine):
    """The main rank of two, the other of which has another disk."""

    def on_main(self, work: Callable[[], Any]) -> Any:
        return work()

    def on_all(self, work: Callable[[], Any]) -> list[Any]:
        return [work(), ("node9", False)]


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is another folder on node9\. Expected a folder on a"):
        check_shared(tmp_path, _Ranks(0, 2, torch.device("cpu")))
    assert not list(tmp_path.iterdir())
    check_shared(tmp_path / "nowhere", Engine(0, 1, torch.device("cpu")))
