"""Turbo Prompt: a prompt's embedding, from disk where it has been encoded before."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.ldm.modules.attention
import comfy.model_management
import comfyui_version
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.graph import DynamicPrompt
from comfy_execution.graph_utils import GraphBuilder, is_link

from .files import checked_name, fingerprint, list_fingerprint
from .prompt_cache import Conditioning, PromptCache, digest, file_identity
from .tokens import prompt_warnings
from .ui import CATEGORY, display_id_of, show_on_node, with_warnings

FOLDER = "text_encoders"
NODE_ID = "TurboDistillPrompt"
NONE = "none"
PREFERRED = "qwen_2.5_vl_7b"
CLIP_TYPE = "qwen_image"
EMBEDDING = "embedding:"  # a textual inversion: another file has a say

NO_ENCODER = (
    "Turbo Prompt: no text encoder. Choose one in `text_encoder` (put Qwen-Image's, such as "
    "qwen_2.5_vl_7b.safetensors, into models/text_encoders and press R), or wire a CLIP loader "
    "into `clip`."
)


# -------------------------------------------------------------------------------------- identity


def prompt_key(text: str, recipe: Any) -> str | None:
    """Under which name a prompt's embedding is kept; None if it must not be.

    recipe: the encoder as `recipe_of` tells it. What else changes the bits of the result is in the
    key: versions of ComfyUI and torch, device, dtype and attention kernel.
    """
    if EMBEDDING in text:
        return None
    device = comfy.model_management.text_encoder_device()
    machine = {
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        "device": comfy.model_management.get_torch_device_name(device),
        "dtype": str(comfy.model_management.text_encoder_dtype(device)),
        "attention": comfy.ldm.modules.attention.optimized_attention.__name__,
        "fast": sorted(feature.value for feature in args.fast),
    }
    return digest({"text": text, "encoder": recipe, "machine": machine})


def recipe_of(graph: Any, link: list[Any], files: dict[str, str]) -> Any:
    """What makes an output, without running it: the node's type, its values, what is wired to it,
    and the identity of every model file that a value names, which also goes into `files`.

    This is what core's own cache goes by, so it holds for any loader (GGUF too) that does not
    change its result without changing its inputs. link: [node id, output]; graph: has get_node(id).
    """
    node_id, output = link
    node = graph.get_node(node_id)
    inputs = {}
    for name, value in node["inputs"].items():
        if is_link(value):
            inputs[name] = recipe_of(graph, value, files)
        else:
            found = _files(value)
            files.update(found)
            inputs[name] = [value, *found.values()]
    return [node["class_type"], output, inputs]


def _files(value: Any) -> dict[str, str]:
    """Paths and identities of the model files of that name, in any of ComfyUI's folders."""
    if not isinstance(value, str) or not Path(value).suffix:
        return {}
    kinds = list(folder_paths.folder_names_and_paths)
    found = {folder_paths.get_full_path(kind, value) for kind in kinds} - {None}
    if os.path.isfile(value):
        found.add(value)
    return {path: _identity(path, fingerprint(Path(path))) for path in sorted(found)}


@functools.lru_cache(maxsize=64)
def _identity(path: str, version: str) -> str:
    return file_identity(Path(path))


_files_of_encoder: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()


def is_fresh(clip: Any, files: dict[str, str]) -> bool:
    """Whether the files are still those of this encoder; core keeps one that it has loaded even if
    its file is replaced, and what that encodes must not be kept in the new file's name.
    """
    known = _files_of_encoder.setdefault(clip.cond_stage_model, {})
    changed = [
        path for path, identity in files.items() if known.setdefault(path, identity) != identity
    ]
    for path in changed:
        logging.warning(
            "Turbo Distill: %s was replaced after it was loaded. The prompt was encoded by the old "
            "one and is not kept. Free models and node cache, or restart, to load it anew.",
            path,
        )
    return not changed


# -------------------------------------------------------------------------------------- encoding


def cache() -> PromptCache:
    """In ComfyUI's user folder, in a part that its web server hands to nobody."""
    folder = folder_paths.get_system_user_directory("turbo_distill")
    return PromptCache(Path(folder) / "prompts")


