"""Module names of Qwen-Image, equal in diffusers and in ComfyUI, and their flattened spelling.

kohya's scripts, OneTrainer and LyCORIS write `transformer_blocks_0_attn_to_out_0`. Since names
contain underscores of their own, the dots come back by looking the name up, not by splitting it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

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


def flatten(name: str) -> str:
    """`attn.to_out.0` -> `attn_to_out_0`."""
    return name.replace(".", "_")


_BLOCK_BY_FLAT = {flatten(name): name for name in BLOCK_MODULES}
_TOP_BY_FLAT = {flatten(name): name for name in TOP_MODULES}


def flat_index(known_modules: Collection[str]) -> dict[str, str]:
    """Flattened -> dotted name, without names that two modules share when flattened."""
    index: dict[str, str] = {}
    ambiguous = set()
    for name in known_modules:
        if index.setdefault(flatten(name), name) != name:
            ambiguous.add(flatten(name))
    return {flat: name for flat, name in index.items() if flat not in ambiguous}


def unflatten(flat: str, index: Mapping[str, str] | None = None) -> str | None:
    """The dotted name of a flattened one, from `index` or else from Qwen-Image's own names.

    None if it is no module of Qwen-Image at all.
    """
    if index and flat in index:
        return index[flat]
    if flat in _TOP_BY_FLAT:
        return _TOP_BY_FLAT[flat]
    block = re.fullmatch(r"transformer_blocks_(\d+)_(\w+)", flat)
    if block and block[2] in _BLOCK_BY_FLAT:
        return f"transformer_blocks.{block[1]}.{_BLOCK_BY_FLAT[block[2]]}"
    return None
