"""An independently trained judge of the tiny model's images: which symbol, which colour, and
features for distances.

Trained on letters of another seed and on digits that the teacher never sees.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ..contract.tiny import COLOURS, DIGITS, LETTERS
from ..utils.files import replace_file
from ..utils.images import to_unit
from ..utils.progress import progress
from .images import ImageSet, digits, join, letters

FEATURES = 48


class Classifier(nn.Module):
    """Four strided convolutions; images [B, 3, 64, 64] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.features_head = nn.Linear(widths[-1] * 16, FEATURES)
        self.symbol_head = nn.Linear(FEATURES, len(LETTERS) + len(DIGITS))
        self.colour_head = nn.Linear(FEATURES, len(COLOURS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, 64, 64] -> [B, 48] in (-1, 1)"""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        return torch.tanh(self.features_head(x.flatten(1)))

    def heads(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of symbol [B, 20] (letters, then digits) and colour [B, 5]."""
        return self.symbol_head(features), self.colour_head(features)


def train_classifier(steps: int, seed: int) -> Classifier:
    """Cross-entropy on symbol and colour, with shifts, small noise and blur, so that soft images
    are judged fairly.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    data = join(letters(12_000, seed), *[digits("classifier")] * 6)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), what="classifier"):
        index = torch.randint(len(data), (64,), generator=generator)
        logits = net.heads(net.features(augment(to_unit(data.images[index]), generator)))
        loss = F.cross_entropy(logits[0], data.symbol[index], label_smoothing=0.05)
        loss = loss + F.cross_entropy(logits[1], data.colour[index], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts the batch by up to 3 pixels, blurs every second batch and adds noise."""
    dx, dy = torch.randint(-3, 4, (2,), generator=generator).tolist()
    x = torch.roll(F.pad(images, (4, 4, 4, 4), mode="replicate"), (dy, dx), (2, 3))[..., 4:-4, 4:-4]
    if torch.rand(1, generator=generator) < 0.5:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x + 0.05 * torch.randn(x.shape, generator=generator)


@torch.no_grad()
def accuracy(net: Classifier, data: ImageSet) -> tuple[float, float]:
    """Share of symbols and of colours recognised."""
    symbol, colour = net.heads(net.features(to_unit(data.images)))
    coloured = data.colour >= 0
    right_colour = (
        (colour.argmax(1) == data.colour)[coloured].float().mean().item() if coloured.any() else 1.0
    )
    return (symbol.argmax(1) == data.symbol).float().mean().item(), right_colour


def save(net: Classifier, path: Path) -> None:
    replace_file(path, lambda p: save_file(net.to(torch.bfloat16).state_dict(), p))


def load(path: Path) -> Classifier:
    net = Classifier()
    net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return net.eval().requires_grad_(False)
