"""Randomness does not depend on how many processes draw it."""

from __future__ import annotations

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
