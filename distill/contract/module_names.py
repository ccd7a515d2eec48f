"""Module names of Qwen-Image, equal in diffusers and in ComfyUI, and their flattened spelling; and
diffusers' names of Wan's and FLUX.2's layers where ComfyUI's own table of them has none.

kohya's scripts, OneTrainer and LyCORIS write `transformer_blocks_0_attn_to_out_0`. Since names
contain underscores of their own, the dots come back by looking the name up, not by splitting it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping

BLOCK_MODULES = (  # under transformer_blocks.N
    "img_mod.1",
    "txt_mod.1",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.norm_q",
    "attn.norm_k",
    "attn.norm_added_q",
    "attn.norm_added_k",
)
TOP_MODULES = (
    "img_in",
    "txt_in",
    "txt_norm",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.addition_t_embedding",
)
# What Qwen-Image-2.1 calls otherwise
BLOCK_MODULES_21 = ("img_mlp.gate_layer", "img_mlp.proj", "img_mlp.out")
TOP_MODULES_21 = ("modulation.1", "txt_in.in_layer", "txt_in.out_layer", "txt_in.text_norm")


def flatten(name: str) -> str:
    """`attn.to_out.0` -> `attn_to_out_0`."""
    return name.replace(".", "_")


_BLOCK_BY_FLAT = {flatten(name): name for name in (*BLOCK_MODULES, *BLOCK_MODULES_21)}
_TOP_BY_FLAT = {flatten(name): name for name in (*TOP_MODULES, *TOP_MODULES_21)}


def flat_index(known_modules: Collection[str]) -> dict[str, str]:
    """Flattened -> dotted name, without names that two modules share when flattened.

    In a mapping the values tell whether two names mean the same module.
    """
    means: Mapping[str, Hashable] = (
        known_modules
        if isinstance(known_modules, Mapping)
        else {name: name for name in known_modules}
    )
    index: dict[str, str] = {}
    ambiguous = set()
    for name, module in means.items():
        if means[index.setdefault(flatten(name), name)] != module:
            ambiguous.add(flatten(name))
    return {flat: name for flat, name in index.items() if flat not in ambiguous}


def unflatten(flat: str, index: Mapping[str, str] | None = None) -> str | None:
    """The dotted name of a flattened one, from `index` or else from Qwen-Image's own names.

    None if it is no module of Qwen-Image (2.1 included) at all.
    """
    if index and flat in index:
        return index[flat]
    if flat in _TOP_BY_FLAT:
        return _TOP_BY_FLAT[flat]
    block = re.fullmatch(r"transformer_blocks_(\d+)_(\w+)", flat)
    if block and block[2] in _BLOCK_BY_FLAT:
        return f"transformer_blocks.{block[1]}.{_BLOCK_BY_FLAT[block[2]]}"
    return None


# ------------------------------------------------------------------------------- other families

# ComfyUI's name -> diffusers', for layers that are missing in ComfyUI's own tables (0.33)
_DIFFUSERS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # Wan: WanTransformer3DModel
        (r"(blocks\.\d+)\.self_attn\.([qkv])", r"\1.attn1.to_\2"),
        (r"(blocks\.\d+)\.self_attn\.o", r"\1.attn1.to_out.0"),
        (r"(blocks\.\d+)\.self_attn\.(norm_[qk])", r"\1.attn1.\2"),
        (r"(blocks\.\d+)\.cross_attn\.([qkv])", r"\1.attn2.to_\2"),
        (r"(blocks\.\d+)\.cross_attn\.o", r"\1.attn2.to_out.0"),
        (r"(blocks\.\d+)\.cross_attn\.(norm_[qk])", r"\1.attn2.\2"),
        (r"(blocks\.\d+)\.cross_attn\.([kv])_img", r"\1.attn2.add_\2_proj"),
        (r"(blocks\.\d+)\.cross_attn\.norm_k_img", r"\1.attn2.norm_added_k"),
        (r"(blocks\.\d+)\.norm3", r"\1.norm2"),
        (r"(blocks\.\d+)\.ffn\.0", r"\1.ffn.net.0.proj"),
        (r"(blocks\.\d+)\.ffn\.2", r"\1.ffn.net.2"),
        (r"(text|time)_embedding\.0", r"condition_embedder.\1_embedder.linear_1"),
        (r"(text|time)_embedding\.2", r"condition_embedder.\1_embedder.linear_2"),
        (r"time_projection\.1", "condition_embedder.time_proj"),
        (r"img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
        (r"img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        (r"img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
        (r"img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
        (r"head\.head", "proj_out"),
        # FLUX.2: Flux2Transformer2DModel
        (r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.lin", r"\1.linear"),
        (r"time_in\.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
        (r"time_in\.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
        (r"guidance_in\.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
        (r"guidance_in\.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    )
)


def diffusers_name(name: str) -> str | None:
    """What diffusers calls a layer of Wan or FLUX.2 that ComfyUI calls `name`; None: not known."""
    for pattern, other in _DIFFUSERS:
        if match := pattern.fullmatch(name):
            return match.expand(other)
    return None
