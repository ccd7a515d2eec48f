"""The speed benchmark's own arithmetic, and its trainer half at toy size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.speed import measure, train
from benchmarks.speed.flops import FlopsByDtype
from benchmarks.speed.measure import Budget, Clock, Line, Spread, in_turns
from benchmarks.speed.report import ratios, stage_table
from benchmarks.speed.targets import Target, speed_targets, target_table

CPU = torch.device("cpu")


def test_arms_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def run(name: str, clock: Clock) -> None:
        order.append(name)
        clock.seconds["a"], clock.seconds["b"] = float(len(order)), 10.0

    arms = {name: partial(run, name) for name in "ABC"}
    found = in_turns(arms, CPU, rounds=3, budget=Budget(60))
    assert "".join(order) == "ABCABCABCABC"
    assert found["B"]["a"] == Spread(median=8, low=5, high=11, count=3)
    assert found["B"][measure.TOTAL] == Spread(18, 15, 21, 3)


def test_a_budget_ends_after_a_whole_round_and_says_so() -> None:
    runs: list[str] = []
    arms = {name: (lambda clock, name=name: runs.append(name)) for name in "AB"}
    budget = Budget(0)
    in_turns(arms, CPU, rounds=4, budget=budget, total=False)
    assert "".join(runs) == "ABAB"  # the one that does not count, and one that does
    assert budget.skipped == ["3 of 4 rounds of A, B"]
    assert not budget.allows("the rest", 5)
    assert budget.skipped[1] == "the rest: 5 s expected, 0 s left"


def test_a_clock_adds_up_a_stage() -> None:
    clock = Clock(CPU)
    for _ in range(2):
        with clock("wait"):
            torch.zeros(10).sum()
    assert list(clock.seconds) == ["wait"]
    assert 0 < clock.seconds["wait"] < 1


def test_a_line_through_points() -> None:
    line = Line.through([1, 2, 4], [5, 7, 11])
    assert (line.intercept, line.slope) == pytest.approx((3, 2))
    assert line.r2 == pytest.approx(1)
    assert Line.through([1, 2, 3, 4], [1, -1, 1, -1]).r2 < 0.3


def test_tables() -> None:
    stages = {
        "A": {"total": Spread(3, 2.5, 4, 5), "load": Spread(0.00012, 0.0001, 0.0002, 5)},
        "C": {"total": Spread(2, 2, 2, 1)},
    }
    assert stage_table(stages).splitlines()[0].split() == [
        "|",
        "seconds",
        "|",
        "load",
        "|",
        "total",
        "|",
    ]
    assert "3 (2.5 to 4)" in stage_table(stages)
    assert ratios(stages, "total", "C") == "total: A / C: 1.50x"


def test_an_arm_without_memory_is_left_out_and_said_so() -> None:
    def full(clock: Clock) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def run(clock: Clock) -> None:
        clock.seconds["a"] = 1
        clock.moments[measure.FIRST] = 0.5

    budget = Budget(60)
    found = in_turns({"full": full, "runs": run}, CPU, rounds=2, budget=budget)
    one, half = Spread(1, 1, 1, 2), Spread(0.5, 0.5, 0.5, 2)
    assert found == {"runs": {"a": one, measure.TOTAL: one, measure.FIRST: half}}
    assert budget.skipped == ["full: CUDA out of memory."]
    header = stage_table(found).splitlines()[0].replace(" ", "")
    assert header == "|seconds|a|total|firstimage|"


def spreads(total: float, first: float) -> dict[str, Spread]:
    pair = zip((measure.TOTAL, measure.FIRST), (total, first), strict=True)
    return {stage: Spread(value, value, value, 3) for stage, value in pair}


def test_targets_are_computed_from_our_fastest_arm() -> None:
    found = {"A d": spreads(8, 2), "B c": spreads(8.4, 2), "C x": spreads(6, 1)}
    best, targets = speed_targets(found | {"C y": spreads(4.9, 1.6)})
    assert best == "C y"
    assert [target.verdict for target in targets] == ["met", "missed", "met", "missed"]
    assert [target.found for target in targets] == pytest.approx([4.9, 1.6, 8.4 / 4.9, 8 / 4.9])
    text = target_table(targets, "a card")
    assert [cell.strip() for cell in text.splitlines()[2].split("|")[2:5]] == [
        "under 5 s",
        "4.9 s",
        "met",
    ]
    best, targets = speed_targets({})
    assert best is None
    assert {target.verdict for target in targets} == {"not measured"}
    without_a = speed_targets({"B c": spreads(8.4, 2), "C x": spreads(6, 1)})[1]
    assert [target.verdict for target in without_a] == ["missed", "met", "missed", "not measured"]


def test_a_limit_itself_is_not_under_it() -> None:
    assert Target("x", 5.0, "s", 5.0).verdict == "missed"
    assert Target("x", 1.7, "x", 1.7, at_least=True).verdict == "met"


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The step of AdamW in 8 bits, of which test_adam.py tries the compiled one."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("samples", [1, 2])
def test_every_choice_of_the_trainer_takes_the_same_step(samples: int) -> None:
    """Side by side they may differ in speed only: same weights and random numbers, same loss."""
    losses = {}
    choices = dict.fromkeys(train.CHOICES + train.BF16_CHOICES)  # in float32 here
    for choice in (choice for choice in choices if choice.samples == samples):
        trainee = train.Trainee(train.SMALL, 32, CPU, rank=4)
        losses[choice.name] = [trainee.step(choice, Clock(CPU)) for _ in range(2)][-1]
    first, *others = losses.values()
    assert first["loss/dmd"] > 0
    assert others
    for other in others:
        assert other == pytest.approx(first, rel=1e-3)


@pytest.mark.usefixtures("uncompiled")
def test_the_trainers_report(tmp_path: Path) -> None:
    train.run(small=True, rounds=1, budget=Budget(120), out=tmp_path)
    saved = json.loads((tmp_path / "speed_train_cpu.json").read_text())
    wide, low = (value for name, value in saved.items() if "blocks of width" in name)
    assert set(wide["table"]) == {choice.name for choice in train.CHOICES}
    assert set(low["table"]) == {choice.name for choice in train.BF16_CHOICES}
    rows = [*wide["table"].values(), *low["table"].values()]
    assert all(row[clock]["median"] > 0 for row in rows for clock in ("iteration", train.PROCESSOR))
    text = (tmp_path / "speed_train_cpu.md").read_text()
    assert "| teacher in two calls" in text
    assert text.endswith("## Skipped\n\nnothing\n")

    ours, pefts, host = low["counts"].values()
    assert ours["GFLOP in float32"] == 0
    assert pefts["GFLOP in float32"] > 0
    kinds = ("GFLOP in bfloat16", "GFLOP in float32")
    together = [sum(row[kind] for kind in kinds) for row in (ours, pefts)]
    assert together[0] == pytest.approx(together[1])
    assert 0 < host["modulation computed, times"] < ours["modulation computed, times"]


def test_flops_are_counted_by_precision_and_backward_too() -> None:
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 5)
    with FlopsByDtype() as counted:
        (a @ b).sum().backward()
        (a.detach().bfloat16() @ b.bfloat16()).sum()
    one = 2 * 2 * 3 * 5
    assert counted.flops == {torch.float32: 2 * one, torch.bfloat16: one}
