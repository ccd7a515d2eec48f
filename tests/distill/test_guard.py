"""Runs that cannot succeed stop with a message that says what to do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import trainer
from distill.config import Config, load_config
from distill.data.batch import Batch, Data
from distill.stages import OptimizerSection, PCMStage
from distill.trainer import train
from distill.training.checkpoint import latest_checkpoint, load_checkpoint
from distill.training.engine import Engine
from distill.training.guard import (
    Diverged,
    NanGuard,
    OutOfMemory,
    forbid_global_rng,
    is_out_of_memory,
    memory_advice,
)
from distill.training.optim import Optimizer
from distill.utils.rng import Rng

ALONE = Engine(0, 1, torch.device("cpu"))
STAGE = PCMStage(method="pcm", steps=10)


def optimizer(parameter: torch.nn.Parameter) -> Optimizer:
    return Optimizer("student", [parameter], OptimizerSection(lr=0.1), ALONE, ema=0.9)


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: (w * math.nan).sum(),
        lambda w: (w * math.inf).sum(),
        lambda w: w.sum() + math.inf,  # the gradient is finite, the loss is not
        lambda w: w.sum() + math.nan,
    ],
)
def test_an_update_that_is_not_finite_is_left_out(loss: Callable) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optim = optimizer(parameter)
    optim.step(parameter.square().sum())
    before = [parameter.detach().clone(), *(t.clone() for t in flat(optim.state_dict()))]
    reported = optim.step(loss(parameter))
    after = [parameter.detach(), *flat(optim.state_dict())]
    assert not math.isfinite(reported["grad_norm/student"])
    assert optim.skipped == 1
    assert optim.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    optim.step(parameter.square().sum())
    assert optim.updates == 2


def flat(state: object) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state
    return [t for v in values for t in flat(v)] if isinstance(state, dict | list) else []


def test_a_finite_gradient_is_not_touched_by_the_guard() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    optim = optimizer(parameter)
    (parameter**3).sum().backward()
    expected = parameter.grad.norm().item()
    parameter.grad = None
    assert optim.step((parameter**3).sum()) == {"grad_norm/student": expected}


def test_single_bad_steps_are_counted_and_forgiven() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optim, guard = optimizer(parameter), NanGuard(limit=2)
    for step in range(1, 7):
        values = optim.step(parameter.sum() * (math.nan if step % 2 else 1.0))
        guard.check(step, STAGE, values, [optim])
    assert guard.skipped == 3
    assert optim.skipped == 0


def test_many_in_a_row_stop_the_run_with_a_diagnosis() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optim, guard = optimizer(parameter), NanGuard(limit=3)
    guard.check(1, STAGE, {"loss/pcm": 0.25, **optim.step(parameter.sum())}, [optim])

    def go_on() -> None:
        for step in range(2, 9):
            values = {"loss/pcm": math.nan, **optim.step(parameter.sum() * math.nan)}
            guard.check(step, STAGE, values, [optim])

    with pytest.raises(Diverged) as caught:
        go_on()
    message = str(caught.value)
    assert "stage pcm, step 4: 3 steps in a row" in message
    assert "Last finite, step 1: loss/pcm 0.25" in message
    assert "Lower lr (5e-05)" in message


@dataclass(frozen=True)
class Spoiled:
    """Data whose latents are nan from a step on."""

    good: Data
    first_bad: int

    @property
    def negative(self):
        return self.good.negative

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        batch = self.good.batch(rng, batch_size)
        return batch if rng.step < self.first_bad else Batch(batch.x0 * math.nan, batch.text)


def test_a_diverging_run_leaves_its_last_good_checkpoint(
    small_config: Callable[..., Config], data: Data
) -> None:
    config = small_config(save_every=2, nan_limit=3)
    with pytest.raises(Diverged, match="step 8: 3 steps in a row"):
        train(config, data=Spoiled(data, 5))
    checkpoint = load_checkpoint(latest_checkpoint(config.run_dir))
    assert checkpoint.step == 6
    assert checkpoint.skipped == 1
    assert all(torch.isfinite(t).all() for t in checkpoint.adapters["student"].values())
    assert not list((config.run_dir / "lora").glob("*"))


def test_out_of_memory_says_what_to_lower(
    small_config: Callable[..., Config], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_method(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(trainer, "build_method", build_method)
    with pytest.raises(OutOfMemory) as caught:
        train(small_config(), data=data)
    message = str(caught.value)
    assert "stage pcm: CUDA out of memory. Tried to allocate 2.00 GiB." in message
    for advice in (
        "gradient_checkpointing",
        "now 4 per rank",
        "model.quantize=fp8",
        "model.offload_modulation=true",
        "engine.shard",
        "adapter.rank",
    ):
        assert advice in message


def test_no_advice_that_the_base_refuses() -> None:
    """The blocks of Qwen-Image-2.1 have no modulation of their own to leave in main memory."""
    recipes = Path(__file__).parents[2] / "configs"
    error = RuntimeError("out of memory")
    told = [
        "offload_modulation" in memory_advice(config, config.stages[-1], error)
        for config in (
            load_config(recipes / "qwen_image_2512_2step.yaml"),
            load_config(recipes / "qwen_image_2_1_2step_48gb.yaml"),
        )
    ]
    assert told == [True, False]


def test_libraries_say_out_of_memory_in_their_own_words() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("draw", "name"), [(lambda: torch.randn(1), "torch"), (lambda: random.random(), "random")]
)
def test_global_randomness_is_refused(draw: Callable, name: str) -> None:
    with (
        pytest.raises(RuntimeError, match=f"global generator of {name}"),
        forbid_global_rng(ALONE.device),
    ):
        draw()


def test_rng_touches_no_global_generator() -> None:
    with forbid_global_rng(ALONE.device):
        Rng(0, 0).normal("x", (2, 3))
        torch.randn(2, generator=torch.Generator().manual_seed(0))


def test_the_advice_trades_the_batch_for_micro_batches_before_the_resolution(
    small_config: Callable[..., Config],
) -> None:
    """As many samples per update of every role."""
    gan = {"features": "latent", "accumulate": 2}
    stage = {"method": "dmd2", "steps": 1, "batch": 4, "accumulate": 4, "fake_accumulate": 1}
    config = small_config(
        data={"cache": "no_cache"}, stages=[{**stage, "gan": gan}, {"method": "pcm", "steps": 1}]
    )
    advice, alone = (
        memory_advice(config, stage, RuntimeError("out of memory")) for stage in config.stages
    )
    keys = "batch=1 accumulate=16 fake_accumulate=4 gan.accumulate=8 "
    assert 0 < advice.index(keys) < advice.index("data.resolution")
    assert "accumulate" not in alone  # one sample at a time already


def test_the_advice_names_the_largest_size_that_is_trained(
    small_config: Callable[..., Config],
) -> None:
    def advice(**data: Any) -> str:
        config = small_config(data={"cache": "no_cache", **data})
        return memory_advice(config, config.stages[0], RuntimeError("out of memory"))

    assert "data.resolution, whose largest size is 1024x1024" in advice(resolution=1024)
    assert "data.buckets, whose largest size is 64x128" in advice(buckets=[[64, 64], [64, 128]])
