"""The optimisers: no first moment where it is the gradient, 8 bits per state, and their states."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distill import stages, trainer
from distill.config import Config, ConfigError
from distill.data.batch import Data
from distill.stages import DMD2Stage, OptimizerSection
from distill.training.adam import AdamW, go_on_with, load_plain_state, make_adam, plain_state
from distill.training.checkpoint import load_checkpoint
from distill.training.engine import Engine
from distill.training.optim import Optimizer

ENGINE = Engine(0, 1, torch.device("cpu"))


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (10,))
    ]


def set_gradients(weights: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("foreach", [False, True])
def test_without_a_first_moment_no_bit_changes(beta1: float, foreach: bool) -> None:
    ours, theirs = parameters(), parameters()
    keys = {"lr": 1e-2, "betas": (beta1, 0.99), "weight_decay": 0.1, "foreach": foreach}
    adam, reference = AdamW(ours, **keys), torch.optim.AdamW(theirs, **keys)
    for step in range(5):
        for weights, optimizer in ((ours, adam), (theirs, reference)):
            set_gradients(weights, step)
            optimizer.step()
        if step == 2:  # of a checkpoint that kept it
            adam.load_state_dict(deepcopy(reference.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(("exp_avg" in adam.state[p]) == (beta1 > 0) for p in ours)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.9), (0.9, 0.0), (0.9, 0.5)])
def test_a_run_goes_on_with_other_betas(before: float, after: float) -> None:
    """As torch does with a first moment that begins at 0 where it was not kept."""
    ours, theirs = parameters(), parameters()
    first = OptimizerSection(lr=1e-2, betas=(before, 0.99))
    then = OptimizerSection(lr=1e-2, betas=(after, 0.99), weight_decay=0.1)
    adam = make_adam(ours, first)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(before, 0.99), weight_decay=0.0)
    for step in range(3):
        for weights, optimizer in ((ours, adam), (theirs, reference)):
            set_gradients(weights, step)
            optimizer.step()
    resumed = make_adam(ours, then)
    load_plain_state(resumed, plain_state(adam))
    go_on_with(resumed, then)
    for group in reference.param_groups:
        group["betas"], group["weight_decay"] = (after, 0.99), 0.1
    if before == 0:
        for weight in theirs:
            reference.state[weight]["exp_avg"].zero_()
    for step in range(3, 6):
        for weights, optimizer in ((ours, resumed), (theirs, reference)):
            set_gradients(weights, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torchao's step as it is written: compiling it takes a minute here and changes nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def optimizer_of(weights: list[torch.nn.Parameter], kind: str, beta1: float) -> Optimizer:
    section = OptimizerSection(optimizer=kind, lr=1e-2, betas=(beta1, 0.99), clip=1e9, warmup=3)
    return Optimizer("student", weights, section, ENGINE)


def train(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(optimizer.parameters, step)
        optimizer.update()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_eight_bits_follow_thirty_two(beta1: float) -> None:
    small, whole = (optimizer_of(parameters(), kind, beta1) for kind in ("adamw8bit", "adamw"))
    for optimizer in (small, whole):
        train(optimizer, range(6))
    start = parameters()
    for a, b, before in zip(small.parameters, whole.parameters, start, strict=True):
        moved = (b - before).abs().max()
        assert moved > 0.01
        assert (a - b).abs().max() < 0.05 * moved  # the moments' 8 bits
    states = small.adam.state[small.parameters[0]]
    moments = {"exp_avg_sq"} | ({"exp_avg"} if beta1 else set())
    assert set(states) == {"step", *moments}
    assert all(states[name].codes.dtype == torch.uint8 for name in moments)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_states_are_plain_tensors_and_go_on_exactly(kind: str, beta1: float) -> None:
    one = optimizer_of(parameters(), kind, beta1)
    train(one, range(3))
    saved = deepcopy(one.state_dict())
    assert all(type(tensor) is torch.Tensor for tensor in tensors_of(saved["adam"]))
    two = optimizer_of(parameters(), kind, beta1)
    two.load_state_dict(saved)
    for optimizer in (one, two):
        train(optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, two.parameters, strict=True))


def tensors_of(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict | list | tuple):
        values = state.values() if isinstance(state, dict) else state
        return [tensor for value in values for tensor in tensors_of(value)]
    return []


@pytest.mark.usefixtures("uncompiled")
def test_a_run_in_eight_bits_goes_on_from_its_checkpoint(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    stage = {"method": "pcm", "batch": 2, "lr": 1e-3, "points": 4, "optimizer": "adamw8bit"}

    def config(name: str) -> Config:
        stages = [{**stage, "steps": 4}]
        return small_config(
            run_dir=tmp_path / name, stages=stages, adapter={"rank": 64}, save_every=3
        )

    def state(name: str, step: int) -> Any:
        return load_checkpoint(tmp_path / name / "checkpoints" / f"step-{step:06d}")

    trainer.train(config("whole"), data=data)
    trainer.train(config("cut"), data=data)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000004")
    trainer.train(config("cut"), data=data, resume=True)
    whole, cut = state("whole", 4), state("cut", 4)
    moments = whole.method["student"]["adam"]["state"].values()
    assert any(isinstance(moment["exp_avg"], dict) for moment in moments)
    for a, b in zip(tensors_of(vars(whole)), tensors_of(vars(cut)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_the_compiled_step() -> None:
    """In a process of its own: what other tests compiled stays in this one's compiler."""
    code = f"import runpy; runpy.run_path({__file__!r})['compiled_step']()"
    subprocess.run([sys.executable, "-c", code], check=True)


def compiled_step() -> None:
    eight, whole = (optimizer_of(parameters(), kind, 0.0) for kind in ("adamw8bit", "adamw"))
    for optimizer in (eight, whole):
        train(optimizer, range(3))
    for a, b in zip(eight.parameters, whole.parameters, strict=True):
        assert (a - b).abs().max() < 2e-3


def test_without_torchao_a_recipe_is_refused_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"torchao.*pip install"):
        DMD2Stage(method="dmd2", steps=1, optimizer="adamw8bit")
    assert DMD2Stage(method="dmd2", steps=1).optimizer == "adamw"


def test_a_torchao_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    section = OptimizerSection(optimizer="adamw8bit")
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"torchao\.optim.*optimizer: adamw"):
        make_adam(parameters(), section)


def test_the_fake_score_has_its_stages_optimizer() -> None:
    assert DMD2Stage(method="dmd2", steps=1, optimizer="adamw8bit").fake.optimizer == "adamw8bit"
