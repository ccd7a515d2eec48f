"""Configurations: what is accepted, and what a mistake tells its author."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distill.config import (
    Config,
    ConfigError,
    load_config,
    parse_config,
    save_config,
)
from distill.contract.latent_grid import sigmas_at
from distill.contract.shift import LinearShift
from distill.models.family import for_base, spec_of
from distill.training.run_dir import RunDir, step_name
from distill.training.run_start import differences
from distill.utils.overrides import OverrideError, apply_override
from distill.utils.section import Section, classes
from distill.utils.values import NAME_BYTES

PRESETS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
DEMO = next(path for path in PRESETS if path.name == "tiny_demo.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_is_valid(path: Path) -> None:
    config = for_base(load_config(path))
    assert sigmas_at(spec_of(config))[-1] == 0


def test_overrides_reach_sections_and_stages() -> None:
    config = load_config(DEMO, ["seed=5", "stages.0.steps=7", "spec.sigmas=[1, 0.6, 0]"])
    assert (config.seed, config.stages[0].steps, config.spec.sigmas) == (5, 7, (1.0, 0.6, 0.0))


def test_a_schedule_by_size() -> None:
    rule = "{rule: linear, tokens: [256, 8192], mu: [.5, .9]}"
    config = load_config(DEMO, ["spec.sigmas=null", "spec.nodes=[1, .5, 0]", f"spec.shift={rule}"])
    spec = spec_of(config)
    assert (spec.nodes, spec.shift) == ((1.0, 0.5, 0.0), LinearShift((256, 8192), (0.5, 0.9)))
    assert parse_config(config.model_dump(mode="json"), "again") == config
    none = load_config(DEMO, ["spec.sigmas=null"])
    assert spec_of(none).sigmas() == (1.0, 0.7155, 0.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("spec.nodes=[1, .5, 0]", ["spec", "sigmas or nodes, found both"]),
        ("spec.terminal=0.5", ["spec", "shift and terminal move nodes"]),
        ("spec={terminal: 0.5}", ["spec", "move nodes, found none"]),
        ("spec={shift: {rule: static, shift: 3}}", ["spec", "move nodes, found none"]),
        ("spec.shift={rule: linaer}", ["spec.shift.rule", "linaer"]),
        ("spec.shift={rule: static, mu: [1, 2]}", ["shift and terminal move nodes"]),
        ("stages.0.stpes=7", ["stages.0.stpes", "Did you mean 'steps'"]),
        ("adapter.rnak=7", ["adapter.rnak", "'rank'"]),
        ("stages.0.steps=-1", ["stages.0.steps", "greater than 0", "-1"]),
        ("stages.0.method=pmc", ["stages.0", "pmc", "pcm"]),
        ("stages.3.steps=1", ["stages.3", "0 to 0"]),
        ("spec.sigmas=[1, 0.5]", ["0 as the last"]),
        ("seed", ["key=value"]),
        ("seed.x=1", ["seed", "no keys"]),
        ("data=other", ["data", "tiny"]),
    ],
)
def test_a_mistake_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, [override])
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(broken)


def test_round_trip_and_differences(tmp_path: Path) -> None:
    config = load_config(DEMO)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    other = load_config(DEMO, ["stages.0.lr=0.5", "run_dir=elsewhere"])
    assert differences(config, other) == ["  stages.0.lr: 0.001 -> 0.5"]


# --------------------------------------------------------------- values are what was written

FULL: dict[str, Any] = {  # a recipe that has every kind of section
    "model": {"path": "base"},
    "data": {"cache": "cache"},
    "stages": [
        {"method": "pcm", "steps": 1, "gan": {}},
        {"method": "dmd2", "steps": 1, "gan": {}},
    ],
}
WORDS = (
    "2024_11",
    "2024-11-26",
    "007",
    "on",
    "null",
    "x~y",
    "set #2",
    "@home/x",
    "a: b",
    "[a",
    "{",
)
NO_PATHS = {"name", "data.caption_key", "data.negative"}


def keys(section: Section, prefix: str = "") -> Iterator[tuple[str, frozenset[type]]]:
    """Every key with the classes of its type."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        inner = enumerate(value) if isinstance(value, tuple) else [("", value)]
        below = [(f"{prefix}{name}.{i}".strip("."), v) for i, v in inner if isinstance(v, Section)]
        for key, part in below:
            yield from keys(part, f"{key}.")
        if not below:
            yield prefix + name, classes(field.annotation)


def having(*overrides: str) -> Config:
    values = deepcopy(FULL)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, "test")


def at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


KEYS = dict(keys(parse_config(FULL, "test")))
TEXTS = [key for key, kinds in KEYS.items() if kinds & {str, Path}]


