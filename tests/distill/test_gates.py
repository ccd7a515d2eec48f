"""Figures of previews, gates, scores, and the judges of prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from distill.config import Config, ConfigError, GatesSection, parse_config
from distill.contract.tiny import COLOURS, LETTERS
from distill.evaluation.gates import failures, measure, ratios, teacher_distance
from distill.evaluation.prompt_score import ClipScore, prompt_score
from distill.tiny.images import digits, letters
from distill.tiny.metrics import TinyScore, expected

LIKE_TEACHER = dict.fromkeys(
    ("saturation", "chroma", "contrast", "sharpness", "diversity", "prompt"), 1.0
)


def tiny_config(**keys: object) -> Config:
    values = {"model": {"path": "tiny"}, "stages": [{"method": "pcm", "steps": 1}], **keys}
    return parse_config(values, "test")


# Figures


def test_figures_of_known_images() -> None:
    grey = torch.zeros(4, 3, 8, 8)
    grey[1] = 0.5
    grey[2, 0] = 1  # red: one channel of three at the end of the range
    grey[3, :, :, ::2] = 0.8  # stripes of 0 and 0.8
    figures = measure(grey, torch.tensor([0, 0, 1, 1]))
    assert figures["saturation"] == pytest.approx(1 / 12)
    assert figures["chroma"] == pytest.approx(1 / 4)
    stripes = measure(grey[3:], torch.tensor([0]))
    assert stripes["contrast"] == pytest.approx(0.4, rel=0.01)
    assert stripes["sharpness"] == pytest.approx(1.6**2, rel=0.01)
    assert "diversity" not in stripes


def test_diversity_is_within_a_prompt() -> None:
    images = torch.cat([torch.full((2, 3, 16, 16), v) for v in (-0.5, 0.5)])
    assert measure(images, torch.tensor([0, 0, 1, 1]))["diversity"] == 0
    assert measure(images, torch.tensor([0, 1, 0, 1]))["diversity"] == pytest.approx(768**0.5)
    assert "diversity" not in measure(images, torch.arange(4))


def test_nearly_no_clipping_makes_no_wild_ratio() -> None:
    student, teacher = {"saturation": 0.003, "chroma": 0.3}, {"saturation": 0.0, "chroma": 0.2}
    found = ratios(student, teacher)
    assert found["saturation"] == pytest.approx(1.3)
    assert found["chroma"] == pytest.approx(1.5, rel=1e-4)
    assert ratios({"diversity": 0.0}, {"diversity": 0.0}) == {"diversity": 1.0}


# Gates


@pytest.mark.parametrize(
    ("figure", "good", "bad", "key"),
    [
        ("saturation", 1.49, 1.51, "saturation_max"),
        ("chroma", 1.24, 1.26, "chroma_max"),
        ("sharpness", 0.51, 0.49, "sharpness_min"),
        ("sharpness", 1.99, 2.01, "sharpness_max"),
        ("diversity", 0.76, 0.74, "diversity_min"),
        ("prompt", 0.91, 0.89, "prompt_min"),
    ],
)
def test_every_gate_at_its_limit(figure: str, good: float, bad: float, key: str) -> None:
    gates = GatesSection()
    limit = getattr(gates, key)
    assert failures({**LIKE_TEACHER, figure: good}, gates) == []
    (message,) = failures({**LIKE_TEACHER, figure: bad}, gates)
    word = "most" if key.endswith("max") else "least"
    assert message == (
        f"{figure} is {bad:.2f} times the teacher's, expected at {word} {limit:g} (gates.{key})"
    )
    assert failures({figure: bad}, GatesSection(**{key: None})) == []


def test_what_was_not_measured_has_no_gate_and_nan_passes_none() -> None:
    assert failures({"contrast": 9.0}, GatesSection()) == []
    broken = dict.fromkeys(LIKE_TEACHER, math.nan)
    limits = GatesSection().model_dump(exclude={"clip"})
    assert len(failures(broken, GatesSection())) == len(limits)


def test_the_score_is_a_distance_to_the_teacher() -> None:
    assert teacher_distance(LIKE_TEACHER) == 0
    twice, half = ({**LIKE_TEACHER, "sharpness": x} for x in (2.0, 0.5))
    assert (
        teacher_distance(twice)
        == teacher_distance(half)
        == pytest.approx(math.log(2) / len(LIKE_TEACHER))
    )
    assert teacher_distance({**LIKE_TEACHER, "prompt": 1.2}) == 0  # more of that is no fault
    assert teacher_distance({**LIKE_TEACHER, "prompt": 0.8}) > 0
    for broken in (math.nan, math.inf, 0.0):
        assert teacher_distance({**LIKE_TEACHER, "chroma": broken}) == math.inf


# Prompts


def test_what_tiny_prompts_name() -> None:
    k, red = LETTERS.index("K"), COLOURS.index("red")
    assert expected("a red letter K") == ({k}, {red})
    assert expected("A Red letter k.") == ({k}, {red})
    assert expected("a handwritten seven") == ({len(LETTERS) + 7}, set())
    assert expected("an even number") == ({len(LETTERS) + d for d in (0, 2, 4, 6, 8)}, set())
    assert expected("") == (set(), set())


def test_the_tiny_judge_tells_right_prompts_from_wrong_ones() -> None:
    judge = TinyScore()
    drawn, written = letters(60, 9), digits("classifier")
    images = torch.cat([drawn.images, written.images[:20]]).float() / 127.5 - 1
    right = [
        f"a {COLOURS[colour]} letter {LETTERS[symbol]}"
        for symbol, colour in zip(drawn.symbol.tolist(), drawn.colour.tolist(), strict=True)
    ]
    parity = [("an even number", "an odd number")[s % 2] for s in written.symbol[:20].tolist()]
    assert judge(images, [*right, *parity]) > 0.95
    assert judge(images, [*right[1:], right[0], *parity[::-1]]) < 0.6
    assert math.isnan(judge(images[:1], [""]))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of toy size, with a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("clip")
    words = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*words, *(f"{w}</w>" for w in words), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 16
    part = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **part,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**part, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder
    )
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_pairs(clip: Path) -> None:
    judge = prompt_score(tiny_config(gates={"clip": str(clip)}))
    assert isinstance(judge, ClipScore)
    images = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prompts = ["a cat", "the sea at night " * 9]  # longer than CLIP reads
    pixels = [((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for x in images]
    processor = CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=prompts, images=pixels, return_tensors="pt", padding=True,
                       truncation=True)  # fmt: skip
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert judge(images, prompts) == pytest.approx(100 * logits.diag().mean().item(), rel=1e-4)
    assert judge(images, prompts[::-1]) != pytest.approx(judge(images, prompts), rel=1e-3)


def test_models_that_are_no_clip_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gates\.clip: .*nowhere: expected a model"):
        ClipScore(str(tmp_path / "nowhere"))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dino")
    with pytest.raises(ConfigError, match=r"gates\.clip: .*dino"):
        ClipScore(str(tmp_path / "dino"))


def test_who_judges(small_config) -> None:
    assert isinstance(prompt_score(tiny_config()), TinyScore)
    assert prompt_score(small_config()) is None
