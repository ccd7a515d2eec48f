"""LoRA keys of every spelling met in the wild, under ComfyUI's and diffusers' module names.

A key is prefix + module + marker of the half (+ adapter name) + ".weight", for example
`base_model.model.` + `transformer_blocks.0.attn.to_q` + `.lora_A` + `.student` + `.weight`.
Nothing is guessed: what cannot be applied exactly as it was trained raises LoraFormatError.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .lora_alpha import ADAPTER_CONFIG, Alphas, Given, collect_alpha, tensor_alpha
from .lora_forms import LoraFormatError as LoraFormatError
from .lora_forms import is_text_encoder, refuse
from .module_names import flat_index, flatten, unflatten
from .shown import shown

_DOTTED_PREFIXES = re.compile(  # in any order and combination, e.g. unet.base_model.model.
    r"(?:base_model\.model\.|diffusion_model\.|transformer\.|unet\.|pipe\.dit\.)*"
)
_FLAT_PREFIXES = re.compile(r"lora_unet_|lora_transformer_|lycoris_")
_MAX_KEY = 1000  # characters; a pattern's time grows with their square

_HALF = re.compile(
    r"(?P<stem>.+?)"
    r"(?P<marker>\.lora_[AB]|\.lora_down|\.lora_up|[._]lora\.down|[._]lora\.up"
    r"|\.lora_linear_layer\.down|\.lora_linear_layer\.up)"
    r"(?P<rest>(?:\.[^.]+)*)"
)
_PAIRS = {  # marker of the down half -> both halves, for people
    ".lora_A": ".lora_A/lora_B",
    ".lora_down": ".lora_down/lora_up",
    ".lora.down": ".lora.down/up",
    "_lora.down": "_lora.down/up",
    ".lora_linear_layer.down": ".lora_linear_layer.down/up",
}
# Additive changes of what has no matrix: zeros change nothing, and core's own exports are full of
# them.
_ADDED = re.compile(r"\.(diff|diff_b|w_norm|b_norm)$|\.lora_(A|B|up|down)(\..+)?\.bias$")
_CHANGED = re.compile(r"(?P<stem>.+)\.(?P<kind>diff|diff_b|w_norm|b_norm)")
_PARAMETERS = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
_LOOKS_LIKE = (  # first match names a file without LoRA keys
    (r"^(decoder|encoder|first_stage_model)\.|^conv[12]\.", "a VAE"),
    (r"^(model\.layers|visual|language_model|model\.language_model)\.", "a text encoder"),
    (
        r"transformer_blocks\.\d+\.|diffusion_model\.|double_blocks\.|^blocks\.\d+\.",
        "a whole model",
    ),
)


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The low-rank change of one linear layer: delta = alpha / rank * up @ down.

    down: [rank, in_features]; up: [out_features, rank];
    alpha_source: "tensor", "metadata", "adapter_config.json" or "rank" (alpha was not given and
    equals the rank).
    """

    name: str
    down: Tensor
    up: Tensor
    alpha: float
    alpha_source: str = "rank"

    @property
    def rank(self) -> int:
        """Number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass
class NormalisedLora:
    """A LoRA under ComfyUI's module names.

    formats: spellings found, such as "transformer.<module>.lora_A/lora_B"; adapters: PEFT adapter
    names; changes: (module, "weight" or "bias") -> what is added to that parameter as it is, kept
    where `normalise` was asked to; other_keys: keys that belong to no module of the diffusion model
    and are not applied; alpha_where: the place that states alpha, in words; warnings: what was
    assumed, for people.
    """

    source: str
    modules: dict[str, LoraModule]
    formats: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    other_keys: tuple[str, ...] = ()
    changes: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    alpha_where: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def alpha_source(self) -> str:
        """Where alpha came from, as `LoraModule.alpha_source` has it, or "mixed"."""
        sources = {module.alpha_source for module in self.modules.values()}
        return sources.pop() if len(sources) == 1 else "mixed"

    @property
    def alpha_words(self) -> str:
        """Where alpha came from, for people."""
        stated = f"from {self.alpha_where} (core's loaders would ignore it)"
        words = {
            "tensor": "from the file's .alpha tensors",
            "metadata": stated,
            ADAPTER_CONFIG: stated,
            "rank": "not given, so equal to the rank (scale 1)",
        }
        found = Counter(module.alpha_source for module in self.modules.values())
        if len(found) == 1:
            return words[next(iter(found))]
        return "; ".join(f"{count} modules {words[source]}" for source, count in found.items())

    @property
    def ranks(self) -> dict[int, int]:
        """rank -> number of modules."""
        return dict(sorted(Counter(module.rank for module in self.modules.values()).items()))


@dataclass
class _Parts:
    """What has been read of one module; key texts are kept for messages."""

    halves: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    alpha: tuple[str, Tensor] | None = None


def normalise(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    source: str = "LoRA",
    known_modules: Collection[str] | None = None,
    keep_changes: bool = False,
) -> NormalisedLora:
    """Bring a LoRA's keys to `<module>` names as in ComfyUI's and diffusers' Qwen-Image.

    metadata: the file's header as `read_lora` gives it, for alpha; source: file name for messages;
    known_modules: names of the model at hand, which resolve flattened names of any model family; in
    a mapping, names of equal values mean the same module.
    keep_changes: `.diff` and `.diff_b`, which no pair of matrices can say, go to `changes`.
    Tensors are not copied and keep device and dtype; meta tensors do. alpha comes from `.alpha`
    tensors, else from where it is stated, else it equals the rank. Keys of a text encoder are
    reported in `other_keys`, not applied.

    Raises LoraFormatError: no LoRA keys, a kind that is no plain low-rank pair (DoRA, LoHa, LoKr,
    OFT, biases, `.diff`) and no zeros, half a pair, shapes that do not fit, a module given twice,
    two places that state another alpha, or names of another model.
    """
    parts: dict[str, _Parts] = {}
    formats: set[str] = set()
    adapters: set[str] = set()
    other: list[str] = []
    unresolved: list[str] = []
    changes: dict[tuple[str, str], Tensor] = {}
    prefixes: set[str] = set()
    index = cache(lambda: flat_index(known_modules or ()))  # most files never ask

    for key, tensor in state_dict.items():
        check_key(key, source)
        if _adds_nothing(key, tensor):
            continue
        if keep_changes and (changed := _CHANGED.fullmatch(key)):
            _, name = _module_name(changed["stem"], known_modules, index)
            if name is None:
                unresolved.append(key)
            else:
                changes[name, _PARAMETERS[changed["kind"]]] = tensor
            continue
        refuse(key, tensor, source)
        half = _HALF.fullmatch(key)
        stem = half["stem"] if half else key.removesuffix(".alpha")
        if (half is None and stem == key) or is_text_encoder(key):
            other.append(key)
            continue
        prefix, name = _module_name(stem, known_modules, index)
        if name is None:
            unresolved.append(key)
            continue
        if half is None:
            _put_alpha(parts.setdefault(name, _Parts()), name, key, tensor, source)
            continue
        marker, adapter = half["marker"], half["rest"].removesuffix(".weight").removeprefix(".")
        _put_half(parts.setdefault(name, _Parts()), name, marker, key, tensor, source)
        prefixes.add(prefix)
        if marker in _PAIRS:
            formats.add(f"{prefix}<module>{_PAIRS[marker]}")
        if adapter:
            adapters.add(adapter)

    if unresolved:
        raise _another_model(unresolved, len(state_dict), source)
    for name, found in list(parts.items()):
        if found.alpha is not None and not found.halves:
            other.append(found.alpha[0])
            del parts[name]
    if not parts:
        raise _no_lora(list(state_dict), source)
    pairs = {name: _pair(name, found, source) for name, found in parts.items()}
    alphas = _alphas(pairs, parts, metadata or {}, prefixes, source)
    modules = {
        name: LoraModule(name, *pair, alphas.values[name], alphas.sources[name])
        for name, pair in pairs.items()
    }
    return NormalisedLora(
        source,
        modules,
        tuple(sorted(formats)),
        tuple(sorted(adapters)),
        tuple(other),
        changes,
        alphas.where,
        alphas.warnings,
    )


def delta(module: LoraModule) -> Tensor:
    """The change of the weight, alpha / rank * up @ down, float32 [out_features, in_features]."""
    return module.scale * (module.up.float() @ module.down.float())


def to_comfy(lora: NormalisedLora, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`diffusion_model.<module>.lora_A.weight`, `.lora_B.weight`, `.alpha`: ComfyUI's own spelling.

    dtype: of the weights, None keeps them; alpha is float32, because 1/3 in bfloat16 is not 1/3.
    """
    tensors = {}
    for name, module in lora.modules.items():
        stem = f"diffusion_model.{name}"
        tensors[f"{stem}.lora_A.weight"] = module.down.to(dtype or module.down.dtype).contiguous()
        tensors[f"{stem}.lora_B.weight"] = module.up.to(dtype or module.up.dtype).contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    return tensors


