"""The embedded LoRA and the demo's judgement of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.commands import demo
from distill.contract.metadata import read_lora
from distill.contract.resolve import resolve_spec
from distill.contract.tiny import TINY_DIR
from distill.tiny import metrics as evaluate
from distill.tiny.metrics import LetterMetrics

GOOD = LetterMetrics(1.0, 1.0, 0.5, 0.26, 11.0, 0.026, 0.03, float("inf"))


def shipped_lora() -> Path:
    (path,) = (TINY_DIR / "lora").glob("*.safetensors")
    return path


def test_the_model_fits_its_budget() -> None:
    size = sum(file.stat().st_size for file in TINY_DIR.rglob("*") if file.is_file())
    assert size <= 12e6


def test_the_shipped_lora_carries_the_default_schedule() -> None:
    _, metadata = read_lora(shipped_lora())
    spec, source = resolve_spec(shipped_lora(), metadata)
    assert spec.sigmas() == (1.0, 0.7155, 0.0)
    assert source == "header of the file"


@pytest.mark.parametrize(
    ("figure", "value"),
    [("colour_accuracy", 0.96), ("background_spread", 0.2), ("intra_distance", 9.8),
     ("frechet", 0.71), ("psnr", 19.9)],
)  # fmt: skip
def test_each_gate_can_fail(figure: str, value: float) -> None:
    student = LetterMetrics(1.0, 1.0, 0.5, 0.26, 11.0, 0.026, 0.03, 25.0)
    assert all(gate.passed for gate in evaluate.gates(student, GOOD).values())
    worse = LetterMetrics(**{**vars(student), figure: value})
    failed = [name for name, gate in evaluate.gates(worse, GOOD).items() if not gate.passed]
    assert failed == [figure]


def test_an_earlier_result_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    for force in ([], ["--force"]):  # not even by force: it is no demo's folder
        args = demo_arguments(["--out", str(tmp_path), *force])
        with pytest.raises(FileExistsError, match="not empty"):
            demo.run(args)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_lora_in_the_folder_to_overwrite_survives(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("{}")
    lora = tmp_path / "mine.safetensors"
    lora.write_bytes(shipped_lora().read_bytes())
    args = demo_arguments(["--out", str(tmp_path), "--force", "--lora", str(lora)])
    with pytest.raises(FileExistsError, match="another folder"):
        demo.run(args)
    assert lora.is_file()


def test_a_lora_that_is_none_removes_nothing(tmp_path: Path) -> None:
    (tmp_path / "figures.json").write_text("{}")
    args = demo_arguments(["--out", str(tmp_path), "--force", "--lora", "missing.safetensors"])
    with pytest.raises(FileNotFoundError, match="missing"):
        demo.run(args)
    assert (tmp_path / "figures.json").is_file()


def demo_arguments(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
def test_the_shipped_lora_passes_the_gates_and_the_undistilled_model_does_not() -> None:
    torch.manual_seed(0)
    studio = demo.Studio(demo.demo_config(Path("unused"), 0), shipped_lora())
    teacher, naive, student = studio.metrics(seed=5).values()
    assert all(gate.passed for gate in evaluate.gates(student, teacher).values())
    assert not any(gate.passed for gate in evaluate.gates(naive, teacher).values())
