"""What the arms share: one base model, one LoRA, one text encoder, one VAE, in memory.

`tiny` is the model that comes with the repository; `random` builds any size on the device, the full
one as well as a small one for tests of this very code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from distill.contract.tiny import TINY_DIR

from .core import Core, fill_randomly

SIGMAS = (1.0, 0.75, 0.0)  # those of core's template: simple, 2 steps, shift 3
SHIFT = 3.0
CORE_HEAD = 128  # width of a head of core's text encoder

# Modules of a block that our LoRAs and the public ones train.
TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.net.{part}" for stream in ("img", "txt") for part in ("0.proj", "2")),
)


@dataclass(frozen=True)
class Size:
    """Numbers of a model; the defaults are Qwen-Image-2512's and Qwen2.5-VL-7B's."""

    blocks: int = 60
    heads: int = 24
    head_dim: int = 128
    axes: tuple[int, int, int] = (16, 56, 56)
    text_width: int = 3584
    text_mlp: int = 18944
    text_layers: int = 28
    text_heads: tuple[int, int] = (28, 4)  # queries, keys
    vae_base: int = 96
    rank: int = 64

    def transformer(self) -> dict[str, Any]:
        """Arguments of core's and diffusers' QwenImageTransformer2DModel."""
        return {
            "num_layers": self.blocks,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": self.axes,
            "joint_attention_dim": self.text_width,
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
        }

    def text_encoder(self) -> dict[str, Any]:
        """Fields of core's Qwen25_7BVLI_Config and of transformers' Qwen2.5-VL text config."""
        queries, keys = self.text_heads
        return {
            "hidden_size": self.text_width,
            "intermediate_size": self.text_mlp,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": queries,
            "num_key_value_heads": keys,
        }


FULL = Size()
SMALL = Size(  # the code of FULL in a second on a CPU
    blocks=2,
    heads=1,
    text_width=256,
    text_mlp=128,
    text_layers=2,
    text_heads=(2, 1),
    vae_base=8,
    rank=4,
)
TINY = Size(
    blocks=4,
    heads=5,
    head_dim=32,
    axes=(8, 12, 12),
    text_width=64,
    text_mlp=256,
    text_layers=2,
    text_heads=(4, 2),
    vae_base=8,
)


@dataclass
class World:
    """Parts for every arm. base has no LoRA on it; patched has, by core's own loader."""

    core: Core
    size: Size
    base: Any  # MODEL
    patched: Any  # MODEL
    lora: Path
    clip: Any
    vae: Any
    pipeline: Any  # diffusers, its weights those of `patched`


def build(core: Core, size: Size, tiny: bool = False) -> World:
    """tiny: the trained tiny model and its LoRA; else random weights of `size`."""
    from comfy.model_management import load_models_gpu

    import nodes

    base = (
        core.pack("nodes.tiny").load_transformer(TINY_DIR / "transformer")
        if tiny
        else random_transformer(core, size)
    )
    lora = core.models("loras") / f"{'tiny' if tiny else 'random'}_2_steps.safetensors"
    if tiny:
        source = core.pack("nodes.tiny").lora_file(TINY_DIR)
        lora.write_bytes(source.read_bytes())
    else:
        write_lora(core, lora, layers_of(base), size.rank)
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(base, lora.name, 1.0)[0]
    load_models_gpu([patched], force_full_load=True)
    vae, diffusers_vae = vaes(core, size, tiny)
    world = World(core, size, base, patched, lora, text_encoder(core, size), vae, None)
    return replace(world, pipeline=diffusers_pipeline(world, diffusers_vae))


def build_random(core: Core, size: Size) -> World:
    """Random weights of `size` that stand for base + LoRA, merged already: nothing to patch."""
    from comfy.model_management import load_models_gpu

    model = random_transformer(core, size)
    load_models_gpu([model], force_full_load=True)
    vae, diffusers_vae = vaes(core, size, tiny=False)
    clip = text_encoder(core, size)
    world = World(core, size, model, model, Path("merged already"), clip, vae, None)
    return replace(world, pipeline=diffusers_pipeline(world, diffusers_vae))


# ----------------------------------------------------------------------------------- transformer


