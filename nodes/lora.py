"""Turbo LoRA Loader: the LoRA on the MODEL, its spec with it, and a report."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill.contract.resolve import Override
from ..distill.contract.schedule import MAX_STEPS
from ..distill.contract.spec import SAMPLERS
from .apply_lora import MODES, apply_lora
from .core_schedule import follow, leave, shift_conflict
from .files import LORAS, list_fingerprint, lora_input, lora_path
from .ui import CATEGORY, show_on_node


class TurboLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillLoraLoader",
            display_name="Turbo LoRA Loader",
            category=CATEGORY,
            description="Loads a few-step LoRA together with the schedule it was trained for (from "
            "the file's header, or from a table of public files), checks that all of it fits, and "
            "tells what it did. Follow it with Turbo Sampler.",
            search_aliases=[
                "turbo lora",
                "few step lora",
                "lightning lora",
                "load lora",
                "lora loader model only",
                "distill lora",
                "qwen image 2512 turbo",
                "wuli",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the LoRA was trained on."),
                lora_input("A few-step LoRA in models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Relative to how the LoRA was trained: 1 is as trained, whatever "
                    "strength its spec asks for.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="merge: into the weights (fastest). bypass: beside the weights, in "
                    "full precision (for quantised models: fp8 and the like would round the LoRA "
                    "away, GGUF would merge it anew at every step). auto: merge where "
                    "that keeps the LoRA, measured on a few layers, else bypass.",
                ),
                io.String.Input(
                    "sigmas_override",
                    default="",
                    optional=True,
                    advanced=True,
                    placeholder="1, 0.7155, 0",
                    tooltip="Empty: the schedule that the LoRA was trained for. Otherwise these "
                    "noise levels, falling from at most 1 to 0: for a LoRA whose schedule is not "
                    "known, or to decide between two Turbo LoRAs with different schedules.",
                ),
                io.Combo.Input(
                    "sampler_override",
                    options=["auto", *SAMPLERS],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto: as trained. euler: deterministic. renoise: fresh noise at every "
                    "step (DMD and consistency students; lcm in core).",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    optional=True,
                    advanced=True,
                    tooltip="0: the LoRA's usual number of steps. Some files were trained for "
                    "several; the report lists them.",
                ),
                io.Boolean.Input(
                    "core_samplers",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Core's KSampler and what is built on it (detailers, upscalers) get "
                    "the trained sigmas too, where they ask for a number of steps that the LoRA "
                    "has, with scheduler simple, normal or sgm_uniform. Off: they go their own "
                    "way.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The patched model with the LoRA's spec attached. Style LoRAs may come "
                    "before or after.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was loaded and how: spec, matched modules, rank, alpha, mode.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **_inputs) -> str:
        return list_fingerprint(LORAS, lora_name)

    @classmethod
    def execute(
        cls,
        model,
        lora_name,
        strength,
        mode,
        sigmas_override="",
        sampler_override="auto",
        steps=0,
        core_samplers=True,
    ) -> io.NodeOutput:
        override = Override.parse(sigmas_override, sampler_override, steps)
        patched, report = apply_lora(model, lora_path(lora_name), strength, mode, override)
        (follow if core_samplers else leave)(patched)
        if conflict := shift_conflict(patched):
            report.warnings.append(conflict)
        shown = show_on_node(report.to_text(), cls.hidden.unique_id, report.warnings)
        return io.NodeOutput(patched, report.to_text(), ui=shown)
