"""Figures as JSON and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..contract.metadata import usage_hint
from ..contract.spec import TurboSpec
from ..utils.terminal import table
from .measure import plain, psnr

MEANINGS = {
    "sharpness": "energy of the finest detail",
    "saturation": "share of clipped channel values",
    "grid_16": "grid of the 16-pixel patches; 1 = none",
    "grid_8": "grid of the 8-pixel latents; 1 = none",
    "diversity_pixels": "distance between images of a prompt",
    "diversity_clip": "the same in CLIP features",
    "diversity_dino": "the same in DINO features",
    "clip_score": "100 x cosine of image and prompt",
    "fid_clip": "FID to the reference, CLIP features",
    "kid_clip": "KID to the reference, CLIP features",
    "fid_dino": "FID to the reference, DINO features",
    "kid_dino": "KID to the reference, DINO features",
    "psnr": "dB, pairs of the same noise",
    "letter_accuracy": "letters that the classifier reads right",
    "colour_accuracy": "letters in the colour asked for",
    "frechet": "distance to real letters, classifier features",
    "background_spread": "of colours within a prompt",
    "digit_accuracy": "digits that the classifier reads right",
}


def side_by_side(
    lora: Mapping[str, float | None], teacher: Mapping[str, float | None]
) -> dict[str, Any]:
    """LoRA, teacher and their ratio by figure; None where there is none."""
    found = {}
    for name, value in lora.items():
        other = teacher.get(name)
        found[name] = {
            "lora": value,
            "teacher": other,
            "ratio": value / other if value is not None and other else None,
        }
    return found


def on_bases(
    reference: Tensor, variants: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Figures of the LoRA on each base, PSNR against `reference`, its images on the unquantised
    one.  # [N, 3, H, W] uint8
    """
    found = {}
    for kind, images in variants.items():
        values: dict[str, float | None] = dict(plain(images))
        if images is not reference:
            values["psnr"] = psnr(images, reference)
        found[kind] = values
    return found


def to_text(report: Mapping[str, Any]) -> str:
    """Tables and what a reader needs to repeat them."""
    teacher, size = report["teacher"], "x".join(map(str, report["size"]))
    rows = [
        [
            name,
            _number(f["lora"]),
            _number(f["teacher"]),
            _number(f["ratio"], 3),
            MEANINGS.get(name, ""),
        ]
        for name, f in report["figures"].items()
    ]
    lines = [
        report["lora"],
        usage_hint(TurboSpec.from_values(report["spec"])),
        f"{report['images']} images {size}, {report['prompts']} prompts, seeds from "
        f"{report['seed']}, {report['precision']}; teacher {teacher['steps']} steps, guidance "
        f"{teacher['scale']:g}",
        "",
        table(["figure", "LoRA", "teacher", "ratio", "what it is"], rows),
    ]
    if report["bases"]:
        names = list(dict.fromkeys(n for values in report["bases"].values() for n in values))
        rows = [
            [kind, *(_number(values.get(name)) for name in names)]
            for kind, values in report["bases"].items()
        ]
        lines += ["", "The LoRA on other forms of the base; psnr against bf16's image:", ""]
        lines.append(table(["base", *names], rows))
    lines += [f"Note: {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"
