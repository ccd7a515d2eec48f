"""Core's own samplers on a MODEL from Turbo LoRA Loader: the trained sigmas, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

SEED = 41
FOUR = (1.0, 0.9, 0.75, 0.5, 0.0)
BY_SIZE = {  # mu .8 for the 12 tokens of `empty`
    "nodes": (1.0, 0.75, 0.5, 0.25, 0.0),
    "shift": {"rule": "linear", "tokens": [4, 20], "mu": [0.5, 1.1]},
}
EVEN = ("simple", "normal", "sgm_uniform")


def empty(height: int = 8, width: int = 6) -> dict[str, Any]:
    return {"samples": torch.zeros(2, 16, height, width)}


@pytest.fixture
def followed(pack: Any, turbo_model: Any) -> Callable[..., Any]:
    """The toy model with a random Turbo LoRA, as the loader node gives it: (**spec) -> MODEL."""

    def build(**spec: Any) -> Any:
        model = turbo_model(**spec)
        pack("nodes.core_schedule").follow(model)
        return model

    return build


def ksampler(
    model: Any,
    prompt: Any,
    steps: int,
    scheduler: str = "simple",
    latent: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Core's KSampler (or KSampler Advanced, by its options), euler at CFG 1."""
    import nodes

    return nodes.common_ksampler(
        model, SEED, steps, 1.0, "euler", scheduler, prompt, prompt, latent or empty(), **options
    )[0]["samples"]


@pytest.mark.parametrize("scheduler", EVEN)
@pytest.mark.parametrize("sigmas", [(1.0, 0.7155, 0.0), FOUR, (1.0, 0.0), (0.9, 0.4, 0.0)])
def test_ksampler_is_turbo_sampler(
    sigmas: tuple[float, ...], scheduler: str, followed: Any, sample: Any, prompt: Any
) -> None:
    model = followed(nodes=sigmas)
    expected = sample(model, prompt, empty(), SEED)[0]["samples"]
    assert torch.equal(ksampler(model, prompt, len(sigmas) - 1, scheduler), expected)


@pytest.mark.parametrize("scheduler", EVEN)
def test_at_the_latents_size(
    scheduler: str, followed: Any, sample: Any, prompt: Any, pack: Any
) -> None:
    model = followed(**BY_SIZE)
    spec = pack("nodes.spec_attachment").attached_to(model).spec
    plan = pack("nodes.sampling").make_plan(model, empty())
    assert plan.sigmas.tolist() == pytest.approx(spec.sigmas(12))
    assert "for 12 tokens" in plan.to_text()
    for latent in (empty(), empty(16, 12)):
        expected = sample(model, prompt, latent, SEED)[0]["samples"]
        assert torch.equal(ksampler(model, prompt, 4, scheduler, latent), expected)
    assert not torch.equal(plan.sigmas, pack("nodes.sampling").make_plan(model, empty(16)).sigmas)


def test_a_family_of_nobody_has_the_models_own_tokens(
    followed: Any, sample: Any, prompt: Any
) -> None:
    model = followed(**BY_SIZE, family="of nobody")
    expected = sample(model, prompt, empty(), SEED)[0]["samples"]
    assert torch.equal(ksampler(model, prompt, 4), expected)


def test_basic_scheduler_shows_them(followed: Any, model: Any) -> None:
    from comfy_extras.nodes_custom_sampler import BasicScheduler

    turbo = followed(nodes=FOUR)
    sigmas = BasicScheduler.execute(turbo, "simple", 4, 1.0)[0]
    assert torch.equal(sigmas, torch.tensor(FOUR))
    own, table = (m.get_model_object("model_sampling") for m in (model, turbo))
    levels = torch.linspace(0.01, 1, 50)
    assert torch.equal(table.timestep(levels), own.timestep(levels))
    assert torch.equal(table.sigma(levels), own.sigma(levels))
    assert table.percent_to_sigma(0.3) == own.percent_to_sigma(0.3)
    assert len(table.sigmas) == len(own.sigmas)
    assert (table.sigmas.diff() > 0).all()
    assert not torch.equal(table.sigmas, own.sigmas), "a copy, and the model keeps its own"


