"""Metrics against values known in closed form."""

from __future__ import annotations

import pytest
import torch

from distill.evaluation import metrics


def test_frechet_distance_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    shifted = x + torch.tensor([1.0, 0.0, 2.0])
    assert metrics.frechet_distance(x, shifted) == pytest.approx(5, rel=1e-3)
    # N(0, 1) against N(0, 4) in three dimensions: 3 (2 - 1)^2
    assert metrics.frechet_distance(x, 2 * x) == pytest.approx(3, rel=0.05)


def test_precision_and_recall_of_a_half() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 300, 2, generator=generator) + torch.tensor([[[0.0]], [[50.0]]])
    both = torch.cat([left, right])
    precision, recall = metrics.precision_recall(both, left + 0.01)
    assert precision > 0.95
    assert recall == pytest.approx(0.5, abs=0.03)


def test_psnr_and_saturation() -> None:
    zeros = torch.zeros(1, 3, 8, 8)
    assert metrics.psnr(zeros, zeros + 0.02) == pytest.approx(40, abs=1e-3)  # range 2
    half = zeros.clone()
    half[..., :4] = 1
    assert metrics.saturation(half) == 0.5


def test_diversity_counts_only_within_a_group() -> None:
    black, white = torch.full((2, 3, 16, 16), -1.0), torch.full((2, 3, 16, 16), 1.0)
    images, groups = torch.cat([black, white]), torch.tensor([0, 0, 1, 1])
    assert metrics.intra_distance(images, groups) == 0
    assert metrics.background_spread(images, groups) == 0
    mixed = torch.tensor([0, 1, 0, 1])
    assert metrics.intra_distance(images, mixed) == pytest.approx(2 * (3 * 256) ** 0.5)


def test_blur_lowers_edges_and_high_frequencies() -> None:
    sharp = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    soft = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
    assert metrics.edge_energy(soft) < 0.5 * metrics.edge_energy(sharp)
    assert metrics.high_frequency_energy(soft) < 0.3 * metrics.high_frequency_energy(sharp)
