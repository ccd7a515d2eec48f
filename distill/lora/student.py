"""The finished LoRA as a file that ComfyUI, diffusers and our nodes load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model_state_dict

from ..config import ConfigError
from ..contract.lora_keys import NormalisedLora, normalise, to_comfy
from ..contract.metadata import read_lora, write_lora
from ..contract.shown import shown
from ..contract.spec import TurboSpec
from ..models.family import Family
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
        down, up = _weights(roles, name)
        if down.shape != module.down.shape:
            raise ValueError(f"{path}: {name}: expected rank {down.shape[0]}, found {module.rank}.")
        down.copy_(module.down)
        up.copy_(module.up * (module.scale / roles.scale))


@torch.no_grad()
def init_student(roles: Roles, lora: NormalisedLora) -> None:
    """Gives the fresh student the function of a LoRA, exactly: where the adapter's rank is larger,
    further rows of lora_A stay as they were drawn, beside columns of zero in lora_B; modules that
    the LoRA does not have do nothing yet.

    Raises ConfigError where it has modules, ranks or sizes that the adapter does not.
    """
    parameters = roles.named_parameters(STUDENT)
    found = {name.split(".lora_")[0] for name in parameters}
    if odd := sorted(lora.modules.keys() - found):
        raise ConfigError(modules_advice(lora, odd, roles.family))
    for name, module in lora.modules.items():
        down, up = _weights(roles, name)
        size = [up.shape[0], down.shape[1]]
        if [module.up.shape[0], module.down.shape[1]] != size:
            raise ConfigError(
                f"init_from: {lora.source}: {name}: expected a LoRA for a weight {size}, found "
                f"{[module.up.shape[0], module.down.shape[1]]}. It is of a model of another size."
            )
        if module.rank > len(down):
            raise ConfigError(rank_advice(lora, len(down)))
        down[: module.rank] = module.down
        up.zero_()
        up[:, : module.rank] = module.up.float() * (module.scale / roles.scale)
    for name in found - lora.modules.keys():
        _weights(roles, name)[1].zero_()


def modules_advice(lora: NormalisedLora, odd: Sequence[str], family: Family) -> str:
    wider = any(name.endswith(family.modulation) for name in odd)
    return (
        f"init_from: {lora.source}: {len(odd)} of its modules are not adapted here, e.g. "
        f"{shown(odd[0])}; expected {', '.join(family.targets(True))} of a block"
        + ("; set adapter.modulation=true" if wider else "")
    )


def rank_advice(lora: NormalisedLora, rank: int) -> str:
    highest = max(lora.ranks)
    return (
        f"init_from: {lora.source}: expected a rank of at most adapter.rank, {rank} (found "
        f"{highest}); set adapter.rank={highest}, or cut the LoRA with `turbo-distill export "
        f"--rank {rank}`"
    )


def _weights(roles: Roles, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [rank, in] and lora_B [out, rank] of the student."""
    parameters = roles.transformer.get_submodule(module)
    return parameters.lora_A[STUDENT].weight, parameters.lora_B[STUDENT].weight
