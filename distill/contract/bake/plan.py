"""What a bake is going to do: every check happens before a weight of the base is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..describe import normalise_alone
from ..lora_fit import misfits
from ..lora_keys import LoraFormatError, NormalisedLora, normalise
from ..metadata import read_shapes
from ..module_names import BLOCK_MODULES, TOP_MODULES
from ..peft_folder import lora_file
from ..resolve import Override, resolve
from ..spec import TurboSpec
from ..tensor_file import check_finite, read_tensor
from . import fold
from .rounding import FORMATS, Format
from .weights import Stored, Weights, open_weights

TIMESTEP_ZERO = "__index_timestep_zero__"  # ComfyUI's mark of Edit-2511: reference images at t = 0
BLOCKS = "transformer_blocks."
_LAYERED = "time_text_embed.addition_t_embedding"
_NORMS = ("txt_norm", "norm_q", "norm_k", "norm_added_q", "norm_added_k")  # without a bias
_SHARED_MODULATION = re.compile(r"modulation(\.\d+)?(\.lin)?")
_LAYER = re.compile(r"(^|\.)\d+\..+\.weight")  # of a block: its number, then a name
_DELICATE = re.compile(r"(^|[._])mod(ulation)?(?=[._])|norm")  # scales and shifts a whole block
_PATCH = 2
_ROPE_AXES = {128: (16, 56, 56)}  # head dimension -> axes, where no config.json tells


@dataclass(frozen=True)
class LazyLora:
    """A LoRA known by its header; its matrices are read when a layer is merged."""

    lora: NormalisedLora  # of meta tensors
    weights: Weights
    keys: Mapping[int, str]  # id of a meta tensor -> its key in the file
    strength: float

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """down [rank, in], up [out, rank], float32, and what their product is multiplied by."""
        module = self.lora.modules[name]
        down, up = (self.weights.read(self.keys[id(half)]) for half in (module.down, module.up))
        return down.float(), up.float(), module.scale * self.strength


@dataclass(frozen=True)
class BakePlan:
    """A bake that has passed every check; no weight of the base has been read yet."""

    base: Weights
    lora: LazyLora
    spec: TurboSpec
    out: Path
    dtype: str
    tensors: Mapping[str, Tensor]  # meta tensors of the new file
    folded: fold.Folded | None = None
    unfolded: str = ""  # why it is not folded

    @property
    def format(self) -> Format:
        """How the blocks' linear layers are stored."""
        return FORMATS[self.dtype]


def plan_bake(
    base: Path,
    lora: Path,
    out: Path,
    dtype: str = "bf16",
    override: Override | None = None,
    folding: bool = True,
) -> BakePlan:
    """Reads headers and the LoRA and checks that all of it fits.

    base: a safetensors file, a diffusers folder, or an index of shards. lora: a file, or a folder
    as PEFT writes it. dtype: of the linear layers
    of the blocks, "bf16", "fp8" or "int8"; all else is bf16. folding: where the model allows it.
    Raises ValueError (dtype, a base of 8 bits or of another architecture), LoraFormatError,
    SpecError (no schedule known), FileExistsError, FileNotFoundError.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype: expected one of {', '.join(FORMATS)}; found {dtype!r}")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: expected a name that ends in .safetensors")
    if out.exists():
        raise FileExistsError(f"{out} exists already. Remove it, or choose another name.")
    weights = open_weights(base)
    check_base(weights)
    lora = lora_file(lora)
    shapes, metadata = read_shapes(lora)
    normalise_alone(shapes, metadata, lora.name)  # first: a base in its place is not hashed
    spec = resolve(lora, metadata, override).spec
    opened = _open_lora(lora, shapes, metadata, weights, spec.only_strength("a bake"))
    return make_plan(weights, opened, spec, out, dtype, folding)


def make_plan(
    base: Weights, lora: LazyLora, spec: TurboSpec, out: Path, dtype: str, folding: bool = True
) -> BakePlan:
    """What a bake of weights that `check_base` has passed makes of them, by their names."""
    metas = {name: stored.meta for name, stored in base.tensors.items()}
    unfolded = why_not_folded(base, spec) or ("" if folding else "as asked for")
    if unfolded:
        tensors = stored_tensors(metas, FORMATS[dtype])
        return BakePlan(base, lora, spec, out, dtype, tensors, unfolded=unfolded)
    rows = spec.sigmas()[:-1]
    if _references_at_zero(base):
        rows = (*rows, 0.0)
        metas[TIMESTEP_ZERO] = torch.empty(0, device="meta")
    folded = fold.Folded(rows, shape_of(base))
    tensors = baked_tensors(metas, len(rows), FORMATS[dtype])
    return BakePlan(base, lora, spec, out, dtype, tensors, folded)


def expected_tensors(blocks: int) -> set[str]:
    """Names of a Qwen-Image transformer's tensors."""
    modules = [
        *(name for name in TOP_MODULES if name != _LAYERED),
        *(f"{BLOCKS}{i}.{name}" for i in range(blocks) for name in BLOCK_MODULES),
    ]
    linears = [name for name in modules if not name.endswith(_NORMS)]
    return {f"{name}.weight" for name in modules} | {f"{name}.bias" for name in linears}


