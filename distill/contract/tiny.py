"""The embedded tiny Qwen-Image: where it lies and how its prompts become vectors.

The tiny model is a real Qwen-Image of other width and depth. Only its text encoder is replaced:
every word of a small vocabulary has a fixed vector derived from its own spelling, so no file and no
tokenizer are needed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from .hints import did_you_mean
from .shown import shown

GUIDANCE = 3.5  # without norm rescale
STEPS, SHIFT = 50, 2.0


TINY_DIR = Path(__file__).parent.parent / "tiny" / "model"
IMAGE_SIZE = 64  # pixels
BASE_NAME = "turbo-distill/tiny"  # as specs call it

TEXT_WIDTH = 64  # the transformer's joint_attention_dim
TEXT_TOKENS = 8  # every prompt is padded to this many tokens, so that batches need no mask

LETTERS = tuple("CEHKLRSTXZ")
COLOURS = ("red", "green", "blue", "yellow", "white")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARITIES = ("even", "odd")

VOCABULARY = frozenset(
    word.lower()
    for word in (
        *LETTERS,
        *COLOURS,
        *DIGITS,
        *PARITIES,
        "a",
        "an",
        "letter",
        "handwritten",
        "number",
    )
)


def letter_prompt(colour: str, letter: str) -> str:
    return f"a {colour} letter {letter}"


def digit_prompt(digit: int) -> str:
    return f"a handwritten {DIGITS[digit]}"


def parity_prompt(digit: int) -> str:
    parity = PARITIES[digit % 2]
    return f"an {parity} number"


def word_vector(word: str) -> torch.Tensor:
    """A fixed pseudo-random vector of mean 0 and variance 1, a function of the word's spelling
    alone.  # [64]
    """
    digest = hashlib.shake_256(word.encode()).digest(2 * TEXT_WIDTH)
    uniform = [int.from_bytes(digest[i : i + 2], "big") / 65535 for i in range(0, len(digest), 2)]
    return (torch.tensor(uniform, dtype=torch.float32) * 2 - 1) * 3**0.5


def embed_prompt(prompt: str) -> torch.Tensor:
    """Text embedding of one prompt.  # [8, 64] float32

    The empty prompt is the unconditional one of classifier-free guidance.
    Raises ValueError on a word outside the vocabulary and on a prompt that is too long.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    for word in words:
        if word not in VOCABULARY:
            hint = did_you_mean(word, VOCABULARY)
            raise ValueError(
                f"The tiny model does not know the word {shown(word)} in the prompt "
                f"{shown(prompt)}.{hint} "
                f'It knows "a red letter K" ({", ".join(COLOURS)}; {" ".join(LETTERS)}), '
                f'"a handwritten seven" (zero to nine), "an even number" and "an odd number".'
            )
    if len(words) > TEXT_TOKENS - 2:
        raise ValueError(
            f"The tiny model reads at most {TEXT_TOKENS - 2} words, "
            f"the prompt {shown(prompt)} has {len(words)}."
        )
    tokens = ["<bos>", *words, "<eos>"]
    tokens += ["<pad>"] * (TEXT_TOKENS - len(tokens))
    return torch.stack([word_vector(token) for token in tokens])