def encode(clip: Any, text: str) -> Conditioning:
    """What core's CLIPTextEncode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def to_device(conditioning: Conditioning) -> Conditioning:
    """Where an encoder would have left its tensors."""
    device = comfy.model_management.intermediate_device()
    return [
        [cond.to(device), {name: _moved(value, device) for name, value in options.items()}]
        for cond, options in conditioning
    ]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def loader_graph(text_encoder: str, device: str) -> tuple[GraphBuilder, Any]:
    """Core's CLIPLoader as a graph. Core keeps the encoder that it loads, and gives it up where
    memory is short, as it does with every other node's output; `version` tells it of a new file.
    """
    graph = GraphBuilder()
    path = folder_paths.get_full_path(FOLDER, checked_name(FOLDER, text_encoder))
    version = fingerprint(Path(path)) if path else NONE
    inputs = {"clip_name": text_encoder, "type": CLIP_TYPE, "device": device, "version": version}
    return graph, graph.node("CLIPLoader", "loader", **inputs)


# ------------------------------------------------------------------------------------------ node


class TurboPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list(FOLDER)
        preferred = next((file for file in files if PREFERRED in file), None)
        return io.Schema(
            node_id=NODE_ID,
            display_name="Turbo Prompt",
            category=CATEGORY,
            description="Encodes a prompt as CLIP Text Encode does, and keeps the result on disk: "
            "the next time, even after a restart, the text encoder of 8 to 16 GB is neither run "
            "nor loaded. Loads Qwen-Image's text encoder itself, or takes any CLIP.",
            search_aliases=[
                "prompt",
                "text encode",
                "clip text encode",
                "cached prompt",
                "prompt cache",
                "text encoder",
                "qwen image prompt",
            ],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. One with embedding:name in it is not kept.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[*files, NONE],
                    default=preferred or (files[0] if files else NONE),
                    tooltip="Qwen-Image's text encoder in models/text_encoders. Loaded only for a "
                    "prompt that is new. Without effect where `clip` is wired.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="Where a new prompt is encoded, as in core's Load CLIP.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    lazy=True,
                    tooltip="Instead of `text_encoder`: a CLIP from any loader, such as a GGUF "
                    "one, or with a LoRA. Its loader only runs for a prompt that is new.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="Wire into Turbo Sampler's positive."
                )
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            has_intermediate_output=True,
            enable_expand=True,
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder=None, **_inputs) -> str:
        return list_fingerprint(FOLDER, text_encoder)

    @classmethod
    def check_lazy_status(cls, text, text_encoder, device="default", clip=None) -> list[str]:
        link = cls._clip_link()
        if link is None or clip is not None:
            return []
        key = prompt_key(text, recipe_of(cls.hidden.dynprompt, link, {}))
        return [] if key and cache().has(key) else ["clip"]

    @classmethod
    def execute(cls, text, text_encoder, device="default", clip=None) -> io.NodeOutput:
        graph, loader = loader_graph(text_encoder, device)
        nodes, link = DynamicPrompt(graph.finalize()), loader.out(0)
        if (wired := cls._clip_link()) is not None:
            nodes, link = cls.hidden.dynprompt, wired
        files: dict[str, str] = {}
        key = prompt_key(text, recipe_of(nodes, link, files))
        found = cache().load(key) if key else None
        if found is not None:
            shown = cls._show("From the cache: no text encoder was loaded or run.", text)
            return io.NodeOutput(to_device(found), ui=shown)
        if clip is not None:
            conditioning = encode(clip, text)
            kept = is_fresh(clip, files) and key is not None and cache().store(key, conditioning)
            done = "Encoded, and kept for the next time." if kept else "Encoded, not kept."
            return io.NodeOutput(conditioning, ui=cls._show(done, text))
        if wired is None and text_encoder == NONE:
            raise ValueError(NO_ENCODER)
        # once more, with the encoder wired in: core loads it, keeps it, and frees it if need be
        inputs = {"text": text, "text_encoder": NONE, "device": device, "clip": link}
        again = graph.node(NODE_ID, "encode", **inputs)
        if wired is not None:
            graph.remove_node("loader")
        return io.NodeOutput(again.out(0), expand=graph.finalize())

    @classmethod
    def _clip_link(cls) -> list[Any] | None:
        """Where the wired clip comes from; None where nothing is wired."""
        graph, node_id = cls.hidden.dynprompt, cls.hidden.unique_id
        link = graph.get_node(node_id)["inputs"].get("clip") if graph is not None else None
        return link if is_link(link) else None

    @classmethod
    def _show(cls, done: str, prompt: str) -> dict[str, list[str]]:
        warnings = prompt_warnings(prompt)
        text = with_warnings([done], warnings)
        return show_on_node(text, display_id_of(cls.hidden), warnings)
