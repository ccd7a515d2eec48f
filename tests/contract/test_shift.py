"""Schedules by the size of the image: every rule against diffusers' own scheduler."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from distill.contract.checks import SpecError
from distill.contract.latent_grid import GRIDS, sigmas_at, sigmas_text
from distill.contract.shift import (
    EmpiricalShift,
    ExponentialShift,
    LinearShift,
    Shift,
    StaticShift,
    parse_shift,
)
from distill.contract.spec import TurboSpec

SIZES = ((512, 512), (1024, 1024), (2048, 2048), (928, 1664))
VIGGLE = (1.0, 0.9375, 0.875, 0.75, 0.5, 0.25, 0.0)
UNIFORM = (1.0, 0.75, 0.5, 0.25, 0.0)
LINEAR = LinearShift((256, 8192), (0.5, 0.9))
KLEIN = EmpiricalShift((10, 200), (8.73809524e-05, 0.00016927), (1.89833333, 0.45666666), 4300)
Mu = Callable[[int, int], float]

RULES: dict[str, tuple[Shift | None, dict[str, Any], Mu | None]] = {
    "none": (None, {}, None),
    "static": (StaticShift(3.0), {"shift": 3.0}, None),
    "exponential": (ExponentialShift(math.log(2.5)), {}, lambda tokens, steps: math.log(2.5)),
    "linear": (LINEAR, {}, lambda tokens, steps: calculate_shift(tokens, 256, 8192, 0.5, 0.9)),
    "empirical": (KLEIN, {}, compute_empirical_mu),
}


def of_diffusers(
    nodes: tuple[float, ...], tokens: int, config: dict[str, Any], mu: Mu | None, **more: Any
) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=mu is not None, **config, **more
    )
    steps = len(nodes) - 1
    value = None if mu is None else mu(tokens, steps)
    scheduler.set_timesteps(sigmas=np.array(nodes[:-1]).tolist(), mu=value)
    return list(scheduler.sigmas.tolist())


@pytest.mark.parametrize("terminal", [None, 0.02, 0.7155])
@pytest.mark.parametrize("nodes", [VIGGLE, UNIFORM, (1.0, 0.5, 0.0)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_diffusers_scheduler_gives_the_same(
    rule: str, size: tuple[int, int], nodes: tuple[float, ...], terminal: float | None
) -> None:
    shift, config, mu = RULES[rule]
    spec = TurboSpec(nodes, shift, terminal, family="qwen-image-2.1")
    tokens = size[0] // 16 * (size[1] // 16)
    expected = of_diffusers(nodes, tokens, config, mu, shift_terminal=terminal)
    assert sigmas_at(spec, size) == spec.sigmas(tokens) == pytest.approx(expected, abs=1e-6)


def test_the_most_used_few_step_lora_of_qwen_image_21() -> None:
    spec = TurboSpec(VIGGLE, LINEAR, family="qwen-image-2.1")
    assert LINEAR.factor(4096, 6) == pytest.approx(math.exp(0.6935), abs=1e-4)
    assert LINEAR.factor(16384, 6) == pytest.approx(math.exp(1.3129), abs=2e-4)
    assert sigmas_at(spec)[5] == pytest.approx(0.4001, abs=5e-5)
    assert sigmas_at(spec, (2048, 2048))[5] == pytest.approx(0.5534, abs=5e-5)
    assert "(at 1024x1024; other sizes have others)" in sigmas_text(spec)


@pytest.mark.parametrize("shift", [shift for shift, _, _ in RULES.values()])
def test_a_rule_is_the_same_after_json(shift: Shift | None) -> None:
    assert parse_shift(shift and json.loads(json.dumps(shift.to_json()))) == shift
    spec = TurboSpec(VIGGLE, shift, guidance=2.5)  # which version 1 cannot say
    assert (spec.version, TurboSpec.from_json(spec.to_json())) == (2, spec)


def test_what_version_1_can_say_is_written_as_version_1() -> None:
    spec = TurboSpec((1.0, 0.5, 0.0), ExponentialShift(math.log(2.5)), 0.7155)
    written = json.loads(spec.to_json())
    assert written["version"] == 1
    assert "nodes" not in written
    assert "shift" not in written
    assert written["sigmas"] == list(spec.sigmas()) == [1.0, 0.7155, 0.0]
    assert TurboSpec.from_json(spec.to_json()).sigmas(9999) == spec.sigmas()


@pytest.mark.parametrize(
    "more",
    [
        {"shift": LINEAR},
        {"guidance": 2.5},
        {"strength": (1.0, 0.9, 0.8, 0.7)},
        {"ladder": ((1.0, 0.5, 0.0),)},
        {"boundary": 2},
    ],
)
def test_what_it_cannot_say_is_version_2(more: dict[str, Any]) -> None:
    spec = TurboSpec(UNIFORM, **more)
    assert json.loads(spec.to_json())["version"] == 2
    assert TurboSpec.from_json(spec.to_json()) == spec


def test_a_schedule_by_size_needs_the_size() -> None:
    spec = TurboSpec(UNIFORM, LINEAR, family="of nobody")
    with pytest.raises(SpecError, match="depend on the size of the image"):
        spec.sigmas()
    with pytest.raises(SpecError, match=r"family: expected one of .*; found 'of nobody'"):
        sigmas_at(spec)
    assert sigmas_text(spec) == "1, 0.75, 0.5, 0.25, 0 before a shift by the size of the image"
    assert sigmas_at(TurboSpec(UNIFORM, StaticShift(3), family="of nobody"))[0] == 1


def test_other_numbers_of_steps_are_offered() -> None:
    eight = tuple(n / 8 for n in range(8, -1, -1))
    spec = TurboSpec(UNIFORM, StaticShift(3.0), ladder=(eight, (1.0, 0.0)))
    assert (spec.steps, spec.step_counts) == (4, (1, 4, 8))
    assert spec.in_steps(8).nodes == eight
    assert spec.in_steps(8).step_counts == (1, 4, 8)
    assert spec.in_steps(4) == spec
    with pytest.raises(SpecError, match="trained for 1, 4 or 8 steps; found 2"):
        spec.in_steps(2)
    by_hand = spec.with_sigmas((1, 0.5, 0))
    assert (by_hand.nodes, by_hand.shift, by_hand.ladder) == ((1.0, 0.5, 0.0), None, ())


def test_tokens_of_a_size() -> None:
    assert GRIDS["qwen-image-2.1"].tokens(1024, 1024) == GRIDS["flux"].tokens(1024, 1024) == 4096
    assert GRIDS["qwen-image"].tokens(928, 1664) == 58 * 104
    assert GRIDS["flux"].of_latents(3, 5) == 2 * 3, "padded to whole tokens"


def test_numbers_are_kept_as_numbers() -> None:
    """Of a tensor, or a whole number for a float."""
    shift = StaticShift(torch.tensor(3.0))
    assert (type(shift.shift), type(ExponentialShift(1).mu)) == (float, float)
    more = {"slope": [0, 0], "intercept": [1, 2], "limit": 4300.0}
    empirical = parse_shift({"rule": "empirical", "steps": [10, 200], **more})
    assert isinstance(empirical, EmpiricalShift)
    assert type(empirical.limit) is int
    for rule in (shift, empirical):
        spec = TurboSpec((1, 0.5, 0), shift=rule, guidance=1)
        assert TurboSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("terminal", [None, 0.02])
def test_levels_that_a_shift_moves_into_each_other_are_no_spec(terminal: float | None) -> None:
    """Told where the spec is read, and by size where the size is known."""
    close = (1.0, 1 - 1e-10, 0.0)
    with pytest.raises(SpecError, match=r"sigmas: expected strictly|terminal: cannot"):
        TurboSpec(close, shift=StaticShift(4e8), terminal=terminal)
    with pytest.raises(SpecError, match=r"sigmas: expected strictly|terminal: cannot"):
        TurboSpec((1.0, 0.5, 0.0), ladder=(close,), shift=StaticShift(4e8), terminal=terminal)
    by_size = TurboSpec(
        (1.0, 1 - 2**-53, 0.0), shift=LinearShift((1, 2), (0, 19)), terminal=terminal
    )
    assert by_size.sigmas(1)[0] == 1
    with pytest.raises(SpecError, match=r"sigmas: expected strictly|terminal: cannot"):
        by_size.sigmas(2)
