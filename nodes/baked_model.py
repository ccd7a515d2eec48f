"""A baked model in ComfyUI: core's own Qwen-Image, its modulation layers replaced by table rows.

Core's forward stays as it is. It embeds the timestep once and hands the embedding to every block;
here that embedding is the number of a table's row, and each modulation layer is core's own
Embedding, which looks the row up. So core casts, counts, offloads and streams the tables like any
other weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

from ..distill.contract.bake.fold import HEADER_KEY as FOLDED_KEY
from ..distill.contract.bake.fold import Folded, row_of
from ..distill.contract.bake.merge import BAKED_KEY
from ..distill.contract.metadata import read_header
from ..distill.contract.spec import HEADER_KEY, TurboSpec
from .core_schedule import follow
from .spec_attachment import Attached, attach

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

MODULATION_CHUNKS = 6  # shift, scale and gate, of attention and of the MLP
NORM_OUT_CHUNKS = 2  # scale and shift


class SigmaRow(torch.nn.Module):
    """In place of the timestep embedding: the row of each sigma.  # [B] -> [B] int64

    Raises ValueError for a sigma that has no row.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        super().__init__()
        self.sigmas = tuple(sigmas)

    def forward(
        self, timestep: torch.Tensor, hidden_states: torch.Tensor, addition_t_cond: object = None
    ) -> torch.Tensor:
        rows = [row_of(sigma, self.sigmas) for sigma in timestep.tolist()]
        return torch.tensor(rows, device=timestep.device)


def load_baked(path: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """A file made by `turbo-distill bake` as a MODEL, its spec attached.

    The depth and the variant are what core's detection finds; the other numbers are the header's.
    Raises ValueError: no such file, or tensors missing or unknown.
    """
    metadata = read_header(path)  # first: refuses what is no whole safetensors file
    if BAKED_KEY in metadata and FOLDED_KEY not in metadata:
        return _load_unfolded(path, metadata, disable_dynamic)
    folded = Folded.from_metadata(metadata, path.name)
    spec = TurboSpec.from_json(metadata.get(HEADER_KEY, ""), source=path.name)
    weights, _ = comfy.utils.load_torch_file(str(path), return_metadata=True)
    weights, _ = comfy.utils.convert_old_quants(weights, "", metadata=metadata)
    patcher = baked_model(weights, folded, spec, path.name, disable_dynamic)
    patcher.cached_patcher_init = (load_baked, (path,))  # how core copies it to other GPUs
    return patcher


def _load_unfolded(path: Path, metadata: Mapping[str, str], disable_dynamic: bool) -> ModelPatcher:
    """An ordinary model file with a spec in its header."""
    spec = TurboSpec.from_json(metadata.get(HEADER_KEY, ""), source=path.name)
    patcher = comfy.sd.load_diffusion_model(str(path), disable_dynamic=disable_dynamic)
    patcher.cached_patcher_init = (load_baked, (path,))
    _attach(patcher, spec, path.name)
    return patcher


def _attach(patcher: ModelPatcher, spec: TurboSpec, source: str) -> None:
    attach(patcher, Attached(spec, "header of the baked model", source))
    follow(patcher)


def baked_model(
    weights: dict[str, torch.Tensor],
    folded: Folded,
    spec: TurboSpec,
    source: str,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Tensors of a baked model as a MODEL; source: a file name.

    weights: as core's `convert_old_quants` leaves them. Raises ValueError: missing or unknown ones.
    """
    model_config = _config(weights, folded)
    transformer = partial(
        folded_transformer,
        sigmas=folded.sigmas,
        compute_dtype=model_config.manual_cast_dtype or model_config.unet_config["dtype"],
    )
    model = comfy.model_base.QwenImage(model_config, unet_model=transformer)
    offload_device = comfy.model_management.unet_offload_device()
    kind = comfy.model_patcher
    patcher = (kind.ModelPatcher if disable_dynamic else kind.CoreModelPatcher)(
        model, comfy.model_management.get_torch_device(), offload_device
    )
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    names = model.diffusion_model.load_state_dict(
        weights, strict=False, assign=patcher.is_dynamic()
    )
    if odd := [*names.missing_keys, *names.unexpected_keys]:
        raise ValueError(
            f"{source}: {len(odd)} tensors are missing or unknown, for example "
            f"{', '.join(odd[:3])}. Bake the model again."
        )
    _attach(patcher, spec, source)
    return patcher


def folded_transformer(
    *,
    sigmas: Sequence[float],
    compute_dtype: torch.dtype,
    operations: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **config: Any,
) -> QwenImageTransformer2DModel:
    """Core's transformer with a table of `sigmas` in place of its modulation. Weights are not set.

    The tables stay in float32, which they were computed in, and come out as `compute_dtype`.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    net = QwenImageTransformer2DModel(
        **config, dtype=dtype, device=device, operations=_without_modulation(operations, width)
    )

    class Rows(operations.Embedding):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            # out_dtype serves core's casting path, .to() its path without casting
            return super().forward(rows, out_dtype=compute_dtype).to(compute_dtype)

    def table(chunks: int) -> torch.nn.Module:
        return Rows(len(sigmas), chunks * width, dtype=torch.float32, device=device)

    net.time_text_embed = SigmaRow(sigmas)
    for block in net.transformer_blocks:
        # Names as before, so that core's plain loader stops at the shape instead of painting noise.
        block.img_mod = torch.nn.Sequential(torch.nn.Identity(), table(MODULATION_CHUNKS))
        block.txt_mod = torch.nn.Sequential(torch.nn.Identity(), table(MODULATION_CHUNKS))
    net.norm_out.silu = torch.nn.Identity()  # silu is in the table
    net.norm_out.linear = table(NORM_OUT_CHUNKS)
    return net


def is_folded_model(model: torch.nn.Module) -> bool:
    """Whether a diffusion model is one of ours."""
    return isinstance(getattr(model, "time_text_embed", None), SigmaRow)


def _config(weights: dict[str, torch.Tensor], folded: Folded) -> comfy.supported_models.QwenImage:
    """Core's description of the model, with the dtypes that core's own loader would choose."""
    detected = comfy.model_detection.detect_unet_config(weights, "") or {}
    config = comfy.supported_models.QwenImage({**detected, **folded.shape})
    config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    device = comfy.model_management.get_torch_device()
    supported = config.supported_inference_dtypes
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=supported,
        weight_dtype=None if config.quant_config else comfy.utils.weight_dtype(weights),
    )
    manual_cast = comfy.model_management.unet_manual_cast(
        None if config.quant_config else dtype, device, supported
    )
    config.set_inference_dtype(dtype, manual_cast, device=device)
    return config


def _without_modulation(operations: Any, width: int) -> Any:
    """`operations` that make nothing of the modulation layers, a third of the model: they are
    replaced at once, and not every system gives memory that is never touched for free.
    """

    def linear(in_features: int, out_features: int, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if (in_features, out_features) == (width, MODULATION_CHUNKS * width):
            return torch.nn.Identity()
        return operations.Linear(in_features, out_features, *args, **kwargs)

    return type("WithoutModulation", (operations,), {"Linear": staticmethod(linear)})
