"""A ComfyUI in this process, with our pack loaded as ComfyUI loads it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from distill.utils.comfyui import PATH_VARIABLE, ensure_comfyui, find_comfyui

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Core:
    """ComfyUI, importable, with a folder of its own for models and output."""

    folder: Path
    pack_name: str

    def pack(self, module: str) -> ModuleType:
        """A module of our pack, such as "nodes.sampling"."""
        return importlib.import_module(f"{self.pack_name}.{module}")

    def models(self, kind: str) -> Path:
        """The folder of models/`kind`, such as "loras"."""
        path = self.folder / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def device(self) -> torch.device:
        from comfy.model_management import get_torch_device

        return get_torch_device()

    def run(self, node: Any, **arguments: Any) -> tuple[Any, ...]:
        """Executes a V3 node as the server does and returns its outputs."""
        node.GET_SCHEMA()
        return node.PREPARE_CLASS_CLONE(None).execute(**arguments).args


def start(folder: Path, cpu: bool) -> Core:
    """Makes ComfyUI importable. On the CPU it computes in float32, like every arm there; on a GPU
    it keeps models on the card, as with --highvram.

    ComfyUI reads its arguments when it is first imported, so this comes before all of it. One that
    COMFYUI_PATH names is taken as it is: a machine without network has no front end to install.
    """
    named = find_comfyui() if os.environ.get(PATH_VARIABLE) else None
    # before our own folder: `import nodes` must find ComfyUI's nodes.py
    sys.path.insert(0, str(named or ensure_comfyui()))
    args = importlib.import_module("comfy.cli_args").args
    args.cpu, args.fp32_unet, args.highvram = cpu, cpu, not cpu
    importlib.import_module("comfy.utils").set_progress_bar_enabled(False)
    paths = importlib.import_module("folder_paths")
    core = Core(folder, str(ROOT).replace(".", "_x_"))
    for kind in ("loras", "diffusion_models"):
        paths.add_model_folder_path(kind, str(core.models(kind)), is_default=True)
    paths.set_output_directory(str(core.models("output")))
    if core.pack_name not in sys.modules:
        _load_pack(core.pack_name)
    return core


def _load_pack(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{ROOT / '__init__.py'} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def fill_randomly(module: torch.nn.Module, std: float = 0.02) -> None:
    """Weights from a normal distribution, biases too; vectors of ones stay. In place.

    Never zeros: matrix products of zeros ran 13 % faster on an H200, which draws less power.
    """
    with torch.inference_mode(False), torch.no_grad():
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in module.named_parameters():
            if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                parameter.fill_(1)
                continue
            if parameter.device not in generators:
                seeded = torch.Generator(parameter.device).manual_seed(0)
                generators[parameter.device] = seeded
            generator = generators[parameter.device]
            if parameter.dtype.itemsize > 1:
                parameter.normal_(0, std, generator=generator)
            else:  # fp8 has no generator of its own
                values = torch.empty_like(parameter, dtype=torch.bfloat16)
                parameter.copy_(values.normal_(0, std, generator=generator))
