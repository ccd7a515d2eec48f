"""`turbo-distill sample`: the sampler's pictures, and they say how they were made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from random_pipelines import write_pipeline

from distill import cli
from distill.commands.options import parse_size
from distill.commands.sample import Job, plan, save_image
from distill.config import TINY, AdapterSection, ConfigError, GuidanceSection
from distill.contract.lora_keys import LoraFormatError, LoraModule, NormalisedLora, delta, to_comfy
from distill.contract.metadata import read_lora, write_lora
from distill.contract.sampling import renoise_noise_sampler
from distill.contract.spec import TurboSpec
from distill.contract.tiny import BASE_NAME, TINY_DIR, embed_prompt
from distill.lora.source import open_source
from distill.lora.student import load_student
from distill.models import qwen_image
from distill.models.load import load_transformer, load_vae
from distill.models.pipeline import (
    Pipeline,
    as_text,
    attach,
    embed,
    find_base,
    image_size,
    noise_of_seeds,
    scaled,
    teacher_guidance,
)
from distill.models.roles import Roles
from distill.models.sample import sample_student, sample_teacher, teacher_sigmas
from distill.models.text import Text
from distill.models.vae import decode

LORA = TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors"
PROMPT = "a red letter K"
SPEC = TurboSpec((1.0, 0.7155, 0.0), base=BASE_NAME, resolutions=((64, 64),))
CPU = torch.device("cpu")


def run_sample(*words: object) -> int:
    return cli.main(["sample", *map(str, words)])


def test_a_picture_that_appeared_meanwhile_stays(tmp_path: Path) -> None:
    job = Job("mine", PROMPT, 0, tmp_path / "x.png")
    job.path.write_text("of another")
    with pytest.raises(FileExistsError, match=r"x\.png appeared while it was being written"):
        save_image(torch.zeros(3, 4, 4, dtype=torch.uint8), job, {})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of another"]


def pixels(path: Path) -> torch.Tensor:
    """[3, H, W] in [-1, 1]"""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 127.5 - 1


def copied(path: Path, **changes: object) -> Path:
    """The shipped LoRA with another spec."""
    tensors, _ = read_lora(LORA)
    values = {"nodes": (1.0, 0.7155, 0.0), "base": BASE_NAME, **changes}
    return write_lora(path, tensors, spec=TurboSpec(**values), title="copy")


@pytest.fixture(scope="module")
def roles() -> Roles:
    """The shipped LoRA as the trainer plays it."""
    adapter = AdapterSection(rank=32)
    guidance = GuidanceSection(scale=3.5, rescale=False)
    transformer = load_transformer(TINY, torch.float32)
    roles = Roles(transformer, adapter, guidance, Text(embed_prompt("")[None]), 0)
    load_student(roles, LORA)
    return roles


def test_pictures_are_those_of_the_sampler(roles: Roles, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    asked = ("--prompt", PROMPT, "--prompt", "an even number", "--seed", 3, "--count", 2)
    assert run_sample(LORA, *asked, "--teacher", "--teacher-steps", 4, "--out", out) == 0
    names = {path.name for path in out.iterdir()}
    arms = ("tiny_turbo_2_steps", "teacher")
    expected = {f"{arm}_00{p}_seed{s}.png" for arm in arms for p in (1, 2) for s in (3, 4)}
    assert names == expected | {"sheet.png"}
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    text = Text(embed_prompt(PROMPT)[None])
    vae = load_vae(TINY)
    with torch.no_grad():
        student = decode(vae, sample_student(roles, SPEC, noise, text))[0]
        teacher = decode(vae, sample_teacher(roles, teacher_sigmas(4, 2.0), noise, text))[0]
    found = pixels(out / "tiny_turbo_2_steps_001_seed4.png")
    assert (found - student).abs().max() <= 1.5 / 127.5
    assert (pixels(out / "teacher_001_seed4.png") - teacher).abs().max() <= 1.5 / 127.5
    assert (student - teacher).abs().max() > 0.1
    assert (found - pixels(out / "tiny_turbo_2_steps_001_seed3.png")).abs().max() > 0.1


def test_a_picture_says_how_it_was_made(tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    run_sample(LORA, "--prompt", PROMPT, "--out", out, "--seed", 9, "--teacher",
               "--teacher-steps", 2)  # fmt: skip
    text = Image.open(out / "tiny_turbo_2_steps_001_seed9.png").text
    assert text["turbo.prompt"] == text["Description"] == PROMPT
    assert text["turbo.seed"] == "9"
    assert TurboSpec.from_json(text["turbo.spec"]).sigmas() == (1.0, 0.7155, 0.0)
    assert text["turbo.lora"] == "tiny_turbo_2_steps"
    assert not {"prompt", "parameters", "workflow"} & set(text)  # ComfyUI would read those
    text = Image.open(out / "teacher_001_seed9.png").text
    assert text["turbo.teacher"] == "2 steps, guidance 3.5"
    assert "turbo.spec" not in text
    assert Image.open(out / "sheet.png").size[0] > 128


def test_nothing_is_overwritten_and_nothing_is_loaded_before_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "tiny_turbo_2_steps_001_seed1.png"
    taken.write_bytes(b"mine")
    monkeypatch.setattr(
        "distill.models.pipeline.load_transformer", lambda *_: pytest.fail("was loaded")
    )
    assert run_sample(LORA, "--prompt", PROMPT, "--out", tmp_path, "--count", 2) == 2
    assert "seed1.png exists" in capsys.readouterr().err
    assert taken.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a purple cow"], "does not know the word"),
        (["--prompt", " "], "not empty"),
        ([], "at least one prompt"),
        (["--prompt", PROMPT, "--size", "60x64"], "multiples of 16"),
        (["--prompt", PROMPT, "--count", "0"], "--count"),
        (["--prompt", PROMPT, "--guidance", "0.5"], "--guidance"),
        (["--prompt", PROMPT, "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_sample(LORA, "--out", tmp_path / "x", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_sizes_and_names() -> None:
    assert parse_size("1328x928") == (1328, 928)
    for text in ("0x928", "1328x0", "00x7", "1328x-1", "9" * 99 + "x5", "1328", "x", "1.5x2"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected WxH"):
            parse_size(text)
    base = find_base(SPEC)
    assert base.family.embedded
    assert image_size(SPEC, base, None) == (64, 64)
    assert image_size(SPEC, base, (96, 64)) == (96, 64)
    jobs = plan(Path("no"), ["a", "b"], ["x", "y"], 5, 2)
    assert [(job.arm, job.prompt, job.seed) for job in jobs[:3]] == [
        ("a", "x", 5),
        ("a", "x", 6),
        ("a", "y", 5),
    ]
    assert len({job.path for job in jobs}) == 8


def test_loras_of_one_name_or_of_two_bases_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    twin = copied(tmp_path / "a" / LORA.name)
    words = ("--prompt", PROMPT, "--out", tmp_path / "x")
    assert run_sample(LORA, twin, *words) == 2
    assert "found 'tiny_turbo_2_steps' twice" in capsys.readouterr().err
    other = copied(tmp_path / "other.safetensors", base="Qwen/Qwen-Image")
    assert run_sample(LORA, other, *words) == 2
    assert "Qwen/Qwen-Image" in capsys.readouterr().err


def test_two_loras_draw_side_by_side(tmp_path: Path) -> None:
    """Names that PEFT would not take, and a strength."""
    half = copied(tmp_path / "v1.0-half.safetensors", strength=0.5)
    same = copied(tmp_path / "v1.0-same.safetensors")
    out = tmp_path / "pictures"
    assert run_sample(LORA, half, same, "--prompt", PROMPT, "--out", out) == 0
    whole, half_drawn, same_drawn = (
        pixels(out / f"{name}_001_seed0.png")
        for name in ("tiny_turbo_2_steps", "v1.0-half", "v1.0-same")
    )
    assert torch.equal(whole, same_drawn)
    assert (whole - half_drawn).abs().max() > 0.1


# ----------------------------------------------------------------- a whole model, as on the hub


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-Image with its text encoder, in diffusers layout."""
    return write_pipeline(tmp_path_factory.mktemp("models") / "qwen", "qwen-image")


