"""`turbo-distill sample LORA ... --prompt TEXT --out FOLDER`: images, as the LoRA wants it."""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..config import ConfigError
from ..contract.base_loras import base_records
from ..contract.resolve import Override
from ..data.prompts import read_prompts
from ..lora.inputs import base_loras_of
from ..lora.source import Source, open_source
from ..models.pipeline import Base, Pipeline, embed, find_base, image_size, scaled, teacher_guidance
from ..training.engine import local_device
from ..utils.files import create_file
from ..utils.images import ENLARGE_TO, labelled_grid, save_png, thumbnail
from ..utils.progress import progress
from ..utils.terminal import plural
from .options import (
    NOISE_SEED_MAX,
    add_base_arguments,
    add_override_arguments,
    check_seeds,
    path_argument,
    text_argument,
    whole,
)
from .result import Result

ABOUT = """\
Draws prompts with one or several LoRAs, each at the schedule in its own header, on
the same noise; --teacher adds the base model without LoRA in many guided steps.
Seed N gives the noise that ComfyUI gives for seed N. Every PNG says in its text
chunks how it was made; sheet.png shows all of them side by side."""
EXAMPLES = """\
turbo-distill sample runs/mine --prompt "a red letter K" --count 4 --teacher --out pictures
turbo-distill sample turbo.safetensors --prompt "a cat in the rain" --size 1328x1328 --out cats
turbo-distill sample mine.safetensors other.safetensors --prompts prompts.txt --out compared"""

