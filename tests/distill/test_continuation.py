"""A run that goes on with another recipe: exactly where it makes more steps, refused where its
state would mean nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import small_transformer

from distill.config import Config, ConfigError, load_config
from distill.contract.metadata import read_lora
from distill.data.batch import Data
from distill.trainer import train
from distill.training.continuation import differences, refusals
from distill.training.run_dir import RunDir

PCM = {"method": "pcm", "batch": 2, "lr": 1e-3, "points": 4, "ema": 0.9}
DMD2 = {"method": "dmd2", "batch": 2, "lr": 1e-3, "fake_lr": 1e-3, "fake_updates": 2,
        "fake_warmup": 1, "fake_warmup_updates": 2}  # fmt: skip
GAN = {"features": "latent", "width": 8, "ramp": 2}

Make = Callable[..., Config]


def weights(lora: Path) -> dict[str, torch.Tensor]:
    return read_lora(lora)[0]


def equal(a: Path, b: Path) -> bool:
    (x, ours), (y, theirs) = read_lora(a), read_lora(b)
    same = x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)
    return same and ours["turbo.config"] == theirs["turbo.config"]


@pytest.mark.parametrize("preview", [{"every": 0}, {"every": 1, "images": 2, "teacher_steps": 2}])
@pytest.mark.parametrize("stage", [PCM, {**DMD2, "gan": GAN}], ids=["pcm", "dmd2+gan"])
def test_three_steps_and_three_more_are_six(
    stage: dict[str, Any],
    preview: dict[str, Any],
    small_config: Make,
    data: Data,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys: dict[str, Any] = {"preview": preview}
    whole = train(
        small_config(stages=[{**stage, "steps": 6}], run_dir=tmp_path / "whole", **keys), data=data
    )
    train(small_config(stages=[{**stage, "steps": 3}], **keys), data=data)
    longer = small_config(stages=[{**stage, "steps": 6}], **keys)
    assert equal(train(longer, data=data, resume=True), whole)
    assert "goes on from step 3 with another recipe" in caplog.text
    assert "stages.0.steps: 3 -> 6" in caplog.text
    run = RunDir(longer.run_dir)
    assert load_config(run.config).stages[0].steps == 6
    assert load_config(run.config_until(3)).stages[0].steps == 3


def test_further_stages_equal_a_recipe_that_had_them(
    small_config: Make, data: Data, tmp_path: Path
) -> None:
    both = [{**PCM, "steps": 3}, {**DMD2, "steps": 2, "gan": GAN}]
    whole = train(small_config(stages=both, run_dir=tmp_path / "whole"), data=data)
    train(small_config(stages=both[:1]), data=data)
    assert equal(train(small_config(stages=both), data=data, resume=True), whole)


def test_another_rate_counts_from_here_on(
    small_config: Make, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rates, decay of the average, and settings of the discriminator and of the optimiser."""
    gan = {**DMD2, "steps": 4, "gan": GAN}
    before = small_config(stages=[gan], save_every=2)
    train(before, data=data)
    for folder in ("lora", "checkpoints/step-000004"):
        shutil.rmtree(before.run_dir / folder)
    shutil.copytree(before.run_dir, tmp_path / "same")
    same = train(small_config(stages=[gan], run_dir=tmp_path / "same"), data=data, resume=True)
    other = {**gan, "lr": 1e-4, "ema": 0, "weight_decay": 0.1, "betas": [0.5, 0.9],
             "gan": {**GAN, "lr": 1e-5, "ratio": 0.1}}  # fmt: skip
    caplog.clear()
    lora = train(small_config(stages=[other], save_every=2), data=data, resume=True)
    for line in ("stages.0.lr: 0.001 -> 0.0001", "stages.0.gan.ratio: 0.3 -> 0.1",
                 "stages.0.ema: 0.99 -> 0", "stages.0.weight_decay: 0.0 -> 0.1"):  # fmt: skip
        assert line in caplog.text
    assert not all(torch.equal(a, weights(same)[key]) for key, a in weights(lora).items())


