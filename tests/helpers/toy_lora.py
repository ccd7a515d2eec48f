"""LoRAs for the toy model, with their arithmetic written out once more, without the pack's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIGMAS = (1.0, 0.7155, 0.0)


@dataclass(frozen=True)
class Update:
    """One layer of a LoRA."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    alpha: float

    def delta(self) -> Tensor:
        return self.up @ self.down * (self.alpha / self.down.shape[0])


def linear_weights(transformer: Path) -> dict[str, Tensor]:
    """A saved transformer's weights by module name (without ".weight")."""
    weights = load_file(transformer / "diffusion_pytorch_model.safetensors")
    return {
        key.removesuffix(".weight"): weight for key, weight in weights.items() if weight.ndim == 2
    }


def make_updates(
    base_weights: Mapping[str, Tensor],
    seed: int = 0,
    ranks: tuple[int, ...] = (4,),
    alpha: float | None = 3.0,
) -> dict[str, Update]:
    """Random updates of all linear layers by module name.

    ranks take turns over the layers; alpha None means equal to the rank.
    """
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for index, (name, weight) in enumerate(sorted(base_weights.items())):
        rank = ranks[index % len(ranks)]
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        updates[name] = Update(down, up, rank if alpha is None else alpha)
    return updates


def write_lora(
    folder: Path,
    turbo_spec: Callable[..., Any],
    updates: Mapping[str, Update],
    name: str = "turbo.safetensors",
    **spec: Any,
) -> Path:
    """Writes updates in ComfyUI's spelling, and a spec made by `turbo_spec(**spec)`."""
    tensors = {}
    for module, update in updates.items():
        tensors[f"diffusion_model.{module}.lora_A.weight"] = update.down
        tensors[f"diffusion_model.{module}.lora_B.weight"] = update.up
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(float(update.alpha))
    path = folder / name
    save_file(tensors, path, {"turbo.spec": turbo_spec(**{"nodes": SIGMAS, **spec}).to_json()})
    return path
