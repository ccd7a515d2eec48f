"""The configuration of a run: frozen pydantic models, read from YAML and `key=value` overrides.

An unknown key is an error, and everything that can be checked without reading a weight is checked
here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from .contract.files import open_regular
from .contract.hints import did_you_mean
from .contract.shown import plain, shown
from .contract.spec import TurboSpec
from .pairs import conflicts
from .stages import STAGE_METHODS, AnyStage, check_teacher_images
from .utils.files import replace_text
from .utils.hub_names import public_name
from .utils.overrides import OverrideError, apply_override
from .utils.section import ModelPath, Section, Seed, Text, UserPath
from .utils.values import file_name
from .utils.yaml12 import YAMLTextError, read_yaml

TINY: Final = "tiny"  # the name of the embedded model and of its data

FILE_BYTES: Final = 1 << 20  # of a recipe

Quantize = Literal["none", "fp8", "int8"]
PROBLEMS = 20  # of a recipe, in a message


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, expected and found."""


def _lora_name(text: str) -> str:
    """Raises ValueError."""
    if re.fullmatch(r"step-\d+", text, re.IGNORECASE):
        raise ValueError(
            f"expected another name, for {shown(text)} is what the run calls a step's LoRA"
        )
    return file_name(text)


LoraName = Annotated[str, AfterValidator(_lora_name)]


class BaseLora(Section):
    """A LoRA that becomes part of the base: file or PEFT folder, and its strength."""

    path: UserPath
    strength: float = 1.0

    @field_validator("strength")
    @classmethod
    def _does_something(cls, value: float) -> float:
        if value == 0:
            raise ValueError("expected a strength other than 0; leave the LoRA out instead")
        return value


class ModelSection(Section):
    """The base model: "tiny", a folder in diffusers layout, or a hub id."""

    path: ModelPath = "Qwen/Qwen-Image-2512"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: StrictBool = True
    quantize: Quantize = "none"  # weights of the frozen blocks: fp8 e4m3 or int8, a scale per row
    offload_modulation: StrictBool = False  # the CPU keeps and computes it: a third of Qwen-Image
    loras: tuple[BaseLora, ...] = ()  # of a style or task, merged into the base before all else


class DataSection(Section):
    """What `turbo-distill prepare` reads, and the cache that it writes and training reads."""

    cache: UserPath  # folder
    prompts: tuple[UserPath, ...] = ()  # .txt, .jsonl, .parquet
    images: tuple[
        UserPath, ...
    ] = ()  # folders with captions, WebDataset shards, `datasets` folders
    caption_key: Text | None = None  # column or JSON key; None: prompt, caption or text
    negative: Text = " "  # the unconditional prompt of classifier-free guidance
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
    rescale: StrictBool = True


class ShiftSection(Section):
    """A rule by which the size of an image moves noise levels, with the numbers that it wants
    (contract.shift).
    """

    rule: Literal["none", "static", "exponential", "linear", "empirical"]
    shift: float | None = None  # of static
    mu: float | tuple[float, float] | None = None  # of exponential; of linear one per token count
    tokens: tuple[int, int] | None = None
    steps: tuple[int, int] | None = None  # of empirical, as what follows
    slope: tuple[float, float] | None = None
    intercept: tuple[float, float] | None = None
    limit: int | None = None


TWO_STEPS: Final = (1.0, 0.7155, 0.0)  # of the author of the recipe


class SpecSection(Section):
    """How the finished LoRA is sampled; written into its header."""

    sigmas: tuple[float, ...] | None = None  # at every size; TWO_STEPS without sigmas and nodes
    nodes: tuple[float, ...] | None = None  # in their place: noise levels before the shift
    shift: ShiftSection | None = None  # of nodes, e.g. {rule: linear, tokens: [..], mu: [..]}
    terminal: float | None = None  # of shifted nodes: where the last but 0 is stretched to
    sampler: Literal["euler", "renoise"] = "euler"
    resolutions: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _one_schedule(self) -> SpecSection:
        if self.sigmas is not None and self.nodes is not None:
            raise ValueError("expected sigmas or nodes, found both; nodes are moved by shift")
        if self.nodes is None and (self.shift or self.terminal is not None):
            found = "none" if self.sigmas is None else "sigmas; give them as nodes"
            raise ValueError(f"shift and terminal move nodes, found {found}")
        return self

    @property
    def schedule(self) -> dict[str, Any]:
        """What a TurboSpec wants to know of it."""
        if self.nodes is None:
            return {"nodes": self.sigmas or TWO_STEPS}
        shift = self.shift and self.shift.model_dump(exclude_none=True)
        return {"nodes": self.nodes, "shift": shift, "terminal": self.terminal}


class AdapterSection(Section):
    rank: PositiveInt = 64
    alpha: PositiveFloat | None = None  # None: the rank, hence scale 1
    modulation: StrictBool = False  # also adapt the timestep modulation
    fake_rank: PositiveInt | None = None  # of the fake score's LoRA; None: the same rank


class EngineSection(Section):
    """Processes; started by torchrun, one per device."""

    shard: PositiveInt = 1  # ranks that share one copy of the base (FSDP2); 1 = each holds its own
    world: PositiveInt | None = None  # processes; None = as many as were started
    timeout_s: int = Field(600, ge=1, le=10**6)  # a rank that waits longer for another gives up

    @model_validator(mode="after")
    def _whole_groups(self) -> EngineSection:
        if self.world is not None and self.world % self.shard:
            raise ValueError(
                f"shard, world: expected a world that is a multiple of shard (found {self.shard} "
                f"and {self.world}), for every group of ranks holds one copy of the base"
            )
        return self


