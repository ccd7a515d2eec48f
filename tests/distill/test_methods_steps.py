"""Whole steps of every method on a real, random 2-layer Qwen-Image: who gets a gradient, what it
costs, what stays untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from pydantic import TypeAdapter

from distill.config import AdapterSection, ConfigError, GuidanceSection, parse_config
from distill.contract.shift import LinearShift
from distill.contract.spec import TurboSpec
from distill.data.batch import Batch
from distill.methods import METHODS, Method
from distill.methods.balance import Average
from distill.models import flow, qwen_image
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.stages import AnyStage
from distill.training.engine import Engine
from distill.training.optim import Optimizer
from distill.utils.rng import Rng

SPEC = TurboSpec(nodes=(1.0, 0.7155, 0.0))
RENOISE = TurboSpec(nodes=(1.0, 0.9, 0.7155, 0.0), sampler="renoise")
ENGINE = Engine(0, 1, torch.device("cpu"))
BATCH_SIZE = 3

MIXED = {"real_ratio": 0.5, "teacher_steps": 2}
PIXELS = {"features": "pixels", "crop": 3, "halo": 1, "width": 8, "ramp": 1, **MIXED}
LATENT = {"features": "latent", "width": 8, "ramp": 1, **MIXED}
FEW = {"fake_updates": 2, "fake_warmup": 0, "gradient_step": "last"}

CASES: dict[str, tuple[dict[str, Any], TurboSpec]] = {
    "progressive": ({"method": "progressive", "solver_steps": 3, "distance": "squared"}, SPEC),
    "consistency": ({"method": "consistency", "points": 4, "target": "ema"}, SPEC),
    "pcm": ({"method": "pcm", "points": 4, "solver_steps": 2}, SPEC),
    "pcm+gan": ({"method": "pcm", "points": 4, "gan": {"width": 8, "ramp": 1}}, SPEC),
    "dmd2": ({"method": "dmd2", **FEW}, SPEC),
    "dmd2 renoise": (
        {"method": "dmd2", **FEW, "fake_samples": "reuse", "gradient_step": "random"},
        RENOISE,
    ),
    "dmd2 options": (
        {"method": "dmd2", **FEW, "ida": 0.9, "decoupled": True, "diversity": 0.1}, SPEC,
    ),
    "dmd2+gan pixels": ({"method": "dmd2", **FEW, "gan": PIXELS}, SPEC),
    "dmd2+gan latent": ({"method": "dmd2", **FEW, "gan": {**LATENT, "loss": "softplus"}}, SPEC),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def small_vae() -> AutoencoderKLQwenImage:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLQwenImage(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 16,
            temperal_downsample=[False, True, True], latents_std=[1.5] * 16,
        )  # fmt: skip
    return vae.eval().requires_grad_(False)


def stage_of(values: dict[str, Any]) -> AnyStage:
    return TypeAdapter(AnyStage).validate_python({"steps": 10, "lr": 1e-3, **values})


def roles_of(transformer: QwenImageTransformer2DModel, negative: Text, **adapter: Any) -> Roles:
    return Roles(
        transformer,
        AdapterSection(rank=2, **adapter),
        GuidanceSection(scale=3),
        negative,
        0,
        adapters=(STUDENT, FAKE),
    )


def method_of(
    roles: Roles, values: dict[str, Any], spec: TurboSpec = SPEC, *, warm: bool = True
) -> Method:
    """A method whose student is no longer the teacher."""
    if warm:
        generator = torch.Generator().manual_seed(3)
        for parameter in roles.parameters(STUDENT):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(0)
    return METHODS[values["method"]](stage_of(values), roles, spec, ENGINE, small_vae)


@pytest.fixture
def batch(data: Any) -> Batch:
    return data.batch(Rng(0, 0), BATCH_SIZE)


@pytest.fixture
def roles(transformer: QwenImageTransformer2DModel, data: Any) -> Roles:
    return roles_of(transformer, data.negative)


@contextmanager
def watched_gradients(
    monkeypatch: pytest.MonkeyPatch, method: Method, transformer: torch.nn.Module
) -> Iterator[list[tuple[str, set[str], set[str]]]]:
    """At every optimiser step: whose it is, which weights get a gradient, and which are its own."""
    names = {id(p): n for n, p in transformer.named_parameters()}
    for optimizer in method.optimizers.values():
        for i, p in enumerate(optimizer.parameters):
            names.setdefault(id(p), f"{optimizer.name}.{i}")
    everything = list(transformer.parameters())
    everything += [p for o in method.optimizers.values() for p in o.parameters]
    seen: list[tuple[str, set[str], set[str]]] = []
    original = Optimizer.update

    def update(self: Optimizer) -> dict[str, float]:
        touched = {names[id(p)] for p in everything if p.grad is not None}
        seen.append((self.name, touched, {names[id(p)] for p in self.parameters}))
        return original(self)

    monkeypatch.setattr(Optimizer, "update", update)
    yield seen


@every_case
def test_a_steps_gradients_reach_their_own_role_only(
    case: str,
    roles: Roles,
    transformer: QwenImageTransformer2DModel,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = method_of(roles, *CASES[case])
    with watched_gradients(monkeypatch, method, transformer) as seen:
        values = method.step(batch, Rng(0, 0))
    assert {name for name, _, _ in seen} == set(method.optimizers)
    for name, touched, own in seen:
        assert touched, name
        assert touched <= own, name
    assert all(torch.isfinite(torch.tensor(v)) for v in values.values()), values
    assert values["grad_norm/student"] > 0


@every_case
def test_the_teacher_stays_bit_identical_and_the_student_moves(
    case: str,
    roles: Roles,
    new_transformer: Callable[[], QwenImageTransformer2DModel],
    batch: Batch,
) -> None:
    untouched = new_transformer()
    method = method_of(roles, *CASES[case])
    before = [p.detach().clone() for p in roles.parameters(STUDENT)]
    fresh_rng = torch.get_rng_state()
    for step in range(3):
        method.step(batch, Rng(0, step))
    assert torch.equal(torch.get_rng_state(), fresh_rng), "drew from the global generator"
    t = torch.tensor([0.3, 0.7, 1.0])
    with torch.no_grad():
        expected = qwen_image.velocity(untouched, batch.x0, t, batch.text)
    with torch.no_grad():
        assert torch.equal(roles.velocity(TEACHER, batch.x0, t, batch.text), expected)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, roles.parameters(STUDENT), strict=True)
    )
    assert roles._role == TEACHER


@every_case
def test_a_step_repeats_and_continues_from_its_state(
    case: str,
    new_transformer: Callable[[], QwenImageTransformer2DModel],
    data: Any,
) -> None:
    """Two steps; or one, saved and loaded into new objects as the trainer does, then another."""

    def build() -> tuple[Roles, Method]:
        roles = roles_of(new_transformer(), data.negative)
        return roles, method_of(roles, *CASES[case])

    roles, method = build()
    for step in range(2):
        if step == 1:
            adapters = {
                r: [p.detach().clone() for p in roles.parameters(r)] for r in roles.adapters
            }
            state = deepcopy(method.state_dict())
            resumed_roles, resumed = build()
            with torch.no_grad():
                for role, weights in adapters.items():
                    for p, saved in zip(resumed_roles.parameters(role), weights, strict=True):
                        p.copy_(saved)
            resumed.load_state_dict(state)
            resumed.step(data.batch(Rng(0, step), BATCH_SIZE), Rng(0, step))
        method.step(data.batch(Rng(0, step), BATCH_SIZE), Rng(0, step))
    for name, optimizer in method.optimizers.items():
        for a, b in zip(optimizer.parameters, resumed.optimizers[name].parameters, strict=True):
            assert torch.equal(a, b), name


@every_case
def test_a_schedule_by_size_is_the_schedule_of_the_batchs_size(
    case: str, new_transformer: Callable[[], QwenImageTransformer2DModel], data: Any, batch: Batch
) -> None:
    values, spec = CASES[case]
    by_size = replace(spec, shift=LinearShift((2, 1000), (0.4, 0.9)))
    tokens = batch.x0.shape[-1] * batch.x0.shape[-2] // qwen_image.PATCH**2
    losses = []
    for one in (by_size, by_size.with_sigmas(by_size.sigmas(tokens)), spec):
        method = method_of(roles_of(new_transformer(), data.negative), values, one)
        losses.append(method.step(batch, Rng(0, 0)))
    assert losses[0] == losses[1]
    assert (losses[0] == losses[2]) == (case == "consistency"), "which takes the first sigma alone"


@every_case
def test_checkpointed_blocks_change_nothing(
    case: str, new_transformer: Callable[[], QwenImageTransformer2DModel], data: Any
) -> None:
    """Blocks that run again in the backward pass run in the role of their forward pass."""
    weights = []
    for checkpointing in (False, True):
        transformer = new_transformer()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        roles = roles_of(transformer, data.negative)
        method = method_of(roles, *CASES[case])
        for step in range(2):
            method.step(data.batch(Rng(0, step), BATCH_SIZE), Rng(0, step))
        weights.append(torch.cat([p.flatten() for p in roles.parameters(STUDENT)]))
    assert torch.allclose(*weights, atol=1e-6)


@every_case
def test_a_bfloat16_base(case: str, transformer: QwenImageTransformer2DModel, batch: Batch) -> None:
    """Latents, noise and losses are float32; adapters too."""
    roles = roles_of(transformer.to(torch.bfloat16), Text(torch.zeros(1, 2, 24)))
    values = method_of(roles, *CASES[case]).step(batch.to("cpu", torch.bfloat16), Rng(0, 0))
    assert all(torch.isfinite(torch.tensor(v)) for v in values.values()), values
    assert roles.parameters(STUDENT)[0].dtype == torch.float32


# What a step costs


@contextmanager
def counted(roles: Roles) -> Iterator[list[tuple[str, int, bool]]]:
    """(role, batch size, with gradient) of every forward pass of the transformer."""
    seen: list[tuple[str, int, bool]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((roles._role, len(kwargs["hidden_states"]), torch.is_grad_enabled()))

    handle = roles.transformer.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def forwards(
    role: str, batch_size: int, gradient: bool, times: int = 1
) -> list[tuple[str, int, bool]]:
    return [(role, batch_size, gradient)] * times


B = BATCH_SIZE
COSTS: dict[str, list[tuple[str, int, bool]]] = {
    "progressive": forwards(TEACHER, 2 * B, False, 3) + forwards(STUDENT, B, True),
    "consistency": forwards(TEACHER, 2 * B, False)
    + forwards(STUDENT, B, False)
    + forwards(STUDENT, B, True),
    "pcm": forwards(TEACHER, 2 * B, False, 2)
    + forwards(STUDENT, B, False)
    + forwards(STUDENT, B, True),
    "pcm+gan": forwards(TEACHER, 2 * B, False)
    + forwards(STUDENT, B, False)
    + forwards(STUDENT, B, True)
    + forwards(TEACHER, 3 * B, False)
    + forwards(TEACHER, B, True),
    # 2 sampler steps, gradient at the last: 2 forwards per sample, two samples
    "dmd2": forwards(STUDENT, B, False, 3)
    + forwards(STUDENT, B, True)
    + forwards(FAKE, B, True, 2)
    + forwards(FAKE, B, False)
    + forwards(TEACHER, 2 * B, False),
}
COSTS["dmd2 options"] = (
    COSTS["dmd2"] + forwards(TEACHER, B, False) + forwards(STUDENT, B, True)
    + forwards(TEACHER, 2 * B, False, 5)
)  # fmt: skip
COSTS["dmd2+gan pixels"] = COSTS["dmd2"]
COSTS["dmd2+gan latent"] = (
    COSTS["dmd2"] + forwards(TEACHER, 5 * B, False) + forwards(TEACHER, B, True)
)


@pytest.mark.parametrize("case", COSTS)
def test_forwards_are_those_documented(case: str, roles: Roles, batch: Batch) -> None:
    batch = replace(batch, teacher_x0=torch.randn_like(batch.x0))
    method = method_of(roles, *CASES[case])
    with counted(roles) as seen:
        method.step(batch, Rng(0, 0))
    assert sorted(seen) == sorted(COSTS[case])


def test_reusing_the_sample_saves_the_fresh_ones(roles: Roles, batch: Batch) -> None:
    values = {"method": "dmd2", **FEW, "fake_updates": 4, "fake_samples": "reuse"}
    with counted(roles) as seen:
        method_of(roles, values).step(batch, Rng(0, 0))
    assert [s for s in seen if s[0] == STUDENT] == [(STUDENT, B, False), (STUDENT, B, True)]
    assert len([s for s in seen if s == (FAKE, B, True)]) == 4


def test_teacher_images_are_made_only_if_needed(roles: Roles, batch: Batch) -> None:
    def teacher_forwards(batch: Batch, real_ratio: float) -> int:
        values = {"method": "dmd2", **FEW, "gan": {**PIXELS, "real_ratio": real_ratio}}
        with counted(roles) as seen:
            method_of(roles, values, warm=False).step(batch, Rng(0, 0))
        return sum(role == TEACHER for role, _, _ in seen)

    assert teacher_forwards(batch, 1.0) == 1
    assert teacher_forwards(batch, 0.5) == 1 + 2
    assert teacher_forwards(replace(batch, teacher_x0=batch.x0), 0.5) == 1


# What DMD2 reads and does


@pytest.mark.parametrize("gan", [None, {**PIXELS, "real_ratio": 0}, {**LATENT, "real_ratio": 0}])
def test_without_a_share_of_real_images_none_is_touched(
    gan: dict[str, Any] | None, roles: Roles, batch: Batch
) -> None:
    """Real latents are poisoned: one look at them and everything is nan."""
    poisoned = replace(batch, x0=torch.full_like(batch.x0, float("nan")))
    method = method_of(roles, {"method": "dmd2", **FEW, "gan": gan})
    for step in range(2):
        values = method.step(poisoned, Rng(0, step))
        assert all(torch.isfinite(torch.tensor(v)) for v in values.values()), values
    assert "gan/accuracy_real" not in values
    assert all(torch.isfinite(p).all() for o in method.optimizers.values() for p in o.parameters)


def test_with_a_share_the_poison_is_seen(roles: Roles, batch: Batch) -> None:
    poisoned = replace(batch, x0=torch.full_like(batch.x0, float("nan")))
    method = method_of(roles, {"method": "dmd2", **FEW, "gan": {**PIXELS, "real_ratio": 0.1}})
    assert method.step(poisoned, Rng(0, 0))["loss/discriminator"] != pytest.approx(0, nan_ok=False)
    assert method.optimizers["discriminator"].skipped == 1


@pytest.mark.parametrize("features", [PIXELS, LATENT])
def test_the_adversarial_gradient_has_its_ratio_and_ramp(
    features: dict[str, Any], roles: Roles, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over what was seen before: ratio * ramp, times what the discriminator tells apart."""
    method = method_of(
        roles,
        {
            "method": "dmd2",
            **FEW,
            "gan": {**features, "ratio": 0.4, "by_accuracy": True, "ramp": 4},
        },
    )
    balance = method.gan.adversary.balance
    monkeypatch.setattr(balance, "accuracy", lambda value: told.append(value))
    told: list[float] = []
    logged = [method.step(batch, Rng(0, 0))]
    assert logged[0]["gan/weight"] == 0  # nothing is known of it
    for accuracy, ramp in ((0.8, 0.5), (0.8, 0.75), (0.8, 1.0), (0.3, 0.0)):
        edge = balance.averages["edge"] = Average()
        edge.add(2 * accuracy - 1)
        averages = deepcopy(balance.averages)
        weight = method.gan.adversary.weight(method.optimizers[STUDENT].updates)
        logged.append(method.step(batch, Rng(0, 0)))
        assert logged[-1]["gan/weight"] == weight
        if ramp:
            main, adversarial = (averages[name].value for name in ("main", "adversarial"))
            share = weight * adversarial / main
            assert share == pytest.approx(0.4 * ramp * 0.6, rel=1e-6)
        else:
            assert weight == 0
    assert len(told) == 5


