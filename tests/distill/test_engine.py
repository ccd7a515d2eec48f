"""One process's view of the engine; several processes are in test_distributed.py."""

from __future__ import annotations

import pytest
import torch

from distill.config import ConfigError, EngineSection
from distill.training.engine import Engine, check_world

ALONE = Engine(0, 1, torch.device("cpu"))


def test_one_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    engine = Engine.start()
    assert (engine.rank, engine.world_size, engine.is_main, engine.sharded) == (0, 1, True, False)
    engine.stop()


@pytest.mark.parametrize(
    ("section", "world", "message"),
    [
        (EngineSection(shard=2), 1, "engine.shard: 1 process cannot be divided into groups of 2"),
        (EngineSection(shard=4), 6, "engine.shard: 6 processes cannot be divided into groups of 4"),
        (EngineSection(world=8), 1, "engine.world: expected 8 processes, found 1"),
    ],
)
def test_processes_that_do_not_fit(section: EngineSection, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_world(section, world)
    assert "torchrun --nproc-per-node" in str(caught.value)


def test_processes_that_fit() -> None:
    check_world(EngineSection(), 3)
    check_world(EngineSection(shard=2, world=8), 8)


def test_reductions_of_one_rank_change_nothing() -> None:
    values = {"a": 1.5, "b": -2.0}
    assert ALONE.mean(values) == ALONE.sum(values) == values
    assert ALONE.max(3.0) == 3.0
    assert ALONE.on_main(lambda: 7) == 7


def test_one_rank_is_all_of_them() -> None:
    assert ALONE.on_all(lambda: 7) == [7]
    with pytest.raises(ZeroDivisionError):
        ALONE.on_all(lambda: 1 / 0)


def test_errors_on_the_main_rank_pass_through() -> None:
    def fail() -> None:
        raise ConfigError("as it is")

    with pytest.raises(ConfigError, match="as it is"):
        ALONE.on_main(fail)


def test_memory_is_measured() -> None:
    assert 0 < ALONE.peak_memory_gib() < 1000
