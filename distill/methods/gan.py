"""The adversarial term of `dmd2`: real data lifts the teacher's ceiling, and brings fine texture.

Fakes are the student's x0, decoded through the VAE as latent crops with halo; the real side is a
fixed mixture of real images and of the teacher's, reconstructed by the same VAE, so that there is
no VAE look to be told by. With latent features nothing is decoded: fake and real are noised alike
and judged by the teacher's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..data.batch import Batch
from ..models import flow
from ..models.roles import Roles
from ..models.sample import sample_teacher, teacher_sigmas
from ..models.text import Text
from ..stages import GANSection
from ..training.engine import Engine
from ..utils.rng import Rng
from .adversarial import Adversary, Exhibit
from .base import LoadVAE, Part, turn
from .crops import decode_crops, spans
from .discriminator import PixelDiscriminator, View, dino_discriminator, latent_discriminator

FAKES = "gan/fake"  # stream: the crops that are judged for the student and for the discriminator


class GAN:
    """Discriminator, its real side, and what both sides look like to it."""

    def __init__(
        self, section: GANSection, roles: Roles, engine: Engine, load_vae: LoadVAE | None
    ) -> None:
        self.section, self.roles = section, roles
        self.vae = None
        if section.features == "latent":
            self.adversary = Adversary(latent_discriminator(section, roles), section, engine)
            return
        if section.features == "pixels":
            module = PixelDiscriminator(section.width).to(engine.device)
        else:
            module = dino_discriminator(section, section.features, roles.dtype, engine.device)
        if load_vae is None:
            raise ValueError(
                "gan: a discriminator of images needs the VAE, and nothing loads it here."
            )
        self.vae = load_vae()
        self.adversary = Adversary(module, section, engine, section.augment)

    def gradient(self, x0: torch.Tensor, part: Part) -> tuple[torch.Tensor, dict[str, float]]:
        """The adversarial gradient at the student's x0. Latent features cost one teacher forward of
        B with gradient to x0.
        """
        leaf = x0.detach().requires_grad_()
        fake = self.view(leaf, part.batch.text, part.rng, FAKES)
        return self.adversary.gradient(fake, leaf, part.rng, "gan/generator")

    def train(self, samples: Sequence[torch.Tensor], parts: Sequence[Part]) -> dict[str, float]:
        """Trains the discriminator on the student's x0, one of every micro-batch.

        Latent features cost, per update of the discriminator, one teacher forward of (1 + sources)
        B, with R1 of (1 + 2 sources) B. DINO and pixels cost no transformer forward at all, if the
        teacher's images are cached.
        """
        sources: dict[int, dict[str, tuple[float, torch.Tensor]]] = {}
        values: dict[str, float] = {}
        for number in range(self.section.updates):
            shown = []
            for i in turn(len(parts), self.section.accumulate, number):
                if i not in sources:
                    sources[i] = self.real(*parts[i])
                shown.append(self._exhibit(samples[i], sources[i], parts[i], number))
            values |= self.adversary.update(shown, f"gan/{number}")
        return values

    @torch.no_grad()
    def _exhibit(
        self,
        x0: torch.Tensor,
        sources: dict[str, tuple[float, torch.Tensor]],
        part: Part,
        number: int,
    ) -> Exhibit:
        text, rng = part.batch.text, part.rng
        real = {
            name: (share, self.view(x, text, rng, f"gan/{name}{number}"))
            for name, (share, x) in sources.items()
        }
        return Exhibit(self.view(x0, text, rng, FAKES), real, rng)

    def real(self, batch: Batch, rng: Rng) -> dict[str, tuple[float, torch.Tensor]]:
        """The latents of the real side: source -> (share, [B, C, h, w]). A share of 0 is not even
        looked at.
        """
        share = self.section.real_ratio
        sources = {}
        if share > 0:
            sources["real"] = (share, batch.x0)
        if share < 1:
            sources["teacher"] = (1 - share, self._teacher(batch, rng))
        return sources

    def _teacher(self, batch: Batch, rng: Rng) -> torch.Tensor:
        if batch.teacher_x0 is not None:
            return batch.teacher_x0
        sigmas = teacher_sigmas(self.section.teacher_steps, self.section.teacher_shift)
        noise = rng.normal("gan/teacher/noise", tuple(batch.x0.shape)).to(batch.x0.device)
        return sample_teacher(self.roles, sigmas, noise, batch.text)

    def view(self, x0: torch.Tensor, text: Text, rng: Rng, stream: str) -> View:
        """What the discriminator sees of latents x0, before augmentation."""
        section, batch_size = self.section, len(x0)
        if self.vae is None:
            # The same levels and noise for all sources: only the content can tell them apart
            level = rng.normal("gan/t", (batch_size,)).to(x0.device)
            t = torch.sigmoid(section.t_mean + section.t_std * level)
            eps = rng.normal("gan/eps", tuple(x0.shape)).to(x0.device)
            return View(flow.add_noise(x0, eps, t), t, text)
        x0 = x0.repeat_interleave(section.crops, dim=0)
        height, width = x0.shape[-2:]
        vertical, horizontal = (
            spans(rng, f"{stream}/{side}", len(x0), length, section.crop, section.halo)
            for side, length in (("top", height), ("left", width))
        )
        return View(decode_crops(self.roles.family.vae, self.vae, x0, vertical, horizontal))
