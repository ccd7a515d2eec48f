"""Configurations: what is accepted, and what a mistake tells its author."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.config import ConfigError, load_config, save_config
from distill.models.family import spec_of
from distill.training.run_start import differences

PRESETS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
DEMO = next(path for path in PRESETS if path.name == "tiny_demo.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_is_valid(path: Path) -> None:
    config = load_config(path)
    assert spec_of(config).sigmas[-1] == 0


def test_overrides_reach_sections_and_stages() -> None:
    config = load_config(DEMO, ["seed=5", "stages.0.steps=7", "spec.sigmas=[1, 0.6, 0]"])
    assert (config.seed, config.stages[0].steps, config.spec.sigmas) == (5, 7, (1.0, 0.6, 0.0))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.stpes=7", ["stages.0.stpes", "Did you mean 'steps'"]),
        ("adapter.rnak=7", ["adapter.rnak", "'rank'"]),
        ("stages.0.steps=-1", ["stages.0.steps", "greater than 0", "-1"]),
        ("stages.0.method=pmc", ["stages.0", "pmc", "pcm"]),
        ("stages.3.steps=1", ["stages.3", "0 to 0"]),
        ("spec.sigmas=[1, 0.5]", ["sigmas"]),
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
