"""Trains and measures recipes on the tiny Qwen-Image, one seed at a time.

Whatever is finished lies in a work folder, so that an interrupted experiment goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from diffusers import QwenImageTransformer2DModel
from pydantic import TypeAdapter
from torchvision.transforms.functional import gaussian_blur

from distill.config import TINY, load_config
from distill.contract.tiny import COLOURS, LETTERS, SHIFT, STEPS, embed_prompt
from distill.evaluation import gates, metrics
from distill.methods import Method, build_method
from distill.models.family import spec_of
from distill.models.load import load_transformer, load_vae
from distill.models.roles import FAKE, STUDENT, Roles
from distill.models.sample import in_chunks, sample_student, sample_teacher, teacher_sigmas
from distill.models.text import Text
from distill.models.vae import decode, encode
from distill.stages import AnyStage
from distill.tiny.data import TinyData, embedded_data
from distill.tiny.images import RGB, ImageSet, digits, letters
from distill.tiny.metrics import LETTER_PROMPTS, Judge, TinyScore, digit_batch, letter_batch
from distill.tiny.pretrain import teacher_loss
from distill.tiny.quality import noise_of
from distill.training.engine import Engine
from distill.utils.images import to_unit
from distill.utils.rng import Rng

from .kept import kept

RECIPE = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"
PER_LETTER_PROMPT, PER_DIGIT = 10, 12
PREVIEWS = {"16 images": (4, 4), "500 images": (50, 10)}  # prompts, letters of each
CHUNK = 100  # images at a time
SHARP, BLURRED = "sharp", "blurred"  # teachers
BLUR = 3.0  # standard deviation in pixels of what the blurred teacher learnt from; the VAE sharpens
BLUR_STEPS = 200
NO_GUIDANCE = ("guidance.scale=1",)  # guidance sharpens what the blurred teacher has learnt

Keys = dict[str, Any]
Metrics = dict[str, Any]


def recipe_stages() -> tuple[Keys, Keys, Keys]:
    """The three stages of configs/tiny_cpu.yaml."""
    return tuple(yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"])


@dataclass(frozen=True)
class Arm:
    """One recipe; `forwards` ends the last stage once so many were spent, instead of its steps."""

    table: str
    name: str
    stages: tuple[Keys, ...]
    forwards: int = 0  # of the transformer, counted per image, from the first stage on
    teacher: str = SHARP
    overrides: tuple[str, ...] = ()  # of the configuration, "adapter.rank=8"
    trace: int = 0  # figures after every that many updates of the last stage

    @property
    def path(self) -> str:
        return f"{self.table}/{self.name}"

    @property
    def file(self) -> str:
        """Where its figures lie in a seed's work folder."""
        return f"arm-{self.beginning(len(self.stages))}-{self.trace}.json"

    def beginning(self, stages: int) -> str:
        """Names what the first stages lead to; arms that begin alike share it."""
        budget = self.forwards if stages == len(self.stages) else 0
        parts = [self.teacher, self.overrides, budget, *self.stages[:stages]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class Counted:
    """Transformer forwards, a batch of n images counting n."""

    def __init__(self, transformer: QwenImageTransformer2DModel) -> None:
        self.images = 0
        transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.images += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


class Lab:
    """Everything that the arms of one seed share."""

    def __init__(self, seed: int, work: Path) -> None:
        self.seed, self.work = seed, work / f"seed{seed}"
        self.engine = Engine(0, 1, torch.device("cpu"))
        self.vae = load_vae(TINY)
        self.prompt_score = TinyScore()
        self.judge = Judge(self.prompt_score.network)
        self.text, self.prompt = letter_batch(PER_LETTER_PROMPT)
        self.digit_text, self.digit = digit_batch(PER_DIGIT)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        return kept(self.work / name, make)

    # ------------------------------------------------------------------------------ teachers

    @cached_property
    def data(self) -> TinyData:
        return embedded_data(self.vae, self.seed)

    def roles(self, teacher: str, overrides: tuple[str, ...] = ()) -> Roles:
        """A fresh student and fake score on that teacher."""
        blurred = teacher == BLURRED
        overrides = (f"seed={self.seed}", *overrides, *(NO_GUIDANCE if blurred else ()))
        config = load_config(RECIPE, overrides)
        self.spec = spec_of(config)
        transformer = load_transformer(TINY, torch.float32)
        if blurred:
            transformer.load_state_dict(
                self.kept("weights-blurred-teacher.pt", self._blurred_weights)
            )
        negative = Text(embed_prompt("")[None])
        adapters = (STUDENT, FAKE)
        return Roles(transformer, config.adapter, config.guidance, negative, self.seed, adapters)

    def _blurred_weights(self) -> dict[str, torch.Tensor]:
        """The teacher, trained on with blurred letters: it has never heard of sharp edges."""
        transformer = load_transformer(TINY, torch.float32).train().requires_grad_(True)
        soft = letters(2000, 5000 + self.seed)
        soft = ImageSet(gaussian_blur(soft.images, 9, BLUR), soft.symbol, soft.colour)
        data = TinyData.from_images(self.vae, soft, digit_share=0.0)
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=5e-4, weight_decay=0.0)
        for step in range(BLUR_STEPS):
            loss = teacher_loss(transformer, data, Rng(7000 + self.seed, step), 64)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return transformer.state_dict()

    # ------------------------------------------------------------------------------ figures

    def references(self, teacher: str) -> dict[str, Metrics]:
        """Real letters through the VAE, and the teacher at 50 and at 2 guided steps."""
        rows = {
            f"teacher, {STEPS} steps": self.teacher_images(teacher),
            "teacher, 2 steps": self._teacher_images(teacher, (1.0, 0.7155, 0.0)),
        }
        figures = {name: self.measure(images, teacher) for name, images in rows.items()}
        return {"real, through the VAE": self.real_figures(), **figures}

    def teacher_images(self, teacher: str) -> torch.Tensor:
        return self.kept(
            f"images-{teacher}.pt",
            lambda: self._teacher_images(teacher, teacher_sigmas(STEPS, SHIFT)),
        ).float()

    def _teacher_images(self, teacher: str, sigmas: tuple[float, ...]) -> torch.Tensor:
        roles = self.roles(teacher)
        return self._draw(lambda x, text: sample_teacher(roles, sigmas, x, text))

    @torch.no_grad()
    def real_images(self) -> torch.Tensor:
        """Other letters than the judge's through the VAE, in the order of the prompts."""
        real = letters(len(self.prompt), 3000 + self.seed)
        order = (real.symbol * len(COLOURS) + real.colour).argsort(stable=True)
        order = order.view(-1, PER_LETTER_PROMPT).T.flatten()
        parts = [encode(self.vae, x)[0] for x in to_unit(real.images[order]).split(CHUNK)]
        return torch.cat([decode(self.vae, part) for part in parts])

    def real_figures(self) -> Metrics:
        images = self.real_images()
        scans = digits("held_out")
        read = self.judge.digit_accuracy(to_unit(scans.images), scans.symbol - len(LETTERS))
        return {**self._letter_figures(images, images), "digit_accuracy": read}

    @torch.no_grad()
    def _draw(self, latents: Callable[[torch.Tensor, Text], torch.Tensor]) -> torch.Tensor:
        """Letters, then digits.  # [N, 3, 64, 64]"""
        text = Text(torch.cat([self.text.embeds, self.digit_text.embeds]))
        drawn = in_chunks(latents, noise_of(len(text), 1000 + self.seed), text, CHUNK)
        return torch.cat([decode(self.vae, part) for part in drawn.split(CHUNK)])

    @torch.no_grad()
    def measure(self, images: torch.Tensor, teacher: str) -> Metrics:
        count = len(self.prompt)
        figures = self._letter_figures(images[:count], self.teacher_images(teacher)[:count])
        return {**figures, "digit_accuracy": self.judge.digit_accuracy(images[count:], self.digit)}

    def _letter_figures(self, images: torch.Tensor, reference: torch.Tensor) -> Metrics:
        features = self.judge.classifier.features(images)
        precision, recall = metrics.precision_recall(self.judge.real, features)
        return {
            **asdict(self.judge.letters(images, self.prompt, reference)),
            "precision": precision,
            "recall": recall,
            "sharpness": metrics.high_frequency_energy(images),
            "mixed_ink": mixed_ink(images, self.prompt % len(COLOURS)),
        }

    def preview(
        self, student: torch.Tensor, teacher: torch.Tensor, prompts: int, letters: int
    ) -> Metrics:
        """What a run would see in so many of these images: ratios to the teacher's figures."""
        chosen = torch.arange(len(self.prompt)).view(PER_LETTER_PROMPT, -1)
        chosen = chosen[:letters, :prompts].flatten()
        words = [LETTER_PROMPTS[i] for i in self.prompt[chosen]]

        def figures(images: torch.Tensor) -> gates.Metrics:
            images = images[chosen]
            read = self.prompt_score(images, words)
            return {**gates.measure(images, self.prompt[chosen]), "prompt": read}

        return gates.ratios(figures(student), figures(teacher))

    # ------------------------------------------------------------------------------ training

    def run(self, arm: Arm) -> Metrics:
        """Figures of the averaged student at the arm's end."""
        return self.kept(arm.file, lambda: self._run(arm))

    def _run(self, arm: Arm) -> Metrics:
        trace: list[Metrics] = []
        roles, done = self._trained(arm, trace)
        figures = self.measure(self.student_images(roles), arm.teacher)
        return {"updates": done["step"], "forwards": done["forwards"], **figures, "trace": trace}

    def samples(self, arm: Arm) -> torch.Tensor:
        """What the averaged student at the arm's end draws: letters, then digits."""
        return self.student_images(self._trained(arm, [])[0])

    def _trained(self, arm: Arm, trace: list[Metrics]) -> tuple[Roles, Keys]:
        """Student and fake score at the arm's end, with the updates and forwards it took."""
        roles = self.roles(arm.teacher, arm.overrides)
        counted = Counted(roles.transformer)
        step = 0
        for number in range(len(arm.stages)):

            def train(number: int = number, step: int = step) -> Keys:
                end = self._train(roles, arm, number, step, counted, trace)
                return {"step": end, "forwards": counted.images, "weights": weights(roles)}

            last = number == len(arm.stages) - 1
            name = f"weights-{arm.beginning(number + 1)}.pt"
            begun = train() if last and arm.trace else self.kept(name, train)
            restore(roles, begun["weights"])
            step, counted.images = begun["step"], begun["forwards"]
        return roles, begun

    def student_images(self, roles: Roles) -> torch.Tensor:
        return self._draw(lambda x, text: sample_student(roles, self.spec, x, text, self.seed))

    def _train(
        self, roles: Roles, arm: Arm, number: int, step: int, counted: Counted, trace: list[Metrics]
    ) -> int:
        stage: AnyStage = TypeAdapter(AnyStage).validate_python(arm.stages[number])
        torch.manual_seed(self.seed + number)
        method = build_method(stage, roles, self.spec, self.engine)
        last = number == len(arm.stages) - 1
        end = step + stage.steps
        while counted.images < arm.forwards if last and arm.forwards else step < end:
            rng = Rng(self.seed, step)
            method.step(self.data.batch(rng, stage.samples), rng)
            step += 1
            if last and arm.trace and step % arm.trace == 0:
                trace.append(self._traced(method, roles, arm, step, counted))
        method.adopt_ema()
        return step

    def _traced(
        self, method: Method, roles: Roles, arm: Arm, step: int, counted: Counted
    ) -> Metrics:
        forwards = counted.images
        with method.use_ema():
            images = self.student_images(roles)
        counted.images = forwards
        reference = self.teacher_images(arm.teacher)
        previews = {n: self.preview(images, reference, *size) for n, size in PREVIEWS.items()}
        return {"updates": step, **self.measure(images, arm.teacher), "previews": previews}


