"""Qwen-Image-2.1: our calls of transformer, VAE and text encoder are those of diffusers' pipeline,
on a random model of the published classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from PIL import Image
from random_pipelines import TEXT_WIDTH, write_pipeline
from torch import Tensor
from toy_model import toy_shape_21

from distill.config import AdapterSection, ConfigError, GuidanceSection, load_config, parse_config
from distill.contract.schedule import schedule
from distill.contract.shift import LinearShift
from distill.contract.spec import TurboSpec
from distill.models import qwen_image21
from distill.models.family import family, family_of, for_base, spec_of, tell_licence
from distill.models.load import load_transformer, load_vae
from distill.models.pipeline import Base, as_text, embed
from distill.models.roles import STUDENT, TEACHER, Roles
from distill.models.sample import noise_of_seeds, sample_student, sample_teacher
from distill.models.text import Text
from distill.training.estimate.memory import memory_bytes
from distill.training.estimate.shape import model_shape
from distill.utils.images import to_unit

FAMILY = family("qwen-image-2.1")
PROMPTS = ["a cat", "a dog in the rain, seen from afar", "the sea at night"]
SIZE = (96, 64)  # not square
CPU = torch.device("cpu")
SHIFT = LinearShift((256, 8192), (0.5, 0.9))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("models") / "qwen21", "qwen-image-2.1")


@pytest.fixture(scope="module")
def texts(model: Path) -> dict[str, Tensor]:
    return embed(Base(str(model), model, FAMILY), PROMPTS, CPU)


@pytest.fixture
def transformer() -> QwenImage21Transformer2DModel:
    torch.manual_seed(0)
    return QwenImage21Transformer2DModel(**toy_shape_21(text_width=TEXT_WIDTH)).eval()


def pipeline_of(model: Path, dtype: torch.dtype = torch.float32) -> QwenImage21Pipeline:
    pipeline = QwenImage21Pipeline.from_pretrained(model, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def roles_of(transformer: Any, texts: dict[str, Tensor], scale: float = 1.0, **keys: Any) -> Roles:
    guidance = GuidanceSection(scale=scale, rescale=False)
    negative = Text(texts[""][None])
    return Roles(transformer, AdapterSection(rank=2), guidance, negative, 0, **keys)


def start(count: int) -> Tensor:
    """Noise of images of SIZE."""
    return noise_of_seeds(range(count), (64, SIZE[1] // 16, SIZE[0] // 16))


def theirs(pipeline: QwenImage21Pipeline, prompts: list[str], noise: Tensor, **keys: Any) -> Tensor:
    """Latents of diffusers' pipeline for the same noise."""
    latents = pipeline(
        prompts,
        width=SIZE[0],
        height=SIZE[1],
        latents=noise.flatten(2).mT,
        output_type="latent",
        **keys,
    ).images
    return latents.float().mT.unflatten(2, noise.shape[-2:])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def guided(scale: float, count: int) -> dict[str, Any]:
    return {"true_cfg_scale": scale, "negative_prompt": [" "] * count} if scale > 1 else {}


# ------------------------------------------------------------------- the teacher is the pipeline


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_draws_what_the_pipeline_draws(
    model: Path, texts: dict[str, Tensor], scale: float
) -> None:
    """Prompts of different length in one batch of ours, one by one in the pipeline."""
    pipeline, noise = pipeline_of(model), start(len(PROMPTS))
    roles = roles_of(load_transformer(str(model), torch.float32), texts, scale, adapters=())
    sigmas = FAMILY.sigmas(model, 5, SIZE)
    with torch.no_grad():
        ours = sample_teacher(roles, sigmas, noise, as_text([texts[p] for p in PROMPTS]))
    for mine, prompt, x in zip(ours, PROMPTS, noise.split(1), strict=True):
        expected = theirs(pipeline, [prompt], x, num_inference_steps=5, **guided(scale, 1))
        assert relative(mine[None], expected) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_so_it_does_a_batch_of_one_length(
    model: Path, texts: dict[str, Tensor], scale: float
) -> None:
    pipeline, noise = pipeline_of(model), start(2)
    roles = roles_of(load_transformer(str(model), torch.float32), texts, scale, adapters=())
    text = as_text([texts["a cat"]] * 2)
    assert text.mask is None
    with torch.no_grad():
        ours = sample_teacher(roles, FAMILY.sigmas(model, 3, SIZE), noise, text)
    expected = theirs(pipeline, ["a cat"] * 2, noise, num_inference_steps=3, **guided(scale, 2))
    assert relative(ours, expected) < 1e-5


