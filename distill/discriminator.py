"""Discriminators: light heads on frozen features, their losses, and how the student hears of them.

The features are a DINO backbone's (image crops), the frozen teacher's (noised latents), or none: a
small network on pixels. What is trained is always small and whole on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .augment import augment
from .config import ConfigError
from .engine import Engine
from .models import Text, concatenate
from .optim import Optimizer
from .roles import TEACHER, Roles
from .stages import CriticSection
from .utils.rng import Draws

DINO_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """What is judged: image crops, or latents noised to level t with their prompts."""

    x: torch.Tensor  # [B, 3, H, W] or [B, C, h, w]
    t: torch.Tensor | None = None  # [B]
    text: Text | None = None

    def detach(self) -> View:
        return replace(self, x=self.x.detach())


def stack(views: Sequence[View]) -> View:
    """One batch of several."""
    x = torch.cat([view.x for view in views])
    if views[0].t is None:
        return View(x)
    text = reduce(concatenate, [view.text for view in views])
    return View(x, torch.cat([view.t for view in views]), text)


# Losses on logits: those of one source, [B, places]


def real_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """hinge: max(0, 1 - D); softplus: log(1 + exp(-D)), the non-saturating GAN."""
    return F.relu(1 - logits).mean() if kind == "hinge" else F.softplus(-logits).mean()


def fake_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """hinge: max(0, 1 + D); softplus: log(1 + exp(D))."""
    return F.relu(1 + logits).mean() if kind == "hinge" else F.softplus(logits).mean()


def generator_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """hinge: -D; softplus: log(1 + exp(-D))."""
    return -logits.mean() if kind == "hinge" else F.softplus(-logits).mean()


def approximate_r1(logits: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """|D(x) - D(x + sigma noise)|^2, about sigma^2 |grad D|^2, without a second derivative (APT,
    Lin et al. 2025). x is what D really sees: cropped, augmented, or noised.
    """
    return (logits - perturbed).square().mean()


def balanced_weight(
    main: torch.Tensor, adversarial: torch.Tensor, ratio: float, engine: Engine
) -> float:
    """The weight that makes |weight * adversarial| = ratio |main| over the whole batch of all
    ranks; both are gradients at the same point.
    """
    squares = {"main": main, "adversarial": adversarial}
    means = engine.mean({k: g.double().square().sum().item() for k, g in squares.items()})
    if means["adversarial"] == 0:
        return 0.0
    return ratio * math.sqrt(means["main"] / means["adversarial"])


def size_ratio(adversarial: torch.Tensor, main: torch.Tensor) -> float:
    """|adversarial| / |main| on this rank."""
    return (adversarial.double().norm() / main.double().norm()).item()


def add_gradient(loss: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A loss of the same value whose gradient at x has `gradient` added."""
    carrier = (x * gradient.detach()).sum()
    return loss + carrier - carrier.detach()


# Networks


class Discriminator(Protocol):
    """`extract` is frozen, or does nothing; `forward` is trained."""

    playing: Callable[[], AbstractContextManager[Any]]  # to be entered for the backward pass

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
        playing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.extract, self.playing = features, playing
        self.heads = nn.ModuleList(Head(channels, width) for _ in range(maps))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        maps = zip(self.heads, features, strict=True)
        return torch.cat([head(x.float()) for head, x in maps], dim=1)


class PixelDiscriminator(nn.Module):
    """Judges patches of 22 pixels, from scratch: for tests, and where no backbone is at hand."""

    playing = nullcontext

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


def latent_discriminator(section: CriticSection, roles: Roles) -> FeatureDiscriminator:
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
        lambda: roles.playing(TEACHER),
    ).to(roles.device)