def test_a_skipped_first_update_of_the_student_does_not_start_the_fake_score_again(
    roles: Roles, batch: Batch
) -> None:
    """Nor does a run that was saved and continued in between."""
    method = method_of(roles, {"method": "dmd2", **FEW, "fake_lr": 1e-2})
    student = method.optimizers[STUDENT]
    original, student.backward = student.backward, lambda loss, parts=1: original(loss * math.nan)
    method.step(batch, Rng(0, 0))
    assert (student.updates, student.skipped) == (0, 1)
    student.backward = original
    learnt = [p.detach().clone() for p in roles.parameters(FAKE)]
    pairs = zip(learnt, roles.parameters(STUDENT), strict=True)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in pairs)
    resumed = method_of(roles, {"method": "dmd2", **FEW}, warm=False)
    resumed.load_state_dict(deepcopy(method.state_dict()))
    for one in (method, resumed):
        starts: list[int] = []
        one._start_fake = lambda starts=starts: starts.append(1)
        one.step(batch, Rng(0, 1))
        assert starts == []


@pytest.mark.parametrize("decoupled", [False, True])
def test_score_times_stay_within_their_bounds_after_the_shift(
    decoupled: bool, roles: Roles, data: Any
) -> None:
    keys = {"method": "dmd2", **FEW, "t_min": 0.05, "t_max": 0.9, "shift": 5.0}
    method = method_of(roles, {**keys, "decoupled": decoupled})
    batch = Batch(torch.zeros(4000, 16, 1, 1), Text(torch.zeros(4000, 1, 1)))
    t = method._times(batch, Rng(0, 0), "t", 5.0, 0.05, 0.9)
    assert 0.05 <= t.min() < 0.06
    assert 0.89 < t.max() <= 0.9
    levels = flow.unshift(t, 5.0)  # uniform before the shift, without heaps at the bounds
    counts = torch.histc(levels, 10)
    assert (counts - 400).abs().max() < 80
    seen = []
    original = roles.teacher_pair if decoupled else roles.teacher

    def spied(x_t: torch.Tensor, time: torch.Tensor, *rest: Any) -> Any:
        seen.append(time)
        return original(x_t, time, *rest)

    setattr(roles, "teacher_pair" if decoupled else "teacher", spied)
    for step in range(20):
        method.step(data.batch(Rng(0, step), BATCH_SIZE), Rng(0, step))
    times = torch.cat(seen)
    if decoupled:  # less noise than the student's own step began with
        assert times.min() > 0
        assert times.max() <= 0.7155
    else:
        assert 0.05 <= times.min() < times.max() <= 0.9


