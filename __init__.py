"""Turbo Distill for ComfyUI: load a few-step LoRA and sample it exactly as it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"  # the help pages, whatever this folder is called


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI. Imports inside, so that this folder is importable without ComfyUI too."""
    from .nodes import TurboDistillExtension

    return TurboDistillExtension()