def test_padding_moves_the_image_in_the_pipeline_and_not_here(
    model: Path, texts: dict[str, Tensor]
) -> None:
    """Why samples of prompts of different length are computed one by one."""
    pipeline, noise = pipeline_of(model), start(2)
    both = theirs(pipeline, PROMPTS[:2], noise, num_inference_steps=3)
    alone = theirs(pipeline, PROMPTS[:1], noise[:1], num_inference_steps=3)
    assert relative(both[:1], alone) > 1e-4  # the shorter prompt's
    roles = roles_of(load_transformer(str(model), torch.float32), texts, adapters=())
    x, t = start(2), torch.tensor([0.9, 0.4])
    with torch.no_grad():
        together = roles.velocity(TEACHER, x, t, as_text([texts[p] for p in PROMPTS[:2]]))
        first = roles.velocity(TEACHER, x[:1], t[:1], Text(texts["a cat"][None]))
    assert torch.equal(together[:1], first)


def test_bf16_errs_by_what_its_rounding_costs(model: Path, texts: dict[str, Tensor]) -> None:
    """Against the pipeline in fp32. The measure is what rounding the weights to bf16 does to a
    computation in fp32; the pipeline in bf16 rounds times too, and is further off.
    """
    noise, text = start(1), Text(texts[PROMPTS[1]][None])
    sigmas = FAMILY.sigmas(model, 5, SIZE)
    exact, pipelines = (
        theirs(pipeline_of(model, dtype), PROMPTS[1:2], noise.to(dtype), num_inference_steps=5)
        for dtype in (torch.float32, torch.bfloat16)
    )

    def ours(transformer: Any) -> float:
        with torch.no_grad():
            roles = roles_of(transformer, texts, adapters=())
            return relative(sample_teacher(roles, sigmas, noise, text), exact)

    rounded = load_transformer(str(model), torch.float32)
    for parameter in rounded.parameters():
        parameter.data = parameter.bfloat16().float()
    weights = ours(rounded)
    assert 1e-4 < weights < 0.02
    assert ours(load_transformer(str(model), torch.bfloat16)) < 3 * weights
    assert relative(pipelines, exact) > 3 * weights


def test_bf16_keeps_the_time_in_float32(transformer: QwenImage21Transformer2DModel) -> None:
    bf16 = transformer.bfloat16()
    seen: list[Tensor] = []
    bf16.time_text_embed.register_forward_hook(lambda module, args, out: seen.append(out))
    x, text = torch.randn(2, 64, 4, 4), Text(torch.randn(2, 3, TEXT_WIDTH))
    t = torch.tensor([0.7155, 0.71484375])
    assert t[0].bfloat16() == t[1]
    with torch.no_grad():
        qwen_image21.velocity(bf16, x, t, text)
        alone = bf16.time_text_embed(torch.cat([t, torch.zeros(1)]), x.bfloat16())
    assert torch.equal(seen[0], alone)
    assert not torch.equal(alone[0], alone[1])


def test_guided_velocity_is_two_passes(transformer: QwenImage21Transformer2DModel) -> None:
    text, negative = Text(torch.randn(3, 4, TEXT_WIDTH)), Text(torch.randn(1, 2, TEXT_WIDTH))
    x, t = torch.randn(3, 64, 4, 2), torch.rand(3)
    call = qwen_image21.velocity_pair
    with torch.no_grad():
        cond, found = call(transformer, x, t, text, negative, 4.0, False)
        assert torch.equal(cond, qwen_image21.velocity(transformer, x, t, text))
        uncond = qwen_image21.velocity(transformer, x, t, negative.repeat(3))
        rescaled = call(transformer, x, t, text, negative, 4.0, True)[1]
    assert torch.allclose(found, uncond + 4 * (cond - uncond), atol=1e-5)
    assert torch.allclose(rescaled.norm(dim=1), cond.norm(dim=1), rtol=1e-4)


# ---------------------------------------------------------------- prompts are computed once