def test_accuracy_is_told_by_source(roles: Roles, batch: Batch) -> None:
    values = method_of(roles, {"method": "dmd2", **FEW, "gan": PIXELS}).step(batch, Rng(0, 0))
    accuracies = {name for name in values if name.startswith("gan/accuracy")}
    assert accuracies == {f"gan/accuracy_{source}" for source in ("fake", "real", "teacher")}


def test_the_judges_features_are_the_bare_bases(
    roles: Roles,
    new_transformer: Callable[[], QwenImageTransformer2DModel],
    batch: Batch,
) -> None:
    """The known bug: a discriminator on the "teacher's" features with an adapter still on."""
    with torch.no_grad():
        for role in roles.adapters:
            for parameter in roles.parameters(role):
                parameter.add_(0.3)
    t = torch.tensor([0.2, 0.5, 0.9])
    bare = new_transformer()
    with torch.no_grad():
        expected = qwen_image.hidden_maps(bare, batch.x0, t, batch.text, [0, 1])
        with roles.use_role(STUDENT):
            got = roles.teacher_features(batch.x0, t, batch.text, (0.5, 1.0))
            student = qwen_image.hidden_maps(roles.transformer, batch.x0, t, batch.text, [0, 1])
    for a, b, c in zip(got, expected, student, strict=True):
        assert a.shape == (BATCH_SIZE, 32, 2, 2)
        assert torch.equal(a, b)
        assert not torch.allclose(a, c)