class PreviewSection(Section):
    """Pictures of a run: the student beside the teacher, the same prompts and noise every time."""

    every: int = Field(200, ge=0)  # steps, 0 = never
    prompts: PositiveInt = 4  # held out of training, or the first ones of prompt_file
    prompt_file: UserPath | None = None  # .txt, .jsonl, .parquet; `prepare` embeds them
    images: PositiveInt = 4  # per prompt; one alone has no diversity to measure
    seed: Seed = 0  # of the first image; the others' follow
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
    clip: ModelPath | None = (
        None  # CLIP model that scores prompts, folder or hub id; tiny has its own
    )

    @model_validator(mode="after")
    def _something_passes(self) -> GatesSection:
        low, high = self.sharpness_min, self.sharpness_max
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"sharpness_min, sharpness_max: expected sharpness_min up to sharpness_max (found "
                f"{low:g} and {high:g}); nothing could pass both"
            )
        return self


class Config(Section):
    seed: Seed = 0
    run_dir: UserPath = Path("runs/latest")
    name: LoraName = "turbo"  # file name and title of the LoRA
    model: ModelSection = ModelSection()
    data: AnyData = TINY
    guidance: GuidanceSection = GuidanceSection()
    spec: SpecSection = SpecSection()
    adapter: AdapterSection = AdapterSection()
    init_from: UserPath | None = None  # LoRA, run or checkpoint that the student begins as
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    preview: PreviewSection = PreviewSection()
    gates: GatesSection = GatesSection()
    # the finished LoRA: with 16 images per preview best is chosen by chance (docs/evidence/t1.md)
    select: Literal["best", "last"] = "last"
    save_every: int = Field(500, ge=0)  # steps, 0 = only at the end
    log_every: PositiveInt = 10
    keep_checkpoints: int = Field(2, ge=0)  # newest ones, 0 = all
    nan_limit: PositiveInt = 20  # steps in a row without a finite update, then the run stops
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        spec = self.spec
        checked = TurboSpec(
            **spec.schedule,
            base=public_name(self.model.path),
            sampler=spec.sampler,
            resolutions=spec.resolutions,
        )
        if isinstance(self.data, str) and self.model.path != self.data:
            raise ValueError(
                f'data: "{self.data}" goes with model.path: "{self.data}" alone '
                f"(found {shown(self.model.path)}); "
                "expected `cache: FOLDER`, which `turbo-distill prepare` fills"
            )
        self._check_frozen_base()
        adapter = self.adapter
        found = list(conflicts(self.stages, adapter.rank, adapter.fake_rank, checked.steps))
        if found:
            raise ValueError("\n  ".join(found))
        check_teacher_images(self.stages, getattr(self.data, "teacher_images", 0))
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
        values = read_yaml(_read(path), str(path))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}). Presets lie in configs/."
        ) from error
    except YAMLTextError as error:
        raise ConfigError(f"{error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {shown(values)}.")
    try:
        for override in overrides:
            apply_override(values, override)
    except OverrideError as error:
        raise ConfigError(str(error)) from error
    return parse_config(values, str(path))


def _read(path: Path) -> str:
    """Raises OSError, ConfigError."""
    with open_regular(path) as file:
        content = file.read(FILE_BYTES + 1)
    if len(content) > FILE_BYTES:
        raise ConfigError(f"{path}: expected a recipe, found more than {FILE_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}, line {line}: expected UTF-8, found byte {content[error.start]:#04x}; save "
            "the file as UTF-8."
        ) from error


def parse_config(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        places = [problem["loc"] for problem in error.errors()]
        # of a list with a wrong item pydantic also says that the item is missing
        around = {place[:length] for place in places for length in range(len(place))}
        problems = [p for p in error.errors() if p["loc"] not in around]
        lines = [f"  {_explain(problem)}" for problem in problems[:PROBLEMS]]
        if len(problems) > PROBLEMS:
            lines.append(f"  and {len(problems) - PROBLEMS:,} more")
        raise ConfigError("\n".join([f"{source}:", *lines])) from error


def save_config(config: Config, path: Path) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    replace_text(path, text)


def _explain(problem: Any) -> str:
    """One pydantic error as `key: expected and found`, with a hint where a key is misspelt."""
    unknown = problem["type"] == "extra_forbidden"
    place = problem["loc"]
    keys = [
        part
        for i, part in enumerate(place)
        # methods and kinds of data are no keys, unless somebody made one of them
        if part not in (*STAGE_METHODS, *DATA_KINDS) or (unknown and i == len(place) - 1)
    ]
    key = plain(".".join(map(str, keys)))
    if unknown:
        return f"{key}: there is no such key.{did_you_mean(str(place[-1]), ALL_KEYS)}"
    found = (
        ""
        if problem["type"] in ("missing", "value_error")
        else f" (found {shown(problem['input'])})"
    )
    return f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}{found}"


def _sections(annotation: Any) -> set[type[Section]]:
    """The section classes that occur in a type, and in their fields."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields.values()
        return {annotation}.union(*(_sections(field.annotation) for field in fields))
    return set().union(*(_sections(part) for part in get_args(annotation)))


ALL_KEYS = sorted({name for section in _sections(Config) for name in section.model_fields})
