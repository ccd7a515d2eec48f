"""The methods' pure losses against answers that can be written down: Gaussian data, whose velocity
field, ODE and scores are known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.contract.sampling import renoise_noise_sampler, sample_euler, sample_renoise
from distill.contract.sampling import velocity_denoiser as denoiser
from distill.methods import dmd2, trajectory
from distill.models import flow

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SIGMAS = (1.0, 0.7155, 0.0)


def gaussian_velocity(mean: float, std: float) -> Velocity:
    """v(x, t) = E[eps - x0 | x_t = x] for data N(mean, std^2): with var = (1-t)^2 std^2 + t^2,
    E[x0 | x] = mean + (1-t) std^2 (x - (1-t) mean) / var and E[eps | x] = t (x - (1-t) mean) / var.
    """

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = flow.match(t, x)
        var = (1 - t) ** 2 * std**2 + t**2
        centred = x - (1 - t) * mean
        return t * centred / var - mean - (1 - t) * std**2 * centred / var

    return velocity


def gaussian_flow(
    mean: float, std: float, x: torch.Tensor, t: torch.Tensor, s: torch.Tensor
) -> torch.Tensor:
    """Where the ODE takes x from t to s: the quantile stays, (x - mean_t) / std_t is constant."""
    t, s = flow.match(t, x), flow.match(s, x)

    def std_at(time: torch.Tensor) -> torch.Tensor:
        return ((1 - time) ** 2 * std**2 + time**2).sqrt()

    return (1 - s) * mean + std_at(s) / std_at(t) * (x - (1 - t) * mean)


def exact_student(mean: float, std: float, edge: torch.Tensor) -> Velocity:
    """The student that a trajectory method aims at: one Euler step to `edge` lands on the ODE."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        gap = flow.match(edge - t, x)
        step = (gaussian_flow(mean, std, x, t, edge) - x) / torch.where(gap == 0, 1.0, gap)
        return torch.where(gap == 0, torch.zeros_like(x), step)

    return velocity


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Trajectory methods


def pcm_loss(*pair_and_huber: Any) -> torch.Tensor:
    *arguments, huber = pair_and_huber
    prediction, target = trajectory.pcm_pair(*arguments)
    return trajectory.pseudo_huber(prediction - target, huber)


@pytest.mark.parametrize("target_model", [gaussian_velocity(5, 2), lambda x, t: x * 1e3])
def test_on_the_edge_pcm_maps_a_point_to_itself(target_model: Velocity) -> None:
    """f(x, e, e) = x whatever the network says: with s = e the target is the teacher's point."""
    x, t, e = doubles(4, 3), torch.full((4,), 0.9), torch.full((4,), 0.7155)
    teacher = gaussian_velocity(1, 0.5)
    target = trajectory.pcm_target(target_model, teacher, x, t, e, e, 3)
    assert torch.equal(target, trajectory.solve(teacher, x, t, e, 3))
    assert torch.equal(target, trajectory.pcm_target(None, teacher, x, t, e, e, 3))


@pytest.mark.parametrize(
    ("name", "sigmas", "points"),
    [("pcm", SIGMAS, 8), ("progressive", SIGMAS, 1), ("consistency", (1.0, 0.0), 8)],
)
def test_the_exact_flow_is_the_fixed_point(
    name: str, sigmas: tuple[float, ...], points: int
) -> None:
    """Loss 0 for the student that jumps along the ODE, in the limit of a fine teacher; and not for
    the naive one, the teacher's own velocity.
    """
    grid = trajectory.phase_grid(sigmas, points).double()
    mean, std = 0.7, 0.4
    teacher = gaussian_velocity(mean, std)
    for row in grid:
        for t, s in zip(row[1:], row[:-1], strict=True):
            rows = [value.expand(16) for value in (t, s, row[0])]
            x_t = flow.add_noise(mean + std * doubles(16, 5), doubles(16, 5, seed=1), rows[0])
            student = exact_student(mean, std, rows[2])
            target_model = None if name == "progressive" else student
            losses = [
                pcm_loss(student, target_model, teacher, x_t, *rows, steps, 1e-3).item()
                for steps in (16, 32, 400)
            ]
            assert losses[2] < 2e-3
            assert losses[2] < losses[1] < losses[0]
    naive = pcm_loss(teacher, None, teacher, x_t, rows[0], rows[2], rows[2], 400, 1e-3)
    assert naive > 20 * losses[2]


