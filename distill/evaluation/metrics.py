"""Distances between sets of images and of features. Images are [N, 3, H, W] in [-1, 1], features
[N, D].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians fitted to two sets of features (Heusel et al.
    2017).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr (A B)^1/2 from the eigenvalues of the symmetric product A^1/2 B A^1/2
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes inside the real manifold and of reals inside the fake one (Kynkaanniemi et al.
    2019).
    """

    def covered(manifold: torch.Tensor, points: torch.Tensor) -> float:
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(1).float().mean().item()

    return covered(real, fake), covered(fake, real)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pairs in dB, from the mean squared error of all pixels."""
    return 10 * math.log10(4 / F.mse_loss(a.clamp(-1, 1), b.clamp(-1, 1)).item())


def intra_distance(images: torch.Tensor, groups: torch.Tensor, side: int = 16) -> float:
    """Mean Euclidean distance between two images of one group, at `side` x `side` pixels: diversity
    within a prompt.
    """
    small = F.adaptive_avg_pool2d(images, side).flatten(1)
    distances = []
    for group in groups.unique():
        members = small[groups == group]
        if len(members) > 1:
            distances.append(F.pdist(members).mean())
    return torch.stack(distances).mean().item()


def corner_colours(images: torch.Tensor, width: int = 4) -> torch.Tensor:
    """Median colour of the border, a stand-in for the background's colour.  # [N, 3]"""
    border = torch.cat(
        [images[..., :width, :].flatten(2), images[..., -width:, :].flatten(2),
         images[..., :, :width].flatten(2), images[..., :, -width:].flatten(2)], dim=2)  # fmt: skip
    return border.median(dim=2).values


def background_spread(images: torch.Tensor, groups: torch.Tensor) -> float:
    """Standard deviation of the background's colour within a group, averaged over groups and
    channels.
    """
    colours = corner_colours(images)
    return torch.stack([colours[groups == g].std(0).mean() for g in groups.unique()]).mean().item()


def edge_energy(images: torch.Tensor) -> float:
    """Mean squared difference of neighbouring pixels."""
    dx, dy = images.diff(dim=-1), images.diff(dim=-2)
    return (dx.square().mean() + dy.square().mean()).item()


def high_frequency_energy(images: torch.Tensor) -> float:
    """Mean squared response of the Laplacian: energy near the pixel scale."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=images.device).expand(
        images.shape[1], 1, 3, 3
    )
    return F.conv2d(images, kernel, groups=images.shape[1]).square().mean().item()


def saturation(images: torch.Tensor, margin: float = 0.02) -> float:
    """Share of channel values at the ends of the range, within `margin` of -1 or 1."""
    return (images.abs() >= 1 - margin).float().mean().item()