def test_prompts_are_embedded_as_the_pipeline_does_it(whole_model: Path) -> None:
    base = find_base(TurboSpec((1.0, 0.0)), str(whole_model))
    assert not base.family.embedded
    assert find_base(SPEC, str(whole_model)).family.embedded  # a LoRA of the tiny model stays one
    texts = embed(base, ["a cat", "rain"], CPU)
    assert texts.keys() == {"", "a cat", "rain"}
    pipe = QwenImagePipeline.from_pretrained(whole_model, transformer=None, vae=None)
    for key, words in (("", " "), ("rain", "rain")):  # the teacher's negative is a blank
        expected, _ = pipe.encode_prompt(words, device=CPU)
        torch.testing.assert_close(texts[key], expected[0], rtol=1e-4, atol=1e-4)
    assert texts[""].shape != pipe.encode_prompt("", device=CPU)[0][0].shape


def test_it_draws_what_diffusers_draws(whole_model: Path, tmp_path: Path) -> None:
    """From the words of the prompts on, of different length, LoRA and teacher."""
    lora = small_lora(
        ("transformer_blocks.0.attn.to_q", 32, 2, 32), ("transformer_blocks.1.attn.to_k", 32, 4, 32)
    )
    path = write_lora(
        tmp_path / "mine.safetensors",
        to_comfy(lora),
        spec=TurboSpec((1.0, 0.7155, 0.0), base="Qwen/Qwen-Image-2512"),
        title="mine",
    )
    prompts = ["a cat", "a dog in the rain, seen from afar"]
    out = tmp_path / "pictures"
    words = ("--prompt", prompts[0], "--prompt", prompts[1], "--size", "80x48", "--seed", 6)
    words += ("--model", whole_model, "--teacher", "--teacher-steps", 3, "--out", out)
    assert run_sample(path, *words) == 0

    pipe = QwenImagePipeline.from_pretrained(whole_model)
    pipe.set_progress_bar_config(disable=True)
    noise = noise_of_seeds([6], (16, 6, 10))
    common = {"height": 48, "width": 80, "latents": pipe._pack_latents(noise, 1, 16, 6, 10)}
    with torch.no_grad():
        teachers = [
            pipe(p, negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=3, **common)
            for p in prompts
        ]
        pipe.load_lora_weights(str(path))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        students = [pipe(p, sigmas=[1.0, 0.7155], true_cfg_scale=1.0, **common) for p in prompts]
    for arm, pictures in (("mine", students), ("teacher", teachers)):
        for number, theirs in enumerate(pictures, 1):
            mine = np.asarray(Image.open(out / f"{arm}_{number:03d}_seed6.png")).astype(int)
            assert np.abs(mine - np.asarray(theirs.images[0]).astype(int)).max() <= 1
    first = [np.asarray(Image.open(out / f"{arm}_001_seed6.png")) for arm in ("mine", "teacher")]
    assert not np.array_equal(*first)