def test_only_the_student_gets_a_gradient() -> None:
    a, b, c = (torch.ones((), requires_grad=True) for _ in range(3))
    x, t = torch.randn(2, 3), torch.tensor([0.9, 0.8])
    loss = pcm_loss(
        lambda x, t: a * x, lambda x, t: b * x, lambda x, t: c * x, x, t, t - 0.1, t - 0.2, 2, 0.1
    )
    loss.backward()
    assert a.grad is not None
    assert b.grad is None
    assert c.grad is None


def test_renoising_within_a_phase_has_the_forward_process_variance() -> None:
    """x_e = (1-e) x0 + e eps moved to s is (1-s) x0 + s noise in law: mean and variance given x0.
    PCM's published root, (s - e) / (1 - e), fails the same test.
    """
    x0, count = 0.8, 200_000
    eps, noise = doubles(count), doubles(count, seed=1)
    for e, s in ((0.0, 0.3), (0.0, 0.7155), (0.7155, 0.9), (0.5, 0.5), (0.7155, 1.0)):
        levels = [torch.full((count,), value, dtype=torch.float64) for value in (e, s)]
        x_e = (1 - e) * x0 + e * eps
        x_s = flow.renoise_within(x_e, *levels, noise)
        assert x_s.mean().item() == pytest.approx((1 - s) * x0, abs=0.01)
        assert x_s.std().item() == pytest.approx(s, abs=0.01)
        if 0 < e < s < 1:
            published = ((1 - s) * x_e + (s - e) * noise) / (1 - e)
            assert published.std().item() < s - 0.05


# DMD


def test_the_dmd_gradient_is_the_score_difference() -> None:
    """For Gaussians with known scores s = -(x_t - mean_t) / var_t: s_fake - s_teacher = (1 - t) /
    t^2 (x0_fake - x0_teacher), times a positive normaliser per sample.
    """
    teacher, fake = (0.3, 0.5), (-0.2, 0.9)
    x, t = doubles(64, 7), torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    x_t = flow.add_noise(x, doubles(64, 7, seed=1), t)
    x0_teacher, x0_fake = (
        flow.to_x0(x_t, gaussian_velocity(*law)(x_t, t), t) for law in (teacher, fake)
    )
    gradient = dmd2.dmd_gradient(x, x0_teacher, x0_fake).double()

    def score(mean: float, std: float) -> torch.Tensor:
        time = flow.match(t, x)
        return -(x_t - (1 - time) * mean) / ((1 - time) ** 2 * std**2 + time**2)

    difference = score(*fake) - score(*teacher)
    time = flow.match(t, x)
    normaliser = (x - x0_teacher).abs().mean(1, keepdim=True)
    assert torch.allclose(gradient, difference * time**2 / (1 - time) / normaliser, atol=1e-5)


def test_descending_the_dmd_gradient_ends_at_the_teachers_distribution() -> None:
    """A student N(m, s^2) whose fake score is exact moves to the teacher's N(0.3, 0.5^2): true
    only if the gradient's sign is right and it vanishes there.
    """
    mean = torch.tensor(-1.0, requires_grad=True)
    std = torch.tensor(1.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean, std], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        x = mean + std * torch.randn(512, 1, generator=generator)
        t = 0.02 + 0.96 * torch.rand(512, generator=generator)
        x_t = flow.add_noise(x.detach(), torch.randn(512, 1, generator=generator), t)
        fake = gaussian_velocity(mean.item(), std.item())
        x0_teacher = flow.to_x0(x_t, gaussian_velocity(0.3, 0.5)(x_t, t), t)
        x0_fake = flow.to_x0(x_t, fake(x_t, t), t)
        optimizer.zero_grad()
        dmd2.dmd_loss(x, dmd2.dmd_gradient(x, x0_teacher, x0_fake)).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(0.3, abs=0.05)
    assert std.item() == pytest.approx(0.5, abs=0.05)


