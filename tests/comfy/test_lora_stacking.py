"""Several LoRAs on one MODEL, ours and core's, add up in any order and any mode."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def total(*updates: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: sum(update[name].delta() for update in updates) for name in updates[0]}


@pytest.fixture
def two_loras(make_updates: Callable[..., Any], write_lora: Callable[..., Path]) -> Any:
    first, second = make_updates(1), make_updates(2, ranks=(3,))
    return (first, write_lora(first, "a.safetensors")), (
        second,
        write_lora(second, "b.safetensors"),
    )


@pytest.mark.parametrize("modes", ["merge merge", "bypass bypass", "merge bypass", "bypass merge"])
def test_two_loras_equal_the_sum(
    modes: str, pack: Any, model: Any, two_loras: Any, forward: Any, forward_with: Any
) -> None:
    apply_lora = pack("nodes.apply_lora").apply_lora
    (first, first_path), (second, second_path) = two_loras
    first_mode, second_mode = modes.split()

    once, _ = apply_lora(model, first_path, mode=first_mode)
    twice, _ = apply_lora(once, second_path, mode=second_mode)

    close(forward(twice), forward_with(total(first, second)))
    close(forward(once), forward_with(total(first)))  # and the second is gone again
    close(forward(model), forward_with({}))
    close(forward(twice), forward_with(total(first, second)))


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_the_same_lora_twice_counts_twice(
    mode: str, pack: Any, model: Any, two_loras: Any, forward: Any, forward_with: Any
) -> None:
    apply_lora = pack("nodes.apply_lora").apply_lora
    (updates, path), _ = two_loras
    once, _ = apply_lora(model, path, mode=mode)
    twice, _ = apply_lora(once, path, mode=mode)
    close(forward(twice), forward_with(total(updates, updates)))


@pytest.mark.parametrize("core_mode", ["merge", "bypass"])
@pytest.mark.parametrize("ours", ["merge", "bypass"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_with_a_style_lora_from_core(
    ours_first: bool,
    ours: str,
    core_mode: str,
    pack: Any,
    model: Any,
    two_loras: Any,
    forward: Any,
    forward_with: Any,
) -> None:
    import comfy.sd
    from safetensors.torch import load_file

    (turbo, turbo_path), (style, style_path) = two_loras

    def load_style(patcher: Any) -> Any:
        lora = load_file(style_path)
        if core_mode == "merge":
            return comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]
        return comfy.sd.load_bypass_lora_for_models(patcher, None, lora, 1.0, 0)[0]

    def load_turbo(patcher: Any) -> Any:
        return pack("nodes.apply_lora").apply_lora(patcher, turbo_path, mode=ours)[0]

    patched = load_style(load_turbo(model)) if ours_first else load_turbo(load_style(model))

    for _ in range(2):  # loading again ejects and injects again
        close(forward(patched), forward_with(total(turbo, style)))
        close(forward(model), forward_with({}))
    assert pack("nodes.spec_attachment").attached_to(patched).file == turbo_path.name


def test_bypass_survives_clones_and_their_end(
    pack: Any, model: Any, two_loras: Any, forward: Any, forward_with: Any
) -> None:
    (updates, path), _ = two_loras
    patched, _ = pack("nodes.apply_lora").apply_lora(model, path, mode="bypass")
    expected = forward_with(total(updates))
    close(forward(patched), expected)
    discarded = patched.clone()  # inherits is_injected, and ejects when it is collected
    net = patched.model.diffusion_model
    del discarded
    gc.collect()
    assert sum("forward" in module.__dict__ for module in net.modules()) == len(updates)
    clone = patched.clone()
    close(forward(clone), expected)
    del clone, patched
    gc.collect()
    assert not any("forward" in module.__dict__ for module in net.modules())
    close(forward(model), forward_with({}))


def test_bypass_leaves_the_weights_alone_and_is_counted(
    pack: Any, model: Any, two_loras: Any, forward: Any
) -> None:
    (updates, path), _ = two_loras
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    patched, _ = pack("nodes.apply_lora").apply_lora(model, path, mode="bypass")
    forward(patched)
    after = patched.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not patched.patches
    (branch,) = patched.get_nested_additional_models()
    numbers = sum(update.down.numel() + update.up.numel() for update in updates.values())
    assert branch.model_size() == 4 * numbers  # what core's memory planner sees


def test_two_bypass_loras_have_two_keys(pack: Any, model: Any, two_loras: Any) -> None:
    apply_lora = pack("nodes.apply_lora").apply_lora
    (_, first), (_, second) = two_loras
    patched, _ = apply_lora(apply_lora(model, first, mode="bypass")[0], second, mode="bypass")
    assert len(patched.injections) == 2
    weaker, _ = apply_lora(model, first, 0.5, mode="bypass")
    stronger, _ = apply_lora(model, first, 1.0, mode="bypass")
    assert weaker.injections.keys() != stronger.injections.keys()
