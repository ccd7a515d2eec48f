"""`turbo-distill stamp FILE --out OUT`: a LoRA that carries its schedule."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from ..contract.checks import SpecError
from ..contract.shift import EXAMPLES as SHIFTS
from ..contract.shift import Shift, read_shift
from ..contract.shown import printable
from ..contract.spec import SAMPLERS
from ..contract.stamp import Wanted, stamp
from .options import finite, path_argument, positive, sigmas_argument, text_argument, whole
from .result import Result

ABOUT = """\
Writes a copy of a LoRA of any trainer that carries its schedule, its model and its
alpha, so that it is right wherever it goes and whatever it is called. Not a bit of
its weights changes. Without a schedule by hand the one that header, sidecar or the
table of known files give is written in."""
EXAMPLES = """\
turbo-distill stamp public.safetensors --sigmas '1, .5, 0' --out stamped.safetensors
turbo-distill stamp mine.safetensors --nodes '1, .75, .5, .25, 0' --shift static:3 \\
    --base Qwen/Qwen-Image-2512 --out stamped.safetensors
turbo-distill stamp pytorch_lora_weights.safetensors --like Qwen-Image-2.1-Lightning-4step \\
    --out lightning.safetensors
turbo-distill stamp mine.safetensors --alpha 128 --out stamped.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "file",
        metavar="FILE",
        type=path_argument,
        help="a LoRA in safetensors format, or the folder of one that PEFT saved; it stays as it "
        "is",
    )
    files.add_argument(
        "--out", metavar="OUT", type=path_argument, required=True, help="the new file"
    )
    _add_schedule(parser.add_argument_group("schedule (default: what the file or the table says)"))
    _add_rest(parser.add_argument_group("the rest of the spec"))
    parser.add_argument_group("weights").add_argument(
        "--alpha",
        type=positive,
        metavar="A",
        help="of every module, where the file does not say it (the scale is A / rank)",
    )


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    way = group.add_mutually_exclusive_group()
    way.add_argument(
        "--sigmas",
        type=sigmas_argument,
        metavar="'1, .5, 0'",
        help="noise levels as they are sampled at, at every size of image",
    )
    way.add_argument(
        "--nodes",
        type=sigmas_argument,
        metavar="'1, .75, .5, .25, 0'",
        help="noise levels before the shift",
    )
    way.add_argument(
        "--like",
        metavar="NAME",
        type=text_argument,
        help="the schedule of a known public file: its name, or that of its row in "
        "docs/known_files.md",
    )
    group.add_argument(
        "--shift",
        type=shift_argument,
        metavar="RULE",
        help=f"how the nodes move: {', '.join(SHIFTS.values())} (numbers of tokens, or of steps, "
        "and mu there)",
    )
    group.add_argument(
        "--terminal",
        type=positive,
        metavar="SIGMA",
        help="to where the last node but 0 is stretched after the shift",
    )
    group.add_argument(
        "--also-nodes",
        action="append",
        type=sigmas_argument,
        metavar="'1, .5, 0'",
        help="nodes for another number of steps that the file was trained for; may be repeated",
    )


def _add_rest(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--sampler", choices=SAMPLERS, help="euler (the ODE) or renoise")
    group.add_argument("--cfg", type=finite, metavar="SCALE", help="guidance scale; 1 is none")
    group.add_argument(
        "--guidance",
        type=finite,
        metavar="SCALE",
        help="what a guidance-distilled model such as FLUX is told",
    )
    group.add_argument(
        "--strength",
        type=sigmas_argument,
        metavar="'1' or '1, .8'",
        help="multiplier of the LoRA, one number or one for each step",
    )
    group.add_argument(
        "--boundary",
        type=whole(1),
        metavar="N",
        help="steps that the high-noise expert of a model with two takes (Wan 2.2)",
    )
    group.add_argument(
        "--base", type=text_argument, metavar="ID", help="the model that the LoRA was trained on"
    )
    group.add_argument(
        "--family", type=text_argument, metavar="NAME", help="its kind, such as qwen-image"
    )


def shift_argument(text: str) -> Shift | None:
    """`read_shift`, with the error that argparse shows."""
    try:
        return read_shift(text)
    except SpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(args: argparse.Namespace) -> Result:
    """Raises SpecError, LoraFormatError, OSError."""
    report = stamp(args.file, args.out, wanted(args))
    return Result(
        text=to_text(report),
        values=report,
        done=f"stamped {args.file.name}",
        wrote=(args.out,),
        next=f"copy {args.out.name} to ComfyUI/models/loras, or look at it: turbo-distill inspect "
        f"{shlex.quote(str(args.out))}",
    )


def wanted(args: argparse.Namespace) -> Wanted:
    """What the options say."""
    strength = args.strength
    fields = {
        "sampler": args.sampler,
        "cfg": args.cfg,
        "guidance": args.guidance,
        "strength": strength[0] if strength and len(strength) == 1 else strength,
        "ladder": args.also_nodes and tuple(args.also_nodes),
        "boundary": args.boundary,
        "base": args.base,
        "family": args.family,
    }
    return Wanted(
        sigmas=args.sigmas,
        nodes=args.nodes,
        shift=args.shift,
        terminal=args.terminal,
        like=args.like,
        fields={name: value for name, value in fields.items() if value is not None},
        alpha=args.alpha,
    )


def to_text(report: Mapping[str, Any]) -> str:
    added = report["alpha_added"]
    lines = [
        f"sampling  {report['sampling']}",
        f"spec from {report['spec_source']}{' (replaced)' if report['spec_replaced'] else ''}",
        f"model     {report['family']}, {report['base']}",
        f"alpha     {report['alpha_from']}{f'; written as {added} tensors' if added else ''}",
        *(f"warning   {warning}" for warning in report["warnings"]),
        f"{report['file']}  ({report['file_size_bytes'] / 1e6:,.1f} MB)",
    ]
    return "".join(f"{printable(line)}\n" for line in lines)
