"""`--dry-run`: exact counts, plausible estimates, every inconsistency, no weight read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.config import load_config
from distill.contract.latent_grid import sigmas_at
from distill.models.family import spec_of
from distill.models.load import load_transformer
from distill.training import estimate

CONFIGS = Path(__file__).parent.parent.parent / "configs"
BIG = CONFIGS / "qwen_image_2512_2step.yaml"
SMALL = CONFIGS / "qwen_image_2512_2step_24gb.yaml"


def test_the_big_model_as_published() -> None:
    """20.43 B parameters and 73.1 TFLOP per forward at 1024x1024 with 256 text tokens."""
    config = load_config(BIG)
    shape = estimate.model_shape(config)
    assert shape.parameters == 20_430_401_088
    assert estimate.lora_parameters(shape, 64) == pytest.approx(424.7e6, rel=1e-3)
    assert estimate.forward_flop(config, shape) == pytest.approx(73.1e12, rel=2e-3)


@pytest.mark.parametrize("name", ["2step", "2step_8gpu", "4step"])
def test_the_recipes_fit_80_gb(name: str) -> None:
    config = load_config(CONFIGS / f"qwen_image_2512_{name}.yaml")
    memory = estimate.memory_bytes(config, estimate.model_shape(config))
    assert memory["frozen base"] == 2 * 20_430_401_088  # one copy, not three
    assert sum(memory.values()) < 80e9


def test_the_24_gb_recipe_fits() -> None:
    """A byte per weight of the blocks, whose modulation is in main memory."""
    config = load_config(SMALL)
    shape = estimate.model_shape(config)
    memory = estimate.memory_bytes(config, shape)
    assert estimate.host_bytes(config, shape) == 2 * 60 * 2 * (3072 * 18432 + 18432)
    assert memory["frozen base"] == pytest.approx(13.6e9, rel=0.01)
    assert sum(memory.values()) < 22e9
    device, host = estimate.plan_text(estimate.plan_values(config, 100)).split(
        "memory of the host per rank (estimate)"
    )
    assert "bfloat16, blocks in fp8" in device
    assert "total                   21.36 GB" in device
    assert "modulation              13.59 GB" in host


def test_without_checkpointing_every_block_keeps_its_unpacked_weights() -> None:
    kept, recomputed = (
        estimate.memory_bytes(config, estimate.model_shape(config))["unpacked weights"]
        for config in (
            load_config(SMALL, ["model.gradient_checkpointing=false"]),
            load_config(SMALL),
        )
    )
    assert recomputed == 2 * (8 * 3072**2 + 4 * 3072 * 12288)
    assert kept == 60 * recomputed


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_has_a_plan(path: Path) -> None:
    config = load_config(path)
    text = estimate.plan_text(estimate.plan_values(config, tflops=500))
    sigmas = sigmas_at(spec_of(config))
    assert f"sigmas    {', '.join(f'{s:g}' for s in sigmas)};" in text
    assert f"total {config.total_steps} steps" in text
    assert all(f"  {stage.label} " in text for stage in config.stages)


def test_sharding_divides_the_base_only() -> None:
    whole, shared = load_config(BIG), load_config(BIG, ["engine.shard=4"])
    shape = estimate.model_shape(whole)
    a, b = estimate.memory_bytes(whole, shape), estimate.memory_bytes(shared, shape)
    assert b["frozen base"] * 4 == a["frozen base"]
    assert b["adapter student"] == a["adapter student"]


def test_the_tiny_models_counts_are_its_own() -> None:
    config = load_config(CONFIGS / "tiny_demo.yaml")
    transformer = load_transformer("tiny", torch.float32)
    expected = sum(p.numel() for p in transformer.parameters())
    assert estimate.model_shape(config).parameters == expected


def test_problems_are_found(tmp_path: Path) -> None:
    config = load_config(
        BIG, [f"data.cache={tmp_path / 'none'}", "data.images=[]", f"run_dir={tmp_path}"]
    )
    text = "\n".join(estimate.problems(config))
    for word in ("prepare", "prompts.txt", "real_ratio", f"{tmp_path} exists"):
        assert word in text


@pytest.mark.parametrize(
    ("name", "samples"), [("2step", 16), ("2step_24gb", 16), ("4step", 16), ("2step_8gpu", 64)]
)
def test_the_recipes_update_dmd2_from_enough_samples(name: str, samples: int) -> None:
    """And the plan says from how many, and what they cost."""
    path = CONFIGS / f"qwen_image_2512_{name}.yaml"
    plan = estimate.plan_values(load_config(path), tflops=500)
    dmd2 = [stage for stage in plan["stages"] if stage["method"].startswith("dmd2")]
    assert [stage["samples_per_update"] for stage in dmd2] == [samples, samples]
    assert estimate.plan_text(plan).count(f"x {samples} samples (") >= 2
    alone = load_config(path, [f"stages.{i}.accumulate=1" for i in (1, 2)])
    cheap = estimate.plan_values(alone, tflops=500)["stages"]
    assert dmd2[0]["seconds_per_step"] == pytest.approx(
        cheap[1]["seconds_per_step"] * dmd2[0]["accumulate"]
    )


def test_a_smaller_share_for_the_fake_score_is_counted() -> None:
    whole, half = (
        estimate.forwards_per_step(config.stages[1], config, recompute=False)
        for config in (load_config(BIG), load_config(BIG, ["stages.1.fake_accumulate=8"]))
    )
    assert whole - half == pytest.approx(5 * (2 + 2.3) / 2)
