"""From files to a model that can sample: bytes and seconds, and a LoRA loader's time by size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .core import Core
from .measure import TOTAL, Budget, Clock, Line, in_turns
from .world import Size, layers_of, random_transformer, write_lora

BASE = "base.safetensors"
RANKS = (8, 16, 32, 64, 128)


def write_base(core: Core, size: Size) -> Path:
    """A bf16 model file of `size`, as the published one is laid out."""
    path = core.models("diffusion_models") / BASE
    weights = random_transformer(core, size).model.diffusion_model.state_dict()
    save_file({name: weight.bfloat16().cpu() for name, weight in weights.items()}, path)
    return path


def bake(core: Core, base: Path, lora: Path, dtype: str = "bf16") -> Path:
    """Turbo Bake's file, in models/diffusion_models."""
    out = core.models("diffusion_models") / f"{base.stem}_baked_{dtype}.safetensors"
    plan = core.pack("distill.contract.bake.plan").plan_bake(base, lora, out, dtype)
    core.pack("distill.contract.bake.merge").bake(plan)
    return out


def base_and_lora(core: Core, size: Size) -> tuple[Path, Path]:
    base, lora = write_base(core, size), core.models("loras") / "rank.safetensors"
    model = load_base(base, size)
    write_lora(core, lora, layers_of(model), size.rank)
    return base, lora


def load_base(base: Path, size: Size) -> Any:
    """As UNETLoader does, for any width: core's detection assumes the published one."""
    import comfy.sd
    from comfy.utils import load_torch_file

    if size.heads * size.head_dim == 3072 and size.text_width == 3584:
        return comfy.sd.load_diffusion_model(str(base))
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **size.transformer()})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    model.diffusion_model.load_state_dict(load_torch_file(str(base)))
    return comfy.model_patcher.CoreModelPatcher(
        model, management.get_torch_device(), management.unet_offload_device()
    )


# ------------------------------------------------------------------------------------- measuring


def loading(core: Core, size: Size, rounds: int, budget: Budget) -> dict[str, Any]:
    """Load Diffusion Model + LoRA loader against Turbo Baked Loader: file to patched weights."""
    from comfy.model_management import load_models_gpu, unload_all_models

    import nodes

    base, lora = base_and_lora(core, size)
    baked = bake(core, base, lora)
    load_baked = core.pack("nodes.baked_model").load_baked
    resident = {}

    def keep(name: str, model: Any) -> None:
        net = model.model.diffusion_model
        resident[name] = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
        unload_all_models()

    @torch.inference_mode()
    def run_core(clock: Clock) -> None:
        with clock("load"):
            model = load_base(base, size)
        with clock("patch"):
            model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora.name, 1.0)[0]
            load_models_gpu([model], force_full_load=True)
        keep("B base + LoRA", model)

    @torch.inference_mode()
    def run_baked(clock: Clock) -> None:
        with clock("load"):
            model = load_baked(baked)
        with clock("patch"):
            load_models_gpu([model], force_full_load=True)
        keep("C baked", model)

    arms = {"B base + LoRA": run_core, "C baked": run_baked}
    table = in_turns(arms, core.device, rounds, budget)
    on_disk = {"B base + LoRA": size_of(base) + size_of(lora), "C baked": size_of(baked)}
    return {
        "table": table,
        "bytes on disk": on_disk,
        "bytes resident": resident,
        "C/B on disk, without the LoRA": size_of(baked) / size_of(base),
        "C/B resident": resident["C baked"] / resident["B base + LoRA"],
    }


def size_of(path: Path) -> int:
    return path.stat().st_size


def lora_loader(core: Core, size: Size, rounds: int, budget: Budget) -> dict[str, Any]:
    """Seconds of Turbo LoRA Loader for LoRAs of rank 8 to 128, from the file to patched weights,
    and the line through them.
    """
    from comfy.model_management import load_models_gpu

    model = load_base(write_base(core, size), size)
    layers, apply_lora = layers_of(model), core.pack("nodes.apply_lora")
    files = {rank: core.models("loras") / f"rank_{rank}.safetensors" for rank in RANKS}
    for rank, file in files.items():
        write_lora(core, file, layers, rank)

    @torch.inference_mode()
    def run(file: Path, clock: Clock) -> None:
        apply_lora._read_version.cache_clear()  # read it every time
        with clock("load"):
            patched, _ = apply_lora.apply_lora(model, file)
        with clock("patch"):
            load_models_gpu([patched], force_full_load=True)

    arms = {f"rank {rank}": partial(run, file) for rank, file in files.items()}
    table = in_turns(arms, core.device, rounds, budget)
    megabytes = [size_of(file) / 1e6 for file in files.values()]
    seconds = [table[name][TOTAL].low for name in arms]  # the least disturbed repetition
    line = Line.through(megabytes, seconds)
    return {"table": table, "MB": megabytes, "line, s over MB": line}
