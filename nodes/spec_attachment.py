"""The spec that a Turbo LoRA leaves on a MODEL: an attachment, which core copies in clone()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..distill.contract.spec import TurboSpec

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ATTACHMENT = "turbo_distill.spec"


@dataclass(frozen=True)
class Attached:
    """A spec on its way to the sampler: what to obey, who said so, for which LoRA file."""

    spec: TurboSpec
    source: str
    file: str


def attach(model: ModelPatcher, attached: Attached) -> None:
    """Puts the spec on `model`, in place: callers own a fresh clone."""
    model.set_attachments(ATTACHMENT, attached)


def attached_to(model: ModelPatcher) -> Attached | None:
    """The spec that a Turbo LoRA Loader upstream left on `model`, if any."""
    return model.get_attachment(ATTACHMENT)


def require(model: ModelPatcher, wanted_by: str) -> Attached:
    """`attached_to`, or a ValueError that tells how to get there."""
    attached = attached_to(model)
    if attached is None:
        raise ValueError(
            f"{wanted_by}: this MODEL carries no Turbo spec, so its sigmas are not known. Put a "
            f"Turbo LoRA Loader between the model loader and this node (core's LoRA loaders apply "
            f"the weights but drop the schedule), or wire SIGMAS into the Turbo Sampler's `sigmas` "
            f"input, for example from Manual Sigmas."
        )
    return attached
