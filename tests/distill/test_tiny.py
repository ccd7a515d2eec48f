"""The embedded model's data: what it shows and what its prompts mean."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from distill.contract.tiny import (
    COLOURS,
    LETTERS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    VOCABULARY,
    embed_prompt,
    word_vector,
)
from distill.tiny.data import CHUNK, PROMPTS, TinyData
from distill.tiny.images import RGB, ImageSet, digits, join, letters
from distill.tiny.pretrain import VAE_CONFIG
from distill.utils.rng import Rng


def test_letters_are_a_function_of_the_seed_and_balanced() -> None:
    a, b, c = letters(100, 3), letters(100, 3), letters(100, 4)
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)
    pairs = a.symbol * len(COLOURS) + a.colour
    assert pairs.bincount().tolist() == [2] * len(LETTERS) * len(COLOURS)


def test_the_ink_has_the_colour_of_the_prompt() -> None:
    data = letters(50, 0)
    for image, colour in zip(data.images.float(), data.colour.tolist(), strict=True):
        ink = torch.tensor(RGB[COLOURS[colour]]).float().view(3, 1, 1)
        distance = (image - ink).abs().amax(0)
        assert (distance <= 16).float().mean() > 0.02  # at least a thin stroke of it


def test_digit_splits_share_nothing() -> None:
    sets = [digits(split).images.flatten(1) for split in ("train", "classifier", "held_out")]
    assert [len(s) for s in sets] == [1000, 400, 397]


def test_prompts_have_fixed_shape_and_differ() -> None:
    table = torch.stack([embed_prompt(p) for p in PROMPTS])
    assert table.shape == (len(PROMPTS), TEXT_TOKENS, TEXT_WIDTH)
    assert len(torch.unique(table.flatten(1), dim=0)) == len(PROMPTS)
    assert torch.equal(embed_prompt("A red letter k."), embed_prompt("a red letter K"))
    words = torch.stack([word_vector(word) for word in sorted(VOCABULARY)])
    assert words.mean() == pytest.approx(0, abs=0.08)
    assert words.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("a purple letter K", ["'purple'", "red"]), ("a red leter K", ["'letter'"]),
     ("a red letter K " * 2, ["at most 6 words"])],
)  # fmt: skip
def test_other_prompts_are_refused(prompt: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match="tiny model") as error:
        embed_prompt(prompt)
    for word in words:
        assert word in str(error.value)


def test_batches_pair_images_with_their_prompts() -> None:
    vae = AutoencoderKLQwenImage(**VAE_CONFIG)
    images = join(letters(50, 0), digits("held_out"))
    data = TinyData.from_images(vae, images, digit_share=0.5)
    expected = images.prompts()
    for row, prompt in zip(data.prompts.tolist(), expected, strict=True):
        assert PROMPTS[row[0]] == prompt
        assert PROMPTS[row[1]] == prompt or PROMPTS[row[1]].endswith("number")
    batch = data.batch(Rng(0, 0), 400)
    letter = (batch.text.embeds[:, 3] == embed_prompt("a red letter K")[3]).all(1)
    assert letter.float().mean() == pytest.approx(0.5, abs=0.1)


def test_images_are_encoded_when_they_are_drawn() -> None:
    """A chunk at a time, and to the same bits whatever was drawn before."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(**VAE_CONFIG)
    encoded: list[int] = []
    vae.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    held_out = digits("held_out")
    few = ImageSet(held_out.images[:30], held_out.symbol[:30], held_out.colour[:30])
    images = join(letters(29, 0), few)
    one, other = (TinyData.from_images(vae, images) for _ in range(2))
    one.batch(Rng(1, 0), 3)
    assert 0 < sum(encoded) < len(images)
    first = one.batch(Rng(0, 0), 8)
    assert torch.equal(first.x0, other.batch(Rng(0, 0), 8).x0)
    for data in (one, other):
        data.posteriors[torch.arange(len(images))]
    assert sum(encoded) == 2 * len(images)
    assert torch.equal(first.x0, one.batch(Rng(0, 0), 8).x0)
    assert set(encoded) == {CHUNK, len(images) % CHUNK}