def test_a_fake_score_that_has_not_begun_may_have_another_rank(
    small_config: Make, data: Data, tmp_path: Path
) -> None:
    """The checkpoint holds it, untrained."""
    stages = [{**PCM, "steps": 2}, {**DMD2, "steps": 2}]
    wider = {"rank": 4, "fake_rank": 8}
    whole = train(small_config(stages=stages, adapter=wider, run_dir=tmp_path / "w"), data=data)
    train(small_config(stages=stages, save_every=2), data=data)
    run = small_config().run_dir
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert equal(train(small_config(stages=stages, adapter=wider), data=data, resume=True), whole)


REFUSED = [
    ({"adapter": {"rank": 8}}, "adapter.rank: 4 -> 8 (the weights have that shape)"),
    ({"adapter": {"rank": 4, "alpha": 8}}, "adapter.alpha: 4.0 -> 8.0"),
    ({"adapter": {"rank": 4, "modulation": True}}, "adapter.modulation: False -> True"),
    ({"spec": {"sigmas": [1, 0.5, 0]}}, "spec.nodes: [1.0, 0.7155, 0.0] -> [1.0, 0.5, 0.0]"),
    ({"spec": {"sampler": "renoise"}}, "spec.sampler: euler -> renoise"),
    ({"stages": [{**PCM, "steps": 2}]}, "stages: 6 steps in all -> 2 (5 are done)"),
    ({"stages": [{**PCM, "steps": 5}]}, "stages.0.steps: 3 -> 5 (it is finished)"),
    (
        {"stages": [{**PCM, "steps": 3, "lr": 1}, {**DMD2, "steps": 3}]},
        "stages.0.lr: 0.001 -> 1.0 (it is finished)",
    ),
    (
        {"stages": [{**DMD2, "steps": 3}, {**PCM, "steps": 3}]},
        "stages.0.method: pcm -> dmd2 (it is finished)",
    ),
    (
        {"stages": [{**PCM, "steps": 3}, {**DMD2, "steps": 3, "gan": GAN}]},
        "stages.1.gan.features: (absent) -> latent (2 steps of it are done)",
    ),
    (
        {"adapter": {"rank": 4, "fake_rank": 8}},
        "adapter.fake_rank: 4 -> 8 (the weights have that shape)",
    ),
]


@pytest.mark.parametrize(("keys", "line"), REFUSED)
def test_what_would_make_the_state_meaningless(
    keys: dict[str, Any], line: str, small_config: Make
) -> None:
    """After 5 of 3 + 3 steps."""
    stages = [{**PCM, "steps": 3}, {**DMD2, "steps": 3}]
    old = small_config(stages=stages)
    new = small_config(**{"stages": stages, **keys})
    assert line in "\n".join(refusals(old, new, 5))
    assert not refusals(old, new, 0)  # nothing is done that could be lost


