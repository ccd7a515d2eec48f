"""Turbo Sigmas and Turbo Sampler Select: what a LoRA was trained for, for SamplerCustomAdvanced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

import nodes as core

from ..distill.contract.latent_grid import USUAL_SIZE
from ..distill.contract.spec import TurboSpec
from .core_schedule import listed
from .latents import latent_tokens, size_tokens
from .sampling import MAX_START_STEP, ksampler_for, tail_of
from .spec_attachment import require
from .ui import CATEGORY, show_on_node

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class TurboSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": 0, "min": 0, "max": core.MAX_RESOLUTION, "step": 8}
        return io.Schema(
            node_id="TurboDistillSigmas",
            display_name="Turbo Sigmas",
            category=CATEGORY,
            description="The sigmas that the MODEL's Turbo LoRA was trained for, for "
            "SamplerCustomAdvanced. Where they depend on the image's size, wire its latent in.",
            search_aliases=[
                "turbo scheduler",
                "few step sigmas",
                "manual sigmas",
                "turbo schedule",
                "split sigmas",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Turbo LoRA Loader."),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=MAX_START_STEP,
                    tooltip="Image-to-image: leave out this many steps at the start. The second "
                    "of two experts starts here.",
                ),
                io.Int.Input(
                    "end_step",
                    default=0,
                    min=0,
                    max=MAX_START_STEP + 1,
                    optional=True,
                    tooltip="0: to the end. Otherwise stop before this step, as the first of two "
                    "experts does (Wan 2.2); noise stays in the latent for the second.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What will be sampled; its size counts where the sigmas depend on it.",
                ),
                io.Int.Input(
                    "width", **size, optional=True, tooltip="In place of a latent, in pixels."
                ),
                io.Int.Input(
                    "height", **size, optional=True, tooltip="In place of a latent, in pixels."
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip="Noise levels, falling to 0 unless end_step stops them before.",
                )
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, start_step, end_step=0, latent=None, width=0, height=0
    ) -> io.NodeOutput:
        spec = require(model, "Turbo Sigmas").spec
        sigmas, size = sigmas_of(model, spec, latent, width, height)
        chosen = part_of(sigmas, start_step, end_step)
        text = f"{len(chosen) - 1} step(s) at {listed(chosen)}{size}"
        return io.NodeOutput(chosen, ui=show_on_node(text, cls.hidden.unique_id))


def sigmas_of(
    model: ModelPatcher,
    spec: TurboSpec,
    latent: dict[str, Any] | None,
    width: int = 0,
    height: int = 0,
) -> tuple[tuple[float, ...], str]:
    """The trained sigmas of a latent, else of a size in pixels, else of the usual size; and for
    which size that is, in words, where it matters.

    Raises ValueError for half a size.
    """
    if not spec.by_size:
        return spec.sigmas(), ""
    if latent is not None:
        tokens = latent_tokens(model, latent, spec.family)
        return spec.sigmas(tokens), f" (for {tokens:,} tokens)"
    if bool(width) != bool(height):
        raise ValueError(
            f"width and height: expected both, or a latent in their place; found {width} x {height}"
        )
    size = (width, height) if width else USUAL_SIZE
    sigmas = spec.sigmas(size_tokens(model, size, spec.family))
    said = f"at {size[0]}x{size[1]}"
    return sigmas, f" ({said if width else f'{said}; wire the latent in for its own size'})"


def part_of(sigmas: Sequence[float], start_step: int, end_step: int = 0) -> torch.Tensor:
    """The sigmas of the steps from `start_step` on, up to `end_step` or (0) to the end, float32.

    Raises ValueError where no step would be left.
    """
    tail = tail_of(sigmas, start_step)
    if not end_step:
        return tail
    if not start_step < end_step < len(sigmas):
        raise ValueError(
            f"end_step is {end_step}, but the schedule has {len(sigmas) - 1} step(s) and starts at "
            f"step {start_step}: choose 0 (to the end) or {start_step + 1} to {len(sigmas) - 1}."
        )
    return tail[: end_step - start_step + 1]


class TurboSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSamplerSelect",
            display_name="Turbo Sampler Select",
            category=CATEGORY,
            description="The sampler that the MODEL's Turbo LoRA was trained for (Euler, or "
            "re-noising with noise drawn on the CPU), for SamplerCustomAdvanced.",
            search_aliases=["turbo ksampler select", "renoise", "lcm", "few step sampler"],
            inputs=[io.Model.Input("model", tooltip="A MODEL from Turbo LoRA Loader.")],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler",
                    tooltip="Wire into SamplerCustomAdvanced, with Turbo Sigmas and BasicGuider.",
                )
            ],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        attached = require(model, "Turbo Sampler Select")
        return io.NodeOutput(ksampler_for(attached.spec.sampler))
