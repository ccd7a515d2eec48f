"""The grid that low-precision weights can leave on an image: a pattern that repeats with the
transformer's patches (16 pixels) or with the latent's pixels (8).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH, LATENT = 16, 8  # pixels
GUARD = 2  # bins from a peak to its neighbours: a Hann window smears a peak over one to each side


def grid_energy(images: Tensor, period: int) -> float:
    """Energy at the spatial frequencies of a grid over that of frequencies beside them.

    About 1 without a grid; a texture of one grey level in 255 that repeats every 16 pixels gives
    2 to 10 on a photograph. For the patch grid only those harmonics count that the latent grid does
    not have, so the two figures are independent. images: [N, 3, H, W] in any range, 64
    pixels or more. Raises ValueError for smaller ones.
    """
    height, width = (side - side % PATCH for side in images.shape[-2:])
    if min(height, width) < 4 * PATCH:
        raise ValueError(
            f"expected images of at least {4 * PATCH} pixels per side to look for a grid, found "
            f"{images.shape[-1]}x{images.shape[-2]}"
        )
    power = high_pass_power(images[..., :height, :width])
    peaks = lattice(height, width, period)
    if period == PATCH:
        peaks &= ~lattice(height, width, LATENT)
    beside = neighbours(power)
    return (power[peaks].sum() / beside[peaks].sum()).item()


def high_pass_power(images: Tensor) -> Tensor:
    """Power spectrum of the Laplacian of the luminance, mean over images.  # [H, W]

    The Laplacian flattens the spectrum of natural images; the window hides their borders.
    """
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    height, width = images.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    total = torch.zeros(height, width)
    for image in images:
        luminance = image.float().mean(0)[None, None]
        edges = F.conv2d(F.pad(luminance, (1, 1, 1, 1), mode="replicate"), kernel)
        total += torch.fft.fft2(edges[0, 0] * window).abs().square()
    return total / len(images)


def lattice(height: int, width: int, period: int) -> Tensor:
    """Frequencies of everything that repeats every `period` pixels, without the mean.  # [H, W]"""
    peaks = torch.zeros(height, width, dtype=torch.bool)
    peaks[:: height // period, :: width // period] = True
    peaks[0, 0] = False
    return peaks


def neighbours(power: Tensor) -> Tensor:
    """Power beside every frequency, for comparison with it.  # [H, W]

    On an axis only along it: upright and level edges gather their energy there, grid or not.
    """
    along_x = (power.roll(GUARD, 1) + power.roll(-GUARD, 1)) / 2
    along_y = (power.roll(GUARD, 0) + power.roll(-GUARD, 0)) / 2
    beside = (along_x + along_y) / 2
    beside[0], beside[:, 0] = along_x[0], along_y[:, 0]
    return beside
