"""Which student a run keeps, and what a continued run still knows of it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config import ConfigError, GatesSection
from distill.contract.metadata import tensor_sha256
from distill.evaluation.gates import teacher_distance
from distill.training.selection import Candidate, Selection

GATES = GatesSection()


def candidate(step: int, sharpness: float = 1.0, diversity: float = 1.0) -> Candidate:
    return Candidate(step, {"sharpness": sharpness, "diversity": diversity})


def write_with_hash(path: Path, step: int) -> None:
    """As `write_lora` does it: the hash of the bytes after the header is in the header."""
    save_file({"step": torch.tensor(step)}, path)
    save_file(
        {"step": torch.tensor(step)}, path, {"modelspec.hash_sha256": f"0x{tensor_sha256(path)}"}
    )


def offer(selection: Selection, *args: float, checkpoints: tuple[int, ...] = ()) -> bool:
    """A LoRA file that holds its own step."""
    new = candidate(*args)

    def export(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        write_with_hash(path, new.step)

    return selection.offer(new, export, checkpoints)


def files(run_dir: Path) -> list[int]:
    return sorted(int(load_file(path)["step"]) for path in (run_dir / "lora").iterdir())


def listed(run_dir: Path) -> tuple[int | None, list[int]]:
    value = json.loads((run_dir / "best.json").read_text())
    return value["best"], [record["step"] for record in value["candidates"]]


def test_closer_to_the_teacher_wins_and_the_first_of_equals() -> None:
    far, near = candidate(1, 1.5), candidate(2, 1.1)
    assert near.rank(GATES) < far.rank(GATES)
    assert candidate(3, 1.1).rank(GATES) == near.rank(GATES)


def test_passing_the_gates_comes_before_the_score() -> None:
    passing, failing = candidate(1, 1.9, 0.8), candidate(2, 1.0, 0.7)
    assert teacher_distance(failing.ratios) < teacher_distance(passing.ratios)
    assert passing.rank(GATES) < failing.rank(GATES)
    assert failing.rank(GatesSection(diversity_min=None)) < passing.rank(GATES)


def test_only_the_best_is_kept(tmp_path: Path) -> None:
    selection = Selection(tmp_path, GATES)
    assert selection.best is None
    better = [offer(selection, step, s) for step, s in ((10, 1.5), (20, 1.6), (30, 1.2), (40, 1.2))]
    assert better == [True, False, True, False]
    assert selection.best == candidate(30, 1.2)
    assert files(tmp_path) == [30]
    assert listed(tmp_path) == (30, [30])


def test_overtaken_candidates_stay_while_a_checkpoint_needs_them(tmp_path: Path) -> None:
    selection = Selection(tmp_path, GATES)
    offer(selection, 10, 1.8)
    offer(selection, 20, 1.5)
    offer(selection, 30, 1.3, checkpoints=(15, 25))  # 10 is gone: nothing was saved before 20
    assert files(tmp_path) == [20, 30]
    offer(selection, 40, 1.1, checkpoints=(25, 35))
    assert files(tmp_path) == [20, 30, 40]
    offer(selection, 50, 1.05, checkpoints=(35, 45))
    assert files(tmp_path) == [30, 40, 50]
    assert listed(tmp_path) == (50, [30, 40, 50])

    again = Selection(tmp_path, GATES)
    again.restore(35)
    assert again.best == candidate(30, 1.3)
    assert files(tmp_path) == [30]
    assert listed(tmp_path) == (30, [30])


def test_a_fresh_start_knows_nobody(tmp_path: Path) -> None:
    offer(Selection(tmp_path, GATES), 10)
    selection = Selection(tmp_path, GATES)
    selection.restore(0)
    assert selection.best is None
    assert files(tmp_path) == []
    assert listed(tmp_path) == (None, [])


def test_other_gates_on_resume_judge_anew(tmp_path: Path) -> None:
    selection = Selection(tmp_path, GATES)
    offer(selection, 10, 1.0, 0.7)  # fails
    offer(selection, 20, 1.9, 0.8, checkpoints=(15,))  # passes, with a worse score
    assert selection.best == candidate(20, 1.9, 0.8)
    again = Selection(tmp_path, GatesSection(diversity_min=0.5))
    again.restore(20)
    assert again.best == candidate(10, 1.0, 0.7)


def test_not_a_number_is_no_json_and_never_best(tmp_path: Path) -> None:
    selection = Selection(tmp_path, GATES)
    offer(selection, 10, math.nan)
    assert "NaN" not in (tmp_path / "best.json").read_text()
    again = Selection(tmp_path, GATES)
    again.restore(10)
    assert again.best is not None
    assert math.isnan(again.best.ratios["sharpness"])
    assert offer(again, 20, 5.0)
    assert again.best == candidate(20, 5.0)


def test_a_file_that_went_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    selection = Selection(tmp_path, GATES)
    offer(selection, 10, 1.5)
    offer(selection, 20, 1.1, checkpoints=(15,))
    selection.lora(candidate(20)).unlink()
    again = Selection(tmp_path, GATES)
    with caplog.at_level(logging.WARNING):
        again.restore(30)
    assert again.best == candidate(10, 1.5)
    assert "step-000020.safetensors is missing" in caplog.text


@pytest.mark.parametrize("position", [4, 20, -1])
def test_a_file_that_was_damaged(
    position: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the header's length, in the header, in the weights."""
    selection = Selection(tmp_path, GATES)
    offer(selection, 10, 1.5)
    offer(selection, 20, 1.1, checkpoints=(15,))
    path = selection.lora(candidate(20))
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)
    again = Selection(tmp_path, GATES)
    again.restore(30)
    assert again.best == candidate(10, 1.5)
    assert "it can no longer be chosen" in caplog.text
    assert "step-000020.safetensors" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02pickle",
        b"[]",
        b"{}",
        b'{"candidates": 1}',
        b'{"candidates": [{"step": 1, "ratios": [1]}]}',
        b'{"candidates": [{"step": {}, "ratios": {}}]}',
        b'{"candidates": [{"step": 1, "ratios": {"chroma": "x"}}]}',
        b"[" * 100_000,
    ],
)
def test_a_list_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "best.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"best\.json: expected .* Delete the file"):
        Selection(tmp_path, GATES).restore(10)
