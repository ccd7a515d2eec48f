"""`turbo-distill eval LORA`: figures of a LoRA beside its teacher's, on the same noise."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import ConfigError
from ..contract.resolve import Override
from ..data.prompts import read_prompts
from ..evaluation.base_variants import BASES
from ..evaluation.features import CLIP_TYPES, Clip, Vision, check_model, load_dino, reference_images
from ..evaluation.generate import LORA, TEACHER, Job
from ..evaluation.measure import Judges, measure, psnr
from ..evaluation.report import on_bases, side_by_side, to_text
from ..lora.inputs import base_loras_of
from ..lora.source import open_source
from ..models.dino import DINO_TYPES
from ..models.pipeline import Base, embed, find_base, image_size, teacher_guidance
from ..training.engine import local_device
from ..utils.files import replace_text
from ..utils.images import ENLARGE_TO, labelled_grid, save_png, thumbnail
from .options import (
    NOISE_SEED_MAX,
    add_base_arguments,
    add_override_arguments,
    check_seeds,
    model_argument,
    path_argument,
    whole,
)
from .result import Result, finite

ABOUT = """\
Draws the same prompts and noise with a LoRA and with its teacher and measures both:
sharpness, clipped values, diversity and, with CLIP or DINO models, prompt score, FID
and KID. A ratio near 1 says "like the teacher". FID and KID (with --reference) are
computed on CLIP's or DINO's features, not on Inception's: compare them only with
figures made the same way. --bases finds the grid that naive fp8 weights can leave on
images: 1 means none."""
EXAMPLES = """\
turbo-distill eval runs/mine                                      # a LoRA of the tiny model
turbo-distill eval turbo.safetensors --prompts prompts.txt --clip openai/clip-vit-base-patch32
turbo-distill eval turbo.safetensors --prompts prompts.txt --dino facebook/dinov2-base \\
    --reference photos --bases bf16,fp8_naive,fp8_scaled --sheet sheet.png --out figures.json"""

COLUMNS = 8  # images per row of the sheet
LETTER = 6  # pixels of a caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("what to draw")
    images.add_argument(
        "lora", type=path_argument, metavar="LORA", help="a LoRA file or a run folder"
    )
    images.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help=".txt, .jsonl or .parquet; only the tiny model has prompts of its own",
    )
    images.add_argument(
        "--count", type=int, default=10, help="images per prompt (default: 10); 1 has no diversity"
    )
    images.add_argument(
        "--seed",
        type=whole(0, NOISE_SEED_MAX),
        default=0,
        help="of the first image; the others follow",
    )
    images.add_argument("--batch", type=int, help="images at a time (default: 1, tiny model 50)")
    judges = parser.add_argument_group("what to measure")
    judges.add_argument(
        "--reference", type=path_argument, metavar="FOLDER", help="real images, for FID and KID"
    )
    judges.add_argument(
        "--clip",
        type=model_argument,
        metavar="PATH",
        help="a CLIP model: prompt score, diversity, FID and KID",
    )
    judges.add_argument(
        "--dino",
        type=model_argument,
        metavar="PATH",
        help="a DINOv2 or DINOv3: diversity, FID and KID",
    )
    judges.add_argument(
        "--bases",
        type=parse_bases,
        default=(),
        metavar=",".join(BASES),
        help="also draw on these forms of the base and compare with the unquantised one",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out", type=path_argument, metavar="FILE", help="write the figures as JSON"
    )
    files.add_argument(
        "--sheet", type=path_argument, metavar="FILE", help="write a picture of all arms"
    )
    add_base_arguments(parser)
    add_override_arguments(parser)


def parse_bases(text: str) -> tuple[str, ...]:
    bases = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if unknown := [base for base in bases if base not in BASES]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(BASES)}, found {unknown[0]}")
    return bases


def run(args: argparse.Namespace) -> Result:
    check(args)
    report, picture = evaluate(args)
    if args.sheet:
        save_png(picture, args.sheet)
    if args.out:
        text = json.dumps(finite(report), indent=2, ensure_ascii=False) + "\n"
        replace_text(args.out, text)
    return Result(
        text=to_text(report),
        values=report,
        done=f"measured {report['images']} images",
        wrote=tuple(path for path in (args.out, args.sheet) if path),
        next="" if args.sheet else "add --sheet FILE to see the images",
    )


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that do not go together or that lead nowhere, before any
    weight is read.
    """
    if args.count < 1 or (args.batch is not None and args.batch < 1):
        raise ConfigError(
            f"--count, --batch: expected 1 or more, found {args.count} and {args.batch}."
        )
    if args.bases and args.quantize != "none":
        raise ConfigError(
            "--bases compares with the unquantised base; leave out --quantize or --bases."
        )
    if args.reference and not (args.clip or args.dino):
        raise ConfigError(
            "--reference: FID and KID need features; expected --clip PATH, --dino PATH or both."
        )
    if args.clip:
        check_model("--clip", args.clip, CLIP_TYPES)
    if args.dino:
        check_model("--dino", args.dino, DINO_TYPES)


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], Image.Image]:
    """The report, ready for JSON, and a picture of every arm."""
    # What is drawn
    source = open_source(args.lora, Override(args.sigmas, args.sampler))
    base = find_base(source.spec, args.model or source.model)
    base = replace(base, loras=base_loras_of(source))
    size = image_size(source.spec, base, args.size)
    guidance = teacher_guidance(source.metadata, base, args.guidance)
    distinct = chosen_prompts(args.prompts, base)
    check_seeds(args.seed, len(distinct) * args.count)
    reference = reference_images(args.reference, size) if args.reference else None
    device = local_device()
    job = Job(
        source.lora,
        source.spec,
        base,
        size,
        embed(base, distinct, device),
        [prompt for prompt in distinct for _ in range(args.count)],
        args.seed,
        args.teacher_steps,
        guidance,
        args.batch or base.family.eval_batch,
        device,
        args.quantize,
    )

    # Images and metrics
    images = job.pair()
    variants = {kind: images[LORA] if kind == "bf16" else job.on(kind) for kind in args.bases}
    judges = Judges(vision(args, device), reference, base.family.metrics)
    found = {arm: measure(x, job.prompts, judges) for arm, x in images.items()}
    paired = {"psnr": psnr(images[LORA], images[TEACHER])}

    # Report and sheet
    report = {
        "lora": source.origin,
        "spec": json.loads(source.spec.to_json()),
        "spec_source": source.spec_source,
        "alpha_from": source.lora.alpha_words,
        "base": base.path,
        "precision": str(base.dtype).removeprefix("torch."),
        "quantize": args.quantize,
        "size": list(size),
        "prompts": len(distinct),
        "images": len(job.prompts),
        "seed": args.seed,
        "teacher": {"steps": args.teacher_steps, **guidance.model_dump()},
        "clip": args.clip,
        "dino": args.dino,
        "reference_images": None if reference is None else len(reference),
        "figures": side_by_side(found[LORA] | paired, found[TEACHER]),
        "bases": on_bases(images[LORA], variants),
        "notes": notes(judges, len(job.prompts)),
    }
    others = {kind: x for kind, x in variants.items() if x is not images[LORA]}
    return report, sheet(job, images | others)


