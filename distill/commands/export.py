"""`turbo-distill export SOURCE --out FILE`: a LoRA in another spelling, precision or rank."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ..contract.resolve import Override
from ..contract.shown import plain, printable
from ..lora.convert import DTYPES, KEYS, export
from ..lora.model_card import companions, write_release
from ..lora.source import open_source
from .options import add_override_arguments, path_argument, whole
from .result import Result

ABOUT = """\
Writes a LoRA of any trainer, or the newest state of a run, as one file: with the
keys of ComfyUI or of diffusers, in fp32, bf16 or fp16, at a lower rank if asked to,
and says how much of it is lost. The header keeps the schedule; a model card and a
workflow for ComfyUI are written beside it."""
EXAMPLES = """\
turbo-distill export runs/mine --out turbo.safetensors                  # newest state of a run
turbo-distill export turbo.safetensors --out small.safetensors --rank 16
turbo-distill export public.safetensors --out theirs.safetensors --keys diffusers --dtype fp32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "source",
        type=path_argument,
        metavar="SOURCE",
        help="a LoRA file of any trainer, or the folder of a run (finished or not)",
    )
    files.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="file to write"
    )
    form = parser.add_argument_group("form")
    form.add_argument(
        "--keys",
        choices=KEYS,
        default="comfyui",
        help="comfyui: diffusion_model.* with .alpha, which diffusers reads too (default); "
        "diffusers: transformer.* with alpha multiplied in",
    )
    form.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)"
    )
    form.add_argument(
        "--rank",
        type=whole(1),
        metavar="N",
        help="cut every module to at most this rank (truncated SVD) and report what is lost",
    )
    add_override_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    for path in (args.out, *companions(args.out)):
        if path.exists():
            raise FileExistsError(f"{path} exists; delete it, or name another file with --out.")
    source = open_source(args.source, Override(args.sigmas, args.sampler))
    report = export(source, args.out, keys=args.keys, dtype=args.dtype, rank=args.rank)
    write_release(args.out, source.run_dir)
    beside = [path for path in companions(args.out) if path.is_file()]
    return Result(
        text=to_text(report),
        values=report,
        done=f"exported {len(report['modules'])} modules",
        wrote=(args.out, *beside),
        next=f"copy {args.out.name} to ComfyUI/models/loras",
    )


def to_text(report: Mapping[str, Any]) -> str:
    """The report with one line per kind of layer; JSON has every module."""
    from ..utils.terminal import table

    def kind(name: str) -> str:
        return re.sub(r"\.\d+\.", ".*.", name, count=1)

    rows = []
    for label, group in groupby(sorted(report["modules"], key=kind), key=kind):
        modules = [report["modules"][name] for name in group]
        errors = [module["relative_error"] for module in modules]
        rows.append(
            [
                label,
                str(len(modules)),
                _span(module["rank_before"] for module in modules),
                _span(module["rank"] for module in modules),
                f"{sum(errors) / len(errors):.5f}",
                f"{max(errors):.5f}",
            ]
        )
    header = ["layers", "modules", "rank before", "rank", "mean error", "largest"]
    lines = [table(header, rows), ""] if report["rank_limit"] else []
    lines += [
        f"relative error |new - old| / |old| of all modules together: "
        f"{report['relative_error']:.5f}",
        f"from      {report['source']}",
        f"sampling  {printable(report['sampling'])}",
        f"spec from {report['spec_source']}",
        f"alpha     {report['alpha_from']}",
        f"{report['file']}  ({report['file_size_bytes'] / 1e6:,.1f} MB, {report['dtype']}, "
        f"{report['keys']} keys)",
    ]
    if report["not_exported"]:
        lines.append(
            f"Left out: {len(report['not_exported'])} keys that belong to no layer of the "
            f"diffusion model, such as {plain(report['not_exported'][0])}"
        )
    return "\n".join(lines) + "\n"


def _span(numbers: Any) -> str:
    low, *rest = sorted(set(numbers))
    return f"{low}-{rest[-1]}" if rest else str(low)
