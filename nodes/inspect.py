"""Turbo LoRA Inspect: what is in a LoRA file, without loading a model."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..distill.contract.describe import describe, to_text
from .files import LORAS, list_fingerprint, lora_input, lora_path
from .ui import CATEGORY, show_on_node


class TurboInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillInspect",
            display_name="Turbo LoRA Inspect",
            category=CATEGORY,
            description="Tells what is in a LoRA file: key format, modules, ranks, where alpha "
            "comes from, and the schedule it was trained for. Loads no model.",
            search_aliases=[
                "lora info",
                "lora metadata",
                "inspect lora",
                "turbo spec",
                "lora keys",
            ],
            inputs=[lora_input("A file in models/loras.")],
            outputs=[io.String.Output(display_name="text", tooltip="The description shown below.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **_inputs) -> str:
        return list_fingerprint(LORAS, lora_name)

    @classmethod
    def execute(cls, lora_name) -> io.NodeOutput:
        text = to_text(describe(lora_path(lora_name)))
        shown = show_on_node(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui={**ui.PreviewText(text).as_dict(), **shown})