def sheet(job: Job, arms: dict[str, Tensor]) -> Image.Image:
    """The first image of the first prompts, a row per arm."""
    count = len(job.prompts) // len(set(job.prompts))
    shown = range(0, len(job.prompts), count)[:COLUMNS]
    labels = {
        LORA: f"LoRA\n{job.spec.steps} steps",
        TEACHER: f"teacher\n{job.teacher_steps} steps",
    } | {kind: f"LoRA on\n{kind}" for kind in BASES}
    rows = [
        (labels[arm], torch.stack([thumbnail(images[i]) for i in shown]))
        for arm, images in arms.items()
    ]
    scale = max(1, ENLARGE_TO // max(job.size))
    letters = rows[0][1].shape[-1] * scale // LETTER
    columns = [textwrap.shorten(job.prompts[i], letters, placeholder="…") for i in shown]
    return labelled_grid(rows, columns, scale)


def chosen_prompts(file: Path | None, base: Base) -> list[str]:
    """Raises ConfigError where there is none."""
    if file is not None:
        return read_prompts([file])[0]
    if not base.family.prompts:
        raise ConfigError("--prompts: expected a file with one prompt per line (.txt).")
    return list(base.family.prompts)


def vision(args: argparse.Namespace, device: torch.device) -> dict[str, Vision]:
    models: dict[str, Vision] = {}
    if args.clip:
        models["clip"] = Clip(args.clip, device)
    if args.dino:
        models["dino"] = load_dino(args.dino, device)
    return models


def notes(judges: Judges, images: int) -> list[str]:
    """What a reader should know before comparing figures with others'."""
    found = []
    if judges.reference is not None:
        found.append(
            "FID and KID are on the features of the models given, not on Inception's: compare them "
            "only with figures made the same way."
        )
        for name, model in judges.vision.items():
            count = min(images, len(judges.reference))
            if count <= model.width:
                found.append(
                    f"fid_{name}: {count} images for {model.width} features; FID is biased "
                    "upwards until there are several times as many, KID is not."
                )
    return found