def test_where_the_fake_score_starts(roles: Roles, batch: Batch) -> None:
    t = torch.tensor([0.3, 0.7, 1.0])

    def start(init: str) -> torch.Tensor:
        with torch.no_grad():
            for parameter in roles.parameters(FAKE):
                parameter.fill_(0.2)
        values = {"method": "dmd2", **FEW, "fake_init": init}
        method = method_of(roles, values, warm=init == "student")
        method._start_fake()
        with torch.no_grad():
            return roles.velocity(FAKE, batch.x0, t, batch.text)

    with torch.no_grad():
        base = roles.velocity(TEACHER, batch.x0, t, batch.text)
    copied = start("student")
    with torch.no_grad():
        assert torch.equal(copied, roles.velocity(STUDENT, batch.x0, t, batch.text))
    assert not torch.allclose(copied, base)
    assert torch.equal(start("base"), base)
    assert not torch.allclose(start("keep"), base)


def test_the_fake_score_starts_once_and_then_learns(roles: Roles, batch: Batch) -> None:
    method = method_of(roles, {"method": "dmd2", **FEW, "fake_lr": 1e-2})
    starts = []
    original = roles.copy_adapter
    roles.copy_adapter = lambda *names: (starts.append(names), original(*names))  # type: ignore
    for step in range(3):
        method.step(batch, Rng(0, step))
    assert starts == [(STUDENT, FAKE)]
    pairs = zip(roles.parameters(STUDENT), roles.parameters(FAKE), strict=True)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in pairs)


