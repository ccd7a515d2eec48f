"""`turbo-distill eval`: every figure against an independent computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from distill import cli
from distill.config import ConfigError
from distill.contract.bake.rounding import stochastic_fp8
from distill.contract.lora_keys import LoraModule, NormalisedLora, delta
from distill.contract.tiny import TINY_DIR
from distill.evaluation import metrics
from distill.evaluation.base_variants import cast_to_fp8, merge_into_fp8
from distill.evaluation.features import (
    Clip,
    clip_score,
    feature_diversity,
    fid,
    kid,
    load_dino,
    reference_images,
)
from distill.evaluation.grid_artifacts import LATENT, PATCH, grid_energy
from distill.evaluation.measure import Judges, measure, plain
from distill.evaluation.report import on_bases, side_by_side
from distill.tiny.metrics import tiny_metrics
from distill.utils.images import to_unit

LORA = TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors"
CPU = torch.device("cpu")
WORDS = ("a", "red", "letter", "k", "an", "even", "number")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, seed: int, side: int = 64) -> torch.Tensor:
    return torch.randint(256, (count, 3, side, side), generator=generator(seed)).to(torch.uint8)


# -------------------------------------------------------------------------------------- the grid


def photographs(count: int = 4, side: int = 128) -> torch.Tensor:
    """Noise with the spectrum of photographs (amplitude 1/f) and a few upright edges."""
    f = torch.fft.fftfreq(side)
    radius = (f[:, None] ** 2 + f**2).sqrt().clamp_min(1 / side)
    noise = torch.randn(count, 3, side, side, generator=generator(0))
    x = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    x = 0.3 * x / x.std()
    x[..., 30:75, 41:90] += 0.5
    return x.clamp(-1, 1)


def with_grid(images: torch.Tensor, period: int, amplitude: float) -> torch.Tensor:
    """A random texture that repeats every `period` pixels."""
    tile = torch.randn(period, period, generator=generator(1)) * amplitude
    height, width = images.shape[-2:]
    return images + tile.repeat(height // period + 1, width // period + 1)[:height, :width]


@pytest.mark.parametrize("period", [PATCH, LATENT])
def test_no_grid_is_one(period: int) -> None:
    assert 0.7 < grid_energy(photographs(), period) < 1.4
    noise = torch.randn(8, 3, 128, 96, generator=generator(2))
    assert 0.8 < grid_energy(noise, period) < 1.25


def test_edges_are_no_grid() -> None:
    """Frames and letters gather their energy on the axes of the spectrum."""
    x = torch.zeros(6, 3, 128, 128)
    for i in range(6):
        x[i, :, 20 + 5 * i : 70 + 3 * i, 33 + 7 * i : 60 + 9 * i] = 1
    assert grid_energy(x, PATCH) < 1.5
    assert grid_energy(x, LATENT) < 1.5


def test_a_faint_grid_shows_and_grows() -> None:
    clean = photographs()
    found = [grid_energy(with_grid(clean, PATCH, level / 127.5), PATCH) for level in (0, 2, 4)]
    assert found[1] > 1.5 * found[0]
    assert found[2] > 2 * found[1]


def test_patch_and_latent_grids_are_told_apart() -> None:
    latent = with_grid(photographs(), LATENT, 4 / 127.5)
    assert grid_energy(latent, LATENT) > 3
    assert grid_energy(latent, PATCH) < 1.4
    other = with_grid(photographs(), 12, 4 / 127.5)  # repeats with neither
    assert grid_energy(other, PATCH) < 1.5


def test_lines_between_patches_are_a_grid() -> None:
    x = photographs()
    x[..., ::PATCH, :] += 0.06
    x[..., ::PATCH] += 0.06
    assert grid_energy(x, PATCH) > 1.5 * grid_energy(photographs(), PATCH)


def test_the_range_of_values_does_not_matter() -> None:
    x = with_grid(photographs(), PATCH, 0.03)
    assert grid_energy(x * 127.5 + 127.5, PATCH) == pytest.approx(grid_energy(x, PATCH), rel=1e-3)


def test_images_too_small_for_a_grid_are_refused_or_left_out() -> None:
    with pytest.raises(ValueError, match="at least 64 pixels"):
        grid_energy(torch.zeros(1, 3, 48, 64), PATCH)
    assert "grid_16" not in plain(random_images(2, 0, side=48))
    assert "grid_16" in plain(random_images(2, 0))


# ------------------------------------------------------------------------------------- the bases


def fp8_values() -> torch.Tensor:
    """All finite values of e4m3fn."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].unique()


