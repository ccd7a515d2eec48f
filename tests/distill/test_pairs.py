"""Options that do not go together are refused before a model is loaded; all others train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from toy_training import RandomData

from distill import trainer
from distill.config import Config, ConfigError, load_config, parse_config
from distill.contract.metadata import read_lora
from distill.models import dino as dino_models
from distill.trainer import train
from distill.utils.section import Section, classes

CONFIGS = Path(__file__).parents[2] / "configs"
PRESET = CONFIGS / "qwen_image_2512_2step.yaml"
PRESETS = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.fake_rank=32"], ["adapter.fake_rank", "at least adapter.rank, 64", "found 32"]),
        (["stages.1.ida=0.9"], ["stages.1.ida", "null", "found 0.9", "fake_rank 128"]),
        (["stages.1.fake_init=keep"], ["stages.1.fake_init", "found keep", "no stage before"]),
        (["stages.0.target=ema", "stages.0.ema=0"], ["stages.0.target", "ema 0", "stages.0.ema"]),
        (["stages.1.diversity=1", "spec.sigmas=[1, 0]"], ["stages.1.diversity", "one step"]),
        (["stages.2.gan.weight=2", "stages.2.gan.ratio=0.5"], ["stages.2.gan.weight", "replaces"]),
        (["gates.sharpness_min=3"], ["gates", "sharpness_min up to sharpness_max"]),
        (["engine.world=6", "engine.shard=4"], ["engine", "multiple of shard"]),
        (["stages.1.betas=[0.9, 1]"], ["stages.1.betas.1", "less than 1"]),
        (["stages.1.fake_betas=[-0.1, 0.9]"], ["stages.1.fake_betas.0", "0"]),
        (["stages.2.gan.width=1"], ["stages.2.gan.width", "2"]),
        (["model.loras=[{path: x, strength: 0}]"], ["model.loras.0.strength", "other than 0"]),
    ],
)
def test_a_pair_is_refused_when_the_recipe_is_read(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(PRESET, overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.fake_rank=32", "stages.1.fake_init=base"],
        ["adapter.fake_rank=null", "stages.1.ida=0.9"],
        ["adapter.fake_rank=64", "stages.1.ida=0.9"],
        ["stages.0.target=ema"],
        ["stages.2.gan.weight=2"],
        ["engine.world=8", "engine.shard=4"],
    ],
)
def test_its_way_out_is_accepted(overrides: list[str]) -> None:
    load_config(PRESET, overrides)


# ------------------------------------------------- the walk: one option at a time, then one step

SKIPPED = {"run_dir", "name", "model.path", "data", "init_from", "gates.clip", "model.loras"}
# In order to be quick; what each option is set to is added to that
FEW = {
    "steps": 1,
    "points": 2,
    "fake_updates": 1,
    "fake_warmup_updates": 1,
    "diversity_steps": 1,
}
DISCRIMINATOR = {"teacher_steps": 2, "width": 4, "updates": 1, "ramp": 2}
PREVIEW = {"every": 1, "prompts": 1, "images": 2, "teacher_steps": 2}


def options(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, type and value of every option, without those of sections that are not there."""
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if key in SKIPPED or name == "method":
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], Section):
            for i, part in enumerate(value):
                yield from options(part, f"{key}.{i}.")
            continue
        if isinstance(value, Section):
            yield from options(value, f"{key}.")
            if NoneType not in classes(field.annotation):
                continue
        yield key, field.annotation, value


def literals(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(literals(part) for part in get_args(annotation)))


def others(key: str, annotation: Any, value: Any) -> list[Any]:
    """Values of every kind that an option may have, its own left out."""
    name, kinds = key.rpartition(".")[2], classes(annotation)
    by_name: dict[str, list[Any]] = {
        "betas": [[0.0, 0.0], [0.5, 0.9], [0.9, 1.0]],
        "fake_betas": [[0.0, 0.0], [0.5, 0.9], [0.9, 1.0]],
        "layers": [[1.0], [0.01, 1.0], []],
        "augment": [[], ["flip", "flip"], ["cutout"]],
        "sigmas": [[1, 0], [0.9, 0.5, 0.2, 0], [1, 1, 0]],
        "nodes": [[1, 0.5, 0]],
        "resolutions": [[[32, 32]], [[64, 32], [32, 32]]],
        "features": ["latent", "pixels", "no/such-model"],
        "shift": [{"rule": "static", "shift": 3.0}] if key.startswith("spec") else [0.5, 1.0],
        "stages": [],
    }
    found: list[Any] = by_name.get(name, [])
    if not found:
        if issubclass_of(kinds, Section):
            found = [{}]
        elif bool in kinds:
            found = [False, True]
        elif literals(annotation):
            found = sorted(literals(annotation))
        elif int in kinds:
            found = [0, 1, 2, (value or 0) + 1]
        elif float in kinds:
            found = [0.0, 0.5, 1.0, 2 * (value or 1.0)]
    if NoneType in kinds:
        found = [None, *found]
    return [other for other in found if other != value or type(other) is not type(value)]


def issubclass_of(kinds: frozenset[type], base: type) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, base) for kind in kinds)


