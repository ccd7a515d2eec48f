"""alpha of a LoRA, from wherever it stands. The scale of a LoRA is alpha / rank.

ComfyUI reads alpha from `.alpha` tensors only; many trainers write it elsewhere: into the header,
under several names, or into PEFT's adapter_config.json beside the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from .shown import plain, shown

PEFT_KEY = "lora_adapter_metadata"  # diffusers' LORA_ADAPTER_METADATA_KEY
ADAPTER_CONFIG = "adapter_config.json"  # `read_lora` puts the text of that file beside the header
_PEFT_KEYS = (PEFT_KEY, "adapter_config", "peft_config")
_NUMBER_KEYS = ("lora_alpha", "network_alpha", "alpha")
_RANK_KEYS = ("lora_rank", "network_dim", "lora_dim", "rank", "r")
_KOHYA_KEYS = ("ss_network_alpha", "ss_network_dim")
_KOHYA_WHERE = f"the header's {_KOHYA_KEYS[0]!r}"
_NOTHING = ("", "none", "null", "dynamic")  # words for "no number"
# What a header says about alpha and rank: true of the tensors it came with, not of other ones.
HEADER_KEYS = frozenset(
    {*_PEFT_KEYS, ADAPTER_CONFIG, *_NUMBER_KEYS, *_RANK_KEYS, *_KOHYA_KEYS, "use_rslora"}
)
_COMPONENTS = ("transformer.", "diffusion_model.", "unet.", "")
_TOLERANCE = 0.005  # relative; .alpha tensors are often bfloat16


@dataclass(frozen=True)
class Given:
    """A module's rank and the tensors' word on its alpha, None without one.

    peft: its halves are called lora_A and lora_B.
    """

    rank: int
    alpha: float | None
    peft: bool


@dataclass(frozen=True)
class Stated:
    """alpha as one place states it for all modules.

    where: that place, in words; per_module: exceptions by module (PEFT's `alpha_pattern`), a name
    with "^" is whole, any other the end of one; ranks: those that it is meant for, empty if it does
    not tell; rslora: scale is alpha / sqrt(rank) instead of alpha / rank; config: a whole
    LoraConfig of PEFT's, which would have told of exceptions.
    """

    where: str
    alpha: float
    per_module: Mapping[str, float] = field(default_factory=dict)
    ranks: frozenset[int] = frozenset()
    rslora: bool = False
    config: bool = False

    def of(self, name: str, rank: int) -> float:
        """alpha for one module, in the convention scale = alpha / rank."""
        end = next((end for end in self.per_module if _is_end(end, name)), None)
        alpha = self.alpha if end is None else self.per_module[end]
        return alpha * math.sqrt(rank) if self.rslora else alpha

    def check_rank(self, name: str, rank: int) -> None:
        """Raises ValueError where a module's rank is none that this alpha is meant for."""
        if self.ranks and rank not in self.ranks:
            expected = plain(", ".join(map(str, sorted(self.ranks))))
            raise ValueError(
                f"{self.where} gives alpha {self.alpha:g} for rank {expected}, but module "
                f"{shown(name)} has rank {rank}. They do not belong together: take both from one "
                "place."
            )


@dataclass(frozen=True)
class Kohya:
    """sd-scripts' record of its arguments: alpha, and the rank that it refers to if it tells."""

    alpha: float
    dim: float | None = None

    def of(self, rank: int) -> float:
        """alpha in the convention scale = alpha / rank."""
        return self.alpha if self.dim is None else self.alpha / self.dim * rank

    def agrees(self, rank: int, alpha: float) -> bool:
        """Whether a module's own alpha is this one."""
        return same_alpha(self.alpha, alpha) or same_alpha(self.of(rank), alpha)


@dataclass(frozen=True)
class Alphas:
    """alpha of every module, where each is from, and what a person should know about it.

    sources: "tensor", "metadata", "adapter_config.json" or "rank"; where: the place other than
    tensors, in words.
    """

    values: Mapping[str, float]
    sources: Mapping[str, str]
    where: str
    warnings: tuple[str, ...]


def collect_alpha(
    modules: Mapping[str, Given], metadata: Mapping[str, str], *, config_counts: bool
) -> Alphas:
    """alpha of all modules: from tensors, else as stated, else equal to the rank.

    metadata: as `read_lora` gives it; config_counts: whether adapter_config.json is the file's own.
    Raises ValueError where two places disagree, or one is malformed.
    """
    stated, kohya = list(_stated(metadata, config_counts)), _kohya(metadata)
    _check_agreement(stated, kohya)
    first = stated[0] if stated else None
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name, given in modules.items():
        if given.alpha is not None:
            for place in stated:
                _check_tensor(name, given.rank, given.alpha, place)
            values[name], sources[name] = given.alpha, "tensor"
        elif first is not None:
            first.check_rank(name, given.rank)
            values[name] = first.of(name, given.rank)
            sources[name] = ADAPTER_CONFIG if first.where == ADAPTER_CONFIG else "metadata"
        elif kohya is not None and _applies(kohya, given):
            values[name], sources[name] = kohya.of(given.rank), "metadata"
        else:
            values[name], sources[name] = float(given.rank), "rank"
    where = first.where if first else _KOHYA_WHERE
    warnings = tuple(_warnings(modules, sources, kohya, metadata, config_counts))
    return Alphas(values, sources, where, warnings)


def tensor_alpha(key: str, tensor: Tensor) -> float:
    """The number in an `.alpha` tensor. Raises ValueError if it is not one finite number."""
    if tensor.numel() != 1:
        raise ValueError(f"key {shown(key)}: expected one number; found shape {list(tensor.shape)}")
    alpha = float(tensor.item())
    if not math.isfinite(alpha):
        raise ValueError(f"key {shown(key)}: expected a finite number; found {alpha}")
    return alpha


# -------------------------------------------------------------------------------- what is stated


def _stated(metadata: Mapping[str, str], config_counts: bool) -> Iterator[Stated]:
    """Every place that states alpha, the most detailed first."""
    for key in _PEFT_KEYS:
        if key in metadata and (found := _peft_alpha(f"the header's {key!r}", metadata[key])):
            yield found
    if config_counts and ADAPTER_CONFIG in metadata:
        found = _peft_alpha(ADAPTER_CONFIG, metadata[ADAPTER_CONFIG])
        if found:
            yield found
    numbers = (_maybe_number(metadata.get(key)) for key in _RANK_KEYS)
    ranks = frozenset(int(number) for number in numbers if number)
    rslora = metadata.get("use_rslora", "").strip().lower() in ("true", "1")
    for key in _NUMBER_KEYS:
        where = f"the header's {key!r}"
        if key in metadata and (alpha := _stated_number(where, metadata[key])) is not None:
            yield Stated(where, alpha, ranks=ranks, rslora=rslora)


def _peft_alpha(where: str, text: str) -> Stated | None:
    """PEFT's LoraConfig: as PEFT writes it, or as diffusers does, the component's name before each
    key.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON; found text that is not ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected an object; found {type(config).__name__}")
    component = next((name for name in _COMPONENTS if f"{name}lora_alpha" in config), None)
    if component is None:
        return None

    def get(key: str) -> object:
        return config.get(f"{component}{key}")

    if get("use_dora"):
        raise ValueError(
            f"{where}: 'use_dora' is set, and DoRA cannot be applied as a low-rank side branch. "
            "Merge it into the base model, or train without DoRA."
        )
    alphas, ranks = (
        _object(where, key, get(key) or {}) for key in ("alpha_pattern", "rank_pattern")
    )
    rank = get("r")
    # A header travels with its tensors; a file may end up beside somebody else's config.
    known = [rank, *ranks.values()] if where == ADAPTER_CONFIG and rank is not None else []
    return Stated(
        where,
        alpha=_finite(where, f"{component}lora_alpha", get("lora_alpha")),
        per_module={
            _literal(where, key): _finite(where, f"alpha_pattern[{shown(key)}]", alpha)
            for key, alpha in alphas.items()
        },
        ranks=frozenset(int(_finite(where, "r or rank_pattern", number)) for number in known),
        rslora=bool(get("use_rslora")),
        config=True,
    )


def _kohya(metadata: Mapping[str, str]) -> Kohya | None:
    """`ss_network_alpha` over `ss_network_dim`; 'None' and 'Dynamic' say nothing."""
    alpha, dim = (_maybe_number(metadata.get(key)) for key in _KOHYA_KEYS)
    if alpha is None or (_KOHYA_KEYS[1] in metadata and (dim is None or dim <= 0)):
        return None
    return Kohya(alpha, dim)


def _applies(kohya: Kohya, given: Given) -> bool:
    """Whether kohya's record is about these keys.

    Converters (musubi-tuner's `convert_lora.py`) multiply the scale into lora_A and lora_B and keep
    the header as it was, so there it would be applied twice.
    """
    return not given.peft or math.isclose(kohya.of(given.rank), given.rank)


# ----------------------------------------------------------------------------- do they agree?


def _check_agreement(stated: list[Stated], kohya: Kohya | None) -> None:
    """Raises ValueError unless all places state the same."""
    for first, other in pairwise(stated):
        same = same_alpha(first.alpha, other.alpha)
        if first.config and other.config:
            details = [(place.per_module, place.rslora) for place in (first, other)]
            same = same and details[0] == details[1]
        if not same:
            raise _disagree(first.where, first.alpha, other.where, other.alpha)
    if stated and kohya and not same_alpha(stated[0].alpha, kohya.alpha):
        raise _disagree(stated[0].where, stated[0].alpha, _KOHYA_WHERE, kohya.alpha)


def _check_tensor(name: str, rank: int, alpha: float, place: Stated) -> None:
    if not same_alpha(place.of(name, rank), alpha):
        raise _disagree(place.where, place.of(name, rank), f"the tensor {plain(name)}.alpha", alpha)


def _disagree(one: str, alpha: float, other: str, other_alpha: float) -> ValueError:
    return ValueError(
        f"alpha is stated twice: {one} says {alpha:g}, {other} says {other_alpha:g} (or they "
        "differ in single modules). Which one holds cannot be seen: remove the wrong one."
    )


def _warnings(
    modules: Mapping[str, Given],
    sources: Mapping[str, str],
    kohya: Kohya | None,
    metadata: Mapping[str, str],
    config_counts: bool,
) -> Iterator[str]:
    """What was assumed, and what was left aside."""
    for key, least in zip(_KOHYA_KEYS, (-math.inf, 0), strict=True):
        text = metadata.get(key, "")
        number = _maybe_number(text)
        if text.strip().lower() not in _NOTHING and (number is None or number <= least):
            kind = "a finite number" if key == _KOHYA_KEYS[0] else "a number above 0"
            yield f"the header's {key!r} was left aside: expected {kind}; found {shown(text)}."
    assumed = [name for name, source in sources.items() if source == "rank" and modules[name].peft]
    if assumed:
        aside = ""
        if kohya is not None:
            aside = (
                f" {_KOHYA_WHERE.capitalize()} {kohya.alpha:g} was left aside: converters multiply "
                "it into lora_A and lora_B and keep the header."
            )
        elif ADAPTER_CONFIG in metadata and not config_counts:
            aside = f" The {ADAPTER_CONFIG} beside it is about a file in PEFT's layout."
        yield (
            f"neither tensors nor header nor {ADAPTER_CONFIG} give alpha for {len(assumed)} of "
            f"{len(modules)} modules; assumed alpha = rank (scale 1), as other loaders do.{aside} "
            "If pictures look burnt or hardly change, look alpha up where you got the file."
        )
    given = [(name, m.rank, m.alpha) for name, m in modules.items() if m.alpha is not None]
    if given and kohya and not any(kohya.agrees(rank, alpha) for _, rank, alpha in given):
        name, _, alpha = given[0]
        yield (
            f"the tensors count: {plain(name)}.alpha is {alpha:g}, while {_KOHYA_WHERE}, a "
            f"record of the training's arguments, says {kohya.alpha:g}."
        )


# ------------------------------------------------------------------------------------- parsing


def same_alpha(one: float, other: float) -> bool:
    """Whether two places mean one alpha; tensors are often rounded to bfloat16."""
    return math.isclose(one, other, rel_tol=_TOLERANCE)


def _is_end(pattern: str, name: str) -> bool:
    if pattern.startswith("^"):
        return name == pattern[1:]
    return name == pattern or name.endswith(f".{pattern}")


def _literal(where: str, pattern: str) -> str:
    """A PEFT pattern is a regular expression; accept those that are a plain name.

    Refusing the rest is safe, whereas running an expression out of a downloaded file is not: a few
    characters can make the matcher run for years.
    """
    anchor = "^" * pattern.startswith("^")
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise ValueError(
            f"{where}: alpha_pattern {shown(pattern)} is a regular expression, expected module "
            "names. Save the LoRA again with `.alpha` tensors."
        )
    return anchor + name.removeprefix("transformer.")


def _object(where: str, name: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected {shown(name)} to be an object; found {shown(value)}")
    return value


def _finite(where: str, name: str, value: object) -> float:
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    raise ValueError(f"{where}: expected {name} to be a number; found {shown(value)}")


def _stated_number(where: str, text: str) -> float | None:
    """A header's number; None where it says that there is none. Raises ValueError."""
    number = _maybe_number(text)
    if number is None and text.strip().lower() not in _NOTHING:
        raise ValueError(f"{where}: expected a finite number; found {shown(text)}")
    return number


def _maybe_number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None and "_" not in text else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