def random_transformer(core: Core, size: Size, stored: torch.dtype | None = None) -> Any:
    """A MODEL with random weights, made on the device: bf16, or float32 on the CPU.

    stored: another dtype that they are kept in, and cast from layer by layer.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **size.transformer()})
    dtype = dtype_of(core)
    config.set_inference_dtype(stored or dtype, dtype if stored else None)
    model = config.get_model({}, "", device=core.device)
    fill_randomly(model.diffusion_model)
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.CoreModelPatcher(model, core.device, offload)


def dtype_of(core: Core) -> torch.dtype:
    return torch.float32 if core.device.type == "cpu" else torch.bfloat16


def layers_of(model: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that a LoRA trains, by its name below diffusion_model."""
    modules = model.model.diffusion_model.named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in modules
        if name.endswith(TARGETS) and name.startswith("transformer_blocks.")
    }


def write_lora(
    core: Core, path: Path, layers: Mapping[str, Sequence[int]], rank: int, std: float = 0.01
) -> None:
    """A random LoRA in bf16, in ComfyUI's spelling, with a spec."""
    generator = torch.Generator(core.device).manual_seed(rank)

    def normal(*shape: int) -> torch.Tensor:
        found = torch.randn(shape, generator=generator, device=core.device) * std
        return found.bfloat16().cpu()

    tensors = {}
    for name, (out, width) in layers.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = normal(rank, width)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = normal(out, rank)
    spec = core.pack("distill.contract.spec").TurboSpec(SIGMAS)
    save_file(tensors, path, {"turbo.spec": spec.to_json()})


# ------------------------------------------------------------------------------ text encoder, VAE


def text_encoder(core: Core, size: Size) -> Any:
    """Core's CLIP of Qwen2.5-VL's architecture with random weights."""
    import comfy.sd
    import comfy.text_encoders.qwen_image as qwen

    class Target:
        clip = staticmethod(qwen.te())
        tokenizer = qwen.QwenImageTokenizer
        params: ClassVar[dict[str, Any]] = {}

    options = {
        "qwen25_7b_model_config": size.text_encoder(),
        "initial_device": core.device,
        "dtype": dtype_of(core),
    }
    clip = comfy.sd.CLIP(Target, model_options=options)
    clip.cond_stage_model.qwen25_7b.transformer.visual = torch.nn.Identity()  # text only
    fill_randomly(clip.cond_stage_model)
    return clip


def vaes(core: Core, size: Size, tiny: bool) -> tuple[Any, Any]:
    """The same VAE in core and in diffusers."""
    from diffusers import AutoencoderKLQwenImage

    folder = TINY_DIR / "vae"
    if not tiny:
        folder = core.models("vae")
        torch.manual_seed(0)
        AutoencoderKLQwenImage(base_dim=size.vae_base).save_pretrained(folder)
    theirs = AutoencoderKLQwenImage.from_pretrained(folder).to(core.device, dtype_of(core))
    return core.pack("nodes.tiny").load_vae(folder), theirs


# -------------------------------------------------------------------------------------- diffusers


def diffusers_pipeline(world: World, vae: Any) -> Any:
    """QwenImagePipeline around the very tensors that core samples: base + LoRA, fused."""
    import comfy.text_encoders.qwen_image as qwen
    from accelerate import init_empty_weights
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2Tokenizer

    with init_empty_weights():  # leaves the positions, which are no weights, where they are
        transformer = QwenImageTransformer2DModel(**world.size.transformer())
    weights = world.patched.model.diffusion_model.state_dict()
    transformer.load_state_dict(weights, assign=True)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_transformers_encoder(world),
        tokenizer=Qwen2Tokenizer.from_pretrained(Path(qwen.__file__).parent / "qwen25_tokenizer"),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _transformers_encoder(world: World) -> Any:
    """Around the very tensors of core's text encoder, for two would not fit 78 GiB. Its head and
    its eyes, which core does without, are its own.
    """
    from accelerate import init_empty_weights
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**world.size.text_encoder(), "vocab_size": 152064, "max_position_embeddings": 4096}
    half = world.size.text_width // world.size.text_heads[0] // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]  # 16, 24, 24 of 64
    text["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": sections}
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}  # not used
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "out_hidden_size": text["hidden_size"]}
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype_of(world.core))
    try:
        with init_empty_weights():  # leaves the rotary frequencies, which are no weights
            encoder = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    language, own = encoder.model.language_model, [encoder.lm_head, encoder.model.visual]
    if world.size.text_width == CORE_HEAD * world.size.text_heads[0]:
        weights = world.clip.cond_stage_model.qwen25_7b.transformer.model.state_dict()
        language.load_state_dict(weights, assign=True)
    else:  # core's heads have one width, the tiny model's are narrower: another encoder
        own += [part for name, part in language.named_children() if name != "rotary_emb"]
    for part in own:
        part.to_empty(device=world.core.device)
        fill_randomly(part)
    return encoder.to(world.core.device).eval()