def to_diffusers(lora: NormalisedLora, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """`transformer.<module>.lora_A.weight`, `.lora_B.weight` for diffusers' `load_lora_weights`.

    The scale is multiplied into lora_B (in float32, then dtype, None keeps it), so it holds with
    mixed ranks and without metadata, which diffusers would need for alpha.
    """
    tensors = {}
    for name, module in lora.modules.items():
        up = module.up.float() * module.scale
        tensors[f"transformer.{name}.lora_A.weight"] = module.down.to(
            dtype or module.down.dtype
        ).contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = up.to(dtype or module.up.dtype).contiguous()
    return tensors


def split_prefix(stem: str) -> tuple[str, str]:
    """`transformer.img_in` -> "transformer.", "img_in"; what follows a prefix that ends in an
    underscore is a flattened name.
    """
    match = _FLAT_PREFIXES.match(stem) or _DOTTED_PREFIXES.match(stem)
    end = match.end() if match else 0
    return stem[:end], stem[end:]


def _module_name(
    stem: str, known: Collection[str] | None, index: Callable[[], Mapping[str, str]]
) -> tuple[str, str | None]:
    """Split a stem into prefix and module name; the name is None if it cannot be resolved."""
    prefix, name = split_prefix(stem)
    if prefix.endswith("_"):
        return prefix, unflatten(flatten(name.lstrip("_")), index())
    if known is not None and name not in known:
        return prefix, index().get(flatten(name), name)
    return prefix, name


def _put_half(parts: _Parts, name: str, marker: str, key: str, tensor: Tensor, source: str) -> None:
    half = "down" if marker in _PAIRS else "up"
    if half in parts.halves:
        raise LoraFormatError(
            f"{source}: module {shown(name)} is given twice, by {shown(parts.halves[half][0])} and "
            f"{shown(key)}. Expected one adapter in one spelling; save only the adapter you want."
        )
    if tensor.ndim != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise LoraFormatError(
            f"{source}: key {shown(key)}: expected a floating-point matrix; found shape "
            f"{list(tensor.shape)}, {tensor.dtype}. Only LoRAs of linear layers can be applied."
        )
    parts.halves[half] = (key, tensor)


def _put_alpha(parts: _Parts, name: str, key: str, tensor: Tensor, source: str) -> None:
    if parts.alpha is not None:
        raise LoraFormatError(
            f"{source}: alpha of module {shown(name)} is given twice, by {shown(parts.alpha[0])} "
            f"and {shown(key)}"
        )
    parts.alpha = (key, tensor)


def _pair(name: str, parts: _Parts, source: str) -> tuple[Tensor, Tensor]:
    """down and up, of one rank."""
    if len(parts.halves) != 2:
        present = next(iter(parts.halves.values()))[0]
        missing = "up (lora_B)" if "down" in parts.halves else "down (lora_A)"
        raise LoraFormatError(
            f"{source}: module {shown(name)} has {shown(present)} but no {missing} half. "
            "The file is incomplete; download or export it again."
        )
    (down_key, down), (up_key, up) = parts.halves["down"], parts.halves["up"]
    if down.shape[0] != up.shape[1]:
        raise LoraFormatError(
            f"{source}: module {shown(name)}: expected one rank; found {down.shape[0]} rows in "
            f"{shown(down_key)} {list(down.shape)}, {up.shape[1]} columns in {shown(up_key)} "
            f"{list(up.shape)}"
        )
    return down, up


def _alphas(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    parts: Mapping[str, _Parts],
    metadata: Mapping[str, str],
    prefixes: Collection[str],
    source: str,
) -> Alphas:
    try:
        given = {
            name: Given(
                rank=down.shape[0],
                alpha=None if (alpha := parts[name].alpha) is None else tensor_alpha(*alpha),
                peft=".lora_A" in parts[name].halves["down"][0],
            )
            for name, (down, _) in pairs.items()
        }
        return collect_alpha(given, metadata, config_counts=_is_pefts(given, prefixes, source))
    except ValueError as error:
        raise LoraFormatError(f"{source}: {error}") from None


def _is_pefts(modules: Mapping[str, Given], prefixes: Collection[str], source: str) -> bool:
    """Whether a file is as PEFT writes it, by its name or its keys, so that a config beside it is
    its own. In a folder of many LoRAs a config may be of another one.
    """
    if source.endswith("adapter_model.safetensors"):
        return True
    bare = all(prefix == "" or "base_model.model." in prefix for prefix in prefixes)
    return bare and all(module.peft for module in modules.values())


def check_key(key: str, source: str) -> str:
    """The key itself. Raises LoraFormatError for one that is too long to be a module's."""
    if len(key) > _MAX_KEY:
        raise LoraFormatError(
            f"{source}: key {shown(key)}: expected at most {_MAX_KEY:,} characters; found "
            f"{len(key):,}. The file is damaged, or made to harm; download it again."
        )
    return key


def values_matter(key: str, shape: Collection[int]) -> bool:
    """Whether `normalise` looks at a tensor's numbers; of all others shape and dtype are enough."""
    return math.prod(shape) == 1 or (len(shape) == 1 and _ADDED.search(key) is not None)


def _adds_nothing(key: str, tensor: Tensor) -> bool:
    if not values_matter(key, tensor.shape) or _ADDED.search(key) is None or tensor.is_meta:
        return False
    return not tensor.count_nonzero()


def _another_model(keys: Iterable[str], total: int, source: str) -> LoraFormatError:
    keys = list(keys)
    return LoraFormatError(
        f"{source}: {len(keys)} of {total} keys name no module of this model, for example "
        f"{_examples(keys)}. Expected Qwen-Image names such as "
        "'lora_unet_transformer_blocks_0_attn_to_q'; the LoRA was made for another architecture."
    )


def _no_lora(keys: list[str], source: str) -> LoraFormatError:
    if not keys:
        return LoraFormatError(f"{source}: expected a LoRA; found no tensors at all")
    if all(is_text_encoder(key) for key in keys):
        kind = "a LoRA of a text encoder alone"
    else:
        kinds = (k for pattern, k in _LOOKS_LIKE if any(re.search(pattern, key) for key in keys))
        kind = next(kinds, "something else")
    return LoraFormatError(
        f"{source}: expected keys such as 'diffusion_model.<module>.lora_A.weight'; found none "
        f"among {len(keys)}, for example {_examples(keys)}. This looks like {kind}; "
        "choose a LoRA file."
    )


def _examples(keys: Iterable[str]) -> str:
    return ", ".join(shown(key) for key in list(keys)[:3])