def test_the_dmd_loss_has_the_given_gradient() -> None:
    x, gradient = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    loss = dmd2.dmd_loss(x, gradient)
    loss.backward()
    assert torch.allclose(x.grad, gradient / gradient.numel(), atol=1e-7)
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)


def test_the_normaliser_is_per_sample_in_float32_and_never_zero() -> None:
    x = torch.tensor([[1.0, 3.0], [0.5, 0.5]], dtype=torch.bfloat16)
    teacher = torch.tensor([[0.0, 0.0], [0.5, 0.5]], dtype=torch.bfloat16)
    gradient = dmd2.dmd_gradient(x, teacher, teacher + 1)
    assert gradient.dtype == torch.float32
    assert gradient[0].tolist() == pytest.approx([0.5, 0.5])  # mean |x - x0| = 2
    assert torch.isfinite(gradient).all()
    assert gradient[1].tolist() == pytest.approx([1e5, 1e5])  # the floor


def test_decoupling_at_one_time_without_normalisers_is_dmd() -> None:
    """(fake - cond) + (cond - guided) = fake - guided, with CFG's sign."""
    fake, cond, uncond = (doubles(5, 4, seed=i) for i in range(3))
    guided = uncond + 4 * (cond - uncond)
    far = cond.new_full(cond.shape, 1e6)  # both normalisers alike
    got = dmd2.decoupled_gradient(far, cond, fake, cond, guided)
    assert torch.allclose(got, dmd2.dmd_gradient(far, guided, fake), rtol=1e-3, atol=1e-9)


def test_the_fake_score_loss_is_least_at_the_true_velocity() -> None:
    x0, eps = 0.4 + 0.6 * doubles(50_000, 1), doubles(50_000, 1, seed=1)
    t = torch.rand(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    best = dmd2.fake_score_loss(gaussian_velocity(0.4, 0.6), x0, eps, t).item()
    for mean, std in ((0.5, 0.6), (0.3, 0.6), (0.4, 0.7), (0.4, 0.5)):
        assert dmd2.fake_score_loss(gaussian_velocity(mean, std), x0, eps, t).item() > best
    perfect = dmd2.fake_score_loss(lambda x, time: eps - x0, x0, eps, t)
    assert perfect.item() == 0


@pytest.mark.parametrize("sigmas", [SIGMAS, (1.0, 0.9, 0.75, 0.5, 0.0), (0.95, 0.0)])
def test_backward_simulation_is_the_sampler(sigmas: tuple[float, ...]) -> None:
    """Its last step gives what the node's samplers give, noise for noise."""
    x = torch.randn(2, 4, 4, 4) * sigmas[0]
    velocity = gaussian_velocity(0.3, 0.5)
    last = len(sigmas) - 2
    noises = renoise_noise_sampler(x, 5)
    got = dmd2.backward_simulation(
        velocity, x, sigmas, "renoise", last, lambda i: noises(None, None)
    )
    expected = sample_renoise(
        denoiser(velocity), x, sigmas, noise_sampler=renoise_noise_sampler(x, 5)
    )
    assert torch.equal(got, expected)
    got = dmd2.backward_simulation(velocity, x, sigmas, "euler", last, lambda i: x)
    assert torch.allclose(got, sample_euler(denoiser(velocity), x, sigmas), atol=1e-6)


def test_only_the_last_simulated_step_keeps_a_graph() -> None:
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((t[0].item(), torch.is_grad_enabled(), x.requires_grad))
        return weight * x

    weight = torch.ones((), requires_grad=True)
    sigmas = (1.0, 0.9, 0.75, 0.0)
    x0 = dmd2.backward_simulation(velocity, torch.randn(2, 3), sigmas, "euler", 2, lambda i: None)
    assert x0.requires_grad
    assert [(pytest.approx(t), on, of) for t, on, of in seen] == [
        (1.0, False, False),
        (0.9, False, False),
        (0.75, True, False),
    ]


def test_unshift_undoes_shift() -> None:
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(flow.unshift(flow.shift(t, 3.0), 3.0), t, atol=1e-6)
    assert math.isclose(flow.unshift(torch.tensor(0.75), 3.0).item(), 0.5, rel_tol=1e-6)
