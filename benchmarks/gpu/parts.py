"""Parts of a picture on their own: attention by kernel and number of tokens, the VAE both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.speed import stages
from benchmarks.speed.core import Core
from benchmarks.speed.kernels import CALL, attention_kernels
from benchmarks.speed.measure import Budget, Clock, in_turns
from benchmarks.speed.report import stage_table
from benchmarks.speed.world import Size, dtype_of, vaes
from distill.utils.terminal import table

# rows, keys, warps and stages of the Triton kernel
FP8_SHAPES = ((128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 3))
EXPERIMENT = "(an experiment)"


def register_fp8(core: Core) -> None:
    """From now on the pack knows this benchmark's attention in fp8 as well."""
    if core.device.type != "cuda":
        return
    from . import cudnn_fp8, kernels

    attention = core.pack("nodes.attention")
    runs = {"fp8, cuDNN": (cudnn_fp8.attention, cudnn_fp8.missing)}
    for numbers in FP8_SHAPES:
        shape = dict(zip(("rows", "keys", "warps", "stages"), numbers, strict=True))
        name = f"fp8, Triton, {', '.join(map(str, numbers))}"
        runs[name] = partial(kernels.attention, **shape), lambda: None
    for name, (run, missing) in runs.items():
        attention.register(
            attention.Kernel(
                f"{name} {EXPERIMENT}",
                run,
                missing,
                majors=range(attention.HOPPER, attention.HOPPER + 1),
                dtypes=(torch.bfloat16,),
                low_precision=True,
                rounding=2**-4,
                tolerance=0.2,
            )
        )


def fastest_fp8(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Name of the experiment's kernel if it passes and is the fastest of all at the most tokens;
    else "".
    """
    if not found:
        return ""
    rows = found[max(found, key=int)]
    passing = {name: row["s"]["median"] for name, row in rows.items() if row["passes"]}
    best = min(passing, key=passing.__getitem__)
    return best if EXPERIMENT in best else ""


def attention(
    core: Core, size: Size, counts: tuple[int, ...], rounds: int, budget: Budget
) -> tuple[dict[str, Any], str]:
    """Of each kernel: ms per call and TFLOP/s by number of tokens; and what the guard says."""
    register_fp8(core)
    found: dict[str, Any] = {}
    reasons: dict[str, None] = {}
    for tokens in counts:
        measured = attention_kernels(core, size, tokens, rounds, budget)
        operations = 4.0 * tokens**2 * size.heads * size.head_dim
        found[str(tokens)] = {
            name: {
                "s": row[CALL],
                "TFLOP/s": operations / row[CALL].median / 1e12,
                "passes": name not in measured.wrong,
            }
            for name, row in measured.table.items()
        }
        reasons |= dict.fromkeys(measured.reasons)
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    cells = [
        [
            name,
            *(
                f"{1000 * rows[name]['s'].median:.3g} ({rows[name]['TFLOP/s']:.0f})"
                if name in rows
                else "-"
                for rows in found.values()
            ),
        ]
        for name in names
    ]
    header = ["ms per call (TFLOP/s)", *(f"{tokens} tokens" for tokens in found)]
    return found, "\n\n".join([table(header, cells), "\n".join(reasons)])


def vae(
    core: Core, size: Size, sides: tuple[int, ...], rounds: int, budget: Budget
) -> tuple[dict[str, Any], str]:
    """Seconds of decoding and encoding one image by diffusers, core and us."""
    found, parts = {}, []
    for side in sides:
        found[f"decode {side}"] = stages.decoding(core, size, side, rounds, budget)
        found[f"encode {side}"] = encoding(core, size, side, rounds, budget)
        for what in ("decode", "encode"):
            parts += [f"{side} x {side}", stage_table(found[f"{what} {side}"])]
    return found, "\n\n".join(parts)


def encoding(core: Core, size: Size, side: int, rounds: int, budget: Budget) -> stages.Table:
    """One image through the same VAE in diffusers and in core; the pack has no node for it."""
    import nodes

    vae, theirs = vaes(core, size, tiny=False)
    pixels = stages.picture(side)

    @torch.no_grad()
    def encode_diffusers(clock: Clock) -> None:
        image = (2 * pixels - 1).permute(0, 3, 1, 2)[:, :, None]
        with clock("encode"):
            theirs.encode(image.to(core.device, dtype_of(core)), return_dict=False)

    @torch.inference_mode()
    def encode_core(clock: Clock) -> None:
        with clock("encode"):
            nodes.VAEEncode().encode(vae, pixels)

    arms = {"A diffusers": encode_diffusers, "B VAEEncode": encode_core}
    return in_turns(arms, core.device, rounds, budget, total=False)
