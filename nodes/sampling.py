"""Turbo Sampler: sampling exactly as a LoRA was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import (
    Guider_Basic,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
)
from node_helpers import conditioning_set_values

from ..distill.contract.sampling import renoise_noise_sampler, sample_renoise, sampler_function
from ..distill.contract.spec import TurboSpec, check_steps
from ..distill.contract.tensor_file import is_finite
from .core_schedule import PlannedSampler, is_flow, listed
from .latents import check_latent, latent_tokens
from .plan_warnings import plan_warnings
from .spec_attachment import attached_to, require
from .ui import CATEGORY, show_on_node, with_warnings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SAMPLER_NAME = "Turbo Sampler"
MAX_START_STEP = 63


def tail_of(sigmas: Sequence[float] | torch.Tensor, start_step: int) -> torch.Tensor:
    """The sigmas from `start_step` on, float32.  # [steps - start_step + 1]

    Image-to-image starts on a sigma that the LoRA was trained at, never between two of them.
    Raises ValueError where no step would be left.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32).flatten()
    steps = len(sigmas) - 1
    if not 0 <= start_step < steps:
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas.tolist())
        raise ValueError(
            f"start_step is {start_step}, but the schedule [{shown}] has {steps} step(s): choose 0 "
            f"(start from pure noise) to {steps - 1}."
        )
    return sigmas[start_step:]


def ksampler_for(
    name: str,
    batch_index: Sequence[int] | None = None,
    kind: type[comfy.samplers.KSAMPLER] = comfy.samplers.KSAMPLER,
) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs `name` ("euler" or "renoise"); re-noise is drawn on the CPU.

    batch_index: which item of a larger batch each latent is, as for the initial noise.
    """
    if name != "renoise":
        return kind(sampler_function(name))
    return kind(partial(_sample_renoise, batch_index))


def _sample_renoise(
    batch_index: Sequence[int] | None,
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    callback: Any = None,
    disable: bool | None = None,
) -> torch.Tensor:
    noise_sampler = renoise_noise_sampler(x, extra_args["seed"], batch_index)
    return sample_renoise(
        model, x, sigmas, extra_args, callback, disable, noise_sampler=noise_sampler
    )


@dataclass(frozen=True)
class SamplingPlan:
    """How a MODEL is going to be sampled: decided, checked and shown before anything is loaded."""

    sigmas: torch.Tensor  # [steps + 1]
    sampler: str
    warnings: list[str]
    guidance: float | None = None  # of a guidance-distilled model, where the prompt has none
    tokens: int | None = None  # of a latent, where the sigmas depend on them

    def to_text(self) -> str:
        """One line, and one per warning."""
        facts = [f"{len(self.sigmas) - 1} step(s) at {listed(self.sigmas)}", self.sampler, "CFG 1"]
        if self.tokens is not None:
            facts[0] += f" (for {self.tokens:,} tokens; other sizes have others)"
        if self.guidance is not None:
            facts.append(f"guidance {self.guidance:g}")
        return with_warnings(["; ".join(facts)], self.warnings)


def make_plan(
    model: ModelPatcher,
    latent: dict[str, Any],
    sigmas: torch.Tensor | None = None,
    start_step: int = 0,
    positive: list[Any] | None = None,
) -> SamplingPlan:
    """What the MODEL's spec asks for; `sigmas`, where given, replace those of the spec.

    positive: the conditioning, where it is to be checked too.
    Raises ValueError: no schedule, a model that is no flow model, a latent of another kind, a spec
    with guidance, sigmas that are no flow-matching schedule, start_step too large.
    """
    _check_flow_model(model)
    check_latent(SAMPLER_NAME, model, latent)
    attached = require(model, SAMPLER_NAME) if sigmas is None else attached_to(model)
    spec = attached and attached.spec
    if sigmas is not None:
        _check_given(sigmas)
    tokens, trained = None, None
    if spec is not None:
        _check_unguided(spec)
        tokens = latent_tokens(model, latent, spec.family) if spec.by_size else None
        trained = spec.sigmas(tokens)
    chosen = tail_of(trained if sigmas is None else sigmas, start_step)
    warnings = plan_warnings(model, spec, trained, chosen, latent, start_step, positive)
    return SamplingPlan(
        chosen,
        spec.sampler if spec else "euler",
        warnings,
        spec.guidance if spec and not _has_guidance(positive) else None,
        tokens if sigmas is None else None,
    )


def sample(
    model: ModelPatcher, positive: list[Any], latent: dict[str, Any], seed: int, plan: SamplingPlan
) -> dict[str, Any]:
    """Samples `latent`, whose samples are [B, C, H, W] or [B, C, T, H, W], and returns the result.

    One forward of batch B per step: the guider has no negative. Everything else (loading, noise
    masks, previews, interrupts, empty latents) is core's own SamplerCustomAdvanced.
    Raises RuntimeError where the result is not finite.
    """
    guider = Guider_Basic(model)
    if plan.guidance is not None:
        positive = conditioning_set_values(positive, {"guidance": plan.guidance})
    guider.set_conds(positive)
    sampler = ksampler_for(plan.sampler, latent.get("batch_index"), PlannedSampler)
    noise = Noise_RandomNoise(seed)
    sampled = SamplerCustomAdvanced.execute(noise, guider, sampler, plan.sigmas, latent)[0]
    _check_finite(sampled["samples"])
    return sampled


def _has_guidance(positive: list[Any] | None) -> bool:
    """Whether a person has set it, with core's FluxGuidance for example."""
    return any("guidance" in options for _, options in positive or ())