INKS = torch.tensor([RGB[colour] for colour in COLOURS]) / 127.5 - 1


def mixed_ink(images: torch.Tensor, colour: torch.Tensor) -> float:
    """Share of letters with more than a tenth of their ink in another colour than asked for.

    images: [N, 3, H, W]; colour: [N]. Ink is what lies within .5 of one of the five colours.
    """
    distance = (images[:, None] - INKS[:, :, None, None]).square().sum(2).sqrt()
    ink = distance.amin(1) < 0.5
    right = ink & (distance.argmin(1) == colour[:, None, None])
    shares = right.sum((1, 2)) / ink.sum((1, 2)).clamp_min(1)
    return (shares < 0.9).float().mean().item()


def weights(roles: Roles) -> dict[str, torch.Tensor]:
    named = {name: roles.named_parameters(name) for name in roles.adapters}
    return {k: p.detach().clone() for parameters in named.values() for k, p in parameters.items()}


@torch.no_grad()
def restore(roles: Roles, saved: dict[str, torch.Tensor]) -> None:
    for name in roles.adapters:
        for key, parameter in roles.named_parameters(name).items():
            parameter.copy_(saved[key])


def make_encoder(folder: Path, steps: int = 600, seed: int = 9000) -> None:
    """Writes a ViT of DINOv2's class that has learnt to name letters and colours: semantic
    features, as DINO's are, where its weights cannot be had.
    """
    from transformers import Dinov2Config, Dinov2Model

    if (folder / "config.json").is_file():
        return
    torch.manual_seed(seed)
    encoder = Dinov2Model(
        Dinov2Config(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
        )
    )
    head = torch.nn.Linear(64, len(LETTERS) + len(COLOURS))
    data = letters(4000, seed)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.02)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(data), (64,), generator=generator)
        pooled = encoder(to_unit(data.images[index])).last_hidden_state.mean(1)
        symbol, colour = head(pooled).split([len(LETTERS), len(COLOURS)], dim=1)
        loss = F.cross_entropy(symbol, data.symbol[index])
        loss = loss + F.cross_entropy(colour, data.colour[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.save_pretrained(folder)
