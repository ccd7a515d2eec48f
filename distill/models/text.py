"""Embedded prompts as a padded batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Text:
    """Embedded prompts, padded to one length."""

    embeds: torch.Tensor  # [B, L, D]
    mask: torch.Tensor | None = None  # [B, L] bool, True = token; None = all are tokens
    # What a model computed of these prompts, for its further calls; None: nothing is kept
    memory: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.embeds)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Text:
        mask = None if self.mask is None else self.mask.to(device)
        return Text(self.embeds.to(device, dtype), mask)

    def remembering(self) -> Text:
        """The same prompts for several calls of one model with the same weights."""
        return Text(self.embeds, self.mask, {})

    def alone(self) -> list[Text]:
        """Every prompt without padding."""
        if self.memory is not None and "alone" in self.memory:
            return list(self.memory["alone"])
        mask = self.mask
        lengths = [self.embeds.shape[1]] * len(self) if mask is None else mask.sum(1).tolist()
        texts = [Text(e[:, :n]) for e, n in zip(self.embeds.split(1), lengths, strict=True)]
        if self.memory is not None:
            self.memory["alone"] = texts = [text.remembering() for text in texts]
        return texts

    def split(self, rows: int) -> list[Text]:
        """Groups of `rows` prompts, all padded as before."""
        embeds = self.embeds.split(rows)
        if self.mask is None:
            return [Text(part) for part in embeds]
        return [Text(part, mask) for part, mask in zip(embeds, self.mask.split(rows), strict=True)]

    def repeat(self, batch_size: int) -> Text:
        """One prompt -> `batch_size` copies of it."""
        mask = None if self.mask is None else self.mask.expand(batch_size, -1)
        return Text(self.embeds.expand(batch_size, -1, -1), mask)


def concatenate(a: Text, b: Text) -> Text:
    """Joins two batches of prompts, padding the shorter one."""
    if a.mask is None and b.mask is None and a.embeds.shape[1] == b.embeds.shape[1]:
        return Text(torch.cat([a.embeds, b.embeds]))
    length = max(a.embeds.shape[1], b.embeds.shape[1])

    def padded(text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        missing = length - text.embeds.shape[1]
        mask = text.mask
        if mask is None:
            mask = torch.ones(text.embeds.shape[:2], dtype=torch.bool, device=text.embeds.device)
        return (
            torch.nn.functional.pad(text.embeds, (0, 0, 0, missing)),
            torch.nn.functional.pad(mask, (0, missing)),
        )

    (ea, ma), (eb, mb) = padded(a), padded(b)
    return Text(torch.cat([ea, eb]), torch.cat([ma, mb]))
