"""report.html of a run: what it says, and that training neither waits for it nor dies of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.cli import main
from distill.config import Config, ConfigError, GatesSection, parse_config, save_config
from distill.data.batch import Data
from distill.trainer import train
from distill.training import report
from distill.training import run_reader as runs
from distill.training.curves import POINTS, charts, draw, series
from distill.training.report import Reporter, gate_row, spread, write_report

GATES = ["diversity is 0.50 times the teacher's, expected at least 0.75 (gates.diversity_min)"]


def preview_line(step: int, diversity: float, failed: list[str]) -> dict:
    return {
        "step": step,
        "stage": "dmd2",
        "preview/diversity": 3.0,
        "preview/diversity_ratio": diversity,
        "preview/score": abs(math.log(diversity)),
        "preview/failed": failed,
    }


def step_line(step: int, **values: float | None) -> dict:
    speed = {"seconds_per_step": 2.0, "samples_per_second": 4.0, "memory_gib": 1.5, "skipped": 0}
    return {"step": step, "stage": "pcm", **values, **speed}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 40 steps that was stopped after 30; step 20 is the best so far."""
    folder = tmp_path / "run"
    stages = [{"method": "pcm", "steps": 10}, {"method": "dmd2", "steps": 30, "batch": 8}]
    values = {
        "run_dir": str(folder),
        "name": "a <b>& c",
        "model": {"path": "tiny"},
        "select": "best",
    }
    save_config(parse_config({**values, "stages": stages}, "test"), folder / "config.yaml")
    lines = [
        step_line(10, **{"loss/pcm": 0.5, "grad_norm/student": 1.0}),
        step_line(20, **{"loss/dmd": None, "grad_norm/student": 0.1}),
        preview_line(20, 0.96, []),
        step_line(30, **{"loss/dmd": 0.25, "grad_norm/student": 0.2}),
        preview_line(30, 0.5, GATES),
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4'
    (folder / "log.jsonl").write_text(text)
    (folder / "best.json").write_text(json.dumps({"best": 20, "candidates": []}))
    (folder / "machine.json").write_text(json.dumps({"device": "Abacus 3000", "torch": "9.9"}))
    (folder / "previews").mkdir()
    for step in (20, 30):
        pixels = np.full((40, 1200, 3), step, np.uint8)
        Image.fromarray(pixels).save(folder / "previews" / f"step-{step:06d}.png")
    return folder


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]).split())