ALLOWED = [
    {"stages": [{**PCM, "steps": 3}, {**DMD2, "steps": 2}]},  # ends here
    {"stages": [{**PCM, "steps": 3}, {**DMD2, "steps": 9, "batch": 4, "fake_updates": 1}]},
    {"stages": [{**PCM, "steps": 3}, {**DMD2, "steps": 3}, {**DMD2, "steps": 1, "gan": GAN}]},
    {"seed": 5, "guidance": {"scale": 2}, "name": "other", "preview": {"every": 2}},
    {"adapter": {"rank": 4, "alpha": 4}},
    {"spec": {"nodes": [1, 0.7155, 0]}},
    {"model_keys": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    {"data": {"cache": "elsewhere", "buckets": [[32, 32]]}},
]


@pytest.mark.parametrize("keys", ALLOWED)
def test_all_else_may_change(keys: dict[str, Any], small_config: Make) -> None:
    stages = [{**PCM, "steps": 3}, {**DMD2, "steps": 3}]
    old = small_config(stages=stages)
    if more := keys.get("model_keys"):
        keys = {"model": {**old.model.model_dump(), **more}}
    assert refusals(old, small_config(**{"stages": stages, **keys}), 5) == []


@pytest.mark.parametrize(
    ("keys", "ranks", "same"),
    [
        ({"batch": 1}, 4, True),
        ({"batch": 2}, 2, True),
        ({"batch": 1, "accumulate": 4}, 1, True),
        ({"batch": 1, "accumulate": 2}, 2, True),
        ({"batch": 2, "accumulate": 2}, 2, False),  # other samples per update
        ({"batch": 1, "accumulate": 4, "fake_accumulate": 1}, 1, False),
    ],
)
def test_a_finished_stage_may_be_divided_in_another_way(
    keys: dict[str, Any], ranks: int, same: bool, small_config: Make
) -> None:
    stage = {**DMD2, "steps": 3}
    old = small_config(stages=[{**stage, "batch": 4}, {**PCM, "steps": 2}])
    new = small_config(stages=[{**stage, **keys}, {**PCM, "steps": 2}], engine={"world": ranks})
    lines = [line for line in refusals(old, new, 4) if "stages.0" in line]
    assert (lines == []) == same


def test_a_stage_more_or_less_is_one_line(small_config: Make) -> None:
    one = small_config(stages=[{**PCM, "steps": 3}])
    two = small_config(stages=[{**PCM, "steps": 4}, {**DMD2, "steps": 2, "gan": GAN}])
    steps = "  stages.0.steps: {} -> {}"
    stage = "  stages.1: {} -> {}"
    added, absent = "dmd2+gan, 2 steps", "(absent)"
    assert differences(one, two) == [steps.format(3, 4), stage.format(absent, added)]
    assert differences(two, one) == [steps.format(4, 3), stage.format(added, absent)]


def test_a_refusal_says_what_to_do(small_config: Make, data: Data) -> None:
    train(small_config(save_every=4), data=data)
    with pytest.raises(ConfigError) as error:
        train(small_config(adapter={"rank": 8}), data=data, resume=True)
    for words in ("the run has made 8 steps", "adapter.rank: 4 -> 8", "init_from="):
        assert words in str(error.value)


def test_a_base_is_known_by_its_content(
    small_config: Make,
    small_model: Path,
    data: Data,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = {**PCM, "steps": 2}
    whole = train(
        small_config(stages=[{**stage, "steps": 4}], run_dir=tmp_path / "whole"), data=data
    )
    begun = small_config(stages=[stage])
    train(begun, data=data)

    def longer(model: Path, run_dir: Path = begun.run_dir) -> Config:
        keys = {"path": str(model), "dtype": "float32", "gradient_checkpointing": False}
        return small_config(stages=[{**stage, "steps": 4}], model=keys, run_dir=run_dir)

    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    small_transformer(seed=1).save_pretrained(other / "transformer")
    with pytest.raises(ConfigError, match=r"model\.path: .* \(another base\)"):
        train(longer(other), data=data, resume=True)
    shutil.rmtree(other / "transformer")
    shutil.copytree(small_model / "transformer", other / "transformer")  # moved
    begun.run_dir.rename(tmp_path / "renamed")
    lora = train(longer(other, tmp_path / "renamed"), data=data, resume=True)
    assert f"model.path: {small_model} -> {other} (moved, the same content)" in caplog.text
    assert all(torch.equal(a, weights(whole)[key]) for key, a in weights(lora).items())

    small_transformer(seed=2).save_pretrained(other / "transformer")  # the same name
    with pytest.raises(ConfigError, match=r"model\.path: .* \(other content\)"):
        train(longer(other, tmp_path / "renamed"), data=data, resume=True)


def test_candidates_of_another_last_stage_do_not_count(
    small_config: Make, data: Data, tmp_path: Path
) -> None:
    preview = {"every": 1, "images": 2, "teacher_steps": 2}
    both = [{**PCM, "steps": 2}, {**PCM, "steps": 1, "lr": 1e-5}]
    whole = train(small_config(stages=both, preview=preview, run_dir=tmp_path / "w"), data=data)
    train(small_config(stages=both[:1], preview=preview), data=data)
    lora = train(small_config(stages=both, preview=preview), data=data, resume=True)
    assert read_lora(lora)[1]["ss_steps"] == read_lora(whole)[1]["ss_steps"] == "3"
