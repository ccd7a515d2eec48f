"""The prompts of the previews: training does without them, and a run that continues keeps them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill import cli
from distill.config import Config, ConfigError, parse_config
from distill.contract.metadata import read_lora
from distill.contract.tiny import COLOURS, LETTERS, embed_prompt, letter_prompt
from distill.data.batch import Data, Divisible
from distill.data.dataset import PreparedData
from distill.data.load import load_data
from distill.tiny.data import PROMPTS, TinyData
from distill.trainer import train
from distill.training.engine import Engine
from distill.training.held_out import split
from distill.training.run_dir import RunDir
from distill.utils.rng import Rng

ALONE = Engine(0, 1, torch.device("cpu"))
ALL = [letter_prompt(colour, letter) for letter, colour in product(LETTERS, COLOURS)]
PREVIEW = {"every": 1, "prompts": 3, "images": 2, "teacher_steps": 2}
STAGE = {"method": "pcm", "steps": 2, "batch": 2, "lr": 1e-3, "points": 4}

Recipe = Callable[..., Config]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of the tiny model, on a cache of `prepare`; keywords replace its keys."""

    def make(prompts: list[str] = ALL, images: list[str] | None = None, **keys: Any) -> Config:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        data: dict[str, Any] = {
            "cache": tmp_path / "cache",
            "prompts": tmp_path / "prompts.txt",
            "resolution": 64,
            "buckets": [[64, 64]],
            "negative": "",
            "dtype": "float32",
        }
        if images is not None:
            data["images"] = pictures(tmp_path / "images", images)
        values = {
            "run_dir": tmp_path / "run",
            "model": {"path": "tiny", "dtype": "float32", "gradient_checkpointing": False},
            "guidance": {"scale": 3.5, "rescale": False},
            "data": data,
            "adapter": {"rank": 2},
            "stages": [{"method": "dmd2", "steps": 1}],
            "preview": PREVIEW,
            "save_every": 1,
        }
        return parse_config({**values, **keys}, "recipe")

    return make


def pictures(folder: Path, captions: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (64, 64), (5 * i % 256, 90, 200)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(caption)
    return folder


def prepare(config: Config, tmp_path: Path, *more: str) -> None:
    from distill.config import save_config

    save_config(config, tmp_path / "recipe.yaml")
    assert cli.main(["prepare", str(tmp_path / "recipe.yaml"), *more]) == 0


def decide(config: Config, data: Data | None = None) -> tuple[Data, list[str]]:
    config.run_dir.mkdir(exist_ok=True)
    parts = split(config, data or load_data(config), ALONE)
    assert parts.examples is not None
    return parts.data, list(parts.examples.prompts)


def drawn(data: Data, steps: int = 60) -> set[str]:
    """The prompts of many batches, by their embeddings."""
    known = {embed_prompt(p).numpy().tobytes(): p for p in PROMPTS}
    rows = (row for step in range(steps) for row in data.batch(Rng(0, step), 16).text.embeds)
    return {known[row.numpy().tobytes()] for row in rows}


def record(config: Config) -> dict[str, Any]:
    return json.loads(RunDir(config.run_dir).held_out.read_text())


def test_previews_show_what_training_never_sees(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe()
    prepare(config, tmp_path)
    data, shown = decide(config)
    assert len(set(shown)) == 3
    assert drawn(data) == set(ALL) - set(shown)
    assert drawn(load_data(config)) == set(ALL)  # what was there before
    assert record(config)["held_out"] is True
    assert record(config)["prompts"] == shown


def test_the_choice_depends_on_the_prompts_and_not_on_their_order(
    recipe: Recipe, tmp_path: Path
) -> None:
    chosen = []
    for prompts in (ALL, ALL[::-1]):
        config = recipe(prompts)
        prepare(config, tmp_path)
        chosen.append(decide(config)[1])
        shutil.rmtree(config.data.cache)
        shutil.rmtree(config.run_dir)
    assert chosen[0] == chosen[1]
    assert chosen[0] != ALL[:3]


@pytest.mark.parametrize("method", ["pcm", "dmd2"])
def test_images_go_with_their_captions(method: str, recipe: Recipe, tmp_path: Path) -> None:
    """PCM starts from images and their captions, DMD2 reads captions alone."""
    stage = {**STAGE, "method": "pcm"} if method == "pcm" else {"method": "dmd2", "steps": 1}
    config = recipe(["a red letter K"], images=ALL[1:41], stages=[stage])
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"prompts": ()})},
    )
    prepare(config, tmp_path)
    data, shown = decide(config)
    assert set(shown) <= set(ALL[1:41])
    assert drawn(data) == set(ALL[1:41]) - set(shown)
    assert isinstance(data, PreparedData)
    assert sum(data.real.counts()) == 37


