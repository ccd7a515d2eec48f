"""`turbo-distill bake BASE LORA --out FILE`: base + LoRA as one small file."""

from __future__ import annotations

import argparse
import logging

from ..contract.bake.merge import bake
from ..contract.bake.plan import plan_bake
from ..contract.bake.rounding import FORMATS
from ..contract.base_loras import base_records
from ..contract.metadata import read_header
from ..contract.peft_folder import lora_file
from ..contract.resolve import Override
from ..utils.progress import progress
from ..utils.terminal import size
from .options import path_argument, sigmas_argument
from .result import Result

log = logging.getLogger(__name__)

ABOUT = """\
Merges a few-step LoRA into its bf16 base model and folds away what only the timestep
decides, for the LoRA's own sigmas: two thirds of the size, then bf16, int8 or fp8 of
the large layers. The file is for ComfyUI's models/diffusion_models and the node Turbo
Baked Loader. Less than 4 GB of memory, no GPU. What cannot be folded (models other
than Qwen-Image, schedules by the size of the image) is merged and rounded alone."""
EXAMPLES = """\
turbo-distill bake Qwen-Image-2512 turbo.safetensors --out turbo_bf16.safetensors
turbo-distill bake Qwen-Image-2512 turbo.safetensors --out turbo_fp8.safetensors --dtype fp8
turbo-distill bake base.safetensors public.safetensors --out baked.safetensors --sigmas 1,0.7,0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "base",
        metavar="BASE",
        type=path_argument,
        help="the bf16 base model: a .safetensors file, a diffusers folder, or its index of shards",
    )
    files.add_argument(
        "lora", metavar="LORA", type=path_argument, help="a few-step LoRA for that model"
    )
    files.add_argument(
        "--out", metavar="FILE", type=path_argument, required=True, help="the new .safetensors file"
    )
    form = parser.add_argument_group("form")
    form.add_argument(
        "--dtype",
        choices=FORMATS,
        default="bf16",
        help="how the large layers are stored; rounded once, after the merge (default: bf16)",
    )
    form.add_argument(
        "--sigmas",
        metavar="LIST",
        type=sigmas_argument,
        help="noise levels such as 1,0.7155,0 instead of those that the LoRA was trained for",
    )
    form.add_argument(
        "--no-fold",
        action="store_true",
        help="keep the modulation, so that the file is an ordinary model that takes any sigmas; "
        "done by itself where a model or a schedule cannot be folded",
    )


def run(args: argparse.Namespace) -> Result:
    override = Override(args.sigmas)
    plan = plan_bake(args.base, args.lora, args.out, args.dtype, override, not args.no_fold)
    for one in base_records(read_header(lora_file(args.lora))):
        log.warning(
            "%s was distilled with %s in its base, at strength %g: BASE needs that merged too",
            args.lora,
            one["name"],
            one["strength"],
        )
    with progress(total=len(plan.tensors), what="baking", unit="tensor") as bar:
        report = bake(plan, lambda done, total: bar.update(done - bar.n))
    return Result(
        text=report.to_text() + "\n",
        values={
            "file": str(plan.out),
            "file_size_bytes": report.file_bytes,
            "dtype": plan.dtype,
            "tensors": len(plan.tensors),
            "sigmas": None if plan.folded is None else list(plan.folded.sigmas),
            "unfolded": plan.unfolded,
            "update_kept": {
                way: {"share": kept.share, "noise_of_update": kept.noise_of_update}
                for way, kept in report.losses.kept.items()
            },
            "report": report.to_text().splitlines(),
        },
        done=f"baked {size(report.file_bytes)}",
        wrote=(plan.out,),
        next=f"copy {plan.out.name} to ComfyUI/models/diffusion_models, load it with Turbo Baked "
        "Loader",
    )