def test_a_fake_score_of_larger_rank_starts_as_the_student_too(
    transformer: QwenImageTransformer2DModel, data: Any, batch: Batch
) -> None:
    roles = roles_of(transformer, data.negative, fake_rank=5)
    method_of(roles, {"method": "dmd2", **FEW})._start_fake()
    t = torch.tensor([0.3, 0.7, 1.0])
    with torch.no_grad():
        student, fake = (roles.velocity(r, batch.x0, t, batch.text) for r in (STUDENT, FAKE))
    assert torch.allclose(student, fake, atol=1e-6)
    with pytest.raises(ValueError, match="fake_rank"):
        roles.copy_adapter(FAKE, STUDENT)


def test_implicit_distribution_alignment_blends_the_weights(roles: Roles, batch: Batch) -> None:
    method = method_of(roles, {"method": "dmd2", **FEW, "ida": 0.75})
    blended: list[torch.Tensor] = []
    original = roles.blend_adapter

    def blend(source: str, target: str, keep: float) -> None:
        a, b = roles.parameters(source)[0], roles.parameters(target)[0]
        blended.append(keep * b.detach() + (1 - keep) * a.detach())
        original(source, target, keep)

    roles.blend_adapter = blend  # type: ignore[method-assign]
    method.step(batch, Rng(0, 0))
    assert torch.allclose(blended[0], roles.parameters(FAKE)[0], atol=1e-7)


