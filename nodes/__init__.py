"""The ComfyUI side of Turbo Distill: V3 nodes over the shared contract in distill/contract."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import save
from .accelerate import TurboAccelerate
from .bake import TurboBake, TurboBakedLoader
from .compare import TurboCompare
from .decode import TurboDecode
from .images import TurboImages
from .inspect import TurboInspect
from .lora import TurboLoraLoader
from .prompt import TurboPrompt
from .sampling import TurboSampler, TurboSamplerSelect, TurboSigmas
from .save import TurboSaveImage
from .tiny import TurboTinyLoader, TurboTinyText


class TurboDistillExtension(ComfyExtension):
    async def on_load(self) -> None:
        save.start()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TurboLoraLoader,
            TurboSampler,
            TurboSigmas,
            TurboSamplerSelect,
            TurboAccelerate,
            TurboInspect,
            TurboCompare,
            TurboBake,
            TurboBakedLoader,
            TurboImages,
            TurboPrompt,
            TurboDecode,
            TurboSaveImage,
            TurboTinyLoader,
            TurboTinyText,
        ]
