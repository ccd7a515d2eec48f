"""The finished LoRA as a file that ComfyUI, diffusers and our nodes load."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model_state_dict

from ..contract.lora_keys import NormalisedLora, normalise, to_comfy
from ..contract.metadata import read_lora, write_lora
from ..contract.spec import TurboSpec
from ..models.roles import STUDENT, Roles


def student_lora(weights: dict[str, torch.Tensor], alpha: float, source: str) -> NormalisedLora:
    """An adapter's weights by PEFT name, with the alpha that all of its modules have."""
    modules = {key.split(".lora_")[0] for key in weights}
    alphas = {f"{module}.alpha": torch.tensor(alpha) for module in modules}
    return normalise(weights | alphas, source=source)


def lora_tensors(roles: Roles, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The student as `diffusion_model.<module>.lora_A/B.weight` and `.alpha`."""
    # Not the module's own state_dict: asked for on one rank alone, it puts FSDP out of step
    parameters = roles.named_parameters(STUDENT)
    state = get_peft_model_state_dict(roles.transformer, parameters, adapter_name=STUDENT)
    weights = {key: tensor.detach().cpu() for key, tensor in state.items()}
    return to_comfy(student_lora(weights, roles.alpha, "student adapter"), dtype)


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
