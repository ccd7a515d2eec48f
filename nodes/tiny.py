"""The embedded tiny Qwen-Image in ComfyUI: a MODEL, a VAE and prompts of a few known words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from comfy_api.latest import io

from ..distill.contract.tensor_file import read_tensors
from ..distill.contract.tiny import TINY_DIR, embed_prompt
from .apply_lora import apply_lora
from .core_schedule import follow
from .files import fingerprint
from .ui import CATEGORY, show_on_node
from .vae_keys import to_wan_names

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

WITH_LORA = "2-step Turbo LoRA"
TEACHER = "teacher (no LoRA)"

# The numbers of a Qwen-Image that both diffusers' config and ComfyUI's constructor name alike.
SHAPE_KEYS = (
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "axes_dims_rope",
)


REPAIR = (
    "The tiny model is part of Turbo Distill: install the pack again, or run `turbo-distill tiny`."
)


def load_transformer(folder: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """A diffusers `QwenImageTransformer2DModel` folder of any width and depth as a MODEL.

    ComfyUI's own file detection reads the depth only and fixes the widths, hence this loader. Runs
    in float32: the model is small, and a newcomer's picture is then the same everywhere.
    Raises FileNotFoundError, or ValueError where the tensors are not those of the config.
    """
    config = json.loads(_existing(folder / "config.json").read_text(encoding="utf-8"))
    weights = _weights(folder)
    shape = {key: config[key] for key in SHAPE_KEYS if key in config}
    model_config = comfy.supported_models.QwenImage({"image_model": "qwen_image", **shape})
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, "")
    _check_names(model.diffusion_model, weights, folder)
    kind = comfy.model_patcher
    patcher = (kind.ModelPatcher if disable_dynamic else kind.CoreModelPatcher)(
        model,
        comfy.model_management.get_torch_device(),
        comfy.model_management.unet_offload_device(),
    )
    model.diffusion_model.load_state_dict(weights, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_transformer, (folder,))  # how core copies it to other GPUs
    return patcher


def load_vae(folder: Path) -> comfy.sd.VAE:
    """A diffusers `AutoencoderKLQwenImage` folder of any width as a VAE.

    Raises FileNotFoundError, or ValueError where the tensors are not those of such a VAE.
    """
    weights = to_wan_names(_weights(folder))
    vae = comfy.sd.VAE(sd=dict(weights))
    _check_names(vae.first_stage_model, weights, folder)
    return vae


def load_tiny(folder: Path, choice: str = WITH_LORA) -> tuple[ModelPatcher, comfy.sd.VAE, str]:
    """MODEL, VAE and report of a folder with transformer/, vae/ and lora/*.safetensors.

    choice: WITH_LORA puts the folder's LoRA on the MODEL by the very code of Turbo LoRA Loader;
    TEACHER leaves the many-step model as it is.
    """
    model = load_transformer(folder / "transformer")
    vae = load_vae(folder / "vae")
    if choice == TEACHER:
        report = "The tiny teacher without LoRA: about 50 steps, CFG 4, core's KSampler or similar."
        return model, vae, report
    model, applied = apply_lora(model, lora_file(folder))
    follow(model)
    return model, vae, applied.to_text()


def lora_file(folder: Path) -> Path:
    """The one LoRA of a tiny-model folder. Raises FileNotFoundError if there is none."""
    files = sorted((folder / "lora").glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder / 'lora'} holds no .safetensors file. {REPAIR}")
    return files[0]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights, _ = read_tensors(_existing(folder / "diffusion_pytorch_model.safetensors"))
    return {name: weight.float() for name, weight in weights.items()}


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. {REPAIR}")
    return file


def _check_names(module: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Core's loaders log missing names and go on with random weights; here they are an error."""
    expected = set(module.state_dict())
    if different := sorted(expected ^ set(weights)):
        raise ValueError(
            f"{folder}: {len(different)} tensors are missing or unknown, for example "
            f"{', '.join(different[:3])}. {REPAIR}"
        )


class TurboTinyLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillTinyLoader",
            display_name="Turbo Tiny Model",
            category=CATEGORY,
            description="A real Qwen-Image of toy size that comes with Turbo Distill: coloured "
            "letters and handwritten digits at 64x64, on the CPU in a second. To try the nodes "
            "without downloading 30 GB.",
            search_aliases=["tiny qwen image", "demo model", "toy model", "turbo demo"],
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=[WITH_LORA, TEACHER],
                    default=WITH_LORA,
                    tooltip="The distilled LoRA (with Turbo Sampler), or the many-step teacher "
                    "(with core's KSampler: about 50 steps, CFG 4).",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Wire into Turbo Sampler."),
                io.Vae.Output(display_name="vae", tooltip="Wire into VAE Decode."),
                io.String.Output(display_name="report", tooltip="What was loaded and how."),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> str:
        files = sorted(TINY_DIR.glob("**/*.safetensors"))
        return " ".join(fingerprint(file) for file in files)

    @classmethod
    def execute(cls, lora) -> io.NodeOutput:
        model, vae, report = load_tiny(TINY_DIR, lora)
        shown = show_on_node(report, cls.hidden.unique_id)
        return io.NodeOutput(model, vae, report, ui=shown)


class TurboTinyText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillTinyText",
            display_name="Turbo Tiny Prompt",
            category=CATEGORY,
            description="A prompt for Turbo Tiny Model, which knows some forty words: colours, "
            "letters, digits.",
            search_aliases=["tiny prompt", "tiny text encode", "turbo demo"],
            inputs=[
                io.String.Input(
                    "text",
                    default="a red letter K",
                    tooltip='"a red letter K" (red, green, blue, yellow, white; C E H K L R S T X '
                    'Z), "a handwritten seven" (zero to nine), "an even number", "an odd number". '
                    "Empty: the unconditional prompt, for the teacher's negative.",
                )
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="Wire into Turbo Sampler's positive."
                )
            ],
        )

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        return io.NodeOutput(conditioning(text))


def conditioning(text: str) -> list[list[Any]]:
    """A prompt as ComfyUI's CONDITIONING.  # [[[1, tokens, width], {}]]"""
    return [[embed_prompt(text)[None], {}]]
