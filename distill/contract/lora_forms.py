"""Forms of a LoRA file that are no plain low-rank pairs: what is refused, what core can merge."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from .shown import shown

_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(lora_te\d?_|lora_text_encoder|text_encoder)")
_PLAIN = "Save the LoRA as plain low-rank pairs (lora_A / lora_B), or merge it into the base model."
_REFUSED = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"\.dora_scale$|\.lora_magnitude_vector(\.|$)", "DoRA, which rescales the whole weight"),
        (r"\.hada_[wt]\d", "LoHa (LyCORIS)"),
        (r"\.lokr_[wt]\d", "LoKr (LyCORIS)"),
        (r"\.(oft|boft)_\w+", "OFT"),
        (r"\.lora_mid\.", "a Tucker decomposition (LoCon)"),
        (r"\.lora_embedding_[AB]", "an embedding LoRA"),
        (r"\.lora_(A|B|up|down)(\..+)?\.bias$", "a LoRA with a bias"),
        (r"\.(diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)$", "a full change of a weight"),
        (r"(^|\.)proj_out_(means|logweights|loggamma)(\.|$)", "an output mixture (IBFlow)"),
    )
)
# What core can merge and no branch beside a layer can do.
_ADAPTERS = _REFUSED[:5]


class LoraFormatError(ValueError):
    """The file is no LoRA that can be applied; names file, key, expected, found and the way out."""


def adapter_kind(keys: Iterable[str]) -> str | None:
    """What a file holds beside, or instead of, plain low-rank pairs that core can merge all the
    same, in words; None: nothing of the kind.
    """
    for key in keys:
        for pattern, what in _ADAPTERS:
            if pattern.search(key) and not _TEXT_ENCODER.match(key):
                return what
    return None


def is_text_encoder(key: str) -> bool:
    """Whether a key belongs to a text encoder, which the loader leaves alone."""
    return _TEXT_ENCODER.match(key) is not None


def refuse(key: str, tensor: Tensor, source: str) -> None:
    """Raises LoraFormatError for a key of such a form."""
    if tensor.ndim == 3 and key.removesuffix(".weight").endswith("proj_out"):
        raise LoraFormatError(
            f"{source}: key {shown(key)} {list(tensor.shape)} has an output layer for each step "
            f"(PDD, parallel decoding distillation); expected a plain LoRA. {_PLAIN}"
        )
    for pattern, what in _REFUSED:
        if pattern.search(key):
            raise LoraFormatError(
                f"{source}: key {shown(key)} is {what}; expected a plain LoRA. {_PLAIN}"
            )
