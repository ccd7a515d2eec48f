"""The numbers of a recipe's base model, and the bytes of its frozen weights. No weight is read: the
model is built without storage.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from ...config import Config, ConfigError, DataSection
from ...models.family import family_of
from ...models.quantise import ROW_BYTES, block_modulation, quantised_layers
from ...models.roles import FAKE

Layers = dict[str, tuple[int, int]]  # linear layer -> (in, out)


@dataclass(frozen=True)
class Shape:
    """The numbers of a base model that the estimates need."""

    parameters: int
    width: int
    text_width: int
    blocks: int
    linear: Layers
    lora: Layers  # those that are adapted
    assumed: bool  # no local config: the family's published model is assumed


def read_config(file: Path) -> dict[str, Any]:
    """A network's configuration; empty where it is not here. Raises ConfigError."""
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(
            f"{file}: expected a configuration in JSON ({error}). Download the folder again."
        ) from error


def model_shape(config: Config) -> Shape:
    family = family_of(config.model.path)
    loaded = read_config(Path(family.locate(config.model.path)) / "transformer" / "config.json")
    values = {k: v for k, v in loaded.items() if not k.startswith("_")}
    with torch.device("meta"):
        model = resolve_name(family.transformer)(**values)
    targets = tuple(f".{name}" for name in family.targets(config.adapter.modulation))
    linear = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        width=family.width(model),
        text_width=family.text_width(model),
        blocks=len(family.blocks_of(model)),
        linear=linear,
        lora={name: size for name, size in linear.items() if f".{name}".endswith(targets)},
        assumed=not loaded,
    )


def rank_of(config: Config, role: str) -> int:
    """Of the role's LoRA."""
    adapter = config.adapter
    return adapter.rank if role != FAKE else adapter.fake_rank or adapter.rank


def lora_parameters(shape: Shape, rank: int) -> int:
    """rank (in + out) per adapted layer."""
    return sum(rank * (a + b) for a, b in shape.lora.values())


def tokens(config: Config) -> int:
    """Image and text tokens of one sample: of the largest of `data.buckets`, else of the square
    size, for the family's others have about as many.
    """
    family, data = family_of(config.model.path), config.data
    sizes = (family.size,)
    if isinstance(data, DataSection):
        sizes = data.buckets or ((data.resolution, data.resolution),)
    return max(map(family.tokens, sizes)) + family.text_tokens


def tokens_seen(config: Config, name: str) -> int:
    """By the linear layer `name` of a block: the image's, the prompt's or all."""
    family = family_of(config.model.path)
    if not family.text_layers:
        return tokens(config)
    text = name.endswith(tuple(f".{layer}" for layer in family.text_layers))
    return family.text_tokens if text else tokens(config) - family.text_tokens


def block_layers(config: Config, shape: Shape) -> Layers:
    """The linear layers of the blocks that see tokens."""
    family = family_of(config.model.path)
    modulation = re.compile(block_modulation(family))
    inside = f"{family.blocks}."
    layers = shape.linear.items()
    return {n: size for n, size in layers if n.startswith(inside) and not modulation.fullmatch(n)}


def weight_bytes(config: Config) -> int:
    """Of a weight in the precision that the base computes in."""
    return 2 if config.model.dtype == "bfloat16" else 4


def host_bytes(config: Config, shape: Shape) -> int:
    """Modulation that stays in main memory: weights and biases."""
    if not config.model.offload_modulation:
        return 0
    modulation = block_modulation(family_of(config.model.path))
    sizes = [size for name, size in shape.linear.items() if re.fullmatch(modulation, name)]
    return weight_bytes(config) * sum((a + 1) * b for a, b in sizes)


def quantised_sizes(config: Config, shape: Shape) -> Layers:
    """The layers that `model.quantize` turns to 8 bits."""
    if config.model.quantize == "none":
        return {}
    pattern = quantised_layers(family_of(config.model.path), config.model.offload_modulation)
    return {name: size for name, size in shape.linear.items() if re.fullmatch(pattern, name)}


def base_bytes(config: Config, shape: Shape) -> int:
    """The frozen base on the device: 1 byte per weight of a quantised layer, and its scales."""
    layers, size = quantised_sizes(config, shape).values(), weight_bytes(config)
    row = ROW_BYTES.get(config.model.quantize, 0)
    saved = sum((size - 1) * a * b - row * b for a, b in layers)
    return size * shape.parameters - saved - host_bytes(config, shape)


def unpacked_bytes(config: Config, shape: Shape) -> int:
    """Quantised weights of a block in the base's precision, which its backward pass needs;
    modulation has no backward pass.
    """
    quantised = quantised_sizes(config, shape)
    weights = sum(
        a * b for name, (a, b) in block_layers(config, shape).items() if name in quantised
    )
    return weight_bytes(config) * weights // shape.blocks


def unpacking_bytes(config: Config, shape: Shape) -> int:
    """While that is done to the largest layer, which torchao converts, then scales."""
    layers, quantised = block_layers(config, shape), quantised_sizes(config, shape)
    sizes = (a * b for name, (a, b) in layers.items() if name in quantised)
    return 3 * weight_bytes(config) * max(sizes, default=0)
