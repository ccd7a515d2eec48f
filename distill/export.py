"""The finished LoRA as a file that ComfyUI, diffusers and our nodes load."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model_state_dict

from .contract.lora_keys import normalise, to_comfy
from .contract.metadata import read_lora, write_lora
from .contract.spec import TurboSpec
from .roles import STUDENT, Roles


def lora_tensors(roles: Roles, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The student as `diffusion_model.<module>.lora_A/B.weight` and `.alpha`."""
    state = get_peft_model_state_dict(roles.transformer, adapter_name=STUDENT)
    state = {key: tensor.detach().cpu() for key, tensor in state.items()}
    modules = {key.split(".lora_")[0] for key in state}
    state |= {f"{module}.alpha": torch.tensor(roles.alpha) for module in modules}
    return to_comfy(normalise(state, source="student adapter"), dtype)


def export_lora(
    roles: Roles,
    spec: TurboSpec,
    path: Path,
    *,
    title: str,
    extra: dict[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes the student to `path` with its spec in the header."""
    write_lora(path, lora_tensors(roles, dtype), spec=spec, title=title, extra=extra)
    return path


@torch.no_grad()
def load_student(roles: Roles, path: Path) -> None:
    """Fills the student adapter from a LoRA file of the same rank.

    Raises LoraFormatError for a file that is no LoRA, ValueError where modules or ranks do not fit
    the adapter.
    """
    tensors, metadata = read_lora(path)
    lora = normalise(tensors, metadata, source=path.name)
    parameters = roles.named_parameters(STUDENT)
    modules = {name.split(".lora_")[0] for name in parameters}
    if modules != lora.modules.keys():
        odd = sorted(modules ^ lora.modules.keys())
        raise ValueError(f"{path}: {len(odd)} modules differ from the adapter's, e.g. {odd[0]}.")
    for name, module in lora.modules.items():
        down, up = (
            parameters[f"{name}.lora_A.{STUDENT}.weight"],
            parameters[f"{name}.lora_B.{STUDENT}.weight"],
        )
        if down.shape != module.down.shape:
            raise ValueError(f"{path}: {name}: expected rank {down.shape[0]}, found {module.rank}.")
        down.copy_(module.down)
        up.copy_(module.up * (module.scale / roles.scale))
