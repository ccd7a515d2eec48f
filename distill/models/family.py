"""What a model family is, and the registry of families: all that the trainer has to know of a base
model stands in one file per family.

A family is a module with a `FAMILY`. The methods, the trainer, previews, sampling, `prepare`,
`eval` and `--dry-run` ask it for module names and widths, how latents are packed, the size of a
token, VAE, text encoder, image sizes, usual schedule and guidance, and how previews are scored.
To add one: write the module, enter it in FAMILIES.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, ConfigError, DataSection, GuidanceSection
from ..contract.checks import SpecError
from ..contract.spec import TurboSpec
from ..utils.hub_names import public_name
from .sizes import Size, buckets
from .text_encoder import TextEncoder
from .vae import Autoencoder

log = logging.getLogger(__name__)

# name -> module, imported when a family is asked for
FAMILIES = {
    "tiny": "..tiny.family",
    "qwen-image": ".qwen_image",
    "qwen-image-2.1": ".qwen_image21",
}
DEFAULT = "qwen-image"  # what a model is taken for that no family claims, such as another hub id


@dataclass(frozen=True)
class Embedded:
    """The one model of a family that comes with the package."""

    folder: Path  # in diffusers layout
    base: str  # as specs call it
    title: str  # as people do
    data: Callable[[int], Any]  # seed -> what training reads (data.batch.Data)
    text_encoder: str  # stands for the fingerprint of the weights that its encoder does not have


@dataclass(frozen=True)
class Licence:
    """Of a base whose LoRAs are bound by it too."""

    name: str
    hub_name: str  # `license_name` of a model card
    link: str
    terms: str  # in a few words


@dataclass(frozen=True)
class BlockTensors:
    """What a block makes of one sample, for `--dry-run`: hidden tensors (all tokens x width, in the
    base's precision), a wider one counting as several. benchmarks/dry_run counts them.
    """

    kept: float = 22  # from forward to backward, where LoRAs are trained, beside their own
    backward: float = 7  # at most at a time in the backward pass, beside those
    forward: float = 14.6  # at most at a time without gradient


@dataclass(frozen=True)
class Family:
    """One way to build and call a base model. Functions take the transformer first."""

    architecture: str  # `family` of a TurboSpec
    transformer: (
        str  # "module:class" in diffusers' form; imported when needed, for it takes seconds
    )
    pipeline: str  # diffusers' class that draws with it
    hub_ids: tuple[str, ...]  # where its makers publish it

    # Modules of the transformer
    blocks: str  # name of the list of blocks
    lora_targets: tuple[str, ...]  # linear layers of a block that a LoRA adapts, by the end of name
    modulation: tuple[str, ...]  # mostly those that see the timestep alone; adapted on request
    width: Callable[[Any], int]  # channels of the hidden states
    text_width: Callable[[Any], int]  # of a text token's embedding
    latent_channels: Callable[[Any], int]
    precision: Callable[[Any], torch.dtype]  # in which the base computes

    # Calls: x_t [B, C, h, w], t [B], text -> velocity [B, C, h, w]
    velocity: Callable[..., Tensor]
    velocity_pair: Callable[..., tuple[Tensor, Tensor]]  # conditional and guided
    hidden_maps: Callable[..., list[Tensor]]  # of some blocks

    # What stands around it
    vae: Autoencoder
    text_encoder: Callable[[Path, torch.device, torch.dtype], TextEncoder]
    negative: str  # the unconditional prompt of its pipeline

    # Sizes in pixels
    token: int  # per side of one transformer token
    sizes: tuple[Size, ...]  # what it was trained at, the square one first
    size: Size  # of an image where nothing else is said

    # The usual teacher
    sigmas: Callable[[Path, int, Size], tuple[float, ...]]  # (folder, steps, size) -> schedule
    guidance: GuidanceSection = field(default_factory=GuidanceSection)
    gpu_dtype: torch.dtype = torch.bfloat16
    modulated_blocks: bool = True  # every block has modulation of its own
    multiple: int | None = None  # of which sides of an image are, in pixels; None: of a token

    # How it is estimated, shown and judged
    text_tokens: int = 256  # of a long prompt
    tflops: float = 336  # that products of the base reach, in its usual dtype: one H100 in bf16
    text_layers: tuple[str, ...] = ()  # of lora_targets, those that see the prompt's tokens alone,
    # the others then the image's alone; none: all of them see both
    block_tensors: BlockTensors = field(default_factory=BlockTensors)
    workflows: Mapping[str, str] = field(
        default_factory=dict
    )  # last part of a base's name -> graph
    prompts: tuple[str, ...] = ()  # that `eval` draws where none are given
    eval_batch: int = 1  # images that `eval` draws at a time
    prompt_score: Callable[[], Any] | None = None  # makes a judge (evaluation.prompt_score)
    metrics: Callable[[Tensor, Sequence[str]], dict[str, float]] | None = None  # beyond eval's own

    licence: Licence | None = None  # None: one that leaves LoRAs to those who make them
    embedded: Embedded | None = None
    name: str = ""  # key in FAMILIES; the registry sets it

    def claims(self, path: str) -> bool:
        """Whether model.path names a model of this family: its embedded one, one that its makers
        publish, or a local folder with its transformer.
        """
        if self.embedded is not None:
            return path == self.name
        return path in self.hub_ids or _class_in(path) == class_name(self.transformer)

    def locate(self, path: str) -> str:
        """`path` for diffusers' from_pretrained."""
        return str(self.embedded.folder) if self.embedded else path

    def base_name(self, path: str) -> str:
        """What specs call the model at `path`."""
        return self.embedded.base if self.embedded else public_name(path)

    def title(self, path: str) -> str:
        """What people call it; of a folder or hub id the last part."""
        return self.embedded.title if self.embedded else PurePath(path).name

    def blocks_of(self, transformer: nn.Module) -> nn.ModuleList:
        return getattr(transformer, self.blocks)

    def targets(self, modulation: bool) -> list[str]:
        """The layers that get a LoRA (adapter.modulation: the modulation too)."""
        return [*self.lora_targets, *(self.modulation if modulation else ())]

    def buckets(self, resolution: int) -> tuple[Size, ...]:
        """The sizes it was trained at, scaled so that the square one has side `resolution`."""
        return buckets(self.sizes, resolution, self.grid)

    @property
    def grid(self) -> int:
        """Pixels of which sides of an image are multiples."""
        return self.multiple or self.token

    def tokens(self, size: Size) -> int:
        """Image tokens of `size`."""
        return (size[0] // self.token) * (size[1] // self.token)

    def tokens_of_latents(self, height: int, width: int) -> int:
        """Image tokens of latents of that size."""
        patch = self.token // self.vae.pixels
        return (height // patch) * (width // patch)

    def latent_shape(self, transformer: nn.Module, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of an image of `size`."""
        width, height = (side // self.vae.pixels for side in size)
        return self.latent_channels(transformer), height, width


@cache
def family(name: str) -> Family:
    """A family of FAMILIES."""
    return replace(import_module(FAMILIES[name], __package__).FAMILY, name=name)


def families() -> list[Family]:
    return [family(name) for name in FAMILIES]


def family_of(path: str) -> Family:
    """The family of a base model, by configuration key model.path."""
    known = families()
    # By its name before a file is looked into, for this is asked again and again
    by_name = sorted(known, key=lambda f: path not in f.hub_ids)
    return next((f for f in by_name if f.claims(path)), family(DEFAULT))


def family_of_transformer(transformer: nn.Module) -> Family:
    """The family that knows how to call it."""
    classes = {cls.__name__ for cls in type(transformer).__mro__}  # FSDP2 derives one of its own
    known = (f for f in families() if class_name(f.transformer) in classes and not f.embedded)
    return next(known, family(DEFAULT))


def family_of_spec(spec: TurboSpec) -> Family:
    """The family of the base that a LoRA was trained on."""
    embedded = (f for f in families() if f.embedded and f.embedded.base == spec.base)
    others = (f for f in families() if f.architecture == spec.family and not f.embedded)
    return next(embedded, None) or next(others, family(DEFAULT))


def path_of(spec: TurboSpec) -> str:
    """What configuration key model.path says for a spec's base."""
    base = family_of_spec(spec)
    return base.name if base.embedded else spec.base


def for_base(config: Config) -> Config:
    """The recipe, where it does not say how its teacher is guided with the usual guidance of its
    base.

    Raises ConfigError where it asks for what a base of that family cannot do.
    """
    base = family_of(config.model.path)
    sizes = {"spec.resolutions": config.spec.resolutions}
    if isinstance(config.data, DataSection):
        sizes["data.buckets"] = config.data.buckets
    for key, listed in sizes.items():
        for width, height in listed:
            if width % base.grid or height % base.grid:
                raise ConfigError(
                    f"{key}: expected multiples of {base.grid} pixels for {base.architecture} "
                    f"(found {width}x{height})."
                )
    if config.model.offload_modulation and not base.modulated_blocks:
        raise ConfigError(
            f"model.offload_modulation: expected false for {base.architecture} (found true): its "
            "blocks share one modulation, so there is nothing to gain; set it to false."
        )
    said = {key: getattr(config.guidance, key) for key in config.guidance.model_fields_set}
    return config.model_copy(update={"guidance": base.guidance.model_copy(update=said)})


def tell_licence(config: Config) -> None:
    """Logs by which licence of its base a LoRA will be bound, where it is by one."""
    if licence := family_of(config.model.path).licence:
        log.warning(
            "%s: the LoRA inherits the licence of its base, %s: %s. %s",
            config.model.path,
            licence.name,
            licence.terms,
            licence.link,
        )


def trained_sizes(config: Config) -> tuple[Size, ...]:
    """The sizes of a recipe's batches, the square one first: as it says, else its data's."""
    base, data = family_of(config.model.path), config.data
    if config.spec.resolutions:
        return config.spec.resolutions
    if isinstance(data, DataSection):
        return data.buckets or base.buckets(data.resolution)
    return (base.size,)


def spec_of(config: Config) -> TurboSpec:
    """The spec that the finished LoRA of a recipe will carry.

    Raises ConfigError where the schedule of one of its sizes is none.
    """
    base = family_of(config.model.path)
    section = config.spec
    spec = TurboSpec(
        **section.schedule,
        family=base.architecture,
        base=base.base_name(config.model.path),
        sampler=section.sampler,
        resolutions=trained_sizes(config),
        method=" -> ".join(stage.label for stage in config.stages),
        created_by="turbo-distill",
    )
    for size in spec.resolutions:
        try:
            spec.sigmas(base.tokens(size))
        except SpecError as error:
            width, height = size
            raise ConfigError(f"spec: no schedule for {width}x{height}: {error}") from error
    return spec


def class_name(reference: str) -> str:
    """Of "module:class"."""
    return reference.partition(":")[2]


def _class_in(path: str) -> str | None:
    """diffusers' name of the transformer in a local folder, or in what is here of a hub id."""
    file = Path(path) / "transformer" / "config.json"
    try:
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            here = try_to_load_from_cache(path, "transformer/config.json")
            file = Path(here) if isinstance(here, str) else file
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):  # no such folder; `load` says what is wrong with a file
        return None
    return values.get("_class_name") if isinstance(values, dict) else None
