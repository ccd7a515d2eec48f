"""A model of toy size of each family: ComfyUI's own class, and diffusers' names for its layers.

Widths differ from each other, so that a transposed or misplaced slice cannot fit by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import toy_lora
from torch import Tensor
from toy_lora import Update

HEADS, HEAD = 2, 12
WIDTH = HEADS * HEAD
TEXT, POOLED = 20, 14
Z_HEADS, Z_HEAD = 2, 132  # its modulation takes 256 numbers of at least as many


@dataclass(frozen=True)
class TinyFamily:
    """How a family is built on both sides.

    config: core's unet_config; diffusers: class and arguments; inputs: of core's forward.
    """

    core: str  # class in comfy.supported_models
    config: dict[str, Any]
    diffusers: str
    arguments: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]


def _flux_inputs(channels: int, **more: Tensor) -> dict[str, Any]:
    return {
        "x": _random(2, channels, 8, 6),
        "timestep": torch.tensor([1.0, 0.4]),
        "context": _random(2, 5, TEXT),
        **more,
    }


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


FAMILIES = {
    "qwen-image": TinyFamily(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "num_layers": 2,
            "in_channels": 64,
            "out_channels": 16,
            "attention_head_dim": HEAD,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 4, 4),
        },
        "QwenImageTransformer2DModel",
        {
            "num_layers": 2,
            "attention_head_dim": HEAD,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 4, 4),
        },
        lambda: {
            "x": _random(2, 16, 1, 8, 6),
            "timestep": torch.tensor([1.0, 0.4]),
            "context": _random(2, 5, TEXT),
        },
    ),
    "flux": TinyFamily(
        "Flux",
        {
            "image_model": "flux",
            "guidance_embed": True,
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": POOLED,
            "context_in_dim": TEXT,
            "hidden_size": WIDTH,
            "mlp_ratio": 4.0,
            "num_heads": HEADS,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 4, 4],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "txt_ids_dims": [],
        },
        "FluxTransformer2DModel",
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": HEAD,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 4),
        },
        lambda: _flux_inputs(16, y=_random(2, POOLED), guidance=torch.tensor([3.5, 3.5])),
    ),
    "flux2": TinyFamily(
        "Flux2",
        {
            "image_model": "flux2",
            "guidance_embed": True,
            "in_channels": 128,
            "out_channels": 128,
            "vec_in_dim": None,
            "context_in_dim": TEXT,
            "hidden_size": WIDTH,
            "mlp_ratio": 3.0,
            "num_heads": HEADS,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [2, 2, 4, 4],
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "txt_ids_dims": [3],
        },
        "Flux2Transformer2DModel",
        {
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": HEAD,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (2, 2, 4, 4),
        },
        lambda: _flux_inputs(128, guidance=torch.tensor([3.5, 3.5])),
    ),
    "z-image": TinyFamily(
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": Z_HEADS * Z_HEAD,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": Z_HEADS,
            "n_kv_heads": Z_HEADS,
            "multiple_of": 8,
            "ffn_dim_multiplier": 8 / 3,
            "qk_norm": True,
            "cap_feat_dim": TEXT,
            "axes_dims": [44, 44, 44],
            "axes_lens": [64, 64, 64],
            "z_image_modulation": True,
            "pad_tokens_multiple": 32,
            "time_scale": 1000.0,
        },
        "ZImageTransformer2DModel",
        {
            "dim": Z_HEADS * Z_HEAD,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": Z_HEADS,
            "n_kv_heads": Z_HEADS,
            "cap_feat_dim": TEXT,
            "axes_dims": [44, 44, 44],
            "axes_lens": [64, 64, 64],
        },
        lambda: {
            "x": _random(2, 16, 8, 6),
            "timesteps": torch.tensor([1.0, 0.4]),
            "context": _random(2, 5, TEXT),
            "num_tokens": 5,
        },
    ),
    "wan": TinyFamily(
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": WIDTH,
            "ffn_dim": 40,
            "freq_dim": 16,
            "in_dim": 16,
            "out_dim": 16,
            "text_dim": TEXT,
            "num_heads": HEADS,
            "num_layers": 2,
        },
        "WanTransformer3DModel",
        {
            "num_layers": 2,
            "attention_head_dim": HEAD,
            "num_attention_heads": HEADS,
            "ffn_dim": 40,
            "freq_dim": 16,
            "text_dim": TEXT,
        },
        lambda: {
            "x": _random(1, 16, 1, 8, 6),
            "timestep": torch.tensor([600.0]),
            "context": _random(1, 5, TEXT),
        },
    ),
}


def load_family(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh ModelPatcher of core's class with random weights, the same ones each time."""
    patcher = build_family(name, dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in patcher.model.diffusion_model.parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = (values + (parameter.ndim == 1)).to(parameter.dtype)
    return patcher


def build_family(name: str, dtype: torch.dtype = torch.float32, operations: Any = None) -> Any:
    """The same with weights that are not set yet; operations: core's class of layers."""
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.core)(dict(family.config))
    config.set_inference_dtype(dtype, torch.float32)
    config.custom_operations = operations
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}, ""), cpu, cpu)


def diffusers_linears(name: str) -> dict[str, list[int]]:
    """Every linear layer of diffusers' class: its name -> [out, in]."""
    import diffusers

    family = FAMILIES[name]
    with torch.device("meta"):
        net = getattr(diffusers, family.diffusers)(**family.arguments)
    return {
        name: [module.out_features, module.in_features]
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def family_forward(name: str, patcher: Any) -> Tensor:
    """Loads a MODEL as core does before sampling and runs its diffusion model once."""
    from comfy.model_management import load_models_gpu

    load_models_gpu([patcher, *patcher.get_nested_additional_models()])
    return patcher.model.diffusion_model(**FAMILIES[name].inputs()).clone()


HEADER = {"turbo.spec": '{"sigmas": [1, 0.7155, 0]}'}
# Core sizes the timestep embedding otherwise than diffusers where the model is this small.
NOT_COMPARABLE = {"z-image": ("t_embedder",)}


def linears(name: str) -> dict[str, list[int]]:
    """`diffusers_linears` whose sizes are those of core's toy too."""
    odd = NOT_COMPARABLE.get(name, ("nothing",))
    return {key: shape for key, shape in diffusers_linears(name).items() if not key.startswith(odd)}


def random_lora(shapes: Mapping[str, list[int]], seed: int = 0) -> dict[str, Update]:
    """Random updates of linear layers: name -> [out, in]."""
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    return toy_lora.make_updates(weights, seed, ranks=(4, 3, 2), alpha=5.0)


def close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Differs by at most `relative` of its norm."""
    assert (found - expected).norm() <= relative * expected.norm()
