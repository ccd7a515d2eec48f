"""The GPU benchmark's harness: what is on disk when a section fails, is cut off or does not fit;
its verdicts; its products in fp8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import fp8, parts, products, training
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.results import CUT_OFF, FAILED, MEASURED, SKIPPED, Entry, Results
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.speed.measure import FIRST, TOTAL, Budget, Spread
from benchmarks.speed.train import GPU_CHOICES, SMALL, Trainee

CPU = torch.device("cpu")


def good(lab: Lab) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"first": 1}, "one"
    yield {"first": 1, "second": Spread(2, 1, 3, 4)}, "one and two"


def full(lab: Lab) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"first": 1}, "one"
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


def stopped(lab: Lab) -> Iterator[tuple[dict[str, Any], str]]:
    yield {"first": 1}, "one"
    raise KeyboardInterrupt


def nothing(lab: Lab) -> Iterator[tuple[dict[str, Any], str]]:
    lab.budget.skip("not here")
    yield from ()


def sections(monkeypatch: pytest.MonkeyPatch, **runs: Any) -> list[str]:
    found = tuple(Section(key, f"About {key}", 5, 2, run) for key, run in runs.items())
    monkeypatch.setattr(command, "SECTIONS", found)
    return list(runs)


def saved(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_text())["sections"]


def test_a_section_that_fails_says_so_and_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sections(monkeypatch, full=full, nothing=nothing, good=good)
    command.run(keys, small=True, out=tmp_path)
    found = saved(tmp_path)
    assert [found[key]["status"] for key in keys] == [FAILED, SKIPPED, MEASURED]
    assert found["full"]["notes"] == ["OutOfMemoryError: CUDA out of memory."]
    assert found["full"]["values"] == {"first": 1}  # what was measured before is kept
    assert found["nothing"]["notes"] == ["not here"]
    assert found["good"]["values"]["second"] == {"median": 2, "low": 1, "high": 3, "count": 4}
    assert found["good"]["peak_gb"] is None
    text = (tmp_path / "gpu.md").read_text()
    assert "## About full\n\none\n\n- OutOfMemoryError" in text
    assert "| good    | measured |          5 |" in text


def test_what_is_cut_off_is_on_disk_and_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sections(monkeypatch, good=good, stopped=stopped)
    with pytest.raises(KeyboardInterrupt):
        command.run(keys, small=True, out=tmp_path)
    found = saved(tmp_path)
    assert [found[key]["status"] for key in keys] == [MEASURED, CUT_OFF]
    assert found["stopped"]["text"] == "one"

    keys = sections(monkeypatch, good=stopped, stopped=good)  # the first may not run again
    command.run(keys, small=True, out=tmp_path, skip_done=True)
    found = saved(tmp_path)
    assert [found[key]["status"] for key in keys] == [MEASURED, MEASURED]


def test_no_section_begins_without_its_time(tmp_path: Path) -> None:
    lab = Lab(True, 1, Budget(1), tmp_path)
    lab.small = False  # whose sections take the seconds that they are expected to
    results = Results("", {"device": "a card"}, tmp_path)
    entry = command.measure(Section("good", "About good", 5, 2, good), lab, results)
    assert (entry.status, entry.values) == (SKIPPED, {})
    assert saved(tmp_path)["good"]["notes"] == ["About good: 5 s expected, 1 s left"]


def test_a_gpu_is_needed_for_more_than_toy_size() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--small"):
        command.run(["machine"])
    with pytest.raises(SystemExit):
        command.main(["--sections", "machine,nothing"])


def stages(total: float) -> dict[str, Any]:
    spread = {"median": total, "low": total, "high": total, "count": 3}
    return {TOTAL: spread, FIRST: spread}


def test_verdicts_are_about_what_the_pack_has(tmp_path: Path) -> None:
    results = Results("", {"device": "a card"}, tmp_path)
    arms = {"A": 9, "B": 8, "C as shipped": 6, f"C other ({command.EXPERIMENT})": 4}
    table = {name: stages(total) for name, total in arms.items()}
    results.add(Entry("bf16 2048", "", MEASURED, 0, 0, values={"table": table}))
    step = {"iteration": {"median": 1.7}, "peak GB": 66.0}
    own = {GPU_CHOICES[0].name: step}
    results.add(Entry("training", "", CUT_OFF, 0, 0, values=own))
    values, text = command.verdicts(results, small=False)
    assert values["C"] == "C as shipped"
    found = [target["verdict"] for target in values["targets"]]
    assert found == ["missed", "missed", "missed", "missed", "met", "missed"]
    assert [target["verdict"] for target in values["with it"]] == ["met", "missed", "met", "met"]
    assert "| target, on a card " in text
    values, _ = command.verdicts(results, small=True)
    assert {target["verdict"] for target in values["targets"]} == {"not measured"}


def test_the_experiments_attention_has_to_pass_and_to_win() -> None:
    def rows(experiment: float, passes: bool = True) -> dict[str, Any]:
        found = {"cudnn": (3.0, True), f"fp8 {parts.EXPERIMENT}": (experiment, passes)}
        return {name: {"s": {"median": s}, "passes": ok} for name, (s, ok) in found.items()}

    assert parts.fastest_fp8({}) == ""
    assert parts.fastest_fp8({"64": rows(4), "128": rows(2)}) == f"fp8 {parts.EXPERIMENT}"
    assert parts.fastest_fp8({"64": rows(2), "128": rows(4)}) == ""  # most tokens count
    assert parts.fastest_fp8({"64": rows(2, passes=False)}) == ""


@pytest.mark.parametrize("quantise", [fp8.per_tensor, fp8.per_row])
def test_products_in_fp8(quantise: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((40, 64), (32, 64), 32)
    )
    exact = torch.nn.functional.linear(x, weight, bias)
    y = fp8.product(quantise(x), fp8.per_tensor(weight), bias, x.dtype)
    assert 1e-3 < (y - exact).norm() / exact.norm() < 0.05


def test_a_scale_per_row_is_for_rows_that_differ() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e6
    values, scale = fp8.per_row(x)
    assert ((values.float() * scale - x)[1:].norm() / x[1:].norm()) < 0.04
    values, scale = fp8.per_tensor(x)
    assert ((values.float() * scale - x)[1:].norm() / x[1:].norm()) > 0.9


def test_steps_come_one_choice_after_another_with_their_phases() -> None:
    trainee = Trainee(SMALL, 32, CPU, rank=4, dtype=torch.bfloat16)
    budget = Budget(60)
    found = [values for values, _ in training.steps(trainee, GPU_CHOICES[:2], 1, budget, 0)]
    (own, pefts) = found[-1].values()
    assert own["iteration"].median > 0
    assert own["peak GB"] is None  # no GPU to ask
    phases = {name: phase["seconds"] for name, phase in own["phases"].items()}
    whole = sum(seconds for name, seconds in phases.items() if not name.startswith("of that"))
    assert len(phases) == 5
    assert 0 < phases["of that, the teacher"] < whole
    assert list(pefts["phases"]) == list(own["phases"])
    assert list(trainee.methods) == [GPU_CHOICES[1]]  # the other's optimisers are gone


def test_the_published_qwen_image_21_has_7_billion_parameters() -> None:
    with torch.device("meta"):
        model = training.QwenImage21Transformer2DModel()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.1e9, rel=0.01)
    adapted = [
        name for name, _ in training.adapted_21(model).named_parameters() if "lora_A" in name
    ]
    assert len(adapted) == 32 * len(training.ADAPTED)


def test_shapes_count_their_operations() -> None:
    assert products.Shape(4, 3, 2).operations == 48
    assert {section.key for section in SECTIONS} >= {"machine", "training", "2.1", "t2"}