def dino_discriminator(
    section: CriticSection, path: str, dtype: torch.dtype, device: torch.device
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


def load_dino(path: str, dtype: torch.dtype) -> nn.Module:
    """Raises ConfigError."""
    from transformers import AutoConfig, AutoModel

    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in DINO_TYPES:
            raise ConfigError(
                f"gan.features: {path}: expected a DINO model ({', '.join(DINO_TYPES)}), found "
                f"{kind}."
            )
        model = AutoModel.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"gan.features: {path}: cannot be loaded ({str(error).splitlines()[0]}). Expected the "
            'folder or hub id of a DINOv2 or DINOv3 model, "latent", or "pixels".'
        ) from error
    return model.eval().requires_grad_(False)


class Critic:
    """A discriminator in training, and the gradient that it has for the student."""

    def __init__(
        self,
        module: Discriminator,
        section: CriticSection,
        engine: Engine,
        augmentations: Sequence[str] = (),
    ) -> None:
        self.module, self.section, self.engine = module, section, engine
        self.augmentations = augmentations
        self.optimizer = Optimizer("discriminator", module.parameters(), section, engine)

    def _augment(self, view: View, draws: Draws, stream: str) -> View:
        return replace(view, x=augment(view.x, self.augmentations, draws, f"{stream}/augment"))

    def update(
        self, fake: View, real: dict[str, tuple[float, View]], draws: Draws, stream: str = "critic"
    ) -> dict[str, float]:
        """One update of the discriminator, all views in one pass of the frozen features.

        real: source -> (share, view); the shares sum to 1. Logs the accuracy on every source.
        """
        kind, rows = self.section.loss, len(fake.x)
        sources = {"fake": fake} | {name: view for name, (_, view) in real.items()}
        with torch.no_grad():
            views = {k: self._augment(v, draws, f"{stream}/{k}") for k, v in sources.items()}
            if self.section.r1_weight:
                views |= {
                    f"{name}/r1": self._perturbed(views[name], draws, f"{stream}/{name}")
                    for name in real
                }
            features = self.module.extract(stack(list(views.values())))
        logits = dict(zip(views, self.module(features).split(rows), strict=True))
        shares = {name: share for name, (share, _) in real.items()}
        loss = fake_loss(logits["fake"], kind)
        loss = loss + sum(w * real_loss(logits[name], kind) for name, w in shares.items())
        values = {"loss/discriminator": loss.item()}
        if self.section.r1_weight:
            r1 = sum(
                w * approximate_r1(logits[name], logits[f"{name}/r1"]) for name, w in shares.items()
            )
            loss = loss + self.section.r1_weight * r1
            values["gan/r1"] = r1.item()
        for name in sources:
            mean = logits[name].detach().mean(1)
            right = mean < 0 if name == "fake" else mean > 0
            values[f"gan/accuracy_{name}"] = right.float().mean().item()
        return values | self.optimizer.step(loss)

    def _perturbed(self, view: View, draws: Draws, stream: str) -> View:
        noise = draws.normal(f"{stream}/r1", tuple(view.x.shape)).to(view.x.device)
        return replace(view, x=view.x + self.section.r1_sigma * noise)

    def gradient(
        self, fake: View, at: torch.Tensor, draws: Draws, stream: str = "generator"
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Gradient of the generator's loss at the leaf `at` that `fake` was made from; nothing else
        gets one.
        """
        with self.module.playing():
            view = self._augment(fake, draws, stream)
            logits = self.module(self.module.extract(view))
            loss = generator_loss(logits, self.section.loss)
            (gradient,) = torch.autograd.grad(loss, at)
        return gradient, {"loss/generator": loss.item()}

    def weight(self, main: torch.Tensor, adversarial: torch.Tensor, updates: int) -> float:
        """Weight of the adversarial gradient beside the main loss's, at the student's `updates`-th
        update.
        """
        ramp = min(1.0, (updates + 1) / self.section.ramp)
        if self.section.weight is not None:
            return ramp * self.section.weight
        return ramp * balanced_weight(main, adversarial, self.section.ratio, self.engine)
