"""Randomness does not depend on how many processes draw it."""

from __future__ import annotations

import pytest
import torch

from distill.utils.rng import Rng


def test_two_ranks_draw_what_one_rank_draws() -> None:
    one = Rng(seed=3, step=7)
    two = [Rng(seed=3, step=7, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(
        one.normal("eps", (6, 2, 2)), torch.cat([rng.normal("eps", (3, 2, 2)) for rng in two])
    )
    assert torch.equal(one.uniform("t", 6), torch.cat([rng.uniform("t", 3) for rng in two]))
    assert torch.equal(one.integers("i", 6, 9), torch.cat([rng.integers("i", 3, 9) for rng in two]))


def test_seed_step_and_stream_all_matter() -> None:
    drawn = [Rng(0, 0).uniform("a", 4), Rng(1, 0).uniform("a", 4),
             Rng(0, 1).uniform("a", 4), Rng(0, 0).uniform("b", 4)]  # fmt: skip
    for i, first in enumerate(drawn):
        assert all(not torch.equal(first, second) for second in drawn[i + 1 :])
    assert torch.equal(drawn[0], Rng(0, 0).uniform("a", 4))


def test_a_rank_draws_its_own_rows_alone() -> None:
    """Those of all ranks would not fit into memory."""
    last = Rng(3, 7, rank=10**6 - 1, world_size=10**6)
    assert torch.equal(
        last.normal("eps", (2, 16, 64, 64)), Rng(3, 7, rank=999_999).normal("eps", (2, 16, 64, 64))
    )
    assert last.uniform("t", 2).shape == (2,)


def test_samples_are_not_alike() -> None:
    """Nor are two streams, nor two kinds of numbers of one stream."""
    rng = Rng(0, 0)
    rows = rng.normal("a", (64, 1000))
    rows = torch.cat([rows, rng.normal("b", (64, 1000)), Rng(0, 1).normal("a", (64, 1000))])
    rows = torch.cat([rows, rng.uniform("a", 1000)[None] * 12**0.5 - 3**0.5])
    likeness = rows @ rows.T / rows.shape[1] - torch.eye(len(rows))
    assert likeness.abs().max() < 0.2  # six standard deviations


def test_distributions() -> None:
    rng = Rng(0, 0)
    normal = rng.normal("a", (100, 1000)).flatten().double()
    assert normal.mean().abs() < 0.02
    assert abs(normal.std() - 1) < 0.01
    assert abs((normal.abs() < 1).double().mean() - 0.6827) < 0.01
    uniform = rng.uniform("a", 100_000)
    assert 0 <= uniform.min() < uniform.max() < 1
    assert torch.histc(uniform, 10, 0, 1) == pytest.approx([10_000] * 10, rel=0.05)
    counts = rng.integers("a", 70_000, 7).bincount()
    assert counts.tolist() == pytest.approx([10_000] * 7, rel=0.05)
    assert rng.integers("a", 10_000, 2**31 - 1).max() > 2**30


def test_numbers_of_today() -> None:
    """Whoever changes them changes what a checkpoint goes on with."""
    rng = Rng(1, 2, rank=1, world_size=2)
    assert rng.normal("eps", (1, 3))[0].tolist() == pytest.approx(
        [0.0390236527, -1.8061499596, -0.3061583042]
    )
    assert rng.uniform("t", 2).tolist() == pytest.approx([0.4769587517, 0.4047648311])
    assert rng.integers("i", 4, 1000).tolist() == [878, 56, 179, 126]