def test_stochastic_rounding_keeps_the_mean() -> None:
    x = torch.tensor([0.0, 1e-3, -0.0021, 0.07, -1.13, 15.4, 300.0, -440.0, 448.0])
    rounded = torch.stack([stochastic_fp8(x, generator(i)) for i in range(4000)])
    grid = fp8_values()
    assert torch.isin(rounded, grid).all()
    above = grid[torch.searchsorted(grid, x).clamp_max(len(grid) - 1)]
    below = grid[(torch.searchsorted(grid, x, right=True) - 1).clamp_min(0)]
    assert ((rounded == above) | (rounded == below)).all()  # the two neighbours, nothing else
    step = (above - below).clamp_min(1e-9)
    assert ((rounded.mean(0) - x).abs() / step).max() < 0.04  # 5 sigma
    assert stochastic_fp8(torch.tensor([1e4, -1e4]), generator(0)).tolist() == [448, -448]


@pytest.mark.comfy
def test_stochastic_rounding_is_that_of_core(comfyui: object) -> None:
    import comfy.float

    x = torch.linspace(-2, 2, 4001)
    mine = torch.stack([stochastic_fp8(x, generator(i)) for i in range(64)])
    theirs = torch.stack(
        [comfy.float.stochastic_rounding(x[None], torch.float8_e4m3fn, i)[0].float()
         for i in range(64)]
    )  # fmt: skip
    assert torch.isin(theirs, mine.unique()).all()
    assert (mine.mean(0) - theirs.mean(0)).abs().mean() < 0.02
    assert (mine.std(0) - theirs.std(0)).abs().mean() < 0.01


def test_a_merged_fp8_base_holds_base_and_lora(
    new_transformer: Callable[[], QwenImageTransformer2DModel],
) -> None:
    model, original = new_transformer(), new_transformer()
    cast_to_fp8(model)
    for cast, parameter in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(cast, parameter.to(torch.float8_e4m3fn).float())
    name = "transformer_blocks.0.attn.to_q"
    lora = LoraModule(name, torch.full((2, 32), 0.05), torch.full((32, 2), 0.05), 2.0)
    before = model.get_submodule(name).weight.clone()
    merge_into_fp8(model, NormalisedLora("l", {name: lora}))
    after = model.get_submodule(name).weight
    assert torch.isin(after, fp8_values()).all()
    assert (after - before).mean().item() == pytest.approx(delta(lora).mean().item(), rel=0.2)
    assert torch.isin(model.proj_out.weight, fp8_values()).all()


# ---------------------------------------------------------------------------------- the features


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of toy size with tokenizer and image processor, as the hub's folders are."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    text = {**size, "vocab_size": len(vocab), "max_position_embeddings": 24,
            "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}  # fmt: skip
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    sides = {"height": 28, "width": 28}
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=sides).save_pretrained(folder)
    return folder


