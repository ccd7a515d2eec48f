"""What a merge keeps of an update, by the arithmetic of the storage."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.contract.kept import Kept


def tensors(ratio: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight that bf16 holds exactly, and an update of `ratio` times its size."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(256, 512, generator=generator) * 0.02).bfloat16().float()
    update = torch.randn(256, 16, generator=generator) @ torch.randn(16, 512, generator=generator)
    return weight, update * (ratio * weight.norm() / update.norm())


def measured(ratio: float, dtype: torch.dtype) -> Kept:
    weight, update = tensors(ratio)
    kept = Kept()
    kept.add(weight, (weight + update).to(dtype).float(), update)
    return kept


def test_nothing_is_lost_without_rounding() -> None:
    kept = measured(0.01, torch.float32)
    assert kept.share == pytest.approx(1, abs=1e-5)
    assert kept.noise_of_update < 1e-4
    assert kept.survives
    assert Kept().share == 1
    assert Kept().survives


@pytest.mark.parametrize(
    ("ratio", "low", "high", "survives"),
    [(0.02, 0.999, 1.001, True), (0.01, 0.998, 1.001, True), (0.002, 0.78, 0.85, False)],
)
def test_bf16_keeps_an_ordinary_update(
    ratio: float, low: float, high: float, survives: bool
) -> None:
    kept = measured(ratio, torch.bfloat16)
    assert low < kept.share < high
    assert kept.survives == survives
    assert kept.noise_of_weights < 0.0025


def test_noise_buries_what_is_kept_on_average() -> None:
    """Up or down by chance: the share is 1, and the update cannot be seen in it."""
    weight, update = tensors(0.01)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) * 3
    kept = Kept()
    kept.add(weight, weight + update + noise * update.square().mean().sqrt(), update)
    assert kept.share == pytest.approx(1, abs=0.03)
    assert kept.noise_of_update == pytest.approx(3, rel=0.02)
    assert kept.noise_of_weights == pytest.approx(0.03, rel=0.02)
    assert not kept.survives


def test_layers_add_up_by_their_squares() -> None:
    """One layer keeps all, another of twice the size nothing."""
    weight, update = tensors(0.01)
    kept = Kept()
    kept.add(weight, weight + update, update)
    kept.add(weight, weight, 2 * update)
    assert kept.share == pytest.approx(1 / 5, abs=1e-4)
    assert kept.noise_of_update == pytest.approx(math.sqrt(1 / 5 - 1 / 25), abs=1e-3)
    assert kept.to_text(9).startswith("20.0% of the update survives merging, with noise of 40%")
    assert kept.to_text(9).endswith("(measured on 2 of 9 layers)")
