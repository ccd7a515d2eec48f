"""Turbo Accelerate: the fastest attention that gives right results here, and compiled blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention as core_attention
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..distill.contract.shown import shown
from .attention import (
    AUTO,
    CORE,
    KERNELS,
    OVERRIDE,
    AttentionOverride,
    Choice,
    Device,
    GuardedAttention,
    choose,
)
from .compiled import NAME, compile_blocks
from .ui import CATEGORY, show_on_node, warn_on_node

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "turbo_distill.accelerate"


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate` did, for a person to read."""

    attention: str
    compiled: str

    def to_text(self) -> str:
        return f"attention: {self.attention}\ncompile: {self.compiled}"


def accelerate(
    model: ModelPatcher,
    attention: str = AUTO,
    compiled: bool = False,
    on_failure: Callable[[str], None] = logging.warning,
) -> tuple[ModelPatcher, AccelerateReport]:
    """A clone of `model` with another attention, compiled blocks, or neither where that is best.

    on_failure: told once, in the middle of sampling, that a kernel was dropped and why.
    Raises ValueError: an unknown or unavailable kernel, or what `compile_blocks` refuses.
    """
    options = (AUTO, CORE, *KERNELS)
    if attention not in options:
        raise ValueError(
            f"attention: expected one of {', '.join(options)}; found {shown(attention)}"
        )
    # Compiled code reads weights as plain tensors, which core's dynamic loading does not keep.
    patched = model.clone(disable_dynamic=True) if compiled else model.clone()
    done = _set_attention(patched, attention, on_failure)
    if not compiled:
        return patched, AccelerateReport(done, "off")
    count = compile_blocks(patched)
    return patched, AccelerateReport(
        done, f"{count} blocks share one compiled code, made at the first step"
    )


# ------------------------------------------------------------------------------------- attention


def _set_attention(model: ModelPatcher, wanted: str, on_failure: Callable[[str], None]) -> str:
    """Puts the chosen kernel on `model`, in place; returns a line for the report."""
    others = _remove_ours(model)
    core = core_attention.optimized_attention.__name__.removeprefix("attention_")
    if others is not None and wanted in (AUTO, CORE):
        return f"left as a node upstream set it ({_name_of(others)})"
    missing = {name: why for name, kernel in KERNELS.items() if (why := kernel.missing())}
    choice = choose(wanted, Device.of(model.load_device), missing, core)
    if choice.kernel is None:
        return f"core's own, {core} ({choice.why})"
    guarded = GuardedAttention(KERNELS[choice.kernel], others, partial(_tell, on_failure, choice))
    model.model_options["transformer_options"][OVERRIDE] = guarded
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, partial(_never_black, guarded))
    fallback = f"core's own, {core}" if others is None else _name_of(others)
    instead = "" if others is None else f"; goes before {_name_of(others)} of a node upstream"
    return (
        f"{choice.kernel} ({choice.why}){instead}\n"
        f"checked against exact attention in the first step; if it fails: {fallback}"
    )


def _remove_ours(model: ModelPatcher) -> AttentionOverride | None:
    """Takes off what a Turbo Accelerate upstream put on; returns the override of another node."""
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    transformer_options = model.model_options.setdefault("transformer_options", {})
    override = transformer_options.pop(OVERRIDE, None)
    while isinstance(override, GuardedAttention):
        override = override.previous
    if override is not None:
        transformer_options[OVERRIDE] = override
    return override


def _never_black(attention: GuardedAttention, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Samples, and once more without the kernel where it failed after having had a part in it, or
    where the result is not finite.

    Core copies the result to the CPU right after this, so looking at it makes nothing wait.
    """
    before, calls = attention.failed, attention.calls
    samples = executor(*args, **kwargs)
    if before or attention.calls == calls:
        return samples
    if attention.failed is None:
        if samples.isfinite().all():
            return samples
        attention.fail("let values that are not finite into the sampled latent")
    return executor(*args, **kwargs)


def _tell(on_failure: Callable[[str], None], choice: Choice, why: str) -> None:
    on_failure(
        f"{NAME}: the attention kernel {choice.kernel} {why}. It is no longer used for this MODEL, "
        f"and what it gave was computed again without it."
    )


def _name_of(override: AttentionOverride) -> str:
    name = getattr(override, "__qualname__", type(override).__qualname__)
    module = getattr(override, "__module__", "")
    return f"{module}.{name}".removeprefix(".")


# ------------------------------------------------------------------------------------------- node


class TurboAccelerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillAccelerate",
            display_name=NAME,
            category=CATEGORY,
            description="Gives a MODEL the attention that is fastest on this GPU, checks it in the "
            "first step and goes back to ComfyUI's own where the result is wrong. Can compile the "
            "transformer block as well. Anywhere between the model loader and the sampler.",
            search_aliases=[
                "faster",
                "speed up",
                "sage attention",
                "flash attention",
                "cudnn attention",
                "patch attention",
                "torch compile",
                "optimize model",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, with or without a Turbo LoRA."),
                io.Combo.Input(
                    "attention",
                    options=[AUTO, CORE, *KERNELS],
                    default=AUTO,
                    tooltip="auto: cuDNN on Hopper (H100, H200), else as ComfyUI has it. core: as "
                    "ComfyUI has it. cudnn: PyTorch's, cuDNN first. flash3, flash and sage need "
                    "their packages; sage computes in 8 bits.",
                ),
                io.Boolean.Input(
                    "compile",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="torch.compile of the transformer block. The first image takes "
                    "seconds to a minute longer, and again for a new size.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Wire into Turbo Sampler, or into LoRA loaders: the order is free.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was chosen for this GPU and why."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, attention, compile=False) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        on_failure = partial(warn_on_node, node_id=node_id)
        patched, report = accelerate(model, attention, compile, on_failure)
        shown = show_on_node(report.to_text(), node_id)
        return io.NodeOutput(patched, report.to_text(), ui=shown)