def test_a_caption_of_many_images_is_not_spared(recipe: Recipe, tmp_path: Path) -> None:
    """Thirty captions of one image and one of a hundred: the latter is never held out."""
    captions = [*ALL[:30], *["a handwritten two"] * 30]
    config = recipe(["a red letter K"], images=captions, stages=[STAGE])
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"prompts": ()})},
    )
    prepare(config, tmp_path)
    data = load_data(config)
    assert isinstance(data, PreparedData)
    assert data.without(["a handwritten two"]) is None
    assert data.without(["no such prompt"]) is not None
    chosen = data.to_hold_out(3)
    assert len(chosen) == 3
    assert "a handwritten two" not in chosen


def test_with_few_prompts_the_first_ones_are_shown_and_trained_on(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(ALL[:29])  # one in ten: three need thirty
    prepare(config, tmp_path)
    with caplog.at_level(logging.INFO):
        data, shown = decide(config)
    assert shown == ALL[:3]
    assert drawn(data) == set(ALL[:29])
    assert "the 3 prompts of the previews are trained on" in caplog.text
    assert record(config)["held_out"] is False


def test_a_run_that_continues_keeps_them(recipe: Recipe, tmp_path: Path) -> None:
    """Also where further prompts would have been chosen before them, or a fallback could be left:
    what was trained on stays so.
    """
    for count in (30, 29):
        config = recipe(ALL[:count])
        prepare(config, tmp_path)
        _, before = decide(config)
        prepare(recipe(ALL), tmp_path)
        data, after = decide(config)
        assert after == before
        assert drawn(data) == set(ALL) - (set(before) if count == 30 else set())
        shutil.rmtree(config.run_dir)
        _, anew = decide(config)
        assert anew != before
        shutil.rmtree(config.data.cache)
        shutil.rmtree(config.run_dir)


def test_other_prompts_do_not_judge_the_candidates_of_before(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe()
    prepare(config, tmp_path)
    decide(config)
    run = RunDir(config.run_dir)
    run.best.write_text("{}")
    decide(config)
    assert run.best.is_file()
    more = config.model_copy(update={"preview": config.preview.model_copy(update={"prompts": 2})})
    decide(more)
    assert not run.best.exists()
    assert "they no longer count" in caplog.text
    # a run of an older version knows its prompts by words alone
    run.held_out.unlink()
    run.best.write_text("{}")
    run.previews.mkdir()
    run.prompts.write_text("\n".join([*ALL[:3], ""]))
    decide(config)
    assert not run.best.exists()


def test_prompts_of_a_file(recipe: Recipe, tmp_path: Path) -> None:
    """`prepare` embeds them; those that are in the data are held out of it."""
    mine = [ALL[7], "a handwritten two", "an even number", ALL[8]]
    (tmp_path / "mine.txt").write_text("\n".join(mine))
    config = recipe(preview={**PREVIEW, "prompt_file": tmp_path / "mine.txt"})
    prepare(recipe(), tmp_path)
    with pytest.raises(ConfigError, match=r"Run `turbo-distill prepare` again with this recipe"):
        decide(config)
    shards = set((tmp_path / "cache").rglob("*.safetensors"))
    prepare(config, tmp_path)
    assert len(set((tmp_path / "cache").rglob("*.safetensors")) - shards) == 1
    data, shown = decide(config)
    assert shown == mine[:3]
    assert drawn(data) == set(ALL) - {ALL[7]}


def test_a_file_that_holds_what_is_trained_on(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(ALL[:5], preview={**PREVIEW, "prompt_file": tmp_path / "prompts.txt"})
    prepare(config, tmp_path)
    data, shown = decide(config)
    assert shown == ALL[:3]
    assert drawn(data) == set(ALL[:5])
    assert record(config)["held_out"] is False


def test_another_cache_that_cannot_spare_them(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("\n".join(ALL[:3]))
    preview = {**PREVIEW, "prompt_file": tmp_path / "mine.txt"}
    prepare(recipe(preview=preview), tmp_path)
    decide(recipe(preview=preview))
    assert record(recipe())["held_out"] is True
    shutil.rmtree(tmp_path / "cache")
    small = recipe(ALL[:8], preview=preview)
    prepare(small, tmp_path)
    data, shown = decide(small)
    assert (shown, drawn(data)) == (ALL[:3], set(ALL[:8]))
    assert record(small)["held_out"] is False


def test_other_prompts_than_before_are_told(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(recipe(), tmp_path)
    _, before = decide(recipe())
    shutil.rmtree(tmp_path / "cache")
    other = recipe([prompt for prompt in ALL if prompt != before[0]])
    prepare(other, tmp_path)
    assert "other prompts" not in caplog.text
    _, shown = decide(other)
    assert before[0] not in shown
    assert "previews show other prompts from here on" in caplog.text


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"prompts": [1], "held_out": true}', '{"prompts": ["a"]}']
)
def test_a_damaged_record_is_named(content: str, recipe: Recipe, tmp_path: Path) -> None:
    config = recipe()
    prepare(config, tmp_path)
    decide(config)
    RunDir(config.run_dir).held_out.write_text(content)
    with pytest.raises(ConfigError, match=r"held_out\.json: expected .* Delete the file"):
        decide(config)


def test_a_run_that_is_cut_off_goes_on_with_them(recipe: Recipe, tmp_path: Path) -> None:
    """Two steps and two more are four, with the same prompts held out."""
    stages = [{"method": "dmd2", "steps": 4, "batch": 2, "fake_updates": 1, "fake_warmup": 0}]
    whole = recipe(stages=stages, run_dir=tmp_path / "whole")
    prepare(whole, tmp_path)
    train(whole)
    begun = recipe(stages=[{**stages[0], "steps": 2}])
    train(begun)
    shutil.rmtree(begun.run_dir / "previews")
    lora = train(recipe(stages=stages), resume=True)
    ours, theirs = (
        read_lora(path)[0] for path in (lora, whole.run_dir / "lora" / "turbo.safetensors")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    shown = (begun.run_dir / "previews" / "prompts.txt").read_text().splitlines()
    assert shown == record(whole)["prompts"]


def test_the_tiny_data_spares_letters_in_a_colour() -> None:
    """Of every letter and of every colour there are others; digits are too few."""
    images = torch.arange(len(ALL) + 10)
    exact = torch.cat([1 + torch.arange(len(ALL)), 1 + len(ALL) + torch.arange(10)])
    data = TinyData(
        posteriors=_Zeros(len(images)),
        prompts=torch.stack([exact, exact], dim=1),
        digits_from=len(ALL),
        table=torch.stack([embed_prompt(p) for p in PROMPTS]),
    )
    assert isinstance(data, Divisible)
    held = data.to_hold_out(4)
    assert len(set(held)) == 4
    assert set(held) <= set(ALL)
    rest = data.without(held)
    assert rest is not None
    assert drawn(rest) == drawn(data) - set(held) == {*ALL, *PROMPTS[51:61]} - set(held)
    assert data.to_hold_out(6) == []
    assert data.without(["a handwritten two"]) is None


class _Zeros:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(index), 16, 8, 8), torch.zeros(len(index), 16, 8, 8)
