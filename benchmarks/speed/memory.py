"""Memory of decoding one image with the full-size VAE in bf16: what is live, what is reserved.

    python -m benchmarks.speed.memory --out docs/evidence     seconds, no GPU, no weights

Tensors are on PyTorch's meta device, so nothing is computed: every storage that an operation makes
counts from there until it is freed. What convolution kernels allocate inside is not seen.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.live import META, Live
from distill.training.environment import describe_machine
from distill.utils.terminal import table

from .core import Core, start
from .nodes import show
from .report import Report
from .world import FULL, SMALL, Size, vaes

SIDES = (1024, 1328, 2048)
DTYPE = torch.bfloat16


@torch.inference_mode()
def peak_of(decode: Callable[[torch.Tensor], torch.Tensor], latent: torch.Tensor) -> int:
    """Bytes live at most while a latent is decoded, the latent and the weights not counted."""
    with Live() as live:
        decode(latent)
    return live.peak


def fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What core's attention of all pixels allocates with a fused kernel: copies and the result.

    On the meta device PyTorch would write out all of softmax(q k).  # [B, C, ...] each -> like q
    """
    shape = q.shape
    q, k, v = (x.reshape(shape[0], 1, shape[1], -1).transpose(2, 3).contiguous() for x in (q, k, v))
    return torch.empty_like(q).transpose(2, 3).reshape(shape)


def decoding(core: Core, size: Size, sides: Sequence[int]) -> dict[str, dict[str, float]]:
    """Per size of the image: live and reserved bytes of core's VAEDecode and of ours."""
    vae = vaes(core, size, tiny=False)[0]
    ours = core.pack("nodes.decode").image_vae(vae)
    networks = {"core": vae.first_stage_model, "ours": ours.first_stage_model}
    for network in networks.values():
        network.to(DTYPE).to(META)
        for module in network.modules():
            for name in ("optimized_attention", "attention"):
                if hasattr(module, name):
                    setattr(module, name, fused_attention)
    found = {}
    for side in sides:
        latent = torch.empty(1, 16, 1, side // 8, side // 8, dtype=DTYPE, device=META)
        row = {f"{name}: live": peak_of(net.decode, latent) for name, net in networks.items()}
        for name, one in (("core", vae), ("ours", ours)):
            row[f"{name}: reserved"] = one.memory_used_decode(latent.shape, DTYPE)
        found[f"{side} x {side}"] = row
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for speed_memory.json and .md")
    parser.add_argument("--small", action="store_true", help="toy size, to test this script")
    chosen = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="turbo-distill-speed-") as folder:
        core = start(Path(folder), cpu=True)
        machine = describe_machine(1, core.device)
        report = Report("Memory of VAE decode, bf16", machine, chosen.out, "speed_memory")
        found = decoding(core, SMALL if chosen.small else FULL, (64,) if chosen.small else SIDES)
        columns = next(iter(found.values()))
        rows = [
            [side, *(f"{row[column] / 1e9:.2f}" for column in columns)]
            for side, row in found.items()
        ]
        show(report.add("Decoding one image", found, table(["GB", *columns], rows)))


if __name__ == "__main__":
    main()
