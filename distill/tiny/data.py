"""The tiny model's training set as latents and prompts, in the form that every method reads."""

from __future__ import annotations

from dataclasses import dataclass
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
from ..data.batch import Batch, Examples
from ..models.text import Text
from ..models.vae import encode
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


@dataclass(frozen=True)
class TinyData:
    """Posterior latents of an `ImageSet`, each with two prompts that fit it, and the embeddings of
    all prompts.
    """

    mean: torch.Tensor  # [N, 16, 8, 8]
    std: torch.Tensor  # [N, 16, 8, 8]
    prompts: torch.Tensor  # [N, 2] rows of `table`
    digits_from: int  # index of the first digit; letters come before it
    table: torch.Tensor  # [len(PROMPTS), 8, 64]
    digit_share: float = 0.25

    @staticmethod
    def from_images(
        vae: AutoencoderKLQwenImage, images: ImageSet, digit_share: float = 0.25
    ) -> TinyData:
        """Encodes letters followed by digits."""
        with torch.no_grad():
            parts = [encode(vae, to_unit(x)) for x in images.images.split(64)]
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
            torch.cat([mean for mean, _ in parts]),
            torch.cat([std for _, std in parts]),
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
        count = len(self.mean)
        u = rng.uniform("data/index", batch_size)
        index = torch.where(
            letter, u * self.digits_from, self.digits_from + u * (count - self.digits_from)
        ).long()
        eps = rng.normal("data/posterior", (batch_size, *self.mean.shape[1:]))
        prompt = self.prompts[index, rng.integers("data/prompt", batch_size, 2)]
        return Batch(self.mean[index] + self.std[index] * eps, Text(self.table[prompt]))

    def examples(self, count: int) -> Examples:
        prompts = EXAMPLES[:count]
        texts = tuple(Text(embed_prompt(prompt)[None]) for prompt in prompts)
        return Examples(prompts, texts, (IMAGE_SIZE, IMAGE_SIZE))


def embedded_data(vae: AutoencoderKLQwenImage, seed: int, letters_count: int = 4000) -> TinyData:
    """Freshly rendered letters and the training digits: the data of a distillation, small enough to
    make on the spot.
    """
    return TinyData.from_images(vae, join(letters(letters_count, seed), digits("train")))
