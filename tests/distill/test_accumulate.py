"""One update from N micro-batches is the update of one batch N times as large, for every role."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from pydantic import TypeAdapter, ValidationError

from distill.config import AdapterSection, Config, GuidanceSection
from distill.contract.spec import TurboSpec
from distill.data.batch import Batch, Data
from distill.methods import METHODS, Method
from distill.methods.base import turn
from distill.models.roles import FAKE, STUDENT, Roles
from distill.models.text import Text
from distill.stages import STAGE_METHODS, AnyStage
from distill.trainer import train
from distill.training.checkpoint import latest_checkpoint, load_checkpoint
from distill.training.engine import Engine
from distill.training.optim import Optimizer
from distill.utils.rng import Rng

ENGINE = Engine(0, 1, torch.device("cpu"))
SAMPLES = 4
# Where a gradient is near zero, Adam makes a step of size lr of its rounding error: no larger lr
FEW = {"method": "dmd2", "fake_updates": 2, "fake_warmup": 0, "fake_lr": 1e-4}
LATENT = {"features": "latent", "width": 8, "ramp": 1, "updates": 2}
STAGES: dict[str, dict[str, Any]] = {
    "progressive": {"method": "progressive", "solver_steps": 2},
    "consistency": {"method": "consistency", "points": 4},
    "pcm": {"method": "pcm", "points": 4, "target": "ema"},
    # a fixed weight, for after a few updates the other is 0 as often as not
    "pcm+gan": {"method": "pcm", "points": 4, "gan": {"width": 8, "ramp": 1, "weight": 0.1}},
    "dmd2": FEW,
    "dmd2 options": {
        **FEW,
        "fake_samples": "reuse",
        "ida": 0.9,
        "decoupled": True,
        "diversity": 0.1,
    },
    "dmd2+gan": {
        **FEW,
        "gradient_step": "last",
        "gan": {**LATENT, "lr": 1e-3, "real_ratio": 0.5, "teacher_steps": 2},
    },
}


def method_of(
    transformer: QwenImageTransformer2DModel, negative: Text, keys: dict[str, Any]
) -> Method:
    roles = Roles(
        transformer, AdapterSection(rank=2), GuidanceSection(scale=3), negative, 0, (STUDENT, FAKE)
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in roles.parameters(STUDENT):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(0)
    stage = TypeAdapter(AnyStage).validate_python({"steps": 10, "lr": 1e-4, **keys})
    return METHODS[stage.method](stage, roles, TurboSpec((1.0, 0.7155, 0.0)), ENGINE)


@contextmanager
def gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What every role's updates are made from."""
    seen: dict[str, list[torch.Tensor]] = {}
    original = Optimizer.update

    def update(self: Optimizer) -> dict[str, float]:
        held = [p.grad.flatten().clone() for p in self.parameters if p.grad is not None]
        seen.setdefault(self.name, []).append(torch.cat(held))
        values = original(self)
        assert all(p.grad is None for p in self.parameters), "kept beyond the update"
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "update", update)
        yield seen


def test_every_method_is_compared() -> None:
    assert {stage["method"] for stage in STAGES.values()} == set(STAGE_METHODS)