def test_the_recipe_of_these_tests_has_every_kind_of_key() -> None:
    assert {"run_dir", "name", "model.path", "data.cache", "data.prompts", "data.images"} < {*TEXTS}
    assert {"gates.clip", "stages.1.gan.features", "data.caption_key"} < {*TEXTS}
    for kind in (bool, int, float, tuple):
        assert any(kind in kinds for kinds in KEYS.values())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_read_as_with_yaml_1_1(path: Path) -> None:
    assert load_config(path) == Config.model_validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("key", TEXTS)
def test_text_is_what_was_typed(key: str) -> None:
    wanted: Any
    for word in WORDS:
        if key == "name" and word in ("@home/x", "a: b"):  # no names of files
            continue
        found = at(having(f"{key}={word}"), key)
        wanted = Path(word) if Path in KEYS[key] else word
        if tuple in KEYS[key]:
            wanted = (wanted,)
        if word == "null" and type(None) in KEYS[key]:
            wanted = None
        assert found == wanted, word
    for wrong in ("a\0b", "\udcff"):
        with pytest.raises(ConfigError, match=f"^test:\n  {key}"):
            having(f"{key}={wrong}")


@pytest.mark.parametrize("key", [key for key in TEXTS if key not in NO_PATHS])
def test_home_is_expanded_in_every_path(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = at(having(f"{key}=~/x"), key)
    assert str(found[0] if isinstance(found, tuple) else found) == str(tmp_path / "x")


@pytest.mark.parametrize("key", ["run_dir", "data.cache", "data.images", "data.prompts"])
def test_an_object_store_is_no_disk(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{key}[.0-9]*: expected a local path, found an address"
    ):
        having(f"{key}=s3://bucket/x")


@pytest.mark.parametrize("key", ["run_dir", "data.cache", "data.images", "model.path", "name"])
def test_nothing_is_no_path_and_no_name(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        having(f"{key}=")


@pytest.mark.parametrize(("key", "kinds"), KEYS.items())
def test_numbers_and_booleans_are_those_of_yaml_1_2(key: str, kinds: frozenset[type]) -> None:
    wrong = []
    if bool in kinds:
        wrong += ["on", "yes", "1", "'true'"]
    if float in kinds:
        wrong += [".inf", "-.inf", ".nan", "1e999", "true", "inf", "nan", "[.inf, .nan]"]
    if int in kinds:
        wrong += ["true", "1:30", "2024-11-26", ".inf", "[true]"]
    for word in wrong:
        with pytest.raises(ConfigError, match=rf"^test:\n  {key}"):
            having(f"{key}={word}")


def test_lists_and_nested_keys_on_the_command_line() -> None:
    config = having("data.images=[2024_11, 'set #2', on]", "data.buckets=[[64, 32]]")
    assert config.data.images == (Path("2024_11"), Path("set #2"), Path("on"))  # type: ignore[union-attr]
    assert config.data.buckets == ((64, 32),)  # type: ignore[union-attr]
    config = having("data={cache: 007, images: on}", "data.images=2024", "stages.0.lr=1e-4")
    assert config.data.cache == Path("007")  # type: ignore[union-attr]
    assert config.data.images == (Path("2024"),)  # type: ignore[union-attr]
    assert config.stages[0].lr == 1e-4
    assert having("stages=[{method: pcm, steps: 5}]", "stages.0.steps=6").stages[0].steps == 6
    assert having("spec.sigmas=[1, 0.5, 0]", "spec.sigmas.1=0.4").spec.sigmas == (1.0, 0.4, 0.0)


def test_text_in_a_file_is_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "\ufeffrun_dir: 2024_11\nname: 007\nseed: 0x10\nmodel: {path: on}\n"
        "data: {cache: 2024-11-26, images: [1e3, no], caption_key: null, negative: ~}\n"
        "stages: [&one {method: pcm, steps: 1}, {<<: *one, steps: 2}, *one]\n"
    )
    config = load_config(file, ["stages.0.steps=9"])
    assert (config.run_dir, config.name, config.seed) == (Path("2024_11"), "007", 16)
    assert config.model.path == "on"
    assert config.data.cache == Path("2024-11-26")  # type: ignore[union-attr]
    assert config.data.images == (Path("1e3"), Path("no"))  # type: ignore[union-attr]
    assert config.data.caption_key is None  # type: ignore[union-attr]
    assert config.data.negative == "~"  # type: ignore[union-attr]
    assert [stage.steps for stage in config.stages] == [9, 2, 1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed: 1\nseed: 2", "line 2: the key 'seed' stands in line 1 already"),
        (b"seed: 1\nname: \xff", "line 2: expected UTF-8, found byte 0xff; save the file as UTF-8"),
        ("seed: 1".encode("utf-16"), "line 1: expected UTF-8"),
        (b"a: " + b"[" * 5000, "levels of nesting"),
        (b"#" * (1 << 20) + b"##", "expected a recipe, found more than 1,048,576 bytes"),
        (b"", "expected a mapping of keys, found None"),
        (b"7", "expected a mapping of keys, found '7'"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(error.value).startswith(str(file))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", "seed"),
        ("seed=9223372036854775808", "seed"),
        (f"seed={'9' * 5000}", "seed"),
        ("preview.seed=1e300", "preview.seed"),
        ("spec.sigmas=[1,", "spec.sigmas"),
        ("spec.sigmas=" + "[" * 5000, "spec.sigmas"),
        ("stages.0.steps.x=1", "stages.0.steps is the value"),
        ("data.buckets.0.x=1", "data.buckets: "),
        ("stages.²=1", "stages.²: expected a number"),
        ("pcm=1", "pcm: there is no such key"),
        ("data.prepared=1", "data.prepared: there is no such key"),
        (f"name={step_name(100)}", "what the run calls"),
        ("a" + ".a" * 3000 + "=1", "a: there is no such key"),
        ("seed.x" + ".a" * 3000 + "=1", "seed: "),
    ],
)
def test_a_wrong_value_is_one_short_line(override: str, words: str) -> None:
    with pytest.raises((ConfigError, OverrideError)) as error:
        having(override)
    assert words in str(error.value)
    lines = str(error.value).removeprefix("test:\n").splitlines()
    assert len(lines) == 1
    assert len(lines[0]) < 400 or override.startswith("seed.x")


def test_the_longest_name_fits_all_that_is_made_of_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    config = having("name=" + "x" * NAME_BYTES)
    longest = f".{config.name}-{step_name(10**6)}_001_seed{2**64 - 1}.png.deadbeef.tmp"
    assert len(longest) <= 255
    run.loras.mkdir()
    run.lora(config.name).write_bytes(b"")
    (run.loras / longest).write_bytes(b"")


anything = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")
written = st.text(anything, min_size=1, max_size=63)  # of four bytes at most: a file name has 255


@settings(max_examples=150, deadline=None)
@given(written)
def test_any_text_arrives_as_it_was_typed(text: str) -> None:
    assume(text[0] not in "'\"")
    assert having(f"data.negative={text}").data.negative == text  # type: ignore[union-attr]
    assume(not Path(text).parts[:1] or not Path(text).parts[0].startswith("~"))
    assert having(f"run_dir={text}").run_dir == Path(text)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(written, max_size=3),
    written,
    st.none() | written,
    st.integers(0, 2**63 - 1),
    st.floats(0, exclude_min=True, allow_infinity=False),
    st.booleans(),
)
def test_a_saved_recipe_reads_back_to_the_same(
    paths: list[str], text: str, maybe: str | None, seed: int, lr: float, flag: bool
) -> None:
    values = deepcopy(FULL) | {"seed": seed, "run_dir": text, "gates": {"clip": maybe}}
    values["model"] = {"path": text, "gradient_checkpointing": flag}
    values["data"] |= {"images": paths, "negative": text, "caption_key": maybe}
    values["stages"][0]["lr"] = lr
    try:
        config = parse_config(values, "test")
    except ConfigError as error:
        assume("model.path" not in str(error) and "base" not in str(error))
        raise
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        save_config(config, file)
        assert load_config(file) == config


TEACHERS = {"method": "dmd2", "steps": 1, "gan": {"features": "pixels", "real_ratio": 0.5}}


@pytest.mark.parametrize("data", ["tiny", {"cache": "c"}, {"cache": "c", "teacher_images": 0}])
def test_images_that_would_be_drawn_in_every_update_are_refused(data: Any) -> None:
    """40 guided steps each; with images in the cache, or if somebody means it, they are not."""
    model = {"path": "tiny"} if data == "tiny" else {}

    def parse(data: Any = data, **gan: Any) -> Config:
        stage = {**TEACHERS, "gan": {**TEACHERS["gan"], **gan}}
        return parse_config({"model": model, "data": data, "stages": [stage]}, "mine.yaml")

    with pytest.raises(ConfigError) as error:
        parse()
    words = ("stages.0.gan.real_ratio", "0.5", "40 guided steps", "80 forwards")
    for word in (*words, "data.teacher_images", "draw_teacher: true"):
        assert word in str(error.value)
    parse(draw_teacher=True)
    parse(real_ratio=1.0)
    if data != "tiny":
        parse({**data, "teacher_images": 4})
