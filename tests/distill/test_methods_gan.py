"""The discriminator's parts: losses, crops of the VAE, DINO features, augmentations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)

from distill.config import ConfigError
from distill.methods import adversarial, augment, crops
from distill.methods import discriminator as d
from distill.methods.balance import Balance
from distill.models import vae
from distill.models.dino import load_dino
from distill.models.vae import QWEN_VAE, decode_with_gradient
from distill.stages import DiscriminatorSection, GANSection
from distill.training.engine import Engine
from distill.utils.rng import Rng

ENGINE = Engine(0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


def small_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKLQwenImage(
            base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1] * 16,
            temperal_downsample=[False, True, True], latents_std=[1.5] * 16,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


# Losses


def test_loss_values() -> None:
    logits = torch.tensor([[-2.0, 0.0], [0.5, 3.0]])
    assert adversarial.real_loss(logits, "hinge").item() == pytest.approx((3 + 1 + 0.5 + 0) / 4)
    assert adversarial.fake_loss(logits, "hinge").item() == pytest.approx((0 + 1 + 1.5 + 4) / 4)
    assert adversarial.generator_loss(logits, "hinge").item() == pytest.approx(-1.5 / 4)

    def softplus(sign: int) -> float:
        return sum(math.log1p(math.exp(sign * x)) for x in (-2.0, 0.0, 0.5, 3.0)) / 4

    assert adversarial.real_loss(logits, "softplus").item() == pytest.approx(softplus(-1))
    assert adversarial.fake_loss(logits, "softplus").item() == pytest.approx(softplus(1))
    assert adversarial.generator_loss(logits, "softplus").item() == pytest.approx(softplus(-1))


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_loss_directions(kind: str) -> None:
    """Descent: D raises reals and lowers fakes, G raises its fakes."""
    for loss, sign in (
        (adversarial.real_loss, -1),
        (adversarial.fake_loss, 1),
        (adversarial.generator_loss, -1),
    ):
        logits = torch.zeros(2, 3, requires_grad=True)
        loss(logits, kind).backward()
        assert (logits.grad * sign > 0).all()


def test_approximate_r1_is_the_squared_gradient_and_points_at_flatter_judges() -> None:
    """E |D(x) - D(x + sigma n)|^2 = sigma^2 |w|^2 for D = w . x, and its gradient is along w."""
    w = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    x, noise, sigma = torch.randn(100_000, 3), torch.randn(100_000, 3), 0.05
    r1 = adversarial.approximate_r1(x @ w, (x + sigma * noise) @ w)
    assert r1.item() == pytest.approx(sigma**2 * w.square().sum().item(), rel=0.03)
    r1.backward()
    assert torch.allclose(w.grad, 2 * sigma**2 * w.detach(), rtol=0.1, atol=2e-4)


def test_an_adversary_learns_to_tell_sources_apart_and_logs_each() -> None:
    """Teacher images are like the fakes here, real ones are not: their accuracies must differ."""
    torch.manual_seed(0)
    section = DiscriminatorSection(lr=5e-3, r1_gamma=0, width=16)
    adversary = adversarial.Adversary(d.PixelDiscriminator(16), section, ENGINE)

    def image(mean: float, step: int, name: str) -> d.View:
        return d.View(mean + 0.3 * Rng(0, step).normal(name, (8, 3, 16, 16)))

    for step in range(60):
        stripes = torch.arange(16).remainder(4).sub(1.5).mul(0.4)
        real = d.View(image(0, step, "real").x + stripes)
        sources = {"real": (0.5, real), "teacher": (0.5, image(0, step, "teacher"))}
        shown = adversarial.Exhibit(image(0, step, "fake"), sources, Rng(0, step))
        values = adversary.update([shown])
    assert values["gan/accuracy_real"] == 1
    # one loss for both: fakes outweigh the teacher's half share
    assert values["gan/accuracy_fake"] > 0.7
    assert values["gan/accuracy_teacher"] < 0.3


def test_the_penalty_keeps_a_discriminator_flat() -> None:
    def sensitivity(weight: float) -> float:
        torch.manual_seed(0)
        section = DiscriminatorSection(lr=5e-3, r1_weight=weight, r1_sigma=0.1, width=16)
        adversary = adversarial.Adversary(d.PixelDiscriminator(16), section, ENGINE)
        for step in range(40):
            real, fake = (
                d.View(m + 0.1 * Rng(0, step).normal(str(m), (8, 3, 16, 16))) for m in (0.3, -0.3)
            )
            adversary.update([adversarial.Exhibit(fake, {"real": (1.0, real)}, Rng(0, step))])
        with torch.no_grad():
            x = real.x
            logits = adversary.module([x])
            return adversarial.approximate_r1(
                logits, adversary.module([x + 0.1 * torch.randn_like(x)])
            ).item()

    assert sensitivity(100.0) < 0.3 * sensitivity(0.0)


def test_the_penalty_perturbs_what_is_judged() -> None:
    """The views after augmentation, by sigma: not the images before it."""
    seen: list[torch.Tensor] = []

    class Spy(d.PixelDiscriminator):
        @staticmethod
        def extract(view: d.View) -> list[torch.Tensor]:
            seen.append(view.x)
            return [view.x]

    section = GANSection(width=16, r1_sigma=0.01, augment=("translate", "colour", "cutout"))
    adversary = adversarial.Adversary(Spy(16), section, ENGINE, section.augment)
    fake, real, teacher = (d.View(torch.rand(4, 3, 16, 16)) for _ in range(3))
    sources = {"real": (0.5, real), "teacher": (0.5, teacher)}
    adversary.update([adversarial.Exhibit(fake, sources, Rng(0, 0))])
    views = seen[0].split(4)  # fake, real, teacher, real perturbed, teacher perturbed
    assert len(views) == 5
    for plain, original, perturbed in ((1, real, 3), (2, teacher, 4)):
        assert not torch.allclose(views[plain], original.x, atol=0.05)
        difference = views[perturbed] - views[plain]
        assert difference.std().item() == pytest.approx(0.01, rel=0.1)


def test_the_generators_gradient_touches_no_judge_and_raises_the_logits() -> None:
    torch.manual_seed(0)
    adversary = adversarial.Adversary(
        d.PixelDiscriminator(16), DiscriminatorSection(width=16), ENGINE
    )
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    gradient, values = adversary.gradient(d.View(x), x, Rng(0, 0))
    assert all(p.grad is None for p in adversary.module.parameters())
    better = adversary.module([(x - 10 * gradient).detach()])
    assert adversarial.generator_loss(better, "hinge").item() < values["loss/generator"]


def test_the_penaltys_weight_in_the_units_of_two_papers() -> None:
    """gamma / 2 |grad D|^2 whatever the noise; lambda is of one noise."""
    w = torch.tensor([1.0, -2.0, 0.5])
    x, noise = torch.randn(200_000, 3), torch.randn(200_000, 3)
    for sigma in (0.01, 0.2):
        section = DiscriminatorSection(r1_gamma=0.8, r1_sigma=sigma)
        r1 = adversarial.approximate_r1(x @ w, (x + sigma * noise) @ w).item()
        expected = 0.8 / 2 * w.square().sum().item()
        assert section.r1_lambda * r1 == pytest.approx(expected, rel=0.03)
    apt = DiscriminatorSection(r1_weight=100.0, r1_sigma=0.01)
    assert apt.r1_lambda == 100
    assert DiscriminatorSection(r1_gamma=0.02, r1_sigma=0.01).r1_lambda == pytest.approx(100)
    assert DiscriminatorSection().r1_lambda == pytest.approx(100)  # at sigma .05: gamma .5
    assert DiscriminatorSection(r1_gamma=0).r1_lambda == 0


def test_add_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = adversarial.add_gradient(x.square().sum(), x, torch.ones(3, 4))
    loss.backward()
    assert loss.item() == pytest.approx(x.square().sum().item())
    assert torch.allclose(x.grad, 2 * x + 1)


def test_the_weight_balances_averaged_norms() -> None:
    balance = Balance(ENGINE)
    assert balance.weight(0.25, True) == 0
    balance.accuracy(1.0)
    assert balance.weight(0.25, True) == 0  # no gradient was seen
    for main, other in (torch.rand(200, 2) * torch.tensor([2.0, 20.0])).tolist():
        balance.squares(main**2, other**2)
    assert balance.weight(0.25, True) == pytest.approx(0.25 / 10, rel=0.2)
    weight = balance.weight(0.25, True)
    balance.squares(math.nan, 1.0)  # one bad batch is no reason to forget
    balance.squares(1.0, math.inf)
    assert balance.weight(0.25, True) == weight
    again = Balance(ENGINE)
    again.load_state_dict(json.loads(json.dumps(balance.state_dict())))
    assert again.weight(0.25, True) == weight
    assert balance.weight(0.25, False) == weight
    balance.accuracy(0.5)
    assert balance.weight(0.25, True) < weight == balance.weight(0.25, False)


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_discriminator_at_chance_has_no_say(shuffled: bool) -> None:
    """With shuffled labels the weight goes to 0, where the ratio of the norms alone would blow its
    word up to full size; with true ones it stays.
    """
    torch.manual_seed(0)
    section = DiscriminatorSection(
        lr=2e-3, r1_gamma=0, width=16, ratio=0.3, by_accuracy=True, ramp=1
    )
    adversary = adversarial.Adversary(d.PixelDiscriminator(16), section, ENGINE)
    shares = []
    for step in range(150):
        rng = Rng(0, step)
        fake, real = (m + rng.normal(str(m), (8, 3, 16, 16)) for m in (-0.3, 0.3))
        if shuffled:
            swap = (rng.uniform("swap", 8) < 0.5).view(-1, 1, 1, 1)
            fake, real = torch.where(swap, real, fake), torch.where(swap, fake, real)
        leaf = fake.clone().requires_grad_()
        gradient, _ = adversary.gradient(d.View(leaf), leaf, rng)
        main = rng.normal("main", (8, 3, 16, 16))
        squares = (adversarial.square(main), adversarial.square(gradient))
        shares.append(adversary.weighed([squares], adversary.weight(step))["gan/gradient_ratio"])
        adversary.update([adversarial.Exhibit(d.View(fake), {"real": (1.0, d.View(real))}, rng)])
    late = sum(shares[100:]) / 50
    assert late < 0.05 * section.ratio if shuffled else late > 0.75 * section.ratio


# Crops


def test_decoding_by_hand_is_the_vaes_own() -> None:
    """Up to the clamp, with and without folded convolutions, in value and in gradient."""
    for model in (small_vae(), vae.fold_single_frame(small_vae())):
        z = torch.randn(2, 16, 6, 4)
        images = decode_with_gradient(model, z)
        assert images.shape == (2, 3, 48, 32)
        assert torch.allclose(images.clamp(-1, 1), vae.decode(model, z), atol=1e-5)
        leaf = z.clone().requires_grad_()
        direction = torch.randn_like(images)
        (got,) = torch.autograd.grad((decode_with_gradient(model, leaf) * direction).sum(), leaf)
        stored = model.decoder(model.post_quant_conv((leaf * 1.5 + 0.1)[:, :, None]))[:, :, 0]
        (expected,) = torch.autograd.grad((stored * direction).sum(), leaf)
        assert torch.allclose(got, expected, atol=1e-5)


def without_attention(model: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    for attention in model.decoder.mid_block.attentions:
        nn.init.zeros_(attention.proj.weight)
        nn.init.zeros_(attention.proj.bias)
    return model


def centre_error(model: AutoencoderKLQwenImage, halo: int, side: int = 20) -> float:
    """RMS difference of cropped and full decode over the image's own standard deviation."""
    z = torch.randn(4, 16, side, side, generator=torch.Generator().manual_seed(0))
    full = decode_with_gradient(model, z)
    windows = [crops.span(side, 6 + 2 * halo, halo, u) for u in (0.0, 0.4, 0.7, 0.99)]
    cropped = crops.decode_crops(QWEN_VAE, model, z, windows, windows[::-1])
    expected = torch.stack(
        [
            x[
                :,
                8 * (v.start + v.cut) : 8 * (v.start + v.cut + v.inner),
                8 * (h.start + h.cut) : 8 * (h.start + h.cut + h.inner),
            ]
            for x, v, h in zip(full, windows, windows[::-1], strict=True)
        ]
    )
    assert cropped.shape == expected.shape == (4, 3, 48, 48)
    return ((cropped - expected).std() / full.std()).item()


