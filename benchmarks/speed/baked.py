"""What Turbo Bake and Turbo Baked Loader make of the arms' own weights, without a file between.

One layer at a time goes through the bake's own code on the device, so that the full model needs no
41 GB file and no second copy in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.contract.bake.merge import baked, header
from distill.contract.bake.plan import LazyLora, check_base, make_plan
from distill.contract.bake.weights import Stored, Weights
from distill.contract.lora_keys import NormalisedLora

from .core import Core
from .world import SIGMAS, Size


@dataclass(frozen=True)
class InMemory(Weights):
    """Tensors of a model in memory; `read` leaves them on their device.

    consumed: `read` takes them out, so that what is read once does not stay beside its result.
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    consumed: bool = False

    @classmethod
    def of(
        cls, values: dict[str, torch.Tensor], source: str, consumed: bool = False, **config: Any
    ) -> InMemory:
        stored = {name: Stored(Path(), name, value.to("meta")) for name, value in values.items()}
        return cls(Path(source), stored, config, values=values, consumed=consumed)

    def read(self, name: str) -> torch.Tensor:
        return self.values.pop(name) if self.consumed else self.values[name].clone()


@torch.inference_mode()  # as ComfyUI's server runs nodes
def baked_model(
    core: Core, size: Size, weights: dict[str, torch.Tensor], dtype: str, consumed: bool = False
) -> Any:
    """A MODEL of base + LoRA, folded, with linear layers in "bf16", "fp8" or "int8".

    weights: the LoRA is merged already, by core in the weights' own dtype; a bake merges in
    float32. consumed: they are taken out of `weights` one by one.
    """
    from comfy.utils import convert_old_quants

    base = InMemory.of(weights, "base and LoRA", consumed, axes_dims_rope=size.axes)
    check_base(base)
    spec = core.pack("distill.contract.spec").TurboSpec(SIGMAS)
    no_lora = LazyLora(NormalisedLora("merged already", {}), base, {}, 1.0)
    plan = make_plan(base, no_lora, spec, Path(f"baked_{dtype}.safetensors"), dtype)
    tensors, _ = convert_old_quants(dict(baked(plan)), "", metadata=header(plan))
    folded = core.pack("nodes.baked_model")
    return folded.baked_model(tensors, plan.folded, spec, plan.out.name)