# ---------------------------------------------------------------------------------- the pipeline


def test_an_image_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Not even where noise is drawn on the way."""
    source = open_source(copied(tmp_path / "renoise.safetensors", sampler="renoise"))
    base = find_base(source.spec)
    prompts = [PROMPT, "an odd number"]
    texts = embed(base, prompts, CPU)
    pipeline = Pipeline(base, {"l": source.lora}, GuidanceSection(), texts, CPU)
    both = pipeline.student("l", source.spec, prompts, [7, 8], (64, 64))
    alone = pipeline.student("l", source.spec, prompts[1:], [8], (64, 64))
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    other = pipeline.student("l", source.spec, prompts[1:], [9], (64, 64))
    assert (other[0].int() - alone[0].int()).abs().max() > 20
    assert both.dtype == torch.uint8


def test_renoise_follows_the_seed_as_comfyui_does(roles: Roles) -> None:
    spec = TurboSpec((1.0, 0.7155, 0.0), sampler="renoise")
    text = as_text([embed_prompt(PROMPT)] * 2)
    noise = noise_of_seeds([5, 6], (16, 8, 8))
    found = sample_student(roles, spec, noise, text, [5, 6])
    with torch.no_grad():
        x = noise[1:]
        x0 = x - roles.velocity("student", x, torch.ones(1), Text(text.embeds[1:]))
        fresh = renoise_noise_sampler(x, 6)(1.0, 0.7155)
        x = 0.7155 * fresh + (1 - 0.7155) * x0
        last = roles.velocity("student", x, torch.tensor([0.7155]), Text(text.embeds[1:]))
    torch.testing.assert_close(found[1:], x - 0.7155 * last, rtol=1e-3, atol=1e-3)


def test_guidance_of_the_student_is_applied(roles: Roles) -> None:
    """A spec may ask for CFG; then each step takes two forwards."""
    spec = TurboSpec((1.0, 0.0), cfg=2.0)
    noise, text = noise_of_seeds([5], (16, 8, 8)), as_text([embed_prompt(PROMPT)])
    with torch.no_grad():
        v = roles.velocity("student", noise, torch.ones(1), text)
        u = roles.velocity("student", noise, torch.ones(1), roles.negative)
        found = sample_student(roles, spec, noise, text)
    torch.testing.assert_close(found, noise - (u + 2 * (v - u)), rtol=1e-4, atol=1e-4)


@pytest.mark.comfy
def test_noise_is_comfyuis(comfyui: object) -> None:
    import comfy.sample

    theirs = comfy.sample.prepare_noise(torch.zeros(1, 16, 1, 6, 10), 11)[:, :, 0]
    assert torch.equal(noise_of_seeds([11], (16, 6, 10)), theirs)


def test_prompts_of_unequal_length_are_padded_and_masked() -> None:
    text = as_text([torch.ones(2, 3), torch.ones(4, 3)])
    assert text.embeds.shape == (2, 4, 3)
    assert text.mask is not None
    assert text.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert as_text([torch.ones(2, 3)] * 2).mask is None


def small_lora(*modules: tuple[str, int, int, int]) -> NormalisedLora:
    generator = torch.Generator().manual_seed(1)
    return NormalisedLora(
        "small.safetensors",
        {
            name: LoraModule(
                name,
                torch.randn(rank, into, generator=generator),
                torch.randn(out, rank, generator=generator),
                3.0,
            )
            for name, out, rank, into in modules
        },
    )


def test_an_attached_lora_is_the_merged_one(
    new_transformer: Callable[[], QwenImageTransformer2DModel],
) -> None:
    """Also with ranks of its own per layer, and on layers that we never train."""
    lora = small_lora(
        ("transformer_blocks.0.attn.to_q", 32, 2, 32),
        ("transformer_blocks.1.attn.to_q", 32, 5, 32),
        ("transformer_blocks.1.img_mlp.net.2", 32, 5, 128),
        ("img_in", 32, 1, 64),
    )
    merged, beside = new_transformer(), new_transformer()
    attach(beside, "lora_0", scaled(lora, 0.5))
    inputs = (
        torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(2)),
        torch.tensor([0.3, 0.9]),
        Text(torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3))),
    )
    with torch.no_grad():
        for name, module in lora.modules.items():
            merged.get_submodule(name).weight += 0.5 * delta(module)
        expected = qwen_image.velocity(merged, *inputs)
        roles = Roles(beside, AdapterSection(), GuidanceSection(), inputs[2], 0, adapters=())
        assert torch.allclose(roles.velocity("lora_0", *inputs), expected, atol=1e-4)
        teacher = qwen_image.velocity(new_transformer(), *inputs)
        assert torch.equal(roles.velocity("teacher", *inputs), teacher)
        assert not torch.allclose(teacher, expected, atol=1e-2)


def test_adapters_keep_float32_on_a_bf16_base(
    new_transformer: Callable[[], QwenImageTransformer2DModel],
) -> None:
    lora = small_lora(("transformer_blocks.0.attn.to_q", 32, 2, 32))
    transformer = new_transformer().to(torch.bfloat16)
    attach(transformer, "lora_0", lora)
    layer = transformer.transformer_blocks[0].attn.to_q
    module = lora.modules["transformer_blocks.0.attn.to_q"]
    assert torch.equal(layer.lora_A["lora_0"].weight, module.down)
    assert torch.equal(layer.lora_B["lora_0"].weight, module.up * 1.5)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (("transformer_blocks.7.attn.to_q", 32, 2, 32), "no linear layer"),
        (("transformer_blocks.0.attn", 32, 2, 32), "no linear layer"),
        (("transformer_blocks.0.attn.to_q", 48, 2, 32), r"weight \[32, 32\], found \[48, 32\]"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    module: tuple[str, int, int, int], message: str, transformer: QwenImageTransformer2DModel
) -> None:
    with pytest.raises(LoraFormatError, match=message):
        attach(transformer, "lora_0", small_lora(module))
    assert not any("lora" in name for name, _ in transformer.named_parameters())


def test_the_base_and_its_guidance_come_from_the_header(tmp_path: Path) -> None:
    base = find_base(SPEC)
    assert teacher_guidance({}, base) == GuidanceSection(scale=3.5, rescale=False)
    header = {"turbo.config": json.dumps({"guidance": {"scale": 2.5, "rescale": True}})}
    assert teacher_guidance(header, base) == GuidanceSection(scale=2.5, rescale=True)
    assert teacher_guidance(header, base, 6.0) == GuidanceSection(scale=6.0, rescale=True)
    with pytest.raises(ConfigError, match="guidance"):
        teacher_guidance({"turbo.config": "{}"}, base)
    with pytest.raises(ConfigError, match="--model"):
        find_base(TurboSpec((1.0, 0.0), base="unknown"))
    assert find_base(TurboSpec((1.0, 0.0), base="unknown"), str(tmp_path)).folder == tmp_path
