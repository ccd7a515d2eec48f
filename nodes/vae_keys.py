"""Names of the Qwen-Image VAE's tensors: diffusers' `AutoencoderKLQwenImage` to Wan's own.

ComfyUI recognises the VAE of Qwen-Image (which is Wan 2.1's) by Wan's names only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# Wan counts a decoder stage as one flat list: three residual blocks, then the upsampler.
DECODER_STAGE = 4

_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_WHOLE = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}


_PATTERN = re.compile(
    r"(?P<half>encoder\.|decoder\.)?"
    rf"(?:(?P<whole>{'|'.join(map(re.escape, _WHOLE))})"
    r"|down_blocks\.(?P<down>\d+)"
    r"|up_blocks\.(?P<stage>\d+)\.(?:resnets\.(?P<resnet>[012])|upsamplers\.0))"
    rf"(?:\.(?P<residual>{'|'.join(_RESIDUAL)}))?"
    r"(?P<rest>(?:\.(?:resample\.1|time_conv|norm|to_qkv|proj))?\.(?:weight|bias|gamma))"
)


def to_wan_names(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Renames every tensor of an `AutoencoderKLQwenImage` with two residual blocks per stage.

    Raises ValueError naming a tensor that such a VAE does not have.
    """
    return {wan_name(name): value for name, value in state_dict.items()}


def wan_name(name: str) -> str:
    """Wan's name of one diffusers tensor name, such as
    decoder.up_blocks.1.resnets.0.conv1.weight -> decoder.upsamples.4.residual.2.weight.
    """
    found = _PATTERN.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} is no tensor of AutoencoderKLQwenImage with num_res_blocks=2 and no "
            f"attention but in the middle; the VAE of Qwen-Image was expected."
        )
    half, whole, down, stage, resnet, residual, rest = found.group(
        "half", "whole", "down", "stage", "resnet", "residual", "rest"
    )
    if whole:
        place = _WHOLE[whole]
    elif down:
        place = f"downsamples.{down}"
    else:
        place = f"upsamples.{DECODER_STAGE * int(stage) + int(resnet or DECODER_STAGE - 1)}"
    return f"{half or ''}{place}{'.' + _RESIDUAL[residual] if residual else ''}{rest}"