def test_the_fake_score_warms_up(roles: Roles, batch: Batch) -> None:
    values = {"method": "dmd2", "fake_updates": 1, "fake_warmup": 2, "fake_warmup_updates": 3}
    method = method_of(roles, {**values, "gradient_step": "last"})
    counts = []
    for step in range(4):
        before = method.optimizers[FAKE].updates
        method.step(batch, Rng(0, step))
        counts.append(method.optimizers[FAKE].updates - before)
    assert counts == [3, 3, 1, 1]


def test_the_step_with_gradient_is_one_for_all_ranks_and_varies(roles: Roles, batch: Batch) -> None:
    values = {"method": "dmd2", **FEW, "gradient_step": "random"}
    method = method_of(roles, values, RENOISE)

    def step_of(step: int, rank: int) -> int:
        with torch.no_grad():
            return method._sample(batch, Rng(0, step, rank, 2), "dmd2/student")[1]

    assert [step_of(i, 0) for i in range(12)] == [step_of(i, 1) for i in range(12)]
    assert {step_of(i, 0) for i in range(12)} == {0, 1, 2}


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_two_ranks_with_half_the_batch_see_the_same(
    ratio: float, new_transformer: Callable[[], QwenImageTransformer2DModel], data: Any
) -> None:
    """Mean of two ranks' student gradients = one rank's with double batch (fixed weight, whose mean
    over ranks needs no communication).
    """
    values = {"method": "dmd2", **FEW, "fake_updates": 1, "fake_init": "base", "fake_lr": 1e-12,
              "gan": {**PIXELS, "real_ratio": ratio, "weight": 0.1, "lr": 1e-12}}  # fmt: skip

    def gradient(batch_size: int, rng: Rng) -> torch.Tensor:
        roles = roles_of(new_transformer(), data.negative)
        method, found = method_of(roles, values), []
        student = method.optimizers[STUDENT]
        student.update = lambda: found.extend(p.grad for p in student.parameters) or {}
        method.step(data.batch(rng, batch_size), rng)
        return torch.cat([g.flatten() for g in found if g is not None])

    whole = gradient(4, Rng(0, 0))
    parts = [gradient(2, Rng(0, 0, rank, 2)) for rank in range(2)]
    clip = 1.0
    assert all(g.norm() <= clip for g in (whole, *parts)), "clipped: nothing to compare"
    assert torch.allclose(whole, sum(parts) / 2, atol=1e-5 * whole.norm().item())


