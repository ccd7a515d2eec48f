"""The tiny model's training set as latents and prompts, in the form that every method reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..contract.tiny import (
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    LETTERS,
    digit_prompt,
    embed_prompt,
    letter_prompt,
    parity_prompt,
)
from ..data.batch import HELD_SHARE, Batch, Examples
from ..models.text import Text
from ..models.vae import QWEN_VAE, encode
from ..utils.images import to_unit
from ..utils.rng import Rng
from .images import ImageSet, digits, join, letters

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

PROMPTS = (
    "",
    *(letter_prompt(c, s) for s in LETTERS for c in COLOURS),
    *(digit_prompt(d) for d in range(len(DIGITS))),
    *(parity_prompt(d) for d in range(2)),
)

EXAMPLES = (
    "a red letter K",
    "a yellow letter R",
    "a white letter S",
    "a handwritten seven",
    "a blue letter X",
    "an even number",
)


CHUNK = 8  # images that are encoded together


class Posteriors:
    """Mean and standard deviation of the latents of N images.

    With `encode`, the tensors are room for what it makes of images i to j, CHUNK of them at a time
    and when one is first asked for: a short run waits for what it draws alone. As the chunks are
    fixed, no latent depends on what was drawn before it.
    """

    def __init__(
        self,
        mean: torch.Tensor,  # [N, 16, 8, 8]
        std: torch.Tensor,  # [N, 16, 8, 8]
        encode: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.mean, self.std, self._encode = mean, std, encode
        self._missing = set() if encode is None else set(range(0, len(mean), CHUNK))

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B] -> two of [B, 16, 8, 8]"""
        for start in self._missing.intersection((index // CHUNK * CHUNK).tolist()):
            end = start + CHUNK
            self.mean[start:end], self.std[start:end] = self._encode(start, end)
            self._missing.remove(start)
        return self.mean[index], self.std[index]


@dataclass(frozen=True)
class TinyData:
    """Posterior latents of an `ImageSet`, each with two prompts that fit it, and the embeddings of
    all prompts. Images of held-out letters are left out.
    """

    posteriors: Posteriors
    prompts: torch.Tensor  # [N, 2] rows of `table`
    digits_from: int  # index of the first digit; letters come before it
    table: torch.Tensor  # [len(PROMPTS), 8, 64]
    digit_share: float = 0.25
    held: frozenset[int] = frozenset()  # rows of `table` that are not trained on

    @staticmethod
    def from_images(
        vae: AutoencoderKLQwenImage, images: ImageSet, digit_share: float = 0.25
    ) -> TinyData:
        """Of letters followed by digits; `vae` is used later and has to stay as it is."""
        letters = images.symbol < len(LETTERS)
        digit = images.symbol - len(LETTERS)
        first_digit, first_parity = (
            1 + len(LETTERS) * len(COLOURS),
            1 + len(LETTERS) * len(COLOURS) + len(DIGITS),
        )
        exact = torch.where(
            letters, 1 + images.symbol * len(COLOURS) + images.colour, first_digit + digit
        )
        loose = torch.where(letters, exact, first_parity + digit % 2)
        return TinyData(
            _posteriors(vae, images.images),
            torch.stack([exact, loose], dim=1),
            int(letters.sum()),
            torch.stack([embed_prompt(p) for p in PROMPTS]),
            digit_share,
        )

    @property
    def negative(self) -> Text:
        """The empty prompt.  # [1, 8, 64]"""
        return Text(self.table[:1])

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        """`batch_size` samples of this rank: latents drawn from the posterior, one of each image's
        prompts.
        """
        letter = rng.uniform("data/kind", batch_size) >= self.digit_share
        letters = self._letters
        digits = len(self.posteriors) - self.digits_from
        u = rng.uniform("data/index", batch_size)
        index = torch.where(
            letter,
            letters[(u * len(letters)).long()],
            self.digits_from + (u * digits).long(),
        )
        mean, std = self.posteriors[index]
        eps = rng.normal("data/posterior", tuple(mean.shape))
        prompt = self.prompts[index, rng.integers("data/prompt", batch_size, 2)]
        return Batch(mean + std * eps, Text(self.table[prompt]))

    @cached_property
    def _letters(self) -> torch.Tensor:
        """Images of the letters that are trained on."""
        held = torch.tensor(sorted(self.held), dtype=torch.long)
        return (~torch.isin(self.prompts[: self.digits_from, 0], held)).nonzero()[:, 0]

    def to_hold_out(self, count: int) -> list[str]:
        """Letters in a colour: both are still there, apart. A digit would be missed."""
        letters = sorted(
            (letter_prompt(c, s) for s in LETTERS for c in COLOURS),
            key=lambda prompt: hashlib.sha256(prompt.encode()).digest(),
        )
        return letters[:count] if count * HELD_SHARE <= len(letters) else []

    def without(self, prompts: Sequence[str]) -> TinyData | None:
        held = frozenset(PROMPTS.index(prompt) for prompt in prompts if prompt in PROMPTS)
        letters = range(1, 1 + len(LETTERS) * len(COLOURS))
        if not held <= frozenset(letters) or len(held) * HELD_SHARE > len(letters):
            return None
        return replace(self, held=held)

    def examples_of(self, prompts: Sequence[str]) -> Examples | None:
        try:
            texts = tuple(Text(embed_prompt(prompt)[None]) for prompt in prompts)
        except ValueError:
            return None
        return Examples(tuple(prompts), texts, (IMAGE_SIZE, IMAGE_SIZE))

    def examples(self, count: int) -> Examples:
        prompts = EXAMPLES[:count]
        texts = tuple(Text(embed_prompt(prompt)[None]) for prompt in prompts)
        return Examples(prompts, texts, (IMAGE_SIZE, IMAGE_SIZE))


def _posteriors(vae: AutoencoderKLQwenImage, images: torch.Tensor) -> Posteriors:
    count, _, height, width = images.shape
    pixels, channels = QWEN_VAE.pixels, QWEN_VAE.channels
    mean = torch.empty(count, channels, height // pixels, width // pixels)

    @torch.no_grad()
    def of(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return encode(vae, to_unit(images[start:end]))

    return Posteriors(mean, torch.empty_like(mean), of)


def embedded_data(vae: AutoencoderKLQwenImage, seed: int, letters_count: int = 4000) -> TinyData:
    """Freshly rendered letters and the training digits: the data of a distillation, small enough to
    make on the spot.
    """
    return TinyData.from_images(vae, join(letters(letters_count, seed), digits("train")))
