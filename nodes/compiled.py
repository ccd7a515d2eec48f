"""torch.compile of a MODEL's transformer block: compiled once, used by all blocks.

All blocks run the same code, so the first one's compiled code serves the other 59: seconds instead
of the minutes that compiling the whole model takes.
"""

from __future__ import annotations

import functools
import subprocess
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper

from ..distill.contract.shown import first_line
from .attention import OVERRIDE, outside_graphs

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NAME = "Turbo Accelerate"
KEY = "turbo_distill.compile"
BLOCK_LISTS = ("transformer_blocks", "double_blocks", "single_blocks", "blocks", "layers")
OFF = "Set `compile` to off."


def compile_blocks(model: ModelPatcher) -> int:
    """Compiles the blocks of `model` at the first forward, in place; returns how many there are.

    Callers own a clone made with disable_dynamic. Raises ValueError: no compiler that works, or no
    blocks.
    """
    if fault := compiler_fault(model.load_device):
        raise ValueError(
            f"{NAME}: torch.compile does not work on this machine: {fault}. It needs Triton on a "
            f"GPU (pip install triton; triton-windows on Windows) and a C++ compiler on the CPU. "
            f"{OFF}"
        )
    keys = block_keys(model)
    set_torch_compile_wrapper(
        model,
        backend="inductor",
        options={"guard_filter_fn": keep_guards},
        dynamic=None,  # the first size as it is; the second makes code for any length
        keys=keys,
    )
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _around_sampling)
    return len(keys)


def block_keys(model: ModelPatcher) -> list[str]:
    """Paths of the transformer blocks below `model.model`. Raises ValueError without any."""
    net = model.get_model_object("diffusion_model")
    keys = [
        f"diffusion_model.{name}.{index}"
        for name in BLOCK_LISTS
        for index in range(len(getattr(net, name, ())))
    ]
    if not keys:
        raise ValueError(
            f"{NAME}: {type(net).__name__} has no list of blocks that could be compiled "
            f"({', '.join(BLOCK_LISTS)}). {OFF}"
        )
    return keys


@functools.cache
def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work on `device`, by compiling one line; None where it does."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        return first_line(error)
    return None


def keep_guards(guards: Any) -> list[bool]:
    """As core's TorchCompileModel: what is in transformer_options changes with every block."""
    return ["transformer_options" not in guard.name for guard in guards]


def _around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Keeps each MODEL's own attention, and puts torch's errors into words."""
    guider = executor.class_obj
    # guider.model_options are a copy for this run. Without transformer_options among its guards,
    # compiled code would keep the attention of the first MODEL that ran it, for all its clones.
    options = guider.model_options["transformer_options"]
    options[OVERRIDE] = outside_graphs(options.get(OVERRIDE))
    try:
        return executor(*args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = first_line(error)
        raise RuntimeError(
            f"{NAME}: torch.compile could not compile this MODEL's blocks: {reason}. {OFF}"
        ) from error