# Configuration


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"method": "dmd2", "gan": {"crop": 8, "halo": 4}}, ["gan", "halo", "8", "4"]),
        ({"method": "dmd2", "gan": {"layers": [0.5, 1.5]}}, ["layers", "1.5"]),
        ({"method": "dmd2", "t_min": 0.9, "t_max": 0.1}, ["t_min", "0.9"]),
        ({"method": "dmd2", "gan": {"real_ration": 1}}, ["real_ration", "'real_ratio'"]),
        ({"method": "dmd2", "fake_update": 1}, ["fake_update", "'fake_updates'"]),
        ({"method": "dmd"}, ["dmd", "dmd2"]),
        ({"method": "progressive", "target": "ema"}, ["target"]),
    ],
)
def test_a_mistaken_stage_is_named(stage: dict[str, Any], words: list[str]) -> None:
    values = {"model": {"path": "tiny"}, "data": "tiny", "stages": [{"steps": 1, **stage}]}
    with pytest.raises(ConfigError) as error:
        parse_config(values, "test.yaml")
    for word in words:
        assert word in str(error.value)


def test_stages_say_which_adapters_they_train_and_how_they_are_called() -> None:
    assert stage_of(CASES["pcm"][0]).adapters == (STUDENT,)
    assert stage_of(CASES["dmd2"][0]).adapters == (STUDENT, FAKE)
    labels = [stage_of(CASES[case][0]).label for case in ("pcm", "dmd2", "dmd2+gan pixels")]
    assert labels == ["pcm", "dmd2", "dmd2+gan"]


@pytest.mark.parametrize("case", ["pcm", "dmd2", "dmd2 options", "progressive"])
def test_a_stage_may_have_its_own_guidance(case: str, roles: Roles, batch: Batch) -> None:
    scales: list[float] = []

    def spied(*args: Any) -> Any:
        scales.append(args[5])
        return qwen_image.velocity_pair(*args)

    roles.family = replace(roles.family, velocity_pair=spied)
    values, spec = CASES[case]
    method_of(roles, values, spec).step(batch, Rng(0, 0))
    assert set(scales) == {3.0}  # the recipe's
    scales.clear()
    method_of(roles, {**values, "guidance_scale": 1.5}, spec).step(batch, Rng(0, 1))
    assert set(scales) == {1.5}