def test_what_the_page_says(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    text = text_of(page)
    for words in (
        "a &lt;b&gt;&amp; c",  # escaped
        "Not finished: step 30 of 40",
        "30 of 40 (75 %)",
        "all passed step 20",
        "pcm 1 - 10",
        "dmd2 11 - 40",
        "67 %",  # of the second stage
        "Abacus 3000",
        "diversity distance between images of a prompt 0.96 ≥ 0.75 passed",
        "Chosen among 2 previews of the last stage",
        "chosen step 20, dmd2 · distance 0.0408",
        "step 30, dmd2 · distance 0.693 · 1 gate failed",
        "1 min 00 s",  # 30 steps of 2 seconds
        "log.jsonl",
    ):
        assert words in text, words


def test_the_page_needs_nothing_else(run_dir: Path) -> None:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert not re.findall(r"url\((?!#)[^)]*\)|@import", page)
    assert page.count('src="data:image/webp;base64,') == 2
    assert 'width="960" height="32"' in page  # scaled down
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # of all drawings together


def test_a_page_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    stages = [{"method": "pcm", "steps": 10}]
    values = {"run_dir": str(tmp_path), "model": {"path": "tiny"}, "stages": stages}
    config = parse_config(values, "test")
    save_config(config, tmp_path / "config.yaml")
    text = text_of(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "step 0 of 10" in text
    assert "not recorded" in text
    assert "Previews" not in text


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml is missing"):
        write_report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_command(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    out = tmp_path / "mine.html"
    assert main(["report", str(run_dir), "--out", str(out), "--open", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["report"], found["step"], found["chosen_step"]) == (str(out), 30, 20)
    assert found["preview"]["ratios"] == {"diversity": 0.96}
    assert found["training_seconds"] == 60
    assert found["finished"] is False
    assert opened == [out.as_uri()]
    assert not (run_dir / "report.html").exists()


def test_curves_are_thinned_out_and_skip_what_is_not_finite() -> None:
    count = 10 * POINTS
    lines = [{"step": i, "x": None if i % 2 else float(i)} for i in range(count)]
    curve = series(lines, "x")
    assert len(curve.steps) == len(curve.values) == POINTS
    assert curve.steps == curve.values
    assert sum(curve.values) / POINTS == pytest.approx(count / 2 - 1)
    assert series(lines, "y").steps == ()


def test_charts(run_dir: Path) -> None:
    found = {chart.title: chart for chart in charts(runs.read_run(run_dir))}
    assert found["loss/pcm"].series[0].values == (0.5,)
    assert found["loss/dmd"].series[0].steps == (30.0,)
    assert found["gradient norms"].log
    assert found["gradient norms"].series[0].steps == (10.0, 20.0, 30.0)
    ratio = found["previews: ratio to the teacher (1 = alike)"]
    assert ratio.mark == 20
    assert [curve.label for curve in ratio.series] == ["diversity"]
    svg = draw(ratio, (10, 40))
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_pictures_are_spread_over_the_run_with_the_chosen_one() -> None:
    steps = list(range(10, 1010, 10))
    for chosen in (None, 10, 500, 990, 1000, 7):
        shown = spread(steps, 12, chosen)
        assert len(shown) == 12
        assert {10, 1000} <= set(shown)
        assert chosen in shown or chosen in (None, 7)
        assert shown == sorted(shown)
        assert max(b - a for a, b in pairwise(shown)) <= 190
    assert spread([1, 2], 12, 2) == [1, 2]


def test_what_a_gate_allows() -> None:
    section = GatesSection(sharpness_min=0.5, sharpness_max=2, chroma_max=1.25)
    rows = [gate_row(name, 1.5, section) for name in ("sharpness", "chroma", "contrast")]
    assert [row["allowed"] for row in rows] == ["0.5 to 2", "≤ 1.25", "any"]
    assert [row["verdict"] for row in rows] == ["passed", "failed", ""]
    assert gate_row("sharpness", math.nan, section)["verdict"] == "failed"


def test_training_writes_it_and_goes_on_without(
    small_config: Callable[..., Config],
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At every preview and checkpoint, and at the end; what goes wrong there costs no run."""
    written: list[str] = []

    def write(run_dir: Path) -> None:
        written.append(runs.read_run(run_dir).step)
        if len(written) == 2:
            raise OSError("no space for a page")
        write_report(run_dir)

    monkeypatch.setattr(report, "write_report", write)
    monkeypatch.setattr(report, "EVERY_S", 0)
    preview = {"every": 4, "prompts": 2, "images": 2, "teacher_steps": 2}
    config = small_config(preview=preview, save_every=4)
    lora = train(config, data=data)
    assert lora.is_file()
    assert written == [4, 4, 8, 8, 8]  # preview and checkpoint twice, then the LoRA
    assert "no space for a page" in caplog.text
    assert "training goes on" in caplog.text
    text = text_of((config.run_dir / "report.html").read_text(encoding="utf-8"))
    assert "8 of 8 (100 %)" in text
    assert "The finished LoRA" in text
    assert "Not finished" not in text
    assert "CPU" in text
    assert not list(config.run_dir.glob(".*.tmp"))


def test_a_page_is_no_burden(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often training asks, at most one in EVERY_S seconds; at the end always."""
    clock = [100.0]
    written: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(report, "write_report", lambda folder: written.append(clock[0]))
    reporter = Reporter(run_dir, writes=True)
    for clock[0] in (100, 101, 100 + report.EVERY_S, 101 + report.EVERY_S):
        reporter.keep()
    reporter.keep(now=True)
    assert written == [100, 100 + report.EVERY_S, 101 + report.EVERY_S]
    Reporter(run_dir, writes=False).keep(now=True)  # another rank
    assert len(written) == 3