def _check_finite(samples: Any) -> None:
    """Raises RuntimeError for NaN and infinity, which a VAE decodes to a black picture.

    samples: a tensor, or core's nested one.
    """
    parts = samples.unbind() if samples.is_nested else [samples]
    if not all(map(is_finite, parts)):
        raise RuntimeError(
            f"{SAMPLER_NAME}: the sampled latent has NaN or infinite numbers and would decode to a "
            f"black picture. The usual causes: an attention kernel that overflows (start ComfyUI "
            f"without --use-sage-attention), a model in fp16 (Qwen-Image wants bf16 or fp32), a "
            f"damaged model file, or NaN in the latent or the prompt that came in."
        )


def _check_flow_model(model: ModelPatcher) -> None:
    if not is_flow(model):
        raise ValueError(
            f"{SAMPLER_NAME}: {type(model.model).__name__} is not a flow-matching model, so sigmas "
            f"between 1 and 0 mean nothing to it. Use a flow model (Qwen-Image, Flux, Wan, "
            f"Z-Image), and no ModelSamplingDiscrete or similar node on the way."
        )


def _check_given(sigmas: torch.Tensor) -> None:
    check_steps(sigmas.numel() - 1)
    values = sigmas.flatten().tolist()
    falling = all(high > low for high, low in pairwise(values))
    if len(values) < 2 or not falling or values[0] > 1 or values[-1] < 0:
        raise ValueError(
            f"{SAMPLER_NAME}: the sigmas {values} are not a flow-matching schedule. It needs at "
            f"least two, falling from at most 1 to 0, such as 1, 0.7155, 0."
        )


def _check_unguided(spec: TurboSpec) -> None:
    if spec.cfg != 1:
        raise ValueError(
            f"{SAMPLER_NAME}: this LoRA's spec asks for CFG {spec.cfg:g}, and this node runs "
            f"without a negative prompt (CFG 1). Use SamplerCustomAdvanced with core's CFGGuider "
            f"at {spec.cfg:g}, Turbo Sigmas and Turbo Sampler Select."
        )


def seed_input(tooltip: str) -> io.Int.Input:
    """The seed as core's samplers have it."""
    return io.Int.Input(
        "noise_seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip=tooltip,
    )


class TurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillSampler",
            display_name="Turbo Sampler",
            category=CATEGORY,
            description="Samples a MODEL exactly as its Turbo LoRA was trained: its sigmas, its "
            "sampler, no CFG and one forward per step. Steps, scheduler, shift and CFG need no "
            "setting.",
            search_aliases=[
                "turbo ksampler",
                "few step sampler",
                "2 step sampler",
                "lightning sampler",
                "distilled sampler",
                "qwen image turbo",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from Turbo LoRA Loader."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt. There is no negative: at CFG 1 it would have no effect.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent for text-to-image; an encoded image with start_step "
                    "above 0 for image-to-image; one with a noise mask for inpainting.",
                ),
                seed_input(
                    "All noise is drawn on the CPU from this seed: the same seed starts from the "
                    "same noise on every machine."
                ),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=MAX_START_STEP,
                    tooltip="Image-to-image: skip this many steps. 0 starts from pure noise. With "
                    "a 2-step LoRA, 1 keeps the composition of latent_image and repaints the rest. "
                    "It starts on a trained sigma, never between (as `denoise` would).",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Replaces the spec's sigmas. Needed only for a MODEL without a spec.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The sampled latent.")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, noise_seed, start_step, sigmas=None
    ) -> io.NodeOutput:
        plan = make_plan(model, latent_image, sigmas, start_step, positive)
        shown = show_on_node(plan.to_text(), cls.hidden.unique_id, plan.warnings)
        return io.NodeOutput(sample(model, positive, latent_image, noise_seed, plan), ui=shown)
