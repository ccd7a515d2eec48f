"""Turbo Bake and Turbo Baked Loader: base + Turbo LoRA as one file of two thirds of the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..distill.contract.bake.merge import bake
from ..distill.contract.bake.plan import plan_bake
from ..distill.contract.bake.rounding import FORMATS
from ..distill.contract.metadata import usage_hint
from ..distill.contract.resolve import Override
from ..distill.contract.shown import shown
from .baked_model import load_baked
from .files import LORAS, list_fingerprint, listed_path, lora_input, lora_path
from .spec_attachment import attached_to
from .ui import CATEGORY, show_on_node

FOLDER = "diffusion_models"
SUFFIX = ".safetensors"


def model_path(name: Any) -> Path:
    """The file behind an entry of models/diffusion_models; raises as `listed_path`."""
    return listed_path(FOLDER, name)


def file_of(name: str) -> str:
    """A model's name as it appears in the list: with its ending, which people leave out."""
    return name.strip().removesuffix(SUFFIX) + SUFFIX


def new_model_path(name: str) -> Path:
    """Where a model called `name` goes: ComfyUI's models/diffusion_models, or a folder in it.

    Raises ValueError for a name that leads out of there.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    folder = next((folder for folder in folders if folder.name == FOLDER), folders[0]).resolve()
    path = (folder / file_of(name)).resolve()
    if not path.is_relative_to(folder) or path.name == SUFFIX:
        raise ValueError(
            f"file_name: expected a name inside {folder}, such as qwen_image_turbo or "
            f"baked/qwen_image_turbo; found {shown(name)}"
        )
    return path


class TurboBake(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillBake",
            display_name="Turbo Bake",
            category=CATEGORY,
            description="Merges a few-step LoRA into its bf16 base model and writes the result as "
            "one file for Turbo Baked Loader. The third of the model that only depends on the "
            "timestep shrinks to a table for the LoRA's own sigmas: 27 GB in bf16 and 14 GB in fp8 "
            "instead of 41 and 20. Needs no GPU, and less than 4 GB of memory.",
            search_aliases=[
                "merge lora",
                "save merged model",
                "fuse lora",
                "fp8 model",
                "quantize model",
                "fold modulation",
                "smaller model",
            ],
            inputs=[
                io.Combo.Input(
                    "base_model",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="The LoRA's base model in bf16, in models/diffusion_models. An 8-bit "
                    "one is refused: most of the LoRA would be lost.",
                ),
                lora_input("A few-step LoRA in models/loras."),
                io.Combo.Input(
                    "dtype",
                    options=list(FORMATS),
                    default="bf16",
                    tooltip="How the large layers are stored. bf16: as they are. fp8: half the "
                    "size, computed in bf16. int8: half the size, closer weights, computed in "
                    "int8. Rounded once, after the merge.",
                ),
                io.String.Input(
                    "file_name",
                    default="qwen_image_turbo_baked",
                    tooltip="Written to models/diffusion_models; folder/name works too. A file "
                    "that is there already is never replaced.",
                ),
                io.String.Input(
                    "sigmas_override",
                    default="",
                    optional=True,
                    advanced=True,
                    placeholder="1, 0.7155, 0",
                    tooltip="Empty: the schedule that the LoRA was trained for. Otherwise these "
                    "noise levels, falling from at most 1 to 0. The baked model knows no others.",
                ),
                io.Boolean.Input(
                    "fold",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Shrink the modulation to a table, where the model and the schedule "
                    "allow it; the report says why not. Off: an ordinary model that takes any "
                    "sigmas, and is as large as its base.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file_name",
                    tooltip="What to choose in Turbo Baked Loader, after refreshing the page.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Sizes, what was merged and folded, and what rounding does to the "
                    "LoRA in each of the usual ways.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, base_model=None, lora_name=None, **_inputs) -> str:
        files = ((FOLDER, base_model), (LORAS, lora_name))
        return " ".join(list_fingerprint(folder, name) for folder, name in files)

    @classmethod
    def execute(
        cls, base_model, lora_name, dtype, file_name, sigmas_override="", fold=True
    ) -> io.NodeOutput:
        out = new_model_path(file_name)
        override = Override.parse(sigmas_override)
        base, lora = model_path(base_model), lora_path(lora_name)
        plan = plan_bake(base, lora, out, dtype, override, fold)
        bar = comfy.utils.ProgressBar(len(plan.tensors))

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        text = bake(plan, progress).to_text()
        shown = show_on_node(text, cls.hidden.unique_id)
        return io.NodeOutput(file_of(file_name), text, ui=shown)


class TurboBakedLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillBakedLoader",
            display_name="Turbo Baked Loader",
            category=CATEGORY,
            description="Loads a model made by Turbo Bake, with the schedule it was folded for. "
            "Follow it with Turbo Sampler; further LoRAs may come in between. At any other sigma "
            "it stops and says so.",
            search_aliases=[
                "load baked model",
                "load diffusion model",
                "unet loader",
                "turbo model loader",
                "folded model",
            ],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file made by Turbo Bake, in models/diffusion_models.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Wire into Turbo Sampler, or into LoRA loaders for styles.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was loaded and how it is sampled."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model_name=None, **_inputs) -> str:
        return list_fingerprint(FOLDER, model_name)

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        model = load_baked(model_path(model_name))
        attached = attached_to(model)
        report = f"{model_name}\n{usage_hint(attached.spec)}\nspec from: {attached.source}"
        shown = show_on_node(report, cls.hidden.unique_id)
        return io.NodeOutput(model, report, ui=shown)
