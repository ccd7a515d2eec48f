"""The configuration of a run: frozen pydantic models, read from YAML and `key=value` overrides.

An unknown key is an error, and everything that can be checked without reading a weight is checked
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import (
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from .contract.hints import did_you_mean
from .contract.spec import TurboSpec
from .stages import STAGE_METHODS, AnyStage, Section
from .utils.files import replace_text
from .utils.hub_names import public_name

TINY: Final = "tiny"  # the name of the embedded model and of its data

Quantize = Literal["none", "fp8", "int8"]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, expected and found."""


class ModelSection(Section):
    """The base model: "tiny", a folder in diffusers layout, or a hub id."""

    path: str = "Qwen/Qwen-Image-2512"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    quantize: Quantize = "none"  # weights of the frozen blocks: fp8 e4m3 or int8, a scale per row
    offload_modulation: bool = False  # the CPU keeps and computes it: a third of Qwen-Image


class DataSection(Section):
    """What `turbo-distill prepare` reads, and the cache that it writes and training reads."""

    cache: Path  # folder
    prompts: tuple[Path, ...] = ()  # .txt, .jsonl, .parquet
    images: tuple[Path, ...] = ()  # folders with captions, WebDataset shards, `datasets` folders
    caption_key: str | None = None  # column or JSON key; None: prompt, caption or text
    negative: str = " "  # the unconditional prompt of classifier-free guidance
    resolution: int = Field(1024, ge=32)  # side of the square bucket; the others follow
    buckets: tuple[tuple[int, int], ...] = ()  # width, height; none: the base model's seven
    max_upscale: float = Field(1.25, ge=1)  # images that are smaller than that are left out
    teacher_images: int = Field(0, ge=0)  # for the GAN's real side, or in place of real images
    teacher_steps: int = Field(50, ge=2)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of everything in the cache
    shard: PositiveInt = 64  # items per file: what a killed run does again at most
    text_batch: PositiveInt = 8  # prompts that are embedded at a time

    @field_validator("prompts", "images", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("buckets")
    @classmethod
    def _whole_tokens(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for side in (side for bucket in value for side in bucket):
            if side < 16 or side % 16:
                raise ValueError(f"expected multiples of 16 pixels, found {side}")
        return value


def _kind_of_data(value: Any) -> str:
    return "embedded" if isinstance(value, str) else "prepared"


AnyData = Annotated[
    Annotated[Literal["tiny"], Tag("embedded")] | Annotated[DataSection, Tag("prepared")],
    Discriminator(_kind_of_data),
]
DATA_KINDS = ("embedded", "prepared")


class GuidanceSection(Section):
    """The teacher's classifier-free guidance, distilled into the student."""

    scale: float = Field(4.0, ge=1)
    rescale: bool = True


class SpecSection(Section):
    """How the finished LoRA is sampled; written into its header."""

    sigmas: tuple[float, ...] = (1.0, 0.7155, 0.0)
    sampler: Literal["euler", "renoise"] = "euler"
    resolutions: tuple[tuple[int, int], ...] = ()


class AdapterSection(Section):
    rank: PositiveInt = 64
    alpha: PositiveFloat | None = None  # None: the rank, hence scale 1
    modulation: bool = False  # also adapt the timestep modulation
    fake_rank: PositiveInt | None = None  # of the fake score's LoRA; None: the same rank


class EngineSection(Section):
    """Processes; started by torchrun, one per device."""

    shard: PositiveInt = 1  # ranks that share one copy of the base (FSDP2); 1 = each holds its own
    world: PositiveInt | None = None  # processes; None = as many as were started
    timeout_s: PositiveInt = 600  # a rank that waits longer for another one gives up


class PreviewSection(Section):
    """Pictures of a run: the student beside the teacher, the same prompts and noise every time."""

    every: int = Field(200, ge=0)  # steps, 0 = never
    prompts: PositiveInt = 4  # the first ones of the data
    images: PositiveInt = 4  # per prompt; one alone has no diversity to measure
    seed: int = 0  # of the first image; the others' follow
    teacher_steps: int = Field(50, ge=2)  # guided; drawn once in a run
    teacher_shift: PositiveFloat | None = None  # of its schedule; None: the base model's own
    side: PositiveInt = 512  # pixels; larger images are scaled down in the picture


class GatesSection(Section):
    """Limits of what is measured on the previews, as ratios to the teacher's; null = no limit."""

    saturation_max: PositiveFloat | None = 1.5  # clipped channel values
    chroma_max: PositiveFloat | None = 1.25  # colourfulness
    sharpness_min: PositiveFloat | None = 0.5
    sharpness_max: PositiveFloat | None = 2.0
    diversity_min: PositiveFloat | None = 0.75  # between images of one prompt
    prompt_min: PositiveFloat | None = 0.9  # of the prompt score
    clip: str | None = None  # CLIP model that scores prompts, folder or hub id; tiny has its own


class Config(Section):
    seed: int = 0
    run_dir: Path = Path("runs/latest")
    name: str = "turbo"  # file name and title of the LoRA
    model: ModelSection = ModelSection()
    data: AnyData = TINY
    guidance: GuidanceSection = GuidanceSection()
    spec: SpecSection = SpecSection()
    adapter: AdapterSection = AdapterSection()
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    preview: PreviewSection = PreviewSection()
    gates: GatesSection = GatesSection()
    select: Literal["best", "last"] = "best"  # of the last stage's previews, or its last step
    save_every: int = Field(500, ge=0)  # steps, 0 = only at the end
    log_every: PositiveInt = 10
    keep_checkpoints: int = Field(2, ge=0)  # newest ones, 0 = all
    nan_limit: PositiveInt = 20  # steps in a row without a finite update, then the run stops
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        spec = self.spec
        TurboSpec(
            sigmas=spec.sigmas,
            base=public_name(self.model.path),
            sampler=spec.sampler,
            resolutions=spec.resolutions,
        )
        if isinstance(self.data, str) and self.model.path != self.data:
            raise ValueError(
                f'data: "{self.data}" goes with model.path: "{self.data}" alone '
                f"(found {self.model.path!r}); "
                "expected `cache: FOLDER`, which `turbo-distill prepare` fills"
            )
        self._check_frozen_base()
        return self

    def _check_frozen_base(self) -> None:
        model, shard = self.model, self.engine.shard
        if model.offload_modulation and self.adapter.modulation:
            raise ValueError(
                "model.offload_modulation: expected false where adapter.modulation is true, for a "
                "layer with an adapter has to be on the device; set one of them to false"
            )
        if shard > 1 and (model.quantize != "none" or model.offload_modulation):
            raise ValueError(
                f"engine.shard: expected 1 (found {shard}) with model.quantize "
                f"{model.quantize!r} and model.offload_modulation "
                f"{str(model.offload_modulation).lower()}, for FSDP divides plain parameters on "
                "one device only; set engine.shard=1, or model.quantize=none and "
                "model.offload_modulation=false"
            )

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key.sub=value` overrides, e.g. `stages.0.steps=100`.

    Raises ConfigError.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Presets lie in configs/."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}.")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"{source}:\n{problems}") from error


def save_config(config: Config, path: Path) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    replace_text(path, text)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets the key that `key.sub=value` names."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, e.g. stages.0.steps=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from error
    *parents, last = key.split(".")
    node: Any = values
    for i, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: i + 1]), override)
    if isinstance(node, list):
        node[_index(node, last, key, override)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key, override)]
    child = node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise ConfigError(f"{override!r}: {key} is the value {child!r}, it has no keys of its own.")
    return child


def _index(node: list[Any], part: str, key: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"{override!r}: {key}: expected a number from 0 to {len(node) - 1}, found {part!r}."
        )
    return int(part)


def _explain(problem: Any) -> str:
    """One pydantic error as `key: expected and found`, with a hint where a key is misspelt."""
    location = [part for part in problem["loc"] if part not in (*STAGE_METHODS, *DATA_KINDS)]
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such key.{did_you_mean(str(location[-1]), ALL_KEYS)}"
    found = (
        "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
    )
    return f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}{found}"


def _sections(annotation: Any) -> set[type[Section]]:
    """The section classes that occur in a type, and in their fields."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields.values()
        return {annotation}.union(*(_sections(field.annotation) for field in fields))
    return set().union(*(_sections(part) for part in get_args(annotation)))


ALL_KEYS = sorted({name for section in _sections(Config) for name in section.model_fields})
