"""The ComfyUI side of Turbo Distill: V3 nodes over the shared contract in distill/contract."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .bake import TurboBake, TurboBakedLoader
from .compare import TurboCompare
from .inspect import TurboInspect
from .lora import TurboLoraLoader
from .sampling import TurboSampler, TurboSamplerSelect, TurboSigmas
from .tiny import TurboTinyLoader, TurboTinyText


class TurboDistillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TurboLoraLoader,
            TurboSampler,
            TurboSigmas,
            TurboSamplerSelect,
            TurboInspect,
            TurboCompare,
            TurboBake,
            TurboBakedLoader,
            TurboTinyLoader,
            TurboTinyText,
        ]
