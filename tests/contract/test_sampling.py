"""Samplers: exact arithmetic, analytic answers, repeatable re-noise, ComfyUI's own functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.contract.sampling import (
    euler_step,
    renoise_noise_sampler,
    renoise_step,
    sample_euler,
    sample_renoise,
    sampler_function,
    velocity_denoiser,
)
from distill.contract.spec import SAMPLERS, SpecError, TurboSpec

SIGMAS = torch.tensor([1.0, 0.7155, 0.25, 0.0])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def toy(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
    """A denoiser that depends on x and sigma in no simple way."""
    return torch.tanh(x * 0.7) * (1 - sigma.reshape(-1, *[1] * (x.ndim - 1)) * 0.3)


def test_euler_equals_the_closed_form_on_a_gaussian() -> None:
    # Data N(0, s^2): the flow's exact path scales x by sqrt(((1-t)^2 s^2 + t^2)), t from 1 to 0.
    s2 = 0.25

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        t = sigma.reshape(-1, 1)
        return (1 - t) * s2 / ((1 - t) ** 2 * s2 + t**2) * x

    x = noise(4, 8).double()
    out = sample_euler(exact, x, torch.linspace(1, 0, 4001, dtype=torch.float64))
    torch.testing.assert_close(out, x * s2**0.5, rtol=1e-3, atol=0)


def test_one_euler_step_from_one_returns_denoised() -> None:
    x = noise(2, 3, 4, 4)
    torch.testing.assert_close(sample_euler(toy, x, (1.0, 0.0)), toy(x, torch.ones(2)))


def test_renoise_is_x0_then_fresh_noise_then_x0() -> None:
    x, eps = noise(2, 3, 4, 4), [noise(2, 3, 4, 4, seed=k) for k in (1, 2)]
    drawn = iter(eps)
    out = sample_renoise(toy, x, SIGMAS, noise_sampler=lambda *_: next(drawn))
    for sigma, sigma_next, e in zip(SIGMAS[:-2], SIGMAS[1:-1], eps, strict=True):
        x = sigma_next * e + (1 - sigma_next) * toy(x, sigma.expand(2))
    torch.testing.assert_close(out, toy(x, SIGMAS[2].expand(2)), rtol=0, atol=0)


def test_renoise_keeps_the_marginal_variance() -> None:
    # If x0 has unit variance, x_t has (1 - t)^2 + t^2.
    out = renoise_step(noise(200_000), noise(200_000, seed=1), torch.tensor(0.7155))
    assert out.var().item() == pytest.approx(0.2845**2 + 0.7155**2, rel=0.02)


def test_callback_sees_every_step_before_the_update() -> None:
    x, seen = noise(1, 2, 4, 4), []
    for sampler in (sample_euler, sample_renoise):
        seen.clear()
        sampler(toy, x, SIGMAS, extra_args={"seed": 1}, callback=seen.append, disable=True)
        assert [step["i"] for step in seen] == [0, 1, 2]
        assert [step["sigma"].item() for step in seen] == SIGMAS[:-1].tolist()
        assert seen[0]["x"] is x
        torch.testing.assert_close(seen[0]["denoised"], toy(x, torch.ones(1)))


def test_extra_args_and_a_batch_of_sigmas_reach_the_model() -> None:
    calls: list[tuple[Tensor, dict]] = []

    def model(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        calls.append((sigma, extra_args))
        return x * 0

    sample_euler(model, noise(3, 2), [1, 0.5, 0], extra_args={"seed": 7, "model_options": {}})
    assert [sigma.tolist() for sigma, _ in calls] == [[1, 1, 1], [0.5, 0.5, 0.5]]
    assert all(extra == {"seed": 7, "model_options": {}} for _, extra in calls)


def test_samplers_record_no_gradients_but_steps_do() -> None:
    x = noise(1, 4).requires_grad_()
    assert not sample_euler(toy, x, SIGMAS).requires_grad
    euler_step(x, toy(x, torch.ones(1)), torch.tensor(1.0), torch.tensor(0.5)).sum().backward()
    assert x.grad is not None


def test_velocity_denoiser_inverts_the_flow() -> None:
    x0, eps = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    sigma = torch.tensor([0.9, 0.3])
    t = sigma.view(2, 1, 1)
    denoise = velocity_denoiser(lambda x, s, *, gain: (eps - x0) * gain)
    torch.testing.assert_close(denoise((1 - t) * x0 + t * eps, sigma, gain=1.0), x0)


def noises(
    x: Tensor, seed: int, batch_index: list[int] | None = None, steps: int = 3
) -> list[Tensor]:
    """The noise of every step."""
    sampler = renoise_noise_sampler(x, seed, batch_index)
    return [sampler(None, None) for _ in range(steps)]


def test_renoise_noise_is_a_function_of_seed_item_and_step() -> None:
    x = torch.empty(3, 16, 1, 8, 8)
    batch = noises(x, seed=5)
    for a, b in zip(batch, noises(x, seed=5), strict=True):
        assert torch.equal(a, b)
    for item in range(3):  # alone as in the batch, and in any order
        alone = noises(x[:1], seed=5, batch_index=[item])
        assert all(torch.equal(a[0], b[item]) for a, b in zip(alone, batch, strict=True))
    assert torch.equal(noises(x, 5, [2, 0, 1])[1], batch[1][[2, 0, 1]])

    streams = [n for step in batch for n in step] + list(noises(x, seed=6)[0])
    initial = torch.randn(x.shape, generator=torch.manual_seed(5))  # as ComfyUI draws it
    flat = torch.stack([*streams, *initial]).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 0.15  # 1024 samples: about 5 standard deviations


def test_renoise_noise_is_standard_normal_in_the_latents_dtype() -> None:
    x = torch.empty(2, 16, 1, 64, 64, dtype=torch.bfloat16)
    sampled = noises(x, seed=0, steps=1)[0]
    assert sampled.dtype is torch.bfloat16
    assert sampled.shape == x.shape
    assert sampled.float().mean().abs() < 0.01
    assert sampled.float().std().item() == pytest.approx(1, abs=0.01)


def test_renoise_noise_does_not_touch_global_randomness() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample_renoise(toy, noise(2, 4, 4), SIGMAS, extra_args={"seed": 3})
    assert torch.equal(torch.get_rng_state(), before)


def test_renoise_without_seed_or_with_wrong_batch_index_is_an_error() -> None:
    with pytest.raises(ValueError, match="noise_sampler or extra_args"):
        sample_renoise(toy, noise(1, 4), SIGMAS)
    with pytest.raises(ValueError, match=r"batch_index: expected 2 entries.*found 3"):
        renoise_noise_sampler(torch.empty(2, 4), 0, [0, 1, 2])


def test_sampler_function_knows_every_sampler_of_the_spec() -> None:
    assert {name: sampler_function(name) for name in SAMPLERS} == {
        "euler": sample_euler,
        "renoise": sample_renoise,
    }
    assert sampler_function(TurboSpec((1.0, 0.0), sampler="renoise")) is sample_renoise
    with pytest.raises(SpecError, match=r"found 'renois' \(did you mean 'renoise'\?\)"):
        sampler_function("renois")


@pytest.mark.comfy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit_comfyui(comfyui: Path, dtype: torch.dtype) -> None:
    comfy = importlib.import_module("comfy.k_diffusion.sampling")
    flow = importlib.import_module("comfy.model_sampling").CONST()
    patcher = SimpleNamespace(get_model_object=lambda name: flow)

    class Model:
        inner_model = SimpleNamespace(model_patcher=patcher)
        __call__ = staticmethod(toy)

    x = noise(2, 16, 1, 8, 8).to(dtype)
    eps = [noise(2, 16, 1, 8, 8, seed=k).to(dtype) for k in (1, 2)]

    def draw() -> Callable[..., Tensor]:
        drawn = iter(eps)
        return lambda sigma, sigma_next: next(drawn)

    pairs = {
        "euler": (
            sample_euler(toy, x, SIGMAS),
            comfy.sample_euler(Model(), x, SIGMAS, disable=True),
        ),
        "renoise": (
            sample_renoise(toy, x, SIGMAS, noise_sampler=draw()),
            comfy.sample_lcm(Model(), x, SIGMAS, disable=True, noise_sampler=draw()),
        ),
    }
    for name, (ours, reference) in pairs.items():
        assert ours.dtype == reference.dtype, name
        assert torch.equal(ours, reference), name