def check_base(base: Weights) -> None:
    """Raises ValueError for a baked model, one of 8 bits, and a Qwen-Image that is not whole."""
    source, found = base.source.name, set(base.tensors)
    if fold.HEADER_KEY in base.metadata:
        raise ValueError(f"{source} is a baked model already. Bake from the base model.")
    low = [
        name
        for name, stored in base.tensors.items()
        if stored.meta.dtype.itemsize < 2 or not stored.meta.dtype.is_floating_point
    ]
    if low:
        raise ValueError(
            f"{source}: {len(low)} tensors are in 8 bits or fewer, such as {low[0]}. Merging into "
            f"rounded weights loses most of the LoRA, so a bake starts from the bf16 model; choose "
            f"8 bits for the result instead."
        )
    if not any(map(fold.is_modulation, map(module_of, found))) or f"{_LAYERED}.weight" in found:
        return  # another model, which is not folded
    different = sorted(found - {TIMESTEP_ZERO} ^ expected_tensors(depth(base)))
    if different or depth(base) == 0:
        raise ValueError(
            f"{source}: expected the tensors of a Qwen-Image transformer; {len(different)} are "
            f"missing or unknown, for example {', '.join(different[:3])}. Choose the diffusion "
            f"model in ComfyUI's or diffusers' names."
        )


def why_not_folded(base: Weights, spec: TurboSpec) -> str:
    """Why nothing of a model that `check_base` has passed is folded; empty where it can be."""
    modules = [module_of(name) for name in base.tensors]
    if shared := [module for module in modules if _SHARED_MODULATION.fullmatch(module)]:
        return f"its modulation is {shared[0]}, one for all blocks (Qwen-Image-2.1)"
    if _LAYERED in modules:
        return "the modulation of Qwen-Image-Layered does not depend on the timestep alone"
    if not any(map(fold.is_modulation, modules)):
        return "it has not the modulation of a Qwen-Image"
    if spec.by_size:
        return "the LoRA's sigmas depend on the size of the image"
    return ""


def depth(base: Weights) -> int:
    """Number of blocks."""
    return len({name.split(".")[1] for name in base.tensors if name.startswith(BLOCKS)})


def shape_of(base: Weights) -> dict[str, Any]:
    """The model's numbers from its tensors' shapes; only RoPE's axes are not to be seen there."""
    width, channels = base.meta("img_in.weight").shape
    head = base.meta(f"{BLOCKS}0.attn.norm_q.weight").shape[0]
    axes = base.config.get("axes_dims_rope") or _ROPE_AXES.get(head)
    if axes is None:
        raise ValueError(
            f"{base.source}: heads of {head} numbers, not the 128 of the published models, so the "
            f"axes of its RoPE are not known. Put its config.json beside it."
        )
    patch = base.config.get("patch_size", _PATCH)
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": base.meta("proj_out.weight").shape[0] // patch**2,
        "num_layers": depth(base),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": base.meta("txt_in.weight").shape[1],
        "axes_dims_rope": list(axes),
    }


def baked_tensors(base: Mapping[str, Tensor], rows: int, form: Format) -> dict[str, Tensor]:
    """Meta tensors of the baked model from those of its base."""
    tensors: dict[str, Tensor] = {}
    for name, meta in base.items():
        module = module_of(name)
        if fold.becomes_table(module) and name.endswith(".weight"):
            tensors[name] = torch.empty(rows, meta.shape[0], device="meta")
        elif not fold.is_folded(module):
            tensors |= _stored(name, meta, form)
    return tensors


def stored_tensors(base: Mapping[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Meta tensors of a model that is not folded."""
    parts = (_stored(name, meta, form) for name, meta in base.items())
    return {name: meta for part in parts for name, meta in part.items()}


def _stored(name: str, meta: Tensor, form: Format) -> dict[str, Tensor]:
    """One tensor that stays, and its scale if it is of 8 bits."""
    if not is_rounded(name, meta):
        dtype = torch.float32 if name == TIMESTEP_ZERO else torch.bfloat16
        return {name: meta.to(dtype)}
    tensors = {name: torch.empty(meta.shape, dtype=form.dtype, device="meta")}
    if form.scale_shape is not None:
        tensors[f"{name}_scale"] = torch.empty(form.scale_shape(meta.shape[0]), device="meta")
    return tensors


def is_rounded(name: str, meta: Tensor) -> bool:
    """Whether a tensor is stored in the chosen format: the linear layers of the blocks, but for
    modulation, whose error would be that of the whole block.
    """
    return bool(_LAYER.search(name)) and meta.ndim == 2 and not _DELICATE.search(name)


def _references_at_zero(base: Weights) -> bool:
    """Edit-2511 modulates reference images as if they were at sigma 0: one more row."""
    return TIMESTEP_ZERO in base.tensors or bool(base.config.get("zero_cond_t"))


def _open_lora(
    path: Path,
    shapes: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    base: Weights,
    strength: float,
) -> LazyLora:
    """shapes, metadata: as `read_shapes` gives them of the file."""
    modules = {module_of(name) for name in base.tensors if base.meta(name).ndim == 2}
    lora = normalise(shapes, metadata, source=path.name, known_modules=modules)
    odd = misfits(lora, lambda name: base.meta(f"{name}.weight").shape if name in modules else None)
    if odd:
        raise LoraFormatError(
            f"{path.name}: {len(odd)} of its {len(lora.modules)} modules do not fit "
            f"{base.source.name}, such as {odd[0].name}. Choose the base model that the LoRA was "
            f"made for."
        )
    for key in shapes:  # now, not hours into the bake
        check_finite(key, read_tensor(path, key), path.name)
    stored = {key: Stored(path, key, tensor.to("meta")) for key, tensor in shapes.items()}
    keys = {id(tensor): key for key, tensor in shapes.items()}
    return LazyLora(lora, Weights(path, stored), keys, strength)


def module_of(name: str) -> str:
    """The module that a tensor belongs to: `img_in.weight` -> `img_in`."""
    return name.rpartition(".")[0]


def parameters(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers a model consists of; scales of 8-bit layers are none of them."""
    return sum(t.numel() for name, t in tensors.items() if not name.endswith(".weight_scale"))
