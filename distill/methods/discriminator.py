"""Discriminators: light heads on frozen features.

The features are a DINO backbone's (image crops), the frozen teacher's (noised latents), or none: a
small network on pixels. What is trained is always small and whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..models.dino import load_dino
from ..models.roles import TEACHER, Roles
from ..models.text import Text
from ..stages import DiscriminatorSection

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """What is judged: image crops, or latents noised to level t with their prompts."""

    x: torch.Tensor  # [B, 3, H, W] or [B, C, h, w]
    t: torch.Tensor | None = None  # [B]
    text: Text | None = None

    def detach(self) -> View:
        return replace(self, x=self.x.detach())


# Networks


class Discriminator(Protocol):
    """`extract` is frozen, or does nothing; `forward` is trained."""

    role_context: Callable[[], AbstractContextManager[Any]]  # to be entered for the backward pass

    def extract(self, view: View) -> list[torch.Tensor]: ...

    def __call__(self, features: list[torch.Tensor]) -> torch.Tensor: ...  # [B, places]

    def parameters(self) -> Any: ...


def norm_groups(channels: int) -> int:
    """About 16 channels in a group: a map of one place then has something to be normalised by."""
    return math.gcd(channels, max(1, channels // 16))


class Head(nn.Module):
    """Says for every place of a feature map how real it looks.  [B, D, h, w] -> [B, h * w]

    The judge has no bias: while hinge is linear its gradient is 1 - 1, and Adam makes steps of what
    rounding leaves of that.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 1)
        self.enter_norm = nn.GroupNorm(norm_groups(width), width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.mix_norm = nn.GroupNorm(norm_groups(width), width)
        self.judge = nn.Conv2d(width, 1, 1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)
        x = F.leaky_relu(self.enter_norm(self.enter(x)), 0.2)
        x = x + F.leaky_relu(self.mix_norm(self.mix(x)), 0.2)
        return self.judge(x).flatten(1)


class FeatureDiscriminator(nn.Module):
    """A head for every map that `features` makes of a view."""

    def __init__(
        self,
        features: Callable[[View], list[torch.Tensor]],
        channels: int,
        maps: int,
        width: int,
        role_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.extract, self.role_context = features, role_context
        self.heads = nn.ModuleList(Head(channels, width) for _ in range(maps))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        maps = zip(self.heads, features, strict=True)
        return torch.cat([head(x.float()) for head, x in maps], dim=1)


class PixelDiscriminator(nn.Module):
    """Judges patches of 22 pixels, from scratch: for tests, and where no backbone is at hand."""

    role_context = nullcontext

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, max(1, width // 4), max(1, width // 2), width)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(channels)
        )
        self.judge = nn.Conv2d(width, 1, 1, bias=False)

    @staticmethod
    def extract(view: View) -> list[torch.Tensor]:
        return [view.x]

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        (x,) = features
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i:
                x = F.group_norm(x, norm_groups(x.shape[1]))
            x = F.leaky_relu(x, 0.2)
        return self.judge(x).flatten(1)


def latent_discriminator(section: DiscriminatorSection, roles: Roles) -> FeatureDiscriminator:
    """Heads on the teacher's hidden states: the base with every adapter off."""

    def features(view: View) -> list[torch.Tensor]:
        assert view.t is not None
        assert view.text is not None
        return roles.teacher_features(view.x, view.t, view.text, section.layers)

    return FeatureDiscriminator(
        features,
        roles.width,
        len(roles.blocks_at(section.layers)),
        section.width,
        lambda: roles.use_role(TEACHER),
    ).to(roles.device)


def dino_discriminator(
    section: DiscriminatorSection, path: str, dtype: torch.dtype, device: torch.device
) -> FeatureDiscriminator:
    """Heads on the patch tokens of a frozen DINOv2 or DINOv3.

    Raises ConfigError where `path` is no such model.
    """
    backbone = load_dino(path, dtype).to(device)
    count, patch = backbone.config.num_hidden_layers, backbone.config.patch_size
    layers = sorted({max(1, round(depth * count)) for depth in section.layers})
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)

    def features(view: View) -> list[torch.Tensor]:
        x = (whole_patches(view.x, patch) / 2 + 0.5 - mean) / std
        states = backbone(x.to(dtype), output_hidden_states=True).hidden_states
        size = (x.shape[-2] // patch, x.shape[-1] // patch)
        # class and register tokens come first
        return [
            states[i][:, -size[0] * size[1] :].transpose(1, 2).unflatten(2, size) for i in layers
        ]

    return FeatureDiscriminator(
        features, backbone.config.hidden_size, len(layers), section.width
    ).to(device)


def whole_patches(images: torch.Tensor, patch: int) -> torch.Tensor:
    """The middle of the images that whole patches cover; resizing would change the very texture
    that is judged.
    """
    height, width = (side - side % patch for side in images.shape[-2:])
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
