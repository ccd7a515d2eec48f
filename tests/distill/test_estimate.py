"""`--dry-run`: exact counts, plausible estimates, every inconsistency, no weight read. Its figures
beside a count of real steps: test_estimate_passes.py, test_dry_run_count.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from distill.config import Config, ConfigError, load_config
from distill.contract.latent_grid import sigmas_at
from distill.models.family import spec_of
from distill.models.load import load_transformer
from distill.training.checkpoint import STATE, latest_checkpoint
from distill.training.estimate import plan_text, plan_values
from distill.training.estimate.disk import cache_bytes, checkpoint_bytes, checkpoints
from distill.training.estimate.memory import between_steps, in_step, memory_bytes
from distill.training.estimate.problems import problems
from distill.training.estimate.shape import (
    base_bytes,
    host_bytes,
    lora_parameters,
    model_shape,
    tokens,
    unpacked_bytes,
)
from distill.training.estimate.work import (
    H100,
    LOW_RANK,
    forward_flop,
    forwards,
    low_rank_flop,
    passes,
    speeds,
    stage_flop,
)

CONFIGS = Path(__file__).parent.parent.parent / "configs"
BIG = CONFIGS / "qwen_image_2512_2step.yaml"
SMALL = CONFIGS / "qwen_image_2512_2step_24gb.yaml"


def text_of(config: Config, tflops: float = 336) -> str:
    return plan_text(plan_values(config, tflops))


def test_the_big_model_as_published() -> None:
    """20.43 B parameters and 73.1 TFLOP per forward at 1024x1024 with 256 text tokens."""
    config = load_config(BIG)
    shape = model_shape(config)
    assert shape.parameters == 20_430_401_088
    assert lora_parameters(shape, 64) == pytest.approx(424.7e6, rel=1e-3)
    assert sum(forward_flop(config, shape).values()) == pytest.approx(73.1e12, rel=2e-3)


def test_products_of_8_bits_are_counted_as_such() -> None:
    """All linear layers of the blocks; attention stays in bf16."""
    flop = forward_flop(load_config(SMALL), model_shape(load_config(SMALL)))
    assert flop["fp8"] == 2 * 4352 * 60 * (4 * 3072**2 + 2 * 3072 * 12288)
    assert flop["bfloat16"] == 60 * 4 * 4352**2 * 3072


@pytest.mark.parametrize("name", ["2step", "2step_8gpu", "4step"])
def test_the_recipes_fit_80_gb(name: str) -> None:
    config = load_config(CONFIGS / f"qwen_image_2512_{name}.yaml")
    _, memory = memory_bytes(config, model_shape(config))
    assert memory["frozen base"] == 2 * 20_430_401_088  # one copy, not three
    assert sum(memory.values()) < 75e9


def test_the_24_gb_recipe_fits() -> None:
    """A byte per weight of the blocks, whose modulation is in main memory."""
    config = load_config(SMALL)
    shape = model_shape(config)
    _, memory = memory_bytes(config, shape)
    assert host_bytes(config, shape) == 2 * 60 * 2 * (3072 * 18432 + 18432)
    assert memory["frozen base"] == pytest.approx(13.6e9, rel=0.01)
    assert sum(memory.values()) < 22e9
    device, host = text_of(config).split("memory of the host per rank (estimate)")
    assert "bfloat16, blocks in fp8" in device
    assert "modulation                      13.59 GB" in host


def test_without_checkpointing_every_block_keeps_its_unpacked_weights() -> None:
    config = load_config(SMALL, ["model.gradient_checkpointing=false"])
    shape = model_shape(config)
    assert unpacked_bytes(config, shape) == 2 * (8 * 3072**2 + 4 * 3072 * 12288)
    quantised, plain = (
        in_step(c.stages[0], c, shape)["student: backward"]["kept by blocks"]
        for c in (config, load_config(SMALL, ["model.gradient_checkpointing=false", *PLAIN]))
    )
    assert quantised - plain == 60 * unpacked_bytes(config, shape)


PLAIN = ["model.quantize=none"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_has_a_plan(path: Path) -> None:
    config = load_config(path)
    text, sigmas = text_of(config), sigmas_at(spec_of(config))
    assert f"sigmas    {', '.join(f'{s:.6g}' for s in sigmas)};" in text
    assert f"total {config.total_steps} steps" in text
    assert all(f"  {stage.label} " in text for stage in config.stages)
    assert max(map(len, text.split("to look at")[0].splitlines())) <= 100


def test_every_layer_that_gets_an_adapter_is_counted() -> None:
    """Those outside the blocks too, which have no dot before their names."""
    recipe = CONFIGS / "qwen_image_2_1_2step.yaml"
    plain, more = (
        model_shape(load_config(recipe, keys)) for keys in ([], ["adapter.modulation=true"])
    )
    assert set(more.lora) - set(plain.lora) == {
        "modulation.1",
        "txt_in.in_layer",
        "txt_in.out_layer",
    }


def test_the_largest_bucket_counts() -> None:
    small, large = (
        load_config(BIG, [f"data.buckets=[[1024,1024],[{side},{side}]]"]) for side in (512, 2048)
    )
    assert (tokens(small), tokens(large)) == (4096 + 256, 16384 + 256)


def test_a_configuration_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: expected a configuration in JSON"):
        model_shape(load_config(BIG, [f"model.path={tmp_path}"]))


def test_sharding_divides_the_base_only() -> None:
    """But for two blocks, which are whole while they are at work."""
    whole, shared = load_config(BIG), load_config(BIG, ["engine.shard=4", "engine.world=4"])
    shape = model_shape(whole)
    a, b = (between_steps(c.stages[1], c, shape) for c in (whole, shared))
    assert b["frozen base"] * 4 == a["frozen base"]
    assert b["blocks gathered"] == pytest.approx(a["frozen base"] / 30, rel=0.01)
    assert b["LoRA student"] == a["LoRA student"]


def test_ranks_need_room_for_their_message_adam_for_its_square_roots() -> None:
    """Adam in 8 bits makes none."""

    def copy(*overrides: str) -> float:
        config = load_config(BIG, list(overrides))
        return in_step(config.stages[0], config, shape)["student: update"]["copy of gradients"]

    shape = model_shape(load_config(BIG))
    gradients = 4 * lora_parameters(shape, 64)
    assert copy() == copy("engine.world=8") == gradients
    assert copy("stages.0.optimizer=adamw8bit") == 0
    assert copy("stages.0.optimizer=adamw8bit", "engine.world=8") == gradients


def test_adams_moments_are_as_many_as_it_keeps() -> None:
    """Two of PCM, one of DMD2, whose beta1 is 0; the fake score has no moving average."""
    config = load_config(BIG)
    shape = model_shape(config)
    student, fake = 4 * lora_parameters(shape, 64), 4 * lora_parameters(shape, 128)
    pcm, dmd2 = (between_steps(stage, config, shape) for stage in config.stages[:2])
    assert pcm["Adam's moments"] == 2 * student
    assert dmd2["Adam's moments"] == student + fake
    assert pcm["moving average"] == dmd2["moving average"] == student
    small = load_config(BIG, ["stages.1.optimizer=adamw8bit"])
    eight = between_steps(small.stages[1], small, shape)["Adam's moments"]
    assert eight == pytest.approx((student + fake) / 4, rel=0.02)


def test_crops_are_counted_once_each() -> None:
    def crops(count: int) -> float:
        config = load_config(BIG, [f"stages.2.gan.crops={count}", "stages.2.gan.crop=64"])
        return in_step(config.stages[2], config, shape)["student: backward"]["block at work"]

    shape = model_shape(load_config(BIG))
    assert crops(4) == 4 * crops(1) > 5e9


def test_the_tiny_models_counts_are_its_own() -> None:
    config = load_config(CONFIGS / "tiny_demo.yaml")
    transformer = load_transformer("tiny", torch.float32)
    expected = sum(p.numel() for p in transformer.parameters())
    assert model_shape(config).parameters == expected


def test_a_checkpoint_has_the_size_that_is_said(
    small_config: Callable[..., Config], wide_checkpoint: Callable[[Config], Path]
) -> None:
    stage = {"method": "dmd2", "steps": 2, "fake_updates": 1, "fake_warmup": 0}
    config = small_config(
        stages=[{**stage, "gan": {"features": "latent", "width": 8}}], adapter={"rank": 64}
    )
    folder = wide_checkpoint(config)
    found = sum(file.stat().st_size for file in folder.iterdir() if file.name != STATE)
    said = checkpoint_bytes(config.stages[0], config, model_shape(config))
    # the last block's text side, a fifth of two blocks, has no gradient and hence no moments
    assert found == pytest.approx(said, rel=0.1)


@pytest.fixture
def wide_checkpoint() -> Callable[[Config], Path]:
    from toy_training import RandomData

    from distill.trainer import train

    def make(config: Config) -> Path:
        train(config, data=RandomData())
        folder = latest_checkpoint(config.run_dir)
        assert folder is not None
        return folder

    return make


def test_checkpoints_that_lie_there_at_a_time() -> None:
    def count(*overrides: str) -> int:
        return checkpoints(load_config(BIG, list(overrides)))

    assert count() == 3  # two, and the one that is being written
    assert count("keep_checkpoints=0") == 12
    assert count("save_every=0") == 1


def test_a_prompt_in_the_cache() -> None:
    config = load_config(BIG)
    cache = cache_bytes(config, model_shape(config))
    assert cache == {"1,000 prompts": 1000 * 200 * 3584 * 2, "1,000 images": 1000 * 2 * 16 * 128**2}


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_problems_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        BIG,
        [
            f"data.cache={tmp_path / 'none'}",
            "data.images=[]",
            f"run_dir={tmp_path}",
            "preview.prompt_file=none.txt",
        ],
    )
    asked: list[Path] = []

    def usage(path: Path) -> Disk:
        asked.append(path)
        return Disk(2 * 10**12, 10**12, 30 * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    text = "\n".join(problems(config, model_shape(config)))
    for word in (
        "prepare",
        "prompts.txt",
        "real_ratio",
        f"{tmp_path} exists",
        "preview.prompt_file",
    ):
        assert word in text
    assert f"30.0 GB are free where {tmp_path} lies, 3 checkpoints take 35.7" in text
    later = config.model_copy(update={"run_dir": tmp_path / "runs" / "later"})
    assert "are free" in "\n".join(problems(later, model_shape(config)))
    assert asked == [tmp_path, tmp_path]
    few = config.model_copy(update={"keep_checkpoints": 1})
    assert "are free" not in "\n".join(problems(few, model_shape(config)))


@pytest.mark.parametrize(
    ("name", "samples"), [("2step", 16), ("2step_24gb", 16), ("4step", 16), ("2step_8gpu", 64)]
)
def test_the_recipes_update_dmd2_from_enough_samples(name: str, samples: int) -> None:
    """And the plan says from how many, and what they cost."""
    path = CONFIGS / f"qwen_image_2512_{name}.yaml"
    plan = plan_values(load_config(path), 336)
    dmd2 = [stage for stage in plan["stages"] if stage["method"].startswith("dmd2")]
    assert [stage["samples_per_update"] for stage in dmd2] == [samples, samples]
    assert plan_text(plan).count(f"x {samples} samples (") >= 2
    alone = load_config(path, [f"stages.{i}.accumulate=1" for i in (1, 2)])
    cheap = plan_values(alone, 336)["stages"]
    assert dmd2[0]["seconds_per_step"] == pytest.approx(
        cheap[1]["seconds_per_step"] * dmd2[0]["accumulate"]
    )


@pytest.mark.parametrize(("stage", "expected"), [(1, 32.1), (2, 29.2)])
def test_forwards_are_a_mean_over_the_stage(stage: int, expected: float) -> None:
    """Fresh samples for all updates of the fake score but one, 20 of 500 steps with 20 of them."""
    config = load_config(BIG)
    shape = model_shape(config)
    flop = stage_flop(config.stages[stage], config, shape)
    assert forwards(flop, config, shape) == pytest.approx(expected, abs=0.05)


def test_a_smaller_share_for_the_fake_score_is_counted() -> None:
    whole, half = (
        passes(config.stages[2], config)["fake"].trained
        for config in (load_config(BIG), load_config(BIG, ["stages.2.fake_accumulate=8"]))
    )
    assert (whole, half) == (5, 2.5)


def test_times_are_those_of_the_measured_step() -> None:
    """docs/evidence/gpu_h100.md, adapters in bf16: 3.18 to 3.82 s for one update of the fake score
    and of the student at 77 text tokens, the teacher's two rows .41 s, two of the student's .66 s.
    """
    fakes = ["stages.1.fake_updates=1", "stages.1.fake_warmup=0", "stages.1.accumulate=1"]
    config = load_config(BIG, [*fakes, "stages.1.gradient_step=last", "adapter.fake_rank=64"])
    shape, stage = model_shape(config), config.stages[1]
    ratio = 69.55 / 73.1  # FLOP at 77 text tokens over those at 256
    speed = speeds(config, 336)
    roles = stage_flop(stage, config, shape).values()
    assert 3.18 < ratio * sum(speed.seconds(kinds) for kinds in roles) < 3.82
    base = speed.seconds(forward_flop(config, shape))
    lora = speed.seconds({LOW_RANK: low_rank_flop(config, shape, "student")})
    assert 2 * ratio * base == pytest.approx(0.414, rel=0.02)
    assert 2 * ratio * (base + lora) == pytest.approx(0.66, rel=0.05)


def test_the_rank_costs_memory_and_hardly_time() -> None:
    def seconds(rank: int) -> float:
        config = load_config(BIG, [f"adapter.rank={rank}", f"adapter.fake_rank={rank}"])
        return plan_values(config, 336)["stages"][1]["seconds_per_step"]

    assert seconds(16) == pytest.approx(seconds(128))


def test_a_slower_device_is_slower_in_proportion() -> None:
    fast, slow = (plan_values(load_config(SMALL), tflops) for tflops in (336, 84))
    for a, b in zip(fast["stages"], slow["stages"], strict=True):
        for role, expected in a["seconds_by_role"].items():
            device = role != "modulation in main memory"
            assert b["seconds_by_role"][role] == pytest.approx(expected * (4 if device else 1))
    assert slow["tflops_by_kind"]["fp8"] == pytest.approx(H100["fp8"] / 4)


def test_a_schedule_by_size_is_shown_for_every_size_that_is_trained() -> None:
    nodes = {
        "nodes": [1, 0.5, 0],
        "shift": {"rule": "linear", "tokens": [256, 4096], "mu": [0.5, 1.2]},
    }
    config = load_config(BIG)
    changed = config.model_copy(
        update={"spec": type(config.spec).model_validate(nodes), "data": with_buckets(config)}
    )
    text = text_of(changed)
    shown = [line for line in text.splitlines() if " at 1024x1024" in line or " at 512x512" in line]
    assert len(shown) == 2
    assert shown[0].split(";")[0].split()[1:] != shown[1].split(" at ")[0].split()
    assert " at 1024x1024" not in text_of(config)


def with_buckets(config: Config) -> Any:
    return config.data.model_copy(update={"buckets": ((1024, 1024), (512, 512))})


def test_base_bytes_are_those_of_the_weights() -> None:
    config = load_config(BIG)
    shape = model_shape(config)
    assert base_bytes(config, shape) == 2 * shape.parameters
