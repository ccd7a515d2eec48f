"""A ComfyUI for the browser's tests."""

from __future__ import annotations

import json
import shutil
import urllib.request

from PIL import Image
from workflow_files import FILES, models_of

from distill.contract.tiny import TINY_DIR
from distill.utils.comfyui import ComfyServer

SETTINGS = {  # of a user who has seen the welcome screens
    "Comfy.TutorialCompleted": True,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Locale": "en",
}
BAKING = ("qwen_image_2512_bf16.safetensors", "qwen_image_turbo_baked.safetensors")


def fill(server: ComfyServer) -> None:
    """A file of every name that the workflows use, and the settings of a user.

    The large ones are empty: the front end only looks at names. The tiny LoRA is real.
    """
    for model in models_of(FILES):
        (server.folder(model["directory"]) / model["name"]).touch()
    for name in BAKING:
        (server.folder("diffusion_models") / name).touch()
    for file in (TINY_DIR / "lora").glob("*.safetensors"):
        shutil.copy(file, server.folder("loras"))
    Image.linear_gradient("L").convert("RGB").save(server.base / "input" / "example.png")
    body = json.dumps(SETTINGS).encode()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/api/settings", body)).close()
