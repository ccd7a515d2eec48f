"""The configuration of a run: frozen pydantic models, read from YAML and `key=value` overrides.

An unknown key is an error, and everything that can be checked without reading a weight is checked
here.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from .contract.spec import TurboSpec
from .files import replace_file

TINY = "tiny"  # the name of the embedded model and of its data

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
MLP = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
MODULATION = ("img_mod.1", "txt_mod.1")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names file, key, expected and found."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """The base model: "tiny", a folder in diffusers layout, or a hub id."""

    path: str = "Qwen/Qwen-Image-2512"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True


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

    @property
    def targets(self) -> list[str]:
        return [*ATTENTION, *MLP, *(MODULATION if self.modulation else ())]


class Stage(Section):
    """What all methods share."""

    steps: PositiveInt
    batch: PositiveInt = 1  # samples per rank and step
    lr: PositiveFloat = 5e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)  # steps
    clip: PositiveFloat = 1.0  # gradient norm
    ema: float = Field(0.99, ge=0, lt=1)  # decay per step; 0 = off


class PCMStage(Stage):
    """Phased consistency (Wang et al. 2024): the phases are the intervals between the spec's
    sigmas.
    """

    method: Literal["pcm"]
    points: PositiveInt = 16  # grid points per phase
    solver_steps: PositiveInt = 1  # teacher Euler steps from one grid point to the next
    target: Literal["student", "ema"] = "student"
    huber: PositiveFloat = 0.1  # c of the pseudo-Huber distance


AnyStage = Annotated[PCMStage, Field(discriminator="method")]


class Config(Section):
    seed: int = 0
    run_dir: Path = Path("runs/latest")
    name: str = "turbo"  # file name and title of the LoRA
    model: ModelSection = ModelSection()
    data: str = TINY
    guidance: GuidanceSection = GuidanceSection()
    spec: SpecSection = SpecSection()
    adapter: AdapterSection = AdapterSection()
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    preview_every: int = Field(200, ge=0)  # steps, 0 = never
    save_every: int = Field(500, ge=0)  # steps, 0 = only at the end
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        self.turbo_spec()
        if (self.model.path == TINY) != (self.data == TINY):
            raise ValueError(
                "model.path and data: the embedded model goes with the embedded data "
                f'(both "{TINY}")'
            )
        return self

    def turbo_spec(self) -> TurboSpec:
        """The spec that the finished LoRA will carry."""
        tiny = self.model.path == TINY
        return TurboSpec(
            sigmas=self.spec.sigmas,
            family="qwen-image",
            base="turbo-distill/tiny" if tiny else self.model.path,
            sampler=self.spec.sampler,
            resolutions=self.spec.resolutions,
            method=" -> ".join(stage.method for stage in self.stages),
            created_by="turbo-distill",
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
        _apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], source: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise ConfigError(f"{source}:\n{problems}") from error


def save_config(config: Config, path: Path) -> None:
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def _apply_override(values: dict[str, Any], override: str) -> None:
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
    location = [part for part in problem["loc"] if part not in STAGE_METHODS]
    key = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), ALL_KEYS, n=1)
        return f"{key}: there is no such key." + (f" Did you mean {near[0]!r}?" if near else "")
    found = (
        "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
    )
    return f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}{found}"


STAGE_METHODS = ("pcm",)
ALL_KEYS = sorted(
    {
        name
        for section in (
            Config,
            ModelSection,
            GuidanceSection,
            SpecSection,
            AdapterSection,
            PCMStage,
        )
        for name in section.model_fields
    }
)
