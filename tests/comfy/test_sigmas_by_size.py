"""Turbo Sigmas, and what a plan says of guidance, experts and sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

LINEAR = {"rule": "linear", "tokens": [256, 8192], "mu": [0.5, 0.9]}
BY_SIZE = {"nodes": (1.0, 0.75, 0.5, 0.25, 0.0), "shift": LINEAR, "family": "qwen-image-2.1"}
WAN = {"nodes": (1.0, 0.75, 0.5, 0.25, 0.0), "boundary": 2}


def empty(height: int, width: int) -> dict[str, Any]:
    return {"samples": torch.zeros(1, 16, height, width)}


@pytest.fixture
def sigmas(pack: Any, run_node: Any) -> Any:
    def run(model: Any, start_step: int = 0, **inputs: Any) -> list[float]:
        node = pack("nodes.sigmas").TurboSigmas
        return run_node(node, model=model, start_step=start_step, **inputs)[0].tolist()

    return run


def test_a_latent_or_a_size_or_the_usual_one(turbo_model: Any, sigmas: Any, pack: Any) -> None:
    model = turbo_model(**BY_SIZE)
    spec = pack("nodes.spec_attachment").attached_to(model).spec
    assert sigmas(model) == pytest.approx(spec.sigmas(4096))
    assert sigmas(model, width=2048, height=2048) == pytest.approx(spec.sigmas(16384))
    assert sigmas(model, latent=empty(256, 256)) == pytest.approx(spec.sigmas(16384))
    assert sigmas(model, latent=empty(116, 208)) == pytest.approx(spec.sigmas(58 * 104))
    with pytest.raises(ValueError, match="expected both, or a latent in their place; found 64 x 0"):
        sigmas(model, width=64)


def test_a_model_that_names_no_patch_has_its_familys(
    turbo_model: Any, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core's Qwen-Image-2.1 is such a model: 16 pixels to a latent, one latent to a token."""
    tokens_of = pack("nodes.latents").tokens_of
    model = turbo_model(**BY_SIZE)
    shape = (1, 64, 128, 64)
    assert tokens_of(model, shape, "qwen-image-2.1") == 64 * 32, "the toy model's own patch is 2"
    monkeypatch.delattr(model.model.diffusion_model, "patch_size")
    assert tokens_of(model, shape, "qwen-image-2.1") == 128 * 64
    with pytest.raises(ValueError, match="does not say how many latents a token has"):
        tokens_of(model, shape, "of nobody")


def test_a_patch_of_two_sides(pack: Any, turbo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hunyuan-Image names its own."""
    model = turbo_model()
    monkeypatch.setattr(model.model.diffusion_model, "patch_size", [2, 4])
    tokens_of = pack("nodes.latents").tokens_of
    assert tokens_of(model, (1, 16, 8, 6), "qwen-image") == 4 * 2
    assert tokens_of(model, (1, 16, 3, 8, 6), "qwen-image") == 3 * 4 * 2


def test_frames_count(pack: Any, turbo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_of = pack("nodes.latents").tokens_of
    model = turbo_model()
    assert tokens_of(model, (1, 16, 5, 8, 6), "qwen-image") == 5 * 4 * 3
    monkeypatch.setattr(model.model.diffusion_model, "patch_size", (1, 2, 2))  # as Wan has it
    assert tokens_of(model, (1, 16, 5, 9, 6), "wan2.1") == 5 * 5 * 3


def test_two_halves_for_two_experts(turbo_model: Any, sigmas: Any) -> None:
    model = turbo_model(**WAN)
    assert sigmas(model, end_step=2) == [1.0, 0.75, 0.5]
    assert sigmas(model, 2) == [0.5, 0.25, 0.0]
    assert sigmas(model, 1, end_step=4) == [0.75, 0.5, 0.25, 0.0]
    for end in (1, 5):
        with pytest.raises(ValueError, match=r"end_step is .*choose 0 \(to the end\) or 3 to 4"):
            sigmas(model, 2, end_step=end)


def test_one_model_through_both_experts_is_told(turbo_model: Any, sample: Any, prompt: Any) -> None:
    model = turbo_model(**WAN)
    _, warnings = sample(model, prompt, empty(8, 6), 1)
    assert any("one of two experts" in text and "end_step 2" in text for text in warnings)
    half = torch.tensor([0.5, 0.25, 0.0])
    assert sample(model, prompt, empty(8, 6), 1, sigmas=half)[1] == []


def test_start_step_is_a_trained_step_at_every_size(
    turbo_model: Any, pack: Any, prompt: Any
) -> None:
    model = turbo_model(**BY_SIZE)
    spec = pack("nodes.spec_attachment").attached_to(model).spec
    plan = pack("nodes.sampling").make_plan(model, empty(64, 64), start_step=2)
    assert plan.sigmas.tolist() == pytest.approx(spec.sigmas(1024)[2:])


def test_guidance_goes_where_the_prompt_has_none(turbo_model: Any, pack: Any, prompt: Any) -> None:
    make_plan = pack("nodes.sampling").make_plan
    model = turbo_model(guidance=3.5)
    plan = make_plan(model, empty(8, 6), positive=prompt)
    assert (plan.guidance, plan.warnings) == (3.5, [])
    assert plan.to_text().endswith("; guidance 3.5")
    by_hand = [[prompt[0][0], {**prompt[0][1], "guidance": 2.0}]]
    plan = make_plan(model, empty(8, 6), positive=by_hand)
    assert plan.guidance is None
    assert "asks for guidance 2, and the LoRA was trained at 3.5" in plan.warnings[0]


def test_the_steps_of_a_ladder(
    pack: Any, run_node: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    import folder_paths

    path = write_lora(
        make_updates(),
        "ladder.safetensors",
        nodes=(1.0, 0.5, 0.0),
        ladder=((1.0, 0.75, 0.5, 0.25, 0.0),),
    )
    folder_paths.add_model_folder_path("loras", str(path.parent))
    loader = pack("nodes.lora").TurboLoraLoader
    inputs = {"lora_name": path.name, "strength": 1.0, "mode": "auto"}
    usual, report = run_node(loader, model=model, **inputs)
    four, _ = run_node(loader, model=model, **inputs, steps=4)
    attached_to = pack("nodes.spec_attachment").attached_to
    assert (attached_to(usual).spec.steps, attached_to(four).spec.steps) == (2, 4)
    assert "steps to choose from: 2, 4" in report
    with pytest.raises(ValueError, match="trained for 2 or 4 steps; found 3"):
        run_node(loader, model=model, **inputs, steps=3)
    with pytest.raises(ValueError, match="steps: expected 0 or 2, as many as sigmas_override"):
        run_node(loader, model=model, **inputs, steps=3, sigmas_override="1, 0.6, 0")