@pytest.mark.parametrize("scheduler", EVEN)
def test_halves_are_halves(scheduler: str, followed: Any, prompt: Any, sample: Any) -> None:
    """KSampler Advanced, which stops and starts at a step."""
    model = followed(nodes=FOUR)
    half = ksampler(model, prompt, 4, scheduler, last_step=2)
    rest = ksampler(
        model, prompt, 4, scheduler, {"samples": half}, start_step=2, disable_noise=True
    )
    whole = sample(model, prompt, empty(), SEED)[0]["samples"]
    torch.testing.assert_close(rest, whole, rtol=1e-5, atol=1e-5)
    forced = ksampler(model, prompt, 4, scheduler, last_step=2, force_full_denoise=True)
    assert not torch.equal(forced, half)


def test_what_was_not_trained_is_told(
    followed: Any, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = followed()
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 3)
    assert "was trained for 2 step(s) at 1, 0.7155, 0" in caplog.text
    assert "start_step" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 2, denoise=0.5)
    assert "use start_step of Turbo Sampler" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 2)
        ksampler(model, prompt, 2, "sgm_uniform")
    assert caplog.text == ""


@pytest.mark.parametrize("scheduler", EVEN)
def test_a_schedule_that_is_cut_short_is_told(
    scheduler: str, followed: Any, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One step begins as the trained ones do, and goes down to 0 at once; so do three of
    sgm_uniform, which are the first of four of normal.
    """
    model = followed(nodes=FOUR)
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 1, scheduler)
    assert "this sampler goes through 1, 0: expect noise" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 3, scheduler)
    assert "was trained for 4 step(s)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 4, scheduler, last_step=2, force_full_denoise=True)
    assert "this sampler goes through 1, 0.9, 0:" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        ksampler(model, prompt, 4, scheduler, last_step=2)
        ksampler(model, prompt, 4, scheduler, start_step=2)
    assert caplog.text == ""


@pytest.mark.parametrize("scheduler", EVEN)
def test_every_number_of_steps_that_a_lora_offers_is_a_trained_one(
    scheduler: str, followed: Any, sample: Any, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"nodes": (1.0, 0.6, 0.0), "ladder": ((1.0, 0.0), FOUR)}
    shift = {"rule": "linear", "tokens": [4, 4096], "mu": [0.5, 1.1]}
    model = followed(**more, shift=shift)
    with caplog.at_level(logging.WARNING):
        for nodes in (more["nodes"], *more["ladder"]):
            alone = followed(nodes=nodes, shift=shift)
            expected = sample(alone, prompt, empty(), SEED)[0]["samples"]
            found = ksampler(model, prompt, len(nodes) - 1, scheduler)
            assert torch.equal(found, expected)
    assert caplog.text == ""
    ksampler(model, prompt, 7, scheduler)
    assert "was trained for 2 step(s)" in caplog.text


def discrete(model: Any) -> Any:
    """The model with the sigmas of SD 1.5, up to 14.6."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, "eps", False)[0]


def test_a_model_that_is_no_flow_model_keeps_its_schedule(
    pack: Any, followed: Any, turbo_model: Any, prompt: Any
) -> None:
    from comfy.samplers import calculate_sigmas

    plain = discrete(turbo_model())
    before, after = plain.clone(), discrete(followed())
    pack("nodes.core_schedule").follow(before)
    again = after.clone()
    pack("nodes.core_schedule").follow(again)
    expected = ksampler(plain, prompt, 2)
    for model in (before, after, again):
        sampling = model.get_model_object("model_sampling")
        assert calculate_sigmas(sampling, "simple", 2)[0] > 14
        assert torch.equal(ksampler(model, prompt, 2), expected)


def test_sigmas_by_hand_stay(
    followed: Any, sample: Any, turbo_model: Any, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Turbo Sampler's `sigmas` input, even where they are what KSampler would have asked for."""
    from comfy.samplers import calculate_sigmas

    plain = turbo_model()
    even = calculate_sigmas(plain.get_model_object("model_sampling"), "sgm_uniform", 2)
    expected = sample(plain, prompt, empty(), SEED, sigmas=even)[0]["samples"]
    found = sample(followed(), prompt, empty(), SEED, sigmas=even)[0]["samples"]
    assert torch.equal(found, expected)
    assert "was trained for" not in caplog.text


def aura(model: Any, shift: float = 3.1) -> Any:
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    return ModelSamplingAuraFlow().patch_aura(model, shift)[0]


@pytest.mark.parametrize("scheduler", EVEN)
def test_a_shift_is_ignored_and_named(
    scheduler: str,
    pack: Any,
    followed: Any,
    turbo_model: Any,
    sample: Any,
    prompt: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedule = pack("nodes.core_schedule")
    plain = followed()
    expected, warnings = sample(plain, prompt, empty(), SEED)
    assert warnings == []
    after = aura(plain)
    before = aura(turbo_model())
    schedule.follow(before)
    for where, model in (("after", after), ("before", before)):
        caplog.clear()
        found, warnings = sample(model, prompt, empty(), SEED)
        assert torch.equal(found["samples"], expected["samples"])
        assert any(f"a node {where} the Turbo LoRA Loader set" in text for text in warnings)
        assert "shift 3.1" in warnings[0]
        with caplog.at_level(logging.WARNING):
            assert torch.equal(ksampler(model, prompt, 2, scheduler), expected["samples"])
        # before the loader, `simple` reads its table: then the loader's own report names the shift
        named = f"a node {where} the Turbo LoRA Loader" in caplog.text
        assert named == (where == "after" or scheduler != "simple")


def test_it_can_be_left_out(
    pack: Any, run_node: Any, model: Any, make_updates: Any, write_lora: Any, prompt: Any
) -> None:
    import folder_paths

    path = write_lora(make_updates(), "left_out.safetensors")
    folder_paths.add_model_folder_path("loras", str(path.parent))
    loader = pack("nodes.lora").TurboLoraLoader
    inputs = {"lora_name": path.name, "strength": 1.0, "mode": "auto"}
    on, _ = run_node(loader, model=model, **inputs)
    off, _ = run_node(loader, model=model, **inputs, core_samplers=False)
    back, _ = run_node(loader, model=on, **inputs, core_samplers=False)
    own = model.get_model_object("model_sampling")
    assert on.get_model_object("model_sampling") is not own
    assert off.get_model_object("model_sampling") is own
    assert back.get_model_object("model_sampling") is own
    assert torch.equal(ksampler(off, prompt, 2), ksampler(off, prompt, 2, "simple"))
    assert not torch.equal(ksampler(off, prompt, 2), ksampler(on, prompt, 2))


def test_a_core_whose_even_steps_depend_on_the_size(
    pack: Any, followed: Any, prompt: Any, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer cores hand KSampler the latent's shape, where a model's own schedule depends on it."""
    import comfy.samplers

    class KSampler(comfy.samplers.KSampler):
        def __init__(self, *args: Any, latent_shape: tuple[int, ...] = (), **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sigmas = self.sigmas ** (1 + latent_shape[-1] / 10)

    model = followed(nodes=FOUR)
    asked = KSampler(model, 4, "cpu", "euler", "normal", latent_shape=(2, 16, 8, 6)).sigmas
    monkeypatch.setattr(comfy.samplers, "KSampler", KSampler)
    trained = pack("nodes.core_schedule")._trained
    attached = pack("nodes.spec_attachment").attached_to(model)
    assert trained(model, attached, (2, 16, 8, 6), asked).tolist() == pytest.approx(FOUR)
    assert torch.equal(trained(model, attached, (2, 16, 8, 12), asked), asked)


def test_guided_and_negative_prompts_follow_too(
    followed: Any, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A detailer's KSampler at CFG 2: the schedule is the trained one all the same."""
    import nodes

    model = followed()
    seen: list[float] = []

    def spy(apply: Any, inputs: dict[str, Any]) -> Any:
        seen.append(float(inputs["timestep"][0]))
        return apply(inputs["input"], inputs["timestep"], **inputs["c"])

    model.set_model_unet_function_wrapper(spy)
    nodes.common_ksampler(model, SEED, 2, 2.0, "euler", "simple", prompt, prompt, empty())
    assert sorted(set(seen)) == pytest.approx([0.7155, 1.0])
    assert "was trained for CFG 1, and this sampler runs at 2" in caplog.text
    assert "sampler euler" not in caplog.text
    nodes.common_ksampler(model, SEED, 2, 1.0, "heun", "simple", prompt, prompt, empty())
    assert "was trained for sampler euler, and this one is heun" in caplog.text
    for name, shown in (("uni_pc", "unipc"), ("dpm_fast", "dpm_fast")):
        nodes.common_ksampler(model, SEED, 2, 1.0, name, "simple", prompt, prompt, empty())
        assert f"was trained for sampler euler, and this one is {shown}." in caplog.text


def test_lcm_is_renoise(
    followed: Any, sample: Any, prompt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import nodes

    model = followed(sampler="renoise")
    nodes.common_ksampler(model, SEED, 2, 1.0, "lcm", "simple", prompt, prompt, empty())
    assert "was trained for" not in caplog.text
    ksampler(model, prompt, 2)
    assert "was trained for sampler lcm, and this one is euler" in caplog.text
