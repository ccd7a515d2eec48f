"""The ComfyUI side of Turbo Distill: V3 nodes over the shared contract in distill/contract."""

from __future__ import annotations

import sys

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
from .sampling import TurboSampler
from .save import TurboSaveImage
from .sigmas import TurboSamplerSelect, TurboSigmas
from .tiny import TurboTinyLoader, TurboTinyText

PACKAGE = __name__.rpartition(".")[0]  # a path of this machine, where ComfyUI loads the pack


def name_errors() -> None:
    """Lets our exceptions be called turbo_distill.SpecError: ComfyUI shows the module with the
    class, and names ours by the path of custom_nodes.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]
    for member in [member for module in modules for member in vars(module).values()]:
        ours = isinstance(member, type) and member.__module__.startswith(f"{PACKAGE}.")
        if ours and issubclass(member, Exception):
            member.__module__ = "turbo_distill"


class TurboDistillExtension(ComfyExtension):
    async def on_load(self) -> None:
        save.start()
        name_errors()

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