TEACHER = "teacher"
SHEET = "sheet.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("what to draw")
    images.add_argument(
        "loras", type=path_argument, nargs="+", metavar="LORA", help="LoRA files or run folders"
    )
    images.add_argument(
        "--prompt",
        type=text_argument,
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times",
    )
    images.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="prompts from a .txt, .jsonl or .parquet file",
    )
    images.add_argument(
        "--out", type=path_argument, required=True, metavar="FOLDER", help="folder for the images"
    )
    images.add_argument(
        "--seed", type=whole(0, NOISE_SEED_MAX), default=0, help="of the first image (default: 0)"
    )
    images.add_argument(
        "--count", type=int, default=1, help="images per prompt, at seed, seed + 1, ..."
    )
    images.add_argument(
        "--teacher", action="store_true", help="also draw without LoRA: many guided steps"
    )
    add_base_arguments(parser)
    add_override_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    override = Override(args.sigmas, args.sampler)
    sources = named(open_source(path, override) for path in args.loras)
    base = common_base(sources, args.model)
    size = image_size(next(iter(sources.values())).spec, base, args.size)
    prompts = chosen_prompts(args.prompt, args.prompts)
    arms = [*sources, *([TEACHER] if args.teacher else [])]
    jobs = plan(args.out, arms, prompts, args.seed, args.count)
    device = local_device()
    pipeline = open_pipeline(args, base, sources, prompts, device)

    drawn: dict[str, list[Tensor]] = {arm: [] for arm in arms}
    for job in progress(jobs, unit="image"):
        seeds = [job.seed]
        if job.arm == TEACHER:
            image = pipeline.teacher(args.teacher_steps, [job.prompt], seeds, size)[0]
            how = {"turbo.teacher": f"{args.teacher_steps} steps, guidance "
                   f"{pipeline.roles.guidance.scale:g}"}  # fmt: skip
        else:
            source = sources[job.arm]
            image = pipeline.student(job.arm, source.spec, [job.prompt], seeds, size)[0]
            how = {"turbo.spec": source.spec.to_json(), "turbo.lora": source.name}
        save_image(image, job, how)
        drawn[job.arm].append(thumbnail(image))
    if len(jobs) > 1:
        rows = [(textwrap.fill(arm, 22), torch.stack(images)) for arm, images in drawn.items()]
        columns = [job.path.stem[len(job.arm) + 1 :] for job in jobs[: len(jobs) // len(arms)]]
        scale = max(1, ENLARGE_TO // max(size))
        save_png(labelled_grid(rows, columns, scale), args.out / SHEET)
    count = plural(len(jobs), "image")
    compared = args.teacher or len(sources) > 1
    return Result(
        text=f"{count} in {args.out}\n",
        values={
            "out": str(args.out),
            "size": list(size),
            "alpha_from": {name: source.lora.alpha_words for name, source in sources.items()},
            "images": [
                {"file": str(job.path), "arm": job.arm, "prompt": job.prompt, "seed": job.seed}
                for job in jobs
            ],
            "sheet": str(args.out / SHEET) if len(jobs) > 1 else None,
        },
        done=f"drew {count}",
        wrote=(args.out,),
        next=shlex.join(["turbo-distill", "eval", str(args.loras[0])])
        if compared
        else "add --teacher to compare",
    )


def named(sources: object) -> dict[str, Source]:
    """Each LoRA under its own name. Raises ConfigError where two have the same."""
    found: dict[str, Source] = {}
    for source in sources:  # type: ignore[attr-defined]
        if source.name in (*found, TEACHER):
            raise ConfigError(
                f"{source.origin}: expected LoRAs of different names, for images are named after "
                f"them; found {source.name!r} twice. Rename one of the files."
            )
        found[source.name] = source
    return found


def common_base(sources: dict[str, Source], model: str | None) -> Base:
    """Raises ConfigError where LoRAs of different bases are to share one."""
    bases = {source.spec.base: name for name, source in sources.items()}
    if model is None and len(bases) > 1:
        raise ConfigError(
            "--model: the LoRAs were made for different bases ("
            + "; ".join(f"{name}: {base}" for base, name in bases.items())
            + "). Draw them one by one, or name one base with --model."
        )
    merged = {json.dumps(base_records(s.metadata)): name for name, s in sources.items()}
    if len(merged) > 1:
        raise ConfigError(
            f"expected LoRAs of one base, found {' and '.join(merged.values())} with other LoRAs "
            "in theirs. Draw them one by one."
        )
    first = next(iter(sources.values()))
    base = find_base(first.spec, model or first.model)
    return replace(base, loras=base_loras_of(first))


def chosen_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Raises ConfigError where there is none."""
    prompts = [*given, *(read_prompts([file])[0] if file else ())]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigError("--prompt: expected at least one prompt that is not empty.")
    return list(dict.fromkeys(prompts))


@dataclass(frozen=True)
class Job:
    arm: str  # a LoRA's name, or the teacher
    prompt: str
    seed: int
    path: Path


def plan(
    folder: Path, arms: Sequence[str], prompts: Sequence[str], seed: int, count: int
) -> list[Job]:
    """All images, arm by arm. Raises FileExistsError if one of them is there already."""
    if count < 1:
        raise ConfigError(f"--count: expected 1 or more, found {count}.")
    check_seeds(seed, count)
    jobs = [
        Job(arm, prompt, s, folder / f"{arm}_{number:03d}_seed{s}.png")
        for arm in arms
        for number, prompt in enumerate(prompts, 1)
        for s in range(seed, seed + count)
    ]
    paths = [job.path for job in jobs] + [folder / SHEET]
    if taken := [path for path in paths if path.exists()]:
        raise FileExistsError(
            f"{taken[0]} exists ({len(taken)} of {len(jobs)} images do); name another folder with "
            "--out, or another --seed."
        )
    return jobs


def open_pipeline(
    args: argparse.Namespace,
    base: Base,
    sources: dict[str, Source],
    prompts: Sequence[str],
    device: torch.device,
) -> Pipeline:
    """Loads the text encoder, embeds, and then loads the transformer and the VAE."""
    metadata = next(iter(sources.values())).metadata
    guidance = teacher_guidance(metadata, base, args.guidance)
    texts = embed(base, prompts, device)
    loras = {
        name: scaled(source.lora, source.spec.only_strength("this command"))
        for name, source in sources.items()
    }
    return Pipeline(base, loras, guidance, texts, device, quantize=args.quantize)


def save_image(image: Tensor, job: Job, how: dict[str, str]) -> None:
    """A PNG with its origin in text chunks; none is named "prompt" or "parameters", which
    ComfyUI would take for a workflow when the picture is dropped on it.
    """
    info = PngInfo()
    for key, value in {
        "Software": "turbo-distill",
        "Description": job.prompt,
        "turbo.prompt": job.prompt,
        "turbo.seed": str(job.seed),
        **how,
    }.items():
        info.add_itxt(key, value)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    create_file(job.path, lambda p: picture.save(p, format="PNG", pnginfo=info))
