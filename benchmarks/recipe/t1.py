"""T1: the recipe on the tiny Qwen-Image, against its teacher at 50 guided steps.

    python -m benchmarks.recipe.t1 --seeds 1 --tables guidance --out docs/evidence

A seed fixes training and noise. Arms that begin alike share that beginning. Figures are those of
the averaged student on 500 letters (ten per prompt) and 120 digits; `real` is 500 other letters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from distill import metrics
from distill.config import TINY, Config, load_config
from distill.contract.tiny import TINY_DIR
from distill.draws import Draws
from distill.engine import Engine
from distill.load import load_transformer, load_vae
from distill.methods import build_method
from distill.models import Text
from distill.roles import FAKE, STUDENT, Roles
from distill.sample import in_chunks, sample_student, sample_teacher, teacher_sigmas
from distill.stages import AnyStage
from distill.tiny import classifier
from distill.tiny.data import embedded_data
from distill.tiny.evaluate import Judge, digit_batch, letter_batch
from distill.tiny.images import letters
from distill.tiny.quality import SHIFT, STEPS, noise_of
from distill.vae import decode

from .report import arm_table, save_text

RECIPE = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
PER_LETTER_PROMPT, PER_DIGIT = 10, 12
CHUNK = 100  # images at a time

Keys = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    table: str
    name: str
    stages: tuple[Keys, ...]


def recipe_stages() -> tuple[Keys, Keys, Keys]:
    """The three stages of configs/tiny_cpu.yaml."""
    return tuple(yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"])


PCM, DMD2, GAN = recipe_stages()
NO_GAN = {key: value for key, value in GAN.items() if key != "gan"}


def guided(keys: Keys, scale: float, **more: Any) -> Keys:
    return {**keys, "guidance_scale": scale, **more}


def real_share(share: float) -> Keys:
    teacher = {"teacher_steps": 8, "teacher_shift": SHIFT}
    return {**GAN, "gan": {**GAN["gan"], "real_ratio": share, **teacher}}


ARMS = [
    Arm("main", "pcm", (PCM,)),
    Arm("main", "pcm -> dmd2", (PCM, DMD2)),
    Arm("main", "pcm -> dmd2 -> dmd2", (PCM, DMD2, NO_GAN)),
    Arm("main", "pcm -> dmd2 -> dmd2+gan", (PCM, DMD2, GAN)),
    *(
        Arm("guidance", f"dmd2 at guidance {scale:g}", (PCM, guided(DMD2, scale)))
        for scale in (1.0, 2.0, 3.5)
    ),
    Arm("guidance", "dmd2 at 3.5, decoupled", (PCM, guided(DMD2, 3.5, decoupled=True))),
    *(Arm("real data", f"real share {s:g}", (PCM, DMD2, real_share(s))) for s in (0.0, 0.5, 1.0)),
]


class Lab:
    """Trains and measures arms with one seed."""

    def __init__(self, seed: int) -> None:
        self.seed, self.engine = seed, Engine(0, 1, torch.device("cpu"))
        self.config: Config = load_config(RECIPE, [f"seed={seed}"])
        self.spec, self.vae = self.config.turbo_spec(), load_vae(TINY)
        self.data = embedded_data(self.vae, seed)
        self.judge = Judge(classifier.load(TINY_DIR / "classifier.safetensors"))
        self.text, self.prompt = letter_batch(PER_LETTER_PROMPT)
        self.digit_text, self.digit = digit_batch(PER_DIGIT)
        self.begun: dict[str, dict[str, torch.Tensor]] = {}
        roles = self.new_roles()
        sigmas = teacher_sigmas(STEPS, SHIFT)
        self.teacher = self._draw(lambda x, text: sample_teacher(roles, sigmas, x, text))
        naive = self._draw(lambda x, text: sample_teacher(roles, self.spec.sigmas, x, text))
        real = letters(len(self.prompt), 3000 + seed).images.float() / 127.5 - 1
        floor = metrics.frechet_distance(self.judge.classifier.features(real), self.judge.real)
        self.references = {
            f"teacher, {STEPS} steps": self._measure(self.teacher),
            "teacher, 2 steps": self._measure(naive),
        }
        self.floor = {"frechet": floor}

    def new_roles(self) -> Roles:
        config = self.config
        return Roles(
            load_transformer(TINY, torch.float32),
            config.adapter,
            config.guidance,
            self.data.negative,
            self.seed,
            (STUDENT, FAKE),
        )

    def run(self, arm: Arm) -> dict[str, float]:
        roles, step = self.new_roles(), 0
        for number, keys in enumerate(arm.stages):
            stage: AnyStage = TypeAdapter(AnyStage).validate_python(keys)
            beginning = json.dumps(arm.stages[: number + 1])
            if beginning not in self.begun:
                self._train(roles, stage, number, step)
                self.begun[beginning] = weights(roles)
            restore(roles, self.begun[beginning])
            step += stage.steps
        images = self._draw(lambda x, text: sample_student(roles, self.spec, x, text, self.seed))
        return {"updates": step, **self._measure(images)}

    def _train(self, roles: Roles, stage: AnyStage, number: int, step: int) -> None:
        torch.manual_seed(self.seed + number)
        method = build_method(stage, roles, self.spec, self.engine)
        for k in range(step, step + stage.steps):
            draws = Draws(self.seed, k)
            method.step(self.data.batch(draws, stage.batch), draws)
        method.adopt_average()

    @torch.no_grad()
    def _draw(self, latents: Callable[[torch.Tensor, Text], torch.Tensor]) -> torch.Tensor:
        """Letters, then digits.  # [N, 3, 64, 64]"""
        text = Text(torch.cat([self.text.embeds, self.digit_text.embeds]))
        drawn = in_chunks(latents, noise_of(len(text), 1000 + self.seed), text, CHUNK)
        return torch.cat([decode(self.vae, part) for part in drawn.split(CHUNK)])

    @torch.no_grad()
    def _measure(self, images: torch.Tensor) -> dict[str, float]:
        count = len(self.prompt)
        figures = asdict(self.judge.letters(images[:count], self.prompt, self.teacher[:count]))
        features = self.judge.classifier.features(images[:count])
        precision, recall = metrics.precision_recall(self.judge.real, features)
        return {
            **figures,
            "precision": precision,
            "recall": recall,
            "digit_accuracy": self.judge.digit_accuracy(images[count:], self.digit),
            "sharpness": metrics.high_frequency_energy(images[:count]),
        }