@pytest.mark.parametrize("case", STAGES)
def test_micro_batches_are_one_batch(
    case: str,
    new_transformer: Callable[[], QwenImageTransformer2DModel],
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for parts in (1, 2, SAMPLES):
        keys = {**STAGES[case], "batch": SAMPLES // parts, "accumulate": parts}
        method = method_of(new_transformer(), data.negative, keys)
        start = torch.cat([p.detach().flatten() for p in method.optimizers[STUDENT].parameters])
        with gradients(monkeypatch) as seen:
            for step in range(3):
                rng = Rng(0, step)
                values = method.step(data.batch(rng, method.stage.samples), rng)
        weights = {
            name: torch.cat([p.detach().flatten() for p in optimizer.parameters])
            for name, optimizer in method.optimizers.items()
            if name != "discriminator"  # Adam makes steps of size lr of its gradients' rounding
        }
        assert (weights[STUDENT] - start).abs().max() > 1e-4
        if "gan" in keys:
            assert values["gan/weight"] > 0
        results.append((weights, seen, values))
    (weights, seen, values), *others = results
    for other_weights, other_seen, other_values in others:
        for name, expected in weights.items():
            assert (other_weights[name] - expected).abs().max() < 1e-6, name
        for name, updates in seen.items():
            assert len(other_seen[name]) == len(updates), name
            first = (other_seen[name][0] - updates[0]).abs().max()
            # the penalty multiplies the rounding of a difference by 100
            bound = 5e-6 if name == "discriminator" else 1e-6
            assert first < bound * max(1, updates[0].norm()), name
        assert other_values == pytest.approx(values, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["pcm", "dmd2"])
def test_a_run_accumulates_as_its_configuration_says(
    name: str, small_config: Callable[..., Config], data: Data, tmp_path: Any
) -> None:
    runs = []
    for parts in (1, 2):
        stage = {**STAGES[name], "steps": 2, "lr": 1e-4, "accumulate": parts}
        config = small_config(
            stages=[{**stage, "batch": SAMPLES // parts}], run_dir=tmp_path / str(parts)
        )
        train(config, data=data)
        newest = latest_checkpoint(config.run_dir)
        assert newest is not None
        runs.append(load_checkpoint(newest).adapters)
    for role, weights in runs[0].items():
        for key, tensor in weights.items():
            assert (runs[1][role][key] - tensor).abs().max() < 1e-6, (role, key)


def test_other_roles_take_their_turns_of_the_students_micro_batches() -> None:
    """However many ranks share a step, the rows are the same."""
    assert list(turn(6, None, 3)) == list(range(6))
    assert [list(turn(6, 2, number)) for number in range(4)] == [[0, 3], [1, 4], [2, 5], [0, 3]]
    one = [i for i in turn(12, 4, 1)]
    two = [6 * rank + i for rank in range(2) for i in turn(6, 2, 1)]
    assert one == two


def test_a_smaller_share_costs_less_and_every_sample_has_its_turn(
    new_transformer: Callable[[], QwenImageTransformer2DModel], data: Data
) -> None:
    keys = {**STAGES["dmd2+gan"], "accumulate": 4, "fake_accumulate": 2, "fake_updates": 3}
    keys["gan"] = {**LATENT, "accumulate": 1, "real_ratio": 1.0}
    method = method_of(new_transformer(), data.negative, keys)
    backwards: dict[str, int] = {}
    for name, optimizer in method.optimizers.items():

        def counted(
            loss: torch.Tensor,
            parts: int = 1,
            name: str = name,
            original: Callable[..., None] = optimizer.backward,
        ) -> None:
            backwards[name] = backwards.get(name, 0) + 1
            original(loss, parts)

        optimizer.backward = counted  # type: ignore[method-assign]
    method.step(data.batch(Rng(0, 0), 4), Rng(0, 0))
    assert backwards == {"student": 4, "fake": 3 * 2, "discriminator": 2 * 1}
    assert [o.updates for o in method.optimizers.values()] == [1, 3, 2]


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({**FEW, "accumulate": 4, "fake_accumulate": 3}, "fake_accumulate"),
        ({**FEW, "accumulate": 2, "gan": {**LATENT, "accumulate": 4}}, "gan.accumulate"),
        ({"method": "pcm", "accumulate": 3, "gan": {"accumulate": 2}}, "gan.accumulate"),
    ],
)
def test_a_share_that_does_not_divide_is_refused(keys: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        TypeAdapter(AnyStage).validate_python({"steps": 1, **keys})


# What is drawn, and from what


def draws(rng: Rng, rows: int) -> list[torch.Tensor]:
    return [
        rng.normal("a", (rows, 2, 3)),
        rng.uniform("b", rows),
        rng.integers("c", rows, 9),
        rng.normal("b", (rows,)),  # another kind of the same stream
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_draw_what_the_whole_draws(rank: int) -> None:
    rng = Rng(0, 3, rank, 2)
    whole = draws(rng, 6)
    parts = zip(*(draws(part, 2) for part in rng.split(3)), strict=True)
    for expected, got in zip(whole, parts, strict=True):
        assert torch.equal(torch.cat(got), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_divides_into_equal_parts(masked: bool) -> None:
    mask = torch.arange(3) < torch.tensor([[1], [3], [2], [3]]) if masked else None
    batch = Batch(torch.randn(4, 2, 1, 1), Text(torch.randn(4, 3, 5), mask), torch.randn(4, 1))
    parts = batch.split(2)
    assert torch.equal(torch.cat([part.x0 for part in parts]), batch.x0)
    assert torch.equal(torch.cat([part.teacher_x0 for part in parts]), batch.teacher_x0)
    assert torch.equal(torch.cat([part.text.embeds for part in parts]), batch.text.embeds)
    if masked:
        assert torch.equal(torch.cat([part.text.mask for part in parts]), mask)
    with pytest.raises(ValueError, match="accumulate"):
        batch.split(3)


# Memory


class Saved:
    """A tensor that a graph keeps, and the role that made it."""

    def __init__(self, tensor: torch.Tensor, role: str) -> None:
        self.tensor, self.role = tensor, role


@pytest.mark.parametrize("case", ["dmd2", "dmd2 options", "dmd2+gan", "pcm+gan"])
def test_no_graph_of_the_student_outlives_its_micro_batch(
    case: str,
    new_transformer: Callable[[], QwenImageTransformer2DModel],
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whenever a role goes backward, only its own graph is there, and only its own gradients."""
    method = method_of(new_transformer(), data.negative, {**STAGES[case], "accumulate": 2})
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    roles, seen = method.roles, []

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor, roles._role)
        alive.add(saved)
        return saved

    original = Optimizer.backward

    def backward(self: Optimizer, loss: torch.Tensor, parts: int = 1) -> None:
        others = [o for o in method.optimizers.values() if o is not self]
        gradients = [p for o in others for p in o.parameters if p.grad is not None]
        seen.append((self.name, {saved.role for saved in alive}, len(gradients)))
        original(self, loss, parts)

    monkeypatch.setattr(Optimizer, "backward", backward)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        method.step(data.batch(Rng(0, 0), 2), Rng(0, 0))
    assert {name for name, _, _ in seen} == set(method.optimizers)
    for name, held, gradients in seen:
        assert gradients == 0
        if name != STUDENT:
            assert STUDENT not in held, name
        if name != FAKE:
            assert FAKE not in held, name