def test_a_crops_centre_is_the_full_decodes() -> None:
    """Convolutions reach 13.5 latents here: a halo of 14 makes the centre exact, a smaller one
    nearly. The middle block's attention is global: with it the centre agrees only nearly, whatever
    the halo; 5 % of the image's standard deviation is allowed at random weights.
    """
    local = without_attention(small_vae())
    errors = [centre_error(local, halo) for halo in (0, 2, 6)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02
    assert centre_error(local, 14, side=40) < 1e-6
    assert centre_error(small_vae(), 14, side=40) < 0.05


def test_windows_reach_every_latent_and_stay_inside() -> None:
    side, crop, halo = 20, 10, 3
    kept = torch.zeros(side)
    for u in torch.linspace(0, 0.9999, 300).tolist():
        s = crops.span(side, crop, halo, u)
        assert (s.length, s.inner) == (crop, crop - 2 * halo)
        assert 0 <= s.start <= side - crop
        first = s.start + s.cut
        kept[first : first + s.inner] += 1
        assert s.cut >= halo or s.start == 0
        assert s.length - s.cut - s.inner >= halo or s.start == side - crop
    assert (kept > 0).all()
    assert crops.span(8, 10, 3, 0.5) == crops.Span(0, 8, 0, 8)


# DINO


def dino(kind: str, folder: Path) -> Path:
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
             "intermediate_size": 32, "image_size": 28}  # fmt: skip
    torch.manual_seed(0)
    model = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(patch_size=14, **sizes)),
        "registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(patch_size=14, num_register_tokens=3, **sizes)
        ),
        "dinov3": lambda: DINOv3ViTModel(
            DINOv3ViTConfig(patch_size=16, num_register_tokens=2, **sizes)
        ),
        "vit": lambda: ViTModel(ViTConfig(patch_size=14, **sizes)),
    }[kind]()
    model.save_pretrained(folder / kind)
    return folder / kind


