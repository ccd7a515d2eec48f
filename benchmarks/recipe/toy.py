"""The trainer's methods on the exact teacher of `mixture`: student and fake score are the teacher
plus a small network, as LoRAs are the base plus a low-rank one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distill.data.batch import Batch
from distill.methods import METHODS, Method
from distill.methods.adversarial import Adversary
from distill.methods.discriminator import View
from distill.methods.dmd2 import DMD2
from distill.methods.gan import GAN
from distill.models.roles import FAKE, STUDENT, TEACHER
from distill.models.text import Text
from distill.stages import AnyStage, GANSection
from distill.training.engine import Engine
from distill.utils.rng import Rng

from .mixture import Mixture

ENGINE = Engine(0, 1, torch.device("cpu"))
WIDTH = 160
FREQUENCIES = torch.tensor([1.0, 2.0, 4.0, 8.0])  # radians per unit of a coordinate and of time


def waves(x: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of coordinates; without them a network is too smooth for nine modes.
    # [N, D] -> [N, 2 D frequencies]
    """
    angle = (x[..., None] * FREQUENCIES).flatten(1)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Correction(nn.Module):
    """What an adapter adds to the teacher's velocity; nothing at first.  [N, 2], [N] -> [N, 2]"""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (2 + 3 * 2 * len(FREQUENCIES), WIDTH, WIDTH):
            layers += [nn.Linear(inputs, WIDTH), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, waves(torch.cat([x, t[:, None]], dim=1))], dim=1))


class ToyRoles:
    """`distill.models.roles.Roles` for points: counts the samples that each role is asked about."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, teacher: Mixture, seed: int) -> None:
        self.exact = teacher
        torch.manual_seed(seed)
        student = Correction()
        self.networks = {STUDENT: student, FAKE: copy.deepcopy(student)}
        self.asked: Counter[str] = Counter()

    def velocity(self, role: str, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        self.asked[role] += len(x_t)
        points = x_t.flatten(1)
        v = self.exact.velocity(points, t)
        if role != TEACHER:
            v = v + self.networks[role](points, t)
        return v.view_as(x_t)

    def tokens(self, latents: torch.Tensor) -> int:
        """The plane has no sizes."""
        return 1

    def teacher(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, scale: float | None = None
    ) -> torch.Tensor:
        """There is no guidance in the plane."""
        with torch.no_grad():
            return self.velocity(TEACHER, x_t, t, text)

    @contextmanager
    def use_role(self, role: str) -> Iterator[None]:
        yield

    def parameters(self, role: str) -> list[nn.Parameter]:
        return list(self.networks[role].parameters())

    def copy_adapter(self, source: str, target: str) -> None:
        self.networks[target].load_state_dict(self.networks[source].state_dict())

    def reset_adapter(self, role: str) -> None:
        for parameter in list(self.networks[role].layers[-1].parameters()):
            nn.init.zeros_(parameter)


class PointJudge(nn.Module):
    """A discriminator of points."""

    role_context = nullcontext

    def __init__(self) -> None:
        super().__init__()
        inputs = 2 + 2 * 2 * len(FREQUENCIES)
        self.layers = nn.Sequential(
            nn.Linear(inputs, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1),
        )  # fmt: skip

    @staticmethod
    def extract(view: View) -> list[torch.Tensor]:
        x = view.x.flatten(1)
        return [torch.cat([x, waves(x)], dim=1)]

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.layers(features[0])


class PointGAN(GAN):
    """The adversarial term on the points themselves: nothing to decode, nothing to extract."""

    def __init__(self, section: GANSection, roles: Any) -> None:
        self.section, self.roles = section, roles
        self.adversary = Adversary(PointJudge(), section, ENGINE)

    def view(self, x0: torch.Tensor, text: Text, rng: Rng, stream: str) -> View:
        return View(x0)


class PointDMD2(DMD2):
    def make_gan(self, section: GANSection, engine: Engine, load_vae: Any) -> GAN:
        return PointGAN(section, self.roles)


@dataclass(frozen=True)
class PointData:
    truth: Mixture

    def batch(self, rng: Rng, rows: int) -> Batch:
        x0 = self.truth.sample(rows, rng.generator("data"))
        return Batch(x0.view(rows, 2, 1, 1), Text(torch.zeros(rows, 1, 1)))


def make_method(stage: AnyStage, roles: ToyRoles, spec: Any, seed: int) -> Method:
    torch.manual_seed(seed)
    kind = PointDMD2 if stage.method == "dmd2" else METHODS[stage.method]
    return kind(stage, roles, spec, ENGINE)
