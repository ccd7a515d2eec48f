"""T2: the recipe on natural images, CIFAR-10 at 64 x 64 pixels, from nothing.

    python -m benchmarks.recipe.t2 SHARDS --size small      one CPU core, about an hour
    python -m benchmarks.recipe.t2 SHARDS --size full --device cuda

SHARDS is a folder of train-*.tar.gz and val-*.tar.gz holding NAME.jpg with NAME.txt, captions "a
photo of a cat". A VAE, a Qwen-Image and a judge are trained on them, then the teacher is distilled.
Figures are against the validation images, in the features of the judge, which saw training images
only; "real" is what other training images get after the VAE.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from pydantic import TypeAdapter
from torch import nn

from distill.config import AdapterSection, GuidanceSection
from distill.contract.spec import TurboSpec
from distill.contract.tiny import TEXT_TOKENS, TEXT_WIDTH, word_vector
from distill.evaluation import metrics
from distill.methods import METHODS
from distill.models.roles import FAKE, STUDENT, Roles
from distill.models.sample import in_chunks, sample_student, sample_teacher, teacher_sigmas
from distill.models.text import Text
from distill.models.vae import decode, encode, fold_single_frame
from distill.stages import AnyStage
from distill.tiny.data import Posteriors, TinyData
from distill.tiny.pretrain import TRANSFORMER_CONFIG, VAE_CONFIG, train_teacher, train_vae
from distill.training.engine import Engine
from distill.utils.images import labelled_grid, save_png, to_unit
from distill.utils.rng import Rng

from .kept import kept
from .report import arm_table, save_text
from .tiny_lab import Keys, Metrics, recipe_stages

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, CHUNK = 64, 100
STEPS, SHIFT, GUIDANCE = 50, 2.0, 2.5
SIGMAS = (1.0, 0.7155, 0.0)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    images: int
    vae_dim: int
    vae_steps: int
    heads: int  # of 32 channels
    layers: int
    teacher_steps: int
    pcm: int
    dmd2: int
    gan: int
    judge_steps: int
    count: int  # images per arm


SIZES = {
    "smoke": Size(200, 8, 2, 2, 2, 2, 2, 2, 2, 2, 20),
    "small": Size(20_000, 8, 1500, 6, 4, 3000, 400, 100, 100, 1500, 1000),
    "full": Size(40_000, 32, 20_000, 12, 9, 60_000, 4000, 1500, 1500, 8000, 5000),
}


# ------------------------------------------------------------------------------------- data


def read_shards(folder: Path, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of a split, enlarged, and their classes.  # [N, 3, 64, 64] uint8, [N]

    Raises FileNotFoundError, and ValueError on a caption without class.
    """
    files = sorted(folder.glob(f"{split}-*.tar.gz"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no {split}-*.tar.gz")
    images: list[np.ndarray] = []
    classes: list[int] = []
    for file in files:
        pictures: dict[str, np.ndarray] = {}
        with tarfile.open(file) as shard:
            for member in shard:
                if len(classes) == count:
                    break
                name, _, suffix = member.name.rpartition(".")
                handle = shard.extractfile(member)
                if handle is None:
                    continue
                if suffix == "jpg":
                    picture = Image.open(io.BytesIO(handle.read())).convert("RGB")
                    large = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    pictures[name] = np.asarray(large)
                elif suffix == "txt":
                    classes.append(class_of(handle.read().decode(), member.name))
                    images.append(pictures.pop(name))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        classes
    )


def class_of(caption: str, file: str) -> int:
    found = [i for i, name in enumerate(CLASSES) if name in caption.split()]
    if len(found) != 1:
        raise ValueError(f"{file}: expected one of {', '.join(CLASSES)}, found {caption!r}")
    return found[0]


def embed(caption: str) -> torch.Tensor:
    """As the tiny model's prompts, with other words.  # [8, 64]"""
    words = ["<bos>", *caption.split(), "<eos>"] if caption else ["<bos>", "<eos>"]
    words += ["<pad>"] * (TEXT_TOKENS - len(words))
    return torch.stack([word_vector(word) for word in words])


TABLE = torch.stack([embed(""), *(embed(f"a photo of a {name}") for name in CLASSES)])


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLQwenImage, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, in main memory."""
    parts = [encode(vae, to_unit(x).to(vae.device)) for x in images.split(CHUNK)]
    return tuple(torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))


@torch.no_grad()
def decode_all(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([decode(vae, x.to(vae.device)).cpu() for x in latents.split(CHUNK)])


# ------------------------------------------------------------------------------------- judge


class Judge(nn.Module):
    """Names the class; its features measure distances.  [N, 3, 64, 64] -> [N, 64]"""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = [nn.AvgPool2d(2)]  # what CIFAR-10 really holds: 32 x 32
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 64), nn.Tanh())
        self.head = nn.Linear(64, len(CLASSES))


def train_judge(images: torch.Tensor, classes: torch.Tensor, steps: int, device: str) -> Judge:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 10))
    for _ in range(steps):
        index = torch.randint(len(images), (128,), generator=generator)
        x = to_unit(images[index]).to(device)
        x = x.flip(-1) if torch.rand(1, generator=generator) < 0.5 else x
        loss = F.cross_entropy(judge.head(judge.features(x)), classes[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.requires_grad_(False)


# ------------------------------------------------------------------------------------- the run


class Study:
    def __init__(self, shards: Path, size: Size, work: Path, device: str, seed: int) -> None:
        self.size, self.work, self.device, self.seed = size, work, device, seed
        self.images, self.classes = read_shards(shards, "train", size.images)
        held_out, held_out_classes = read_shards(shards, "val", 5 * size.count)
        self.vae = self._vae()
        self.judge = self._judge()
        self.real = self._features(to_unit(held_out))
        right = self._read(to_unit(held_out)) == held_out_classes
        self.judge_accuracy = right.float().mean().item()
        mean, std = kept(work / "latents.pt", lambda: encode_all(self.vae, self.images))
        rows = (1 + self.classes)[:, None].expand(-1, 2)
        self.data = TinyData(Posteriors(mean, std), rows, len(mean), TABLE, digit_share=0.0)
        self.teacher = self._teacher()
        self.prompt = torch.arange(size.count) % len(CLASSES)
        self.text = Text(TABLE[1 + self.prompt])
        generator = torch.Generator().manual_seed(1000 + seed)
        self.noise = torch.randn(size.count, *mean.shape[1:], generator=generator)

    def _vae(self) -> AutoencoderKLQwenImage:
        config = {**VAE_CONFIG, "base_dim": self.size.vae_dim}
        steps, seed, device = self.size.vae_steps, self.seed, self.device

        def make() -> dict[str, torch.Tensor]:
            vae = train_vae(
                self.images,
                steps=steps,
                batch=16,
                lr=2e-3,
                kl_weight=1e-4,
                seed=seed,
                config=config,
                device=device,
            )
            return vae.state_dict()

        vae = AutoencoderKLQwenImage(**config)
        vae.load_state_dict(kept(self.work / "vae.pt", make))
        return fold_single_frame(vae).to(device).eval().requires_grad_(False)

    def _judge(self) -> Judge:
        judge, steps = Judge(), self.size.judge_steps
        make = lambda: train_judge(self.images, self.classes, steps, self.device).state_dict()  # noqa: E731
        judge.load_state_dict(kept(self.work / "judge.pt", make))
        return judge.to(self.device).requires_grad_(False)

    def _teacher(self) -> dict[str, torch.Tensor]:
        return kept(
            self.work / "teacher.pt",
            lambda: train_teacher(
                self.data,
                self.work / "teacher_state.pt",
                steps=self.size.teacher_steps,
                batch=64,
                lr=1e-3,
                ema_decay=0.999,
                seed=self.seed,
                config=self.config,
                device=self.device,
            ).state_dict(),
        )

    @property
    def config(self) -> Keys:
        heads = {"num_attention_heads": self.size.heads, "num_layers": self.size.layers}
        return {**TRANSFORMER_CONFIG, **heads, "joint_attention_dim": TEXT_WIDTH}

    def roles(self) -> Roles:
        transformer = QwenImageTransformer2DModel(**self.config)
        transformer.load_state_dict(self.teacher)
        guidance = GuidanceSection(scale=GUIDANCE, rescale=False)
        return Roles(
            transformer.to(self.device).eval(),
            AdapterSection(rank=32),
            guidance,
            self.data.negative.to(self.device),
            self.seed,
            (STUDENT, FAKE),
        )

    # -------------------------------------------------------------------------- figures

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [self.judge.features(x.to(self.device)).cpu() for x in images.split(CHUNK)]
        )

    def _read(self, images: torch.Tensor) -> torch.Tensor:
        return self.judge.head(self._features(images).to(self.device)).argmax(1).cpu()

    def measure(self, images: torch.Tensor) -> Metrics:
        features = self._features(images)
        some = self.real[: 2 * len(features)]
        precision, recall = metrics.precision_recall(some, features)
        return {
            "frechet": metrics.frechet_distance(features, self.real),
            "class_accuracy": (self._read(images) == self.prompt).float().mean().item(),
            "precision": precision,
            "recall": recall,
            "intra_distance": metrics.intra_distance(images, self.prompt),
            "edge_energy": metrics.edge_energy(images),
            "sharpness": metrics.high_frequency_energy(images),
            "saturation": metrics.saturation(images),
        }

    @torch.no_grad()
    def draw(self, latents: Callable[[torch.Tensor, Text], torch.Tensor]) -> torch.Tensor:
        def on_device(x: torch.Tensor, text: Text) -> torch.Tensor:
            return latents(x.to(self.device), text.to(self.device)).cpu()

        return decode_all(self.vae, in_chunks(on_device, self.noise, self.text, CHUNK))

    def references(self) -> dict[str, torch.Tensor]:
        """Images of the real set after the VAE, and of the teacher at 50 and at 2 guided steps."""
        order = [(self.classes == c).nonzero().flatten() for c in range(len(CLASSES))]
        per_class = -(-self.size.count // len(CLASSES))
        index = torch.stack([o[-per_class:] for o in order], dim=1).flatten()[: self.size.count]
        roles = self.roles()

        def teacher(sigmas: tuple[float, ...]) -> torch.Tensor:
            return self.draw(lambda x, text: sample_teacher(roles, sigmas, x, text))

        return {
            "real, through the VAE": decode_all(self.vae, self.data.mean[index]),
            f"teacher, {STEPS} steps": teacher(teacher_sigmas(STEPS, SHIFT)),
            "teacher, 2 steps": teacher(SIGMAS),
        }

    def distil(self, stages: tuple[Keys, ...]) -> tuple[int, torch.Tensor]:
        """Updates, and the images of the averaged student."""
        engine, spec = Engine(0, 1, torch.device(self.device)), TurboSpec(sigmas=SIGMAS)
        roles, step = self.roles(), 0
        for number, keys in enumerate(stages):
            stage: AnyStage = TypeAdapter(AnyStage).validate_python(keys)
            torch.manual_seed(self.seed + number)
            method = METHODS[stage.method](stage, roles, spec, engine, lambda: self.vae)
            for _ in range(stage.steps):
                rng = Rng(self.seed, step)
                method.step(self.data.batch(rng, stage.samples).to(self.device), rng)
                step += 1
            method.adopt_ema()
        return step, self.draw(lambda x, text: sample_student(roles, spec, x, text, self.seed))


def arms(size: Size) -> dict[str, tuple[Keys, ...]]:
    pcm, dmd2, gan = recipe_stages()
    lower = {"guidance_scale": 1.5}  # as the tiny model's preset, 2 instead of 3.5
    pcm = {**pcm, "steps": size.pcm}
    dmd2 = {**dmd2, "steps": size.dmd2, **lower}
    gan = {**gan, "steps": size.gan, **lower}
    plain = {key: value for key, value in gan.items() if key != "gan"}
    whole = {"guidance_scale": GUIDANCE}
    return {
        "pcm": (pcm,),
        "pcm -> dmd2 -> dmd2": (pcm, dmd2, plain),
        "pcm -> dmd2 -> dmd2+gan": (pcm, dmd2, gan),
        f"pcm -> dmd2 -> dmd2 at guidance {GUIDANCE}": (pcm, dmd2 | whole, plain | whole),
    }


KEYS = (
    "frechet",
    "class_accuracy",
    "precision",
    "recall",
    "intra_distance",
    "edge_energy",
    "sharpness",
    "saturation",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, help="folder of train-*.tar.gz and val-*.tar.gz")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/t2"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    size = SIZES[args.size]
    work = args.work / args.size
    study = Study(args.shards, size, work, args.device, args.seed)
    references = kept(work / "references.pt", study.references)
    rows = dict(references)
    results: dict[str, Any] = {}
    for name, stages in arms(size).items():
        done = kept(
            work / f"{name.replace(' ', '')}.pt",
            lambda stages=stages: dict(
                zip(("updates", "images"), study.distil(stages), strict=True)
            ),
        )
        rows[name] = done["images"]
        results[f"t2/{name}"] = {"updates": done["updates"], **study.measure(done["images"])}
    run = {
        "seed": args.seed,
        "judge_accuracy": study.judge_accuracy,
        "references": {name: study.measure(images) for name, images in references.items()},
        "arms": results,
    }
    save_text(args.out / "t2.json", json.dumps({"size": args.size, "runs": [run]}, indent=1))
    table = arm_table(f"CIFAR-10, {args.size}", [run], "t2", KEYS, references=True)
    save_text(args.out / "t2.md", table)
    grid = labelled_grid([(textwrap.fill(name, 20), x[: len(CLASSES)]) for name, x in rows.items()])
    save_png(grid, args.out / "t2.png")


if __name__ == "__main__":
    main()