@pytest.mark.parametrize(("kind", "patch"), [("dinov2", 14), ("registers", 14), ("dinov3", 16)])
def test_dino_features_are_maps_of_its_patch_tokens(kind: str, patch: int, tmp_path: Path) -> None:
    section = GANSection(width=8, layers=(0.25, 0.5, 1.0))
    judge = d.dino_discriminator(section, str(dino(kind, tmp_path)), torch.float32, CPU)
    assert all("head" in name for name, _ in judge.named_parameters())
    x = torch.randn(2, 3, 5 * patch + 5, 3 * patch + 1).requires_grad_()
    maps = judge.extract(d.View(x))
    assert [m.shape for m in maps] == [(2, 24, 5, 3)] * 3
    logits = judge(maps)
    assert logits.shape == (2, 3 * 15)
    logits.sum().backward()
    covered = x.grad.abs().sum((0, 1))
    assert covered[2 : 2 + 5 * patch, :].any()
    assert covered[0].sum() == covered[-1].sum() == 0  # outside the middle that patches cover


def test_a_dino_map_has_the_place_of_its_patch(tmp_path: Path) -> None:
    """With class and register tokens dropped and rows before columns: changing one patch changes
    the first layer's map most at that place.
    """
    for kind, patch in (("dinov2", 14), ("registers", 14), ("dinov3", 16)):
        section = GANSection(width=8, layers=(0.25,))
        judge = d.dino_discriminator(section, str(dino(kind, tmp_path)), torch.float32, CPU)
        x = torch.zeros(1, 3, 4 * patch, 6 * patch)
        y = x.clone()
        y[..., 2 * patch : 3 * patch, 5 * patch :] = torch.randn(3, patch, patch) * 3
        with torch.no_grad():
            change = (judge.extract(d.View(y))[0] - judge.extract(d.View(x))[0]).abs().sum(1)
        assert divmod(int(change.argmax()), 6) == (2, 5), kind


