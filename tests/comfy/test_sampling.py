"""Turbo Sampler is core's SamplerCustomAdvanced with the spec's sampler and sigmas, bit for bit."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

SIGMAS = torch.tensor([1.0, 0.7155, 0.0])
SEED = 41


def core_sample(
    model: Any, prompt: Any, latent: dict[str, Any], sampler: Any, sigmas: Tensor, seed: int = SEED
) -> Tensor:
    """What a person wires from core nodes."""
    from comfy_extras import nodes_custom_sampler as core

    guider = core.BasicGuider.execute(model, prompt)[0]
    noise = core.RandomNoise.execute(seed)[0]
    result = core.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)
    return result[0]["samples"]


def core_sampler(name: str, **options: Any) -> Any:
    import comfy.samplers

    return comfy.samplers.ksampler(name, options)


def empty(batch: int = 2, *, frames: bool = False) -> dict[str, Any]:
    shape = (batch, 16, 1, 8, 6) if frames else (batch, 16, 8, 6)
    return {"samples": torch.zeros(shape)}


@pytest.mark.parametrize("frames", [False, True], ids=["4-D", "5-D"])
def test_euler_is_core_euler(frames: bool, sample: Any, turbo_model: Any, prompt: Any) -> None:
    model = turbo_model()
    latent, warnings = sample(model, prompt, empty(frames=frames), SEED)
    expected = core_sample(model, prompt, empty(frames=frames), core_sampler("euler"), SIGMAS)
    assert latent["samples"].shape == (2, 16, 1, 8, 6)
    assert torch.equal(latent["samples"], expected)
    assert warnings == []


@pytest.mark.parametrize("frames", [False, True], ids=["4-D", "5-D"])
@pytest.mark.parametrize("sigmas", [(1.0, 0.7155, 0.0), (1.0, 0.9, 0.75, 0.5, 0.0)])
def test_renoise_is_core_lcm_with_the_same_noise(
    sigmas: tuple[float, ...],
    frames: bool,
    pack: Any,
    sample: Any,
    turbo_model: Any,
    prompt: Any,
) -> None:
    model = turbo_model(sampler="renoise", nodes=sigmas)
    noise = pack("distill.contract.sampling").renoise_noise_sampler(
        torch.empty(2, 16, 1, 8, 6), SEED
    )
    core = core_sampler("lcm", noise_sampler=noise)
    latent, _ = sample(model, prompt, empty(frames=frames), SEED)
    expected = core_sample(model, prompt, empty(frames=frames), core, torch.tensor(sigmas))
    assert torch.equal(latent["samples"], expected)


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_select_and_sigmas_give_the_same_in_core(
    kind: str, pack: Any, sample: Any, turbo_model: Any, prompt: Any, run_node: Any
) -> None:
    nodes = pack("nodes.sigmas")
    model = turbo_model(sampler=kind)
    (sampler,) = run_node(nodes.TurboSamplerSelect, model=model)
    (sigmas,) = run_node(nodes.TurboSigmas, model=model, start_step=0)
    assert torch.equal(sigmas, SIGMAS)
    expected = core_sample(model, prompt, empty(), sampler, sigmas)
    assert torch.equal(sample(model, prompt, empty(), SEED)[0]["samples"], expected)


def test_one_forward_per_step(
    sample: Any, turbo_model: Any, prompt: Any, count_forwards: Any
) -> None:
    model = turbo_model()
    batches = count_forwards(model)
    sample(model, prompt, empty(batch=3), SEED)
    assert batches == [3, 3]


def test_a_seed_is_an_image(sample: Any, turbo_model: Any, prompt: Any) -> None:
    model = turbo_model(sampler="renoise")
    first, again, other = (
        sample(model, prompt, empty(), seed)[0]["samples"] for seed in (SEED, SEED, SEED + 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_batch_index_picks_an_item_of_a_batch(
    kind: str, sample: Any, turbo_model: Any, prompt: Any
) -> None:
    model = turbo_model(sampler=kind)
    whole = sample(model, prompt, {**empty(3), "batch_index": [0, 1, 2]}, SEED)[0]["samples"]
    alone = sample(model, prompt, {**empty(1), "batch_index": [2]}, SEED)[0]["samples"]
    torch.testing.assert_close(alone[0], whole[2], rtol=1e-4, atol=1e-4)  # other batch, other BLAS
    assert not torch.allclose(alone[0], whole[0], atol=0.1)


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_image_to_image_starts_on_a_trained_sigma(
    kind: str, sample: Any, turbo_model: Any, prompt: Any, count_forwards: Any
) -> None:
    model = turbo_model(sampler=kind)
    image = {"samples": torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(3))}
    batches = count_forwards(model)
    latent, warnings = sample(model, prompt, image, SEED, start_step=1)
    assert batches == [1]
    assert warnings == []
    core = core_sampler("euler" if kind == "euler" else "lcm")  # one step: nothing to re-noise
    expected = core_sample(model, prompt, image, core, SIGMAS[1:])
    assert torch.equal(latent["samples"], expected)


def test_start_step_beyond_the_schedule(sample: Any, turbo_model: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"start_step is 2.*1, 0\.7155, 0.*choose 0 .*to 1"):
        sample(turbo_model(), prompt, empty(), SEED, start_step=2)


def test_start_step_with_an_empty_latent_warns(sample: Any, turbo_model: Any, prompt: Any) -> None:
    _, warnings = sample(turbo_model(), prompt, empty(), SEED, start_step=1)
    assert len(warnings) == 1
    assert "empty latent" in warnings[0]


@pytest.mark.parametrize("kind", ["euler", "renoise"])
def test_noise_mask_keeps_the_rest(kind: str, sample: Any, turbo_model: Any, prompt: Any) -> None:
    model = turbo_model(sampler=kind)
    image = torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., :24] = 1  # repaint the left half
    latent = {"samples": image, "noise_mask": mask}
    result = sample(model, prompt, latent, SEED)[0]["samples"][:, :, 0]
    torch.testing.assert_close(result[..., 3:], image[..., 3:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result[..., :3], image[..., :3], atol=0.1)


def test_channels_of_an_empty_latent_are_fixed(sample: Any, turbo_model: Any, prompt: Any) -> None:
    latent = {"samples": torch.zeros(1, 4, 8, 6), "downscale_ratio_spacial": 8}
    result, _ = sample(turbo_model(), prompt, latent, SEED)
    assert result["samples"].shape == (1, 16, 1, 8, 6)
    assert "downscale_ratio_spacial" not in result


def test_progress_is_reported(
    sample: Any, turbo_model: Any, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.utils

    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *rest, **_: seen.append((done, total))
    )
    sample(turbo_model(), prompt, empty(), SEED)
    assert seen == [(1, 2), (2, 2)]


def test_interrupt_stops_it(sample: Any, turbo_model: Any, prompt: Any) -> None:
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        sample(turbo_model(), prompt, empty(), SEED)


# ------------------------------------------------------------------------- sigmas by hand, warnings


def test_no_spec_is_an_error_that_helps(
    pack: Any, sample: Any, model: Any, prompt: Any, run_node: Any
) -> None:
    with pytest.raises(ValueError, match=r"no Turbo spec.*Turbo LoRA Loader.*sigmas"):
        sample(model, prompt, empty(), SEED)
    for node in ("TurboSigmas", "TurboSamplerSelect"):
        arguments = {"start_step": 0} if node == "TurboSigmas" else {}
        with pytest.raises(ValueError, match="no Turbo spec"):
            run_node(getattr(pack("nodes.sigmas"), node), model=model, **arguments)


def test_sigmas_make_up_for_a_missing_spec(sample: Any, model: Any, prompt: Any) -> None:
    latent, warnings = sample(model, prompt, empty(), SEED, sigmas=SIGMAS)
    expected = core_sample(model, prompt, empty(), core_sampler("euler"), SIGMAS)
    assert torch.equal(latent["samples"], expected)
    assert warnings == []


def test_untrained_sigmas_warn(sample: Any, turbo_model: Any, prompt: Any) -> None:
    given = torch.tensor([1.0, 0.75, 0.0])
    latent, warnings = sample(turbo_model(), prompt, empty(), SEED, sigmas=given)
    assert torch.isfinite(latent["samples"]).all()
    assert len(warnings) == 1
    assert "0.75 (trained: 1, 0.7155, 0)" in warnings[0]


def test_sigmas_that_leave_noise_warn(sample: Any, turbo_model: Any, prompt: Any) -> None:
    _, warnings = sample(turbo_model(), prompt, empty(), SEED, sigmas=SIGMAS[:2])
    assert [w for w in warnings if "noise stays" in w]


@pytest.mark.parametrize("sigmas", [[14.6, 3.0, 0.0], [1.0], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0]])
def test_sigmas_of_something_else(
    sigmas: list[float], sample: Any, turbo_model: Any, prompt: Any
) -> None:
    with pytest.raises(ValueError, match="not a flow-matching schedule"):
        sample(turbo_model(), prompt, empty(), SEED, sigmas=torch.tensor(sigmas))


def test_a_very_long_list_of_sigmas(sample: Any, turbo_model: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match="at most 256 steps; found 9,999"):
        sample(turbo_model(), prompt, empty(), SEED, sigmas=torch.linspace(1, 0, 10_000))


def test_a_spec_with_guidance_is_refused(sample: Any, turbo_model: Any, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"CFG 3.*CFGGuider"):
        sample(turbo_model(cfg=3.0), prompt, empty(), SEED)


def test_patched_guidance_warns_and_stays_one_forward(
    pack: Any,
    sample: Any,
    turbo_model: Any,
    prompt: Any,
    run_node: Any,
    count_forwards: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = turbo_model().clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"], disable_cfg1_optimization=True)
    batches = count_forwards(model)
    _, warnings = sample(model, prompt, empty(1), SEED)
    assert batches == [1, 1]
    assert len(warnings) == 1
    assert "disable_cfg1_optimization, sampler_cfg_function" in warnings[0]
    with caplog.at_level(logging.WARNING):
        run_node(
            pack("nodes.sampling").TurboSampler,
            model=model,
            positive=prompt,
            latent_image=empty(1),
            noise_seed=SEED,
            start_step=0,
        )
    assert "patched the guidance" in caplog.text


def test_models_that_are_no_flow_are_refused(sample: Any, turbo_model: Any, prompt: Any) -> None:
    import comfy.model_sampling

    class Discrete(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    model = turbo_model().clone()
    model.add_object_patch("model_sampling", Discrete())
    with pytest.raises(ValueError, match="not a flow-matching model"):
        sample(model, prompt, empty(), SEED)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_explained(
    value: float, sample: Any, turbo_model: Any, prompt: Any
) -> None:
    model = turbo_model()
    with pytest.raises(RuntimeError, match=r"black picture.*--use-sage-attention.*fp16"):
        sample(model, [[prompt[0][0] * value, {}]], empty(), SEED)
    assert sample(model, prompt, empty(), SEED)[0]["samples"].isfinite().all()