@contextmanager
def counted(transformer: Any) -> Iterator[list[int]]:
    """Tokens that pass through the first block, per forward."""
    lengths: list[int] = []
    hook = transformer.transformer_blocks[0].attn.to_q.register_forward_hook(
        lambda module, args, out: lengths.append(args[0].shape[1])
    )
    try:
        yield lengths
    finally:
        hook.remove()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_computes_prompts_once(
    model: Path, texts: dict[str, Tensor], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = roles_of(load_transformer(str(model), torch.float32), texts, scale, adapters=())
    sigmas, noise = FAMILY.sigmas(model, 3, SIZE), start(2)
    text = as_text([texts[p] for p in PROMPTS[:2]])
    image = 6 * 4
    words = [len(texts[p]) for p in PROMPTS[:2]] + [len(texts[""])] * (scale > 1)
    with counted(roles.transformer) as lengths, torch.no_grad():
        remembered = sample_teacher(roles, sigmas, noise, text)
    passes = len(words)
    assert lengths == [n + image for n in words] + [image] * (2 * passes)
    monkeypatch.setattr(Text, "remembering", lambda text: text)
    with counted(roles.transformer) as lengths, torch.no_grad():
        each_time = sample_teacher(roles, sigmas, noise, text)
    assert lengths == 3 * [n + image for n in words]
    assert relative(remembered, each_time) < 1e-6


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_students_second_step_does_not_compute_the_prompt(
    model: Path, texts: dict[str, Tensor], sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter that changes what prompts become: the teacher's keys are not its own."""
    roles = roles_of(load_transformer(str(model), torch.float32), texts)
    with torch.no_grad():
        for parameter in roles.parameters(STUDENT):
            parameter.add_(0.1)
    spec = TurboSpec((1.0, 0.5, 0.0), SHIFT, family="qwen-image-2.1", sampler=sampler)
    noise, text = start(1), Text(texts[PROMPTS[1]][None])

    def draw() -> tuple[Tensor, Tensor]:
        student = sample_student(roles, spec, noise, text)
        return student, sample_student(roles, spec, noise, text, role=TEACHER)

    with counted(roles.transformer) as lengths, torch.no_grad():
        remembered = draw()
    assert lengths == 2 * [24 + text.embeds.shape[1], 24]
    monkeypatch.setattr(Text, "remembering", lambda text: text)
    with torch.no_grad():
        each_time = draw()
    for found, expected in zip(remembered, each_time, strict=True):
        assert relative(found, expected) < 1e-6
    assert relative(remembered[0], remembered[1]) > 1e-3


def test_gradients_reach_the_prompt_though_a_text_remembers(
    transformer: QwenImage21Transformer2DModel, texts: dict[str, Tensor]
) -> None:
    roles = roles_of(transformer, texts)
    x, t, text = start(1), torch.tensor([0.5]), Text(texts["a cat"][None])
    found = []
    for prompt in (text, text.remembering()):
        with torch.no_grad():
            roles.velocity(STUDENT, x, t, prompt)
        roles.velocity(STUDENT, x, t, prompt).square().mean().backward()
        found.append([p.grad.clone() for p in roles.parameters(STUDENT)])
        for parameter in roles.parameters(STUDENT):
            parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_model_without_causal_condition_remembers_nothing(texts: dict[str, Tensor]) -> None:
    """Its prompts follow the time."""
    torch.manual_seed(0)
    shape = toy_shape_21(text_width=TEXT_WIDTH) | {"causal_condition": False}
    transformer = QwenImage21Transformer2DModel(**shape).eval()
    text = Text(texts["a cat"][None]).remembering()
    with counted(transformer) as lengths, torch.no_grad():
        for t in (0.9, 0.3):
            qwen_image21.velocity(transformer, start(1), torch.tensor([t]), text)
    assert lengths == [24 + len(texts["a cat"])] * 2


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("padded", [False, True])
def test_every_adapter_gets_a_gradient(
    transformer: QwenImage21Transformer2DModel, texts: dict[str, Tensor], padded: bool
) -> None:
    """The last block's prompt tokens are not used, but their keys and values are."""
    roles = roles_of(transformer, texts)
    text = as_text([texts[p] for p in (PROMPTS[:2] if padded else PROMPTS[:1] * 2)])
    assert (text.mask is not None) == padded
    with torch.no_grad():
        for name, parameter in roles.named_parameters(STUDENT).items():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
            transformer.train()
        x, t = start(2), torch.tensor([0.9, 0.2])
        with roles.use_role(STUDENT):  # checkpointed blocks run again
            roles.velocity(STUDENT, x, t, text).square().mean().backward()
        parameters = roles.named_parameters(STUDENT)
        assert all(p.grad is not None and p.grad.any() for p in parameters.values())
        grads.append([p.grad.clone() for p in parameters.values()])
        for parameter in parameters.values():
            parameter.grad = None
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
    adapted = {name.split(".lora_")[0].split(".", 2)[2] for name in parameters}
    assert adapted == {
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"img_mlp.{name}" for name in ("gate_layer", "proj", "out")),
    }


def test_modulation_and_text_projection_on_request(
    transformer: QwenImage21Transformer2DModel, texts: dict[str, Tensor]
) -> None:
    adapter = AdapterSection(rank=2, modulation=True)
    guidance, negative = GuidanceSection(scale=1), Text(texts[""][None])
    roles = Roles(transformer, adapter, guidance, negative, 0)
    modules = {name.split(".lora_")[0] for name in roles.named_parameters(STUDENT)}
    top = {name for name in modules if not name.startswith("transformer_blocks.")}
    assert top == {"modulation.1", "txt_in.in_layer", "txt_in.out_layer"}
    assert len(modules) == 3 + 2 * 7


def test_hidden_maps_are_the_images_tokens(
    transformer: QwenImage21Transformer2DModel, texts: dict[str, Tensor]
) -> None:
    roles = roles_of(transformer, texts)
    x, t = start(2).requires_grad_(), torch.tensor([0.9, 0.2])
    text = as_text([texts[p] for p in PROMPTS[:2]])
    maps = roles.teacher_features(x, t, text, (0.5, 1.0))
    assert [tuple(m.shape) for m in maps] == [(2, roles.width, 4, 6)] * 2
    one = roles.teacher_features(x[1:], t[1:], Text(texts[PROMPTS[1]][None]), (0.5, 1.0))
    assert all(torch.allclose(m[1:], o, atol=1e-6) for m, o in zip(maps, one, strict=True))
    sum(m.sum() for m in maps).backward()
    assert x.grad.flatten(1).any(1).all()
    with torch.no_grad():  # a place of the image is a place of the map
        moved = x.detach().clone()
        moved[:, :, 3, 5] += 5
        change = (roles.teacher_features(moved, t, text, (0.5,))[0] - maps[0]).norm(dim=1)
    assert (change.flatten(1).argmax(1) == 3 * 6 + 5).all()


# ------------------------------------------------------------------- what stands around it


def test_prompts_are_embedded_as_the_pipeline_does_it(
    model: Path, texts: dict[str, Tensor]
) -> None:
    pipeline = pipeline_of(model)
    for prompt in (*PROMPTS, ""):
        expected, mask, _ = pipeline.encode_prompt(prompt, device=CPU)
        assert mask is None
        torch.testing.assert_close(texts[prompt], expected[0], rtol=1e-4, atol=1e-5)


def test_a_prompt_of_too_many_tokens_is_refused(model: Path) -> None:
    encoder = FAMILY.text_encoder(model, CPU, torch.float32)
    assert encoder.refuses("a cat " * 3000) == ""
    assert encoder.refuses("a cat " * 9000).startswith("expected a prompt of at most 7,936 tokens")


def test_images_are_opaque_to_the_vae(model: Path) -> None:
    """As the pipeline reads a picture without alpha, and shows one with it on white."""
    pipeline, vae = pipeline_of(model), load_vae(str(model))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    rgba = pipeline.image_processor.preprocess(Image.fromarray(pixels).convert("RGBA"))
    expected = pipeline._encode_vae_image(rgba[:, :, None], None)[:, :, 0]
    images = to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    mean, std = FAMILY.vae.encode(vae, images)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
    assert std.shape == mean.shape == (1, 64, 4, 6)

    latents = 3 * torch.randn(1, 64, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = FAMILY.vae.decode(vae, latents)
        statistics = (torch.tensor(vae.config[f"latents_{key}"]) for key in ("mean", "std"))
        mean, std = (values.view(1, -1, 1, 1) for values in statistics)
        raw = pipeline.vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    picture = pipeline.image_processor.postprocess(raw)[0]
    assert picture.mode == "RGBA"
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    shown = to_unit(torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1)[None])
    assert (drawn - shown).abs().max() < 0.03  # levels of a picture


def test_decoding_with_a_gradient_is_decoding(model: Path) -> None:
    vae = load_vae(str(model))
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.3)  # nothing to clamp
    latents = torch.randn(2, 64, 2, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    images = FAMILY.vae.decode_with_gradient(vae, latents)
    assert images.shape == (2, 3, 32, 64)
    expected = FAMILY.vae.decode(vae, latents.detach())
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01
    images.square().sum().backward()
    assert latents.grad.isfinite().all()
    assert latents.grad.flatten(1).any(1).all()


def test_sizes_are_multiples_of_32_pixels() -> None:
    assert FAMILY.buckets(1024)[0] == (1024, 1024)
    assert FAMILY.buckets(2048)[:2] == ((2048, 2048), (2752, 1536))
    for resolution in (64, 512, 1024, 1536, 2048):
        for width, height in FAMILY.buckets(resolution):
            assert width % 32 == height % 32 == 0
            assert 0.7 < width * height / resolution**2 < 1.4 or resolution == 64
    assert FAMILY.tokens((1024, 1024)) == FAMILY.tokens_of_latents(64, 64) == 4096


@pytest.mark.parametrize("size", [(1024, 1024), (2752, 1536), (64, 96)])
def test_the_schedule_of_the_base_model(model: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    """Of its scheduler file, and the same where a folder has none; the spec's rule is that one."""
    tokens = FAMILY.tokens(size)
    mu = 0.5 + 0.4 * (tokens - 256) / (8192 - 256)
    expected = pytest.approx(schedule(8, mu=mu), abs=1e-6)
    assert FAMILY.sigmas(model, 8, size) == expected
    assert FAMILY.sigmas(tmp_path, 8, size) == expected
    assert TurboSpec(tuple(schedule(8)), SHIFT).sigmas(tokens) == expected


# ----------------------------------------------------------------------------------- the recipe


def recipe(path: str = "Qwen/Qwen-Image-2.1", **keys: Any) -> Any:
    values = {"model": {"path": path}, "data": {"cache": "c"}} | keys
    return parse_config({**values, "stages": [{"method": "pcm", "steps": 1}]}, "test")


def test_the_teacher_is_not_guided_unless_the_recipe_says_so() -> None:
    assert for_base(recipe()).guidance == GuidanceSection(scale=1, rescale=False)
    some = for_base(recipe(guidance={"scale": 2.5})).guidance
    assert some == GuidanceSection(scale=2.5, rescale=False)
    assert for_base(recipe("Qwen/Qwen-Image-2512")).guidance == GuidanceSection()
    assert for_base(recipe("Qwen/Qwen-Image-2512", guidance={"scale": 1})).guidance.rescale


def test_what_it_cannot_do_is_told() -> None:
    half = {"cache": "c", "buckets": [[64, 48]]}
    with pytest.raises(ConfigError, match=r"data\.buckets: .* 32 pixels .* \(found 64x48\)"):
        for_base(recipe(data=half))
    for_base(recipe("Qwen/Qwen-Image-2512", data=half))
    with pytest.raises(ConfigError, match=r"spec\.resolutions: expected multiples of 32"):
        for_base(recipe(spec={"sigmas": [1, 0.5, 0], "resolutions": [[1024, 1040]]}))
    offload = {"path": "Qwen/Qwen-Image-2.1", "offload_modulation": True}
    with pytest.raises(ConfigError, match=r"model\.offload_modulation: expected false"):
        for_base(recipe(model=offload))


def test_the_licence_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tell_licence(recipe("Qwen/Qwen-Image-2512"))
        assert not caplog.records
        tell_licence(recipe())
    assert "Qwen Research License Agreement: research and evaluation only" in caplog.text


def test_it_is_known_by_its_folder(model: Path) -> None:
    assert family_of(str(model)) is FAMILY
    assert family_of("Qwen/Qwen-Image-2.1") is FAMILY
    config = json.loads((model / "transformer" / "config.json").read_text())
    assert config["causal_condition"]


RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("qwen_image_2_1_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_say_what_diffusers_would_do(path: Path) -> None:
    """Evenly spaced nodes that the base's own shift moves, no guidance; and that they fit."""
    config = for_base(load_config(path))
    spec = spec_of(config)
    assert spec.version == 2
    for size in spec.resolutions:
        expected = schedule(spec.steps, shift=SHIFT.factor(FAMILY.tokens(size), spec.steps))
        assert spec.sigmas(FAMILY.tokens(size)) == pytest.approx(expected)
    assert config.guidance == FAMILY.guidance
    shape = model_shape(config)
    assert shape.parameters == pytest.approx(7.12e9, rel=1e-3)
    assert len(shape.lora) == 32 * 7
    limit = 23e9 if path.stem[-5:] == "2step" else 48e9
    assert sum(memory_bytes(config, shape)[1].values()) < limit