def shrunk(preset: Path, model: Path, run_dir: Path, features: str) -> dict[str, Any]:
    """A preset for the toy model: one step of every stage."""
    values: dict[str, Any] = yaml.safe_load(preset.read_text(encoding="utf-8"))
    values |= {"run_dir": str(run_dir), "save_every": 0, "preview": {**PREVIEW, "every": 0}}
    values["model"] = {**values["model"], "path": str(model)}
    values["data"] = {"cache": "no_cache", "buckets": [[32, 32]]}
    values["adapter"] = {"rank": 2, "fake_rank": 4}
    values["spec"].pop("resolutions", None)
    for stage in values["stages"]:
        few = {key: value for key, value in FEW.items() if key != "points" or "points" in stage}
        if stage["method"] == "pcm":
            few = {"steps": 1, "points": 2}
        stage |= few | {"batch": 1}
        if "gan" in stage:
            stage["gan"] |= DISCRIMINATOR | {"crop": 4, "halo": 0}
            if stage["gan"]["features"] not in ("pixels", "latent"):
                stage["gan"]["features"] = features
    return values


def walked(preset: Path) -> list[str]:
    """The keys of a preset, each kind of stage once."""
    config = parse_config(shrunk(preset, Path("model"), Path("run"), "dino"), preset.name)
    keys = [key for key, annotation, value in options(config) if others(key, annotation, value)]
    seen = [stage.method for stage in config.stages]
    twice = [f"stages.{i}." for i, method in enumerate(seen) if method in seen[i + 1 :]]
    return [key for key in keys if not key.startswith(tuple(twice))]


# Here fake_rank is not rank, there is one process, sigmas are given, no teacher images are cached
ALONE = ("stages.2.ida", "engine.shard", "spec.nodes", "spec.terminal", "spec.shift",
         "stages.2.gan.real_ratio")  # fmt: skip
QUICK = ("adapter.fake_rank", "stages.2.ida", "stages.2.fake_init", "stages.0.target",
         "stages.2.gan.features", "engine.shard")  # fmt: skip


@pytest.fixture(scope="module")
def tiny_dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
             "intermediate_size": 32, "image_size": 28}  # fmt: skip
    Dinov2Model(Dinov2Config(patch_size=14, **sizes)).save_pretrained(folder)
    return str(folder)


def put(values: dict[str, Any], key: str, value: Any) -> None:
    node: Any = values
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value


@pytest.mark.parametrize(
    ("preset", "key"),
    [
        pytest.param(
            preset, key, marks=() if preset == PRESET and key in QUICK else pytest.mark.slow
        )
        for preset in (PRESET, CONFIGS / "tiny_cpu.yaml")
        for key in walked(preset)
        if preset == PRESET or ".gan" in key or key.startswith("model")
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_an_option_is_refused_at_once_or_it_trains(
    preset: Path,
    key: str,
    small_model: Path,
    tiny_dino: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every kind of value of one option of a preset: a ConfigError before the base is read, or one
    step of each stage and a LoRA of finite numbers.
    """
    load, loads = trainer.load_transformer, []

    def counted(*args: Any) -> Any:
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(trainer, "load_transformer", counted)
    config = parse_config(shrunk(preset, small_model, tmp_path / "run", tiny_dino), "preset")
    annotation, own = next((a, v) for k, a, v in options(config) if k == key)
    for number, value in enumerate(others(key, annotation, own)):
        values = shrunk(preset, small_model, tmp_path / f"run{number}", tiny_dino)
        if key.startswith(("preview", "gates", "select")):
            values["preview"] = dict(PREVIEW)
        put(values, key, value)
        already = len(loads)
        with suppress(ConfigError):
            read_lora(train(parse_config(values, "preset"), data=RandomData()))  # finite, or raises
            continue
        assert len(loads) == already, f"{key}={value}: refused after the base was loaded"
    assert bool(loads) != (key in ALONE), f"{key}: no value but its own was accepted"


def test_a_judge_that_is_not_there_is_found_before_the_first_stage(
    small_model: Path, tiny_dino: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_transformer", None)

    def refused(**gan: Any) -> str:
        values = shrunk(PRESET, small_model, tmp_path / "run", tiny_dino)
        values["stages"][2]["gan"] |= gan
        with pytest.raises(ConfigError) as error:
            train(parse_config(values, "preset"), data=RandomData())
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "cannot be loaded" in refused(features=str(tmp_path))
    assert "expected 2 latents or more" in refused(crop=5, halo=2)
    assert dino_models.check_dino(tiny_dino) == 14
    bare = tmp_path / "bare"
    (bare / "transformer").mkdir(parents=True)
    (bare / "transformer" / "config.json").write_bytes(
        (small_model / "transformer" / "config.json").read_bytes()
    )
    small_model = bare
    assert "vae" in refused(features="pixels")


def test_every_option_of_the_presets_is_walked() -> None:
    """The walk reaches all keys that a recipe has, but for paths and names."""
    keys = {key.rpartition(".")[2] for key in walked(PRESET)}
    named = {
        key.rpartition(".")[2]
        for preset in PRESETS
        for key, _, value in options(load_config(preset))
        if not isinstance(value, Path) and not key.startswith("spec.shift.")  # one value
    }
    assert named - keys <= {"stages", "features", "last_step_only", "prompt_file"} | SKIPPED
    assert isinstance(load_config(PRESET), Config)