def test_what_is_no_dino_is_refused(tmp_path: Path) -> None:
    for path, words in (
        (str(dino("vit", tmp_path)), ["vit", "dinov2"]),
        (str(tmp_path / "nothing"), ["nothing", "pixels"]),
    ):
        with pytest.raises(ConfigError) as error:
            load_dino(path, torch.float32)
        for word in ("gan.features", *words):
            assert word in str(error.value)


# Augmentations


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_augmentations_are_differentiable_and_drawn_from_the_rng(name: str) -> None:
    x = torch.randn(64, 3, 16, 24, requires_grad=True)
    once, again = (augment.augment(x, [name], Rng(0, 0), "a") for _ in range(2))
    other = augment.augment(x, [name], Rng(0, 1), "a")
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == x.shape
    once.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad != 0).float().mean() > 0.5


def test_augmentations_do_what_they_say() -> None:
    x = torch.randn(64, 3, 16, 24)

    def drawn(value: float):
        return lambda name: torch.full((64,), value)

    assert torch.equal(augment.flip(x, drawn(0.1)), x.flip(-1))
    assert torch.equal(augment.flip(x, drawn(0.9)), x)
    moved = augment.translate(x, drawn(0.0))  # content moves down and right by an eighth
    assert torch.equal(moved[:, :, 2:, 3:], x[:, :, :-2, :-3])
    assert (moved[:, :, :2] == 0).all()
    assert torch.allclose(augment.colour(x, drawn(0.5)), x, atol=1e-6)
    cut = augment.cutout(torch.ones(64, 3, 16, 24), drawn(0.5))
    assert (cut == 0).float().mean().item() == pytest.approx(0.25, abs=0.08)