def weights(roles: Roles) -> dict[str, torch.Tensor]:
    named = {name: roles.named_parameters(name) for name in roles.adapters}
    return {k: p.detach().clone() for parameters in named.values() for k, p in parameters.items()}


@torch.no_grad()
def restore(roles: Roles, saved: dict[str, torch.Tensor]) -> None:
    for name in roles.adapters:
        for key, parameter in roles.named_parameters(name).items():
            parameter.copy_(saved[key])


KEYS = (
    "letter_accuracy",
    "colour_accuracy",
    "digit_accuracy",
    "frechet",
    "precision",
    "recall",
    "background_spread",
    "intra_distance",
    "edge_energy",
    "saturation",
    "psnr",
)
TITLES = {
    "main": "The recipe, stage by stage",
    "guidance": "Guidance of the teacher in DMD2 (PCM at 3.5)",
    "real data": "Share of real images in the GAN",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--tables", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    runs = []
    for seed in range(args.first, args.first + args.seeds):
        lab = Lab(seed)
        arms = {f"{a.table}/{a.name}": lab.run(a) for a in ARMS if a.table in args.tables}
        run = {"seed": seed, "references": lab.references, "real": lab.floor, "arms": arms}
        runs.append(run)
        save_text(args.out / "t1.json", json.dumps({"runs": runs}, indent=1))
        tables = [
            arm_table(TITLES[name], runs, name, KEYS, references=True) for name in args.tables
        ]
        save_text(args.out / "t1.md", "\n".join(tables))


if __name__ == "__main__":
    main()
