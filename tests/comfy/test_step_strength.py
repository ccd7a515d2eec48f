"""A LoRA with a strength per step: each forward has that of its own step, wherever a run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

LATENT = {"samples": torch.zeros(1, 16, 1, 8, 8)}
NODES = (1.0, 0.8, 0.5, 0.0)
STRENGTHS = (1.0, 0.25, 0.6)


@pytest.fixture
def updates(make_updates: Callable[..., Any]) -> Any:
    return make_updates()


@pytest.fixture
def path(updates: Any, write_lora: Callable[..., Path]) -> Path:
    return write_lora(updates, nodes=NODES, strength=STRENGTHS)


def recorded(model: Any, calls: list[Any]) -> Any:
    """A clone that notes what its diffusion model gets and gives."""
    from comfy.patcher_extension import WrappersMP

    def note(
        executor: Any, x: Tensor, t: Tensor, context: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        output = executor(x, t, context, *args, **kwargs)
        calls.append((x.clone(), t.clone(), context.clone(), output.clone()))
        return output

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return model


def sampled(model: Any, prompt: Any, sigmas: tuple[float, ...]) -> Tensor:
    """Core's own sampler nodes."""
    from comfy.k_diffusion.sampling import sample_euler
    from comfy.samplers import KSAMPLER
    from comfy_extras.nodes_custom_sampler import (
        Guider_Basic,
        Noise_RandomNoise,
        SamplerCustomAdvanced,
    )

    guider = Guider_Basic(model)
    guider.set_conds(prompt)
    noise, sampler = Noise_RandomNoise(3), KSAMPLER(sample_euler)
    levels = torch.tensor(sigmas)
    return SamplerCustomAdvanced.execute(noise, guider, sampler, levels, LATENT)[0]["samples"]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_each_step_has_its_strength(
    start: int,
    pack: Any,
    model: Any,
    tiny_folder: Path,
    updates: Any,
    path: Path,
    prompt: Any,
) -> None:
    patched, report = pack("nodes.apply_lora").apply_lora(model, path)
    calls: list[Any] = []
    sampled(recorded(patched, calls), prompt, NODES[start:])
    assert len(calls) == len(STRENGTHS) - start
    for strength, (x, t, context, output) in zip(STRENGTHS[start:], calls, strict=True):
        net = pack("nodes.tiny").load_transformer(tiny_folder / "transformer").model.diffusion_model
        for name, update in updates.items():
            net.get_submodule(name).weight.data += strength * update.delta()
        torch.testing.assert_close(output, net(x, t, context), rtol=1e-5, atol=2e-5)
    assert "mode: bypass (auto: one strength per step)" in report.to_text()
    assert "applied strength: 1, 0.25, 0.6 (one per step)" in report.to_text()


def test_the_steps_of_a_run(pack: Any) -> None:
    """Counted from the end; a forward between two levels is part of the step that it is in."""
    step_of = pack("nodes.step_strength").step_of
    cases = [
        (1.0, NODES, 0),
        (0.8, NODES, 1),
        (0.65, NODES, 1),
        (0.5, NODES, 2),
        (0.1, NODES, 2),
        (0.8 + 4e-5, NODES, 1),  # as float32 and bfloat16 arithmetic leave it
        (0.8 - 4e-5, NODES, 1),
        (0.8, NODES[1:], 1),
        (0.5, NODES[2:], 2),
        (0.9, (0.9, 0.0), 2),
        (1.0, (1.0, 0.9, 0.8, 0.5, 0.0), 0),
    ]
    for sigma, sigmas, expected in cases:
        assert step_of(sigma, sigmas, 3) == expected, (sigma, sigmas)


def test_the_nodes_strength_multiplies_each(pack: Any, model: Any, path: Path, prompt: Any) -> None:
    apply_lora = pack("nodes.apply_lora").apply_lora
    half, report = apply_lora(model, path, 0.5, "bypass")
    assert "applied strength: 0.5, 0.125, 0.3" in report.to_text()
    found = sampled(half, prompt, NODES)
    whole = sampled(apply_lora(model, path)[0], prompt, NODES)
    none, report = apply_lora(model, path, 0.0)
    base = sampled(model, prompt, NODES)
    assert not torch.allclose(found, whole, atol=1e-3)
    torch.testing.assert_close(sampled(none, prompt, NODES), base)
    assert "strength 0 switches the LoRA off" in report.to_text()


def test_weights_cannot_change_between_steps(
    pack: Any, model: Any, path: Path, output: Path
) -> None:
    from comfy_extras.nodes_model_merging import ModelSave

    apply_lora = pack("nodes.apply_lora").apply_lora
    with pytest.raises(ValueError, match=r"turbo\.safetensors: mode merge .*another at each step"):
        apply_lora(model, path, mode="merge")
    patched, _ = apply_lora(model, path)
    with pytest.raises(ValueError, match=r"turbo\.safetensors has another strength at each step"):
        ModelSave().save(patched, "m/x")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_steps(pack: Any, model: Any, path: Path, forward: Any) -> None:
    from torch._dynamo.utils import counters

    patched, _ = pack("nodes.apply_lora").apply_lora(model, path)
    forward(patched)
    layer = patched.model.diffusion_model.get_submodule("transformer_blocks.0.attn.to_q")
    code = torch.compile(layer, backend="eager", fullgraph=True)
    (branch,) = pack("nodes.bypass").branches(patched)
    x = torch.randn(3, layer.in_features)
    for index, sigma in enumerate(NODES[:-1]):
        branch.strength.set_for(sigma, NODES)
        assert torch.equal(code(x), layer(x))
        if index == 0:
            frames = dict(counters["frames"])
    assert dict(counters["frames"]) == frames