def test_clip_sees_what_transformers_sees(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    prompts, images = ["a red letter k", "an even number"], random_images(2, 3)
    clip = Clip(str(clip_folder), CPU)
    processor = CLIPProcessor.from_pretrained(clip_folder)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = CLIPModel.from_pretrained(clip_folder)(**inputs)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(clip.images(images), outputs.image_embeds).min() > 0.999
    assert cosine(clip.texts(prompts), outputs.text_embeds).min() > 0.9999
    assert clip.width == 12 == clip.images(images).shape[1]


def test_a_long_prompt_keeps_its_end_mark(clip_folder: Path) -> None:
    """Without it CLIP would pool some other token."""
    clip = Clip(str(clip_folder), CPU)
    long = "a red letter k " * 20
    tokens = clip.tokenizer(long, truncation=True, max_length=24)["input_ids"]
    assert tokens[-1] == 53
    cut = "".join(clip.tokenizer.decode(tokens[1:-1]).split())
    assert torch.allclose(clip.texts([long]), clip.texts([_spaced(long, cut)]), atol=1e-5)


def _spaced(text: str, letters: str) -> str:
    """The beginning of `text` that holds just these letters."""
    taken = 0
    for i, character in enumerate(text):
        taken += character != " "
        if taken == len(letters):
            return text[: i + 1]
    raise AssertionError(letters)


def test_clip_score_is_torchmetrics_clip_score(clip_folder: Path) -> None:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    class Plain(CLIPModel):  # the outputs that torchmetrics expects
        def get_image_features(self, *args: Any) -> torch.Tensor:
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args: Any) -> torch.Tensor:
            return super().get_text_features(*args).pooler_output

    prompts, images = ["a red letter k", "an even number", "a number"], random_images(3, 4)
    processor = CLIPProcessor.from_pretrained(clip_folder)
    theirs = CLIPScore(lambda: (Plain.from_pretrained(clip_folder), processor))
    theirs.update(list(images), prompts)
    clip = Clip(str(clip_folder), CPU)
    signed = torch.nn.functional.cosine_similarity(clip.images(images), clip.texts(prompts))
    mine = clip_score(clip.images(images), clip.texts(prompts))
    assert mine == pytest.approx(theirs.compute().item(), abs=0.02)
    assert mine == pytest.approx(max(0.0, 100 * signed.mean().item()))
    assert clip_score(torch.ones(2, 3), -torch.ones(2, 3)) == 0
    assert clip_score(torch.ones(2, 3), torch.ones(2, 3)) == pytest.approx(100)


def test_dino_sees_what_transformers_sees(dino_folder: Path) -> None:
    from transformers import AutoImageProcessor, Dinov2Model

    images = random_images(20, 5)  # more than one batch
    dino = load_dino(str(dino_folder), CPU)
    processor = AutoImageProcessor.from_pretrained(dino_folder)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    with torch.no_grad():
        model = Dinov2Model.from_pretrained(dino_folder)
        expected = model(**processor(images=pictures, return_tensors="pt")).pooler_output
    torch.testing.assert_close(dino.images(images), expected, rtol=1e-3, atol=1e-3)
    assert dino.width == 16


@pytest.mark.parametrize(
    ("option", "what"), [("--clip", "dino"), ("--dino", "clip"), ("--clip", "nothing")]
)
def test_a_wrong_model_is_named_before_anything_is_drawn(
    option: str, what: str, clip_folder: Path, dino_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "distill.models.pipeline.load_transformer", lambda *_: pytest.fail("was loaded")
    )
    path = {"dino": dino_folder, "clip": clip_folder, "nothing": tmp_path / "nothing"}[what]
    assert run_eval(LORA, option, path) == 2
    message = capsys.readouterr().err
    assert f"{option}: {path}: expected" in message


def test_fid_is_the_frechet_distance() -> None:
    a = torch.randn(300, 6, generator=generator(1))
    b = torch.randn(200, 6, generator=generator(2)) * 1.5 + 0.7
    assert fid(a, b) == pytest.approx(metrics.frechet_distance(a, b), rel=1e-6)
    assert fid(a, a) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_kernel_distance() -> None:
    a = torch.randn(40, 6, generator=generator(1)).double()
    b = torch.randn(40, 6, generator=generator(2)).double() + 0.7

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: torch.Tensor) -> torch.Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diag().sum()) / (len(x) * (len(x) - 1))

    expected = within(a) + within(b) - 2 * kernel(a, b).mean()
    assert kid(a, b) == pytest.approx(expected.item(), rel=1e-6)
    larger = torch.cat([b, b + 0.01])
    state = torch.get_rng_state()
    assert kid(a, larger) == kid(a, larger)
    assert torch.equal(torch.get_rng_state(), state)


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    x = torch.tensor([[1.0, 0], [0, 2], [3, 0], [1, 1], [1, -1], [5, 5]])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])  # the last has no pair
    assert feature_diversity(x, groups) == pytest.approx(((1 + 0 + 1) / 3 + 1) / 2)


