"""LoRAs that a run begins with: those in its base, and the one that its student begins as."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..config import BaseLora, Config, ConfigError
from ..contract.base_loras import base_records
from ..contract.lora_keys import LoraFormatError, NormalisedLora
from ..contract.shown import shown
from ..models.base_lora import content, read_base_lora
from ..models.family import family_of
from ..training.identity import Identity, identity_of
from .source import Source, open_weights
from .student import modules_advice, rank_advice

log = logging.getLogger(__name__)


def inputs_of(config: Config, begun: bool) -> Identity:
    """What a run begins with, by content. begun: it goes on from a checkpoint, and the LoRA that
    its student began as has done its part.

    Raises OSError, LoraFormatError and ConfigError for LoRAs that cannot be used.
    """
    identity = identity_of(config)
    if config.init_from is None or begun:
        return identity
    lora = open_weights(config.init_from)
    check_init(config, lora)
    return identity | {"init_from": {"name": config.init_from.name, "content": content(lora)}}


def check_init(config: Config, lora: NormalisedLora) -> None:
    """That the student can begin as this LoRA, as far as is known without the base.

    Raises ConfigError.
    """
    family, adapter = family_of(config.model.path), config.adapter
    targets = tuple(f".{name}" for name in family.targets(adapter.modulation))
    odd = [name for name in lora.modules if not name.endswith(targets)]
    if odd:
        raise ConfigError(modules_advice(lora, odd, family))
    if max(lora.ranks) > adapter.rank:
        raise ConfigError(rank_advice(lora, adapter.rank))
    if lora.other_keys:
        log.warning(
            "init_from: %s: %d keys belong to no layer of the diffusion model, such as %s; the "
            "student begins without them",
            lora.source,
            len(lora.other_keys),
            shown(lora.other_keys[0]),
        )


def base_loras_of(source: Source) -> tuple[BaseLora, ...]:
    """The LoRAs in the base that a LoRA was distilled from, found again by content: by the recipe
    of its run, else beside it under their names.

    Raises ConfigError where one is not at hand, SpecError for a damaged header.
    """
    return tuple(_find(record, source) for record in base_records(source.metadata))


def _find(record: Mapping[str, Any], source: Source) -> BaseLora:
    name, seen = record["name"], []
    for place in source.near:
        path = place / name if place.is_dir() and place.name != name else place
        if not path.exists():
            continue
        try:
            if content(read_base_lora(path)) == record["content"]:
                return BaseLora(path=path, strength=record["strength"])
        except (LoraFormatError, OSError) as error:
            seen.append(f"{path}: {error}")
            continue
        seen.append(f"{path} is another LoRA")
    raise ConfigError(
        f"{source.origin}: its base has the LoRA {shown(name)} in it, at strength "
        f"{record['strength']:g}; expected that file "
        + (f"beside it, found none that fits ({'; '.join(seen)})" if seen else "beside it")
        + ". Copy it there."
    )
