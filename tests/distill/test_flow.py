"""The flow-matching identities that everything else rests on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.contract.sampling import sample_euler, velocity_denoiser
from distill.models import flow

times = st.floats(0.01, 1.0)


@given(times, st.integers(0, 1000))
def test_x0_and_eps_are_recovered_from_the_velocity(t: float, seed: int) -> None:
    x0, eps = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    at = torch.full((3,), t)
    x_t, v = flow.add_noise(x0, eps, at), eps - x0
    assert torch.allclose(flow.to_x0(x_t, v, at), x0, atol=1e-5)
    assert torch.allclose(flow.euler(x_t, v, at, torch.ones(3)), eps, atol=1e-5)


def test_euler_is_the_sampler_of_the_contract() -> None:
    x = torch.randn(2, 4, 4, 4)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * x + flow.match(t, x)

    stepped = x
    for t, s in ((1.0, 0.7155), (0.7155, 0.0)):
        at, to = torch.full((2,), t), torch.full((2,), s)
        stepped = flow.euler(stepped, velocity(stepped, at), at, to)
    sampled = sample_euler(velocity_denoiser(velocity), x, [1.0, 0.7155, 0.0])
    assert torch.allclose(stepped, sampled, atol=1e-6)


def test_guidance_without_and_with_rescaling() -> None:
    v_cond, v_uncond = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    plain = flow.guide(v_cond, v_uncond, 4.0, rescale=False)
    assert torch.allclose(plain, v_uncond + 4 * (v_cond - v_uncond))
    rescaled = flow.guide(v_cond, v_uncond, 4.0, rescale=True)
    assert torch.allclose(rescaled.norm(dim=-1), v_cond.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(
        torch.nn.functional.cosine_similarity(rescaled, plain, dim=-1), torch.ones(2, 5), atol=1e-5
    )


def test_shift_keeps_the_ends_and_moves_towards_noise() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    assert flow.shift(t, 3.0).tolist() == pytest.approx([0, 0.75, 1])