def test_reference_images_are_cropped_to_size(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 40:60] = 255
    Image.fromarray(wide).save(tmp_path / "below" / "wide.png")
    with pytest.raises(ConfigError, match="found 1"):
        reference_images(tmp_path, (20, 40))
    Image.fromarray(wide).convert("L").save(tmp_path / "grey.png")
    images = reference_images(tmp_path, (20, 40))
    assert images.shape == (2, 3, 40, 20)
    assert images[:, :, :, 5:15].min() > 250  # the middle
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"text\.png"):
        reference_images(tmp_path, (20, 40))


# ------------------------------------------------------------------------------------ the figures


def test_figures_need_what_they_need(dino_folder: Path, clip_folder: Path) -> None:
    images, prompts = random_images(6, 6), ["a red letter k"] * 3 + ["an even number"] * 3
    bare = measure(images, prompts, Judges({}))
    assert bare.keys() == {"sharpness", "saturation", "grid_16", "grid_8", "diversity_pixels"}
    assert bare["sharpness"] == pytest.approx(metrics.high_frequency_energy(to_unit(images)))
    assert bare["saturation"] == pytest.approx(metrics.saturation(to_unit(images)))
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = metrics.intra_distance(to_unit(images), groups)
    assert bare["diversity_pixels"] == pytest.approx(expected)
    assert "diversity_pixels" not in measure(images[:2], ["a", "b"], Judges({}))

    vision = {"clip": Clip(str(clip_folder), CPU), "dino": load_dino(str(dino_folder), CPU)}
    full = measure(images, prompts, Judges(vision, random_images(8, 7)))
    assert full.keys() - bare.keys() == {
        "diversity_clip", "diversity_dino", "clip_score", "fid_clip", "kid_clip", "fid_dino",
        "kid_dino",
    }  # fmt: skip
    same = measure(images, prompts, Judges(vision, images))
    assert same["fid_dino"] == pytest.approx(0, abs=1e-3)
    assert full["fid_dino"] > same["fid_dino"] + 1e-3


def test_the_tiny_models_classifier_reads_letters_and_digits() -> None:
    from distill.tiny.images import digits, letters

    real = letters(60, 5)
    prompts = real.prompts()
    found = tiny_metrics(real.images, prompts)
    assert found.keys() == {"letter_accuracy", "colour_accuracy", "frechet"}
    twice = tiny_metrics(torch.cat([real.images, real.images.flip(0)]), prompts + prompts[::-1])
    assert twice.keys() - found.keys() == {"background_spread"}  # no prompt stands alone
    assert found["letter_accuracy"] > 0.9
    assert found["frechet"] < tiny_metrics(real.images.flip(2), prompts)["frechet"] / 2
    wrong = tiny_metrics(real.images, prompts[1:] + prompts[:1])
    assert wrong["letter_accuracy"] < 0.3
    assert "frechet" not in tiny_metrics(real.images[:40], prompts[:40])
    scans = digits("held_out")
    some = scans.images[:30], scans.prompts()[:30]
    assert tiny_metrics(*some).keys() == {"digit_accuracy"}
    assert tiny_metrics(*some)["digit_accuracy"] > 0.8
    assert tiny_metrics(real.images[:2], ["an even number"] * 2) == {}


def test_side_by_side_has_no_ratio_where_it_says_nothing() -> None:
    found = side_by_side({"sharpness": 2.0, "psnr": 20.0, "x": 1.0}, {"sharpness": 4.0, "x": 0.0})
    assert found["sharpness"] == {"lora": 2.0, "teacher": 4.0, "ratio": 0.5}
    assert found["psnr"] == {"lora": 20.0, "teacher": None, "ratio": None}
    assert found["x"]["ratio"] is None


def test_bases_are_compared_with_the_unquantised_one() -> None:
    reference = random_images(2, 8)
    other = (reference.int() + 2).clamp(0, 255).to(torch.uint8)
    found = on_bases(reference, {"bf16": reference, "fp8_naive": other})
    assert "psnr" not in found["bf16"]
    expected = metrics.psnr(to_unit(reference), to_unit(other))
    assert found["fp8_naive"]["psnr"] == pytest.approx(expected)
    assert on_bases(reference, {"fp8_naive": reference.clone()})["fp8_naive"]["psnr"] is None


# ------------------------------------------------------------------------------------ the command


def run_eval(*words: object) -> int:
    return cli.main(["eval", *map(str, words)])


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red letter K\na handwritten seven\nan even number\n")
    return path


def test_the_whole_on_the_tiny_model(
    prompt_file: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for i, image in enumerate(random_images(3, 9)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(real / f"{i}.png")
    out, sheet = tmp_path / "figures.json", tmp_path / "sheet.png"
    words = [LORA, "--prompts", prompt_file, "--count", 2, "--teacher-steps", 8, "--out", out]
    words += ["--sheet", sheet, "--clip", clip_folder, "--reference", real]
    assert run_eval(*words, "--bases", "bf16,fp8_naive,fp8_scaled") == 0
    text = capsys.readouterr().out
    report = json.loads(out.read_text())
    figures = report["figures"]
    assert report["images"] == 6
    assert report["teacher"] == {"steps": 8, "scale": 3.5, "rescale": False}
    assert report["spec"]["sigmas"] == [1.0, 0.7155, 0.0]
    assert {"letter_accuracy", "digit_accuracy", "kid_clip"} <= figures.keys()
    assert figures["psnr"]["lora"] > 15  # the same noise: pairs look alike
    assert 0.5 < figures["sharpness"]["ratio"] < 2
    assert figures["letter_accuracy"]["lora"] == figures["digit_accuracy"]["lora"] == 1
    bases = report["bases"]
    assert bases["bf16"]["sharpness"] == figures["sharpness"]["lora"]
    assert 25 < bases["fp8_naive"]["psnr"] < bases["fp8_scaled"]["psnr"] < 60
    assert "fp8_naive" in text
    assert "Note: FID and KID" in text
    assert "fid_clip: 3 images for 12 features" in text
    assert Image.open(sheet).size[1] > 4 * 128  # four arms


def test_json_and_the_same_figures_twice(
    prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (LORA, "--prompts", prompt_file, "--count", 1, "--teacher-steps", 2, "--json")
    found = []
    for batch in (2, 3):
        assert run_eval(*words, "--batch", batch) == 0
        found.append(json.loads(capsys.readouterr().out))
    first, second = (report["figures"]["sharpness"]["lora"] for report in found)
    assert first == pytest.approx(second, rel=1e-3)
    assert "diversity_pixels" not in found[0]["figures"]
    assert found[0]["bases"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "."], "FID and KID need features"),
        (["--bases", "bf16", "--quantize", "fp8"], "--bases compares"),
        (["--count", "0"], "--count"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_arguments_that_do_not_go_together(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(LORA, *words) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_base_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_eval(LORA, "--bases", "fp8")
    assert "fp8_naive, fp8_scaled, found fp8" in capsys.readouterr().err


def test_other_models_need_prompts(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
    path = tmp_path / "other.safetensors"
    save_file({key.format("A"): torch.ones(1, 32), key.format("B"): torch.ones(32, 1)}, path)
    assert run_eval(path, "--sigmas", "1,0", "--model", small_model) == 2
    assert "--prompts" in capsys.readouterr().err
