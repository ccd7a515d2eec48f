"""TurboSpec: how a few-step LoRA has to be sampled. It travels in the LoRA's safetensors header."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, SupportsFloat

from .checks import SpecError, items, number, numbers, text, whole
from .hints import closest
from .schedule import MAX_STEPS, static_shift, stretch_to_terminal
from .shift import Shift, parse_shift
from .shown import plain, shown

UNKNOWN_BASE = "unknown"

HEADER_KEY = "turbo.spec"
VERSION = 2  # the newest that is read; a spec that version 1 can say is written as version 1
SAMPLERS = ("euler", "renoise")
MAX_TEXT = 1000  # characters of a name or a text for people
MAX_RESOLUTIONS = 1024
MAX_LADDER = 64  # further step counts


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Numbers as people type them, "1, 0.7155, 0", in brackets or not; none in an empty text.

    Raises ValueError where a piece is not a number, or there are too many; whether they are a
    schedule is for TurboSpec to say.
    """
    words = [word for word in re.split(r"[\s,;]+", text.strip(" ,;[]()")) if word]
    try:
        check_steps(len(words) - 1)
        numbers = tuple(float(word) for word in words)
        split = "." not in text and re.search(r"\d,\d", text)  # 0,7155 as 0 and 7155
        if split and (";" in text or numbers[0] <= 1 < max(numbers)):
            raise ValueError("a comma separates numbers; write decimals with a point: 0.7155")
    except ValueError as error:
        raise ValueError(
            f"expected numbers such as 1, 0.7155, 0; found {shown(text)} ({plain(str(error))})"
        ) from None
    return numbers


def check_steps(steps: int, name: str = "sigmas") -> None:
    """Raises SpecError where a schedule has more steps than MAX_STEPS."""
    if steps > MAX_STEPS:
        raise SpecError(f"{name}: expected at most {MAX_STEPS} steps; found {steps:,}")


@dataclass(frozen=True)
class TurboSpec:
    """The schedule and the settings that a few-step LoRA was trained for.

    nodes: noise levels of x_t = (1 - sigma) x0 + sigma eps before the shift, strictly decreasing
    from <= 1 to 0. shift: how they move with the size of the image, None leaves them (see `shift`);
    terminal: to where the last of them but 0 is stretched after that, None: not at all.
    `sigmas` gives the levels that are sampled at.

    family: model architecture; base: the checkpoint that the LoRA was trained on (hub id).
    sampler: "euler" follows the ODE, "renoise" jumps to x0 and adds fresh noise of the next sigma.
    cfg: guidance scale, 1 means a single conditional forward; guidance: what a guidance-distilled
    model (FLUX) is told, None for others. strength: LoRA multiplier, or one per step.
    ladder: nodes for other numbers of steps that the same file was trained for.
    boundary: how many steps the high-noise expert of a model that has two (Wan 2.2) takes; the
    low-noise expert takes the rest.
    resolutions: trained (width, height) in pixels, empty if not known.
    method, created_by: free text for people.

    Lists, ints and 0-d tensors are accepted and stored as tuples and floats. Raises SpecError.
    """

    nodes: tuple[float, ...]
    shift: Shift | None = None
    terminal: float | None = None
    family: str = "qwen-image"
    base: str = "Qwen/Qwen-Image-2512"
    sampler: str = "euler"
    cfg: float = 1.0
    guidance: float | None = None
    strength: float | tuple[float, ...] = 1.0
    ladder: tuple[tuple[float, ...], ...] = ()
    boundary: int | None = None
    resolutions: tuple[tuple[int, int], ...] = ()
    method: str = ""
    created_by: str = ""

    def __post_init__(self) -> None:
        for name in ("family", "base", "sampler", "method", "created_by"):
            optional = name in ("method", "created_by")
            text(name, getattr(self, name), MAX_TEXT, allow_empty=optional)
        if self.sampler not in SAMPLERS:
            raise SpecError(
                f"sampler: expected one of {', '.join(SAMPLERS)}; found {shown(self.sampler)}"
                + near_miss(self.sampler, SAMPLERS)
            )
        normalised = {
            "nodes": _falling("nodes", self.nodes),
            "shift": parse_shift(self.shift),
            "terminal": None if self.terminal is None else number("terminal", self.terminal),
            "cfg": number("cfg", self.cfg),
            "guidance": None if self.guidance is None else number("guidance", self.guidance),
            "strength": _strength(self.strength),
            "ladder": tuple(
                _falling(f"ladder[{i}]", nodes)
                for i, nodes in enumerate(items("ladder", self.ladder, "lists of nodes"))
            ),
            "boundary": None if self.boundary is None else whole("boundary", self.boundary, 1),
            "resolutions": _resolutions(self.resolutions),
        }
        for name, value in normalised.items():
            object.__setattr__(self, name, value)
        self._check_ranges()
        self._check_steps()

    def _check_ranges(self) -> None:
        if self.cfg < 1:
            raise SpecError(f"cfg: expected 1 (no guidance) or more; found {self.cfg:g}")
        if self.guidance is not None and self.guidance < 0:
            raise SpecError(f"guidance: expected 0 or more; found {self.guidance:g}")
        for strength in self.strengths:
            if strength <= 0:
                raise SpecError(f"strength: expected more than 0; found {strength:g}")
        for nodes in (self.nodes, *self.ladder):
            _stretched(nodes[:-1], self.terminal)
            if not self.by_size:
                self._moved(nodes)

    def _check_steps(self) -> None:
        """What is said per step has as many steps as the nodes."""
        if isinstance(self.strength, tuple) and len(self.strength) != self.steps:
            raise SpecError(
                f"strength: expected one number, or one for each of {self.steps} steps; found "
                f"{len(self.strength)}"
            )
        if self.boundary is not None and self.boundary >= self.steps:
            raise SpecError(
                f"boundary: expected fewer than {self.steps} steps for the high-noise expert, and "
                f"the rest for the other; found {self.boundary}"
            )
        if len(self.ladder) > MAX_LADDER:
            raise SpecError(f"ladder: expected at most {MAX_LADDER}; found {len(self.ladder):,}")
        counts = [len(nodes) - 1 for nodes in (self.nodes, *self.ladder)]
        if len(set(counts)) < len(counts):
            raise SpecError(f"ladder: expected other numbers of steps each; found {counts}")
        if self.ladder and (isinstance(self.strength, tuple) or self.boundary is not None):
            raise SpecError(
                "ladder: expected none beside a strength per step or a boundary, which are for one "
                "number of steps"
            )

    @property
    def steps(self) -> int:
        """Number of model evaluations at cfg 1."""
        return len(self.nodes) - 1

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps that it can be sampled in, ascending."""
        return tuple(sorted(len(nodes) - 1 for nodes in (self.nodes, *self.ladder)))

    @property
    def by_size(self) -> bool:
        """Whether the sigmas depend on the size of the image."""
        return self.shift is not None and self.shift.by_size

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strength at each step."""
        one = self.strength
        return one if isinstance(one, tuple) else (one,) * self.steps

    def sigmas(self, tokens: int | None = None) -> tuple[float, ...]:
        """The noise levels of an image of `tokens` latent tokens, falling to 0: `steps` + 1.

        tokens may be None where the size does not matter (`by_size`). Raises SpecError without
        them where it does, and where levels that close run into each other.
        """
        if tokens is None and self.by_size:
            raise SpecError("sigmas: they depend on the size of the image, and none was given")
        if tokens is not None and tokens < 1:
            raise SpecError(f"tokens: expected 1 or more; found {tokens}")
        return self._moved(self.nodes, tokens)

    def _moved(self, nodes: tuple[float, ...], tokens: int | None = None) -> tuple[float, ...]:
        sigmas = nodes[:-1]
        if self.shift is not None:
            factor = self.shift.factor(tokens or 1, len(sigmas))
            sigmas = tuple(static_shift(u, factor) for u in sigmas)
        return _falling("sigmas", (*_stretched(sigmas, self.terminal), 0.0))

    def only_strength(self, where: str) -> float:
        """The strength, where it has to be one number. Raises SpecError."""
        if isinstance(self.strength, tuple):
            raise SpecError(
                f"strength: {where} takes one number; this LoRA has one per step: "
                f"{self.strength_text}. Sample it with Turbo Sampler."
            )
        return self.strength

    @property
    def strength_text(self) -> str:
        """Strength for people: "1", or "1, 0.8 (one per step)"."""
        if not isinstance(self.strength, tuple):
            return f"{self.strength:g}"
        return f"{', '.join(f'{one:g}' for one in self.strength)} (one per step)"

    def with_sigmas(self, sigmas: Iterable[SupportsFloat]) -> TurboSpec:
        """The same spec on these noise levels at every size; what it says per step is left out
        where they are more steps or fewer. Raises SpecError.
        """
        nodes = _falling("sigmas", sigmas)
        changes: dict[str, Any] = {"shift": None, "terminal": None, "ladder": ()}
        if len(nodes) != len(self.nodes):
            changes["boundary"] = None
            if isinstance(self.strength, tuple):
                changes["strength"] = 1.0
        return replace(self, nodes=nodes, **changes)

    def in_steps(self, steps: int) -> TurboSpec:
        """The same spec in another number of steps that it offers. Raises SpecError."""
        every = (self.nodes, *self.ladder)
        for nodes in every:
            if len(nodes) - 1 == steps:
                others = tuple(other for other in every if other is not nodes)
                return replace(self, nodes=nodes, ladder=others)
        raise SpecError(
            f"steps: this LoRA was trained for {_listed(self.step_counts)}; found {steps}. Set 0 "
            "for its usual number, or give other sigmas by hand."
        )

    @property
    def version(self) -> int:
        """The oldest version of the format that can say this."""
        per_step = isinstance(self.strength, tuple)
        newer = self.by_size or per_step or self.ladder
        return 2 if newer or self.guidance is not None or self.boundary is not None else 1

    def to_json(self) -> str:
        """One line of JSON, the value of the header key `turbo.spec`.

        Where version 1 can say it, older packs read it too: then nodes, shift and terminal are told
        by the sigmas that come out of them.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.version == 1:
            values = {"sigmas": self.sigmas()} | values
            values = {key: values[key] for key in _FIRST_KEYS if key in values}
        elif self.shift is not None:
            values["shift"] = self.shift.to_json()
        return json.dumps(values | {"version": self.version}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "turbo.spec") -> TurboSpec:
        """Parse `to_json` output; `source` (a file name) opens every error message.

        Raises SpecError: not JSON, unknown or missing key, bad value, or a newer version's spec.
        """
        try:
            return cls.from_values(_load(text))
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from None

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> TurboSpec:
        """`from_json` of parsed JSON: `sigmas` (version 1) or `nodes`. Raises SpecError."""
        return cls(**_arguments(values))


def near_miss(name: str, known: Iterable[str]) -> str:
    """A ' (did you mean ...?)' clause, or nothing if no known name is close."""
    near = closest(name, known)
    return f" (did you mean {near!r}?)" if near else ""


_FIRST_KEYS = (  # of version 1
    "sigmas",
    "family",
    "base",
    "sampler",
    "cfg",
    "strength",
    "resolutions",
    "method",
    "created_by",
)


def _load(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"expected a JSON object; found text that is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise SpecError(f"expected a JSON object; found {type(data).__name__}")
    return data


def _arguments(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a TurboSpec, from either version of the format."""
    version = data.get("version", 2 if "nodes" in data else 1)
    _check_version(version)  # first: a newer format may well have other keys
    newest = [field.name for field in fields(TurboSpec)]
    known, schedule = (list(_FIRST_KEYS), "sigmas") if version == 1 else (newest, "nodes")
    for key in data:
        if key not in (*known, "version"):
            raise SpecError(
                f"unknown key {shown(key)}{near_miss(key, known)}; expected {', '.join(known)}"
            )
    if schedule not in data:
        raise SpecError(f"key {schedule!r} is missing; a spec without a schedule means nothing")
    if version == 1:
        _falling("sigmas", data["sigmas"])  # the messages name the key that was written
    values = {key: value for key, value in data.items() if key not in ("version", schedule)}
    return {"nodes": data[schedule], **values}


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise SpecError(
            f"version: expected a whole number from 1 to {VERSION}; found {shown(version)}"
        )
    if version > VERSION:
        raise SpecError(
            f"version: this spec is of version {shown(version)}, this copy of Turbo Distill "
            f"reads up to version {VERSION}. Update the Turbo Distill node pack (or `pip "
            "install -U` it)."
        )


def _strength(value: object) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple)):
        return numbers("strength", value)
    return number("strength", value)


def _stretched(sigmas: tuple[float, ...], terminal: float | None) -> tuple[float, ...]:
    try:
        return sigmas if terminal is None else stretch_to_terminal(sigmas, terminal)
    except ValueError as error:
        raise SpecError(str(error)) from None


def _falling(name: str, value: object) -> tuple[float, ...]:
    """Noise levels from at most 1 strictly down to 0."""
    found = items(name, value, "numbers")
    check_steps(len(found) - 1, name)
    levels = tuple(number(f"{name}[{i}]", item) for i, item in enumerate(found))
    listed = ", ".join(f"{level:g}" for level in levels)
    if len(levels) < 2:
        raise SpecError(f"{name}: expected at least two, such as 1, 0; found [{listed}]")
    if not 0 < levels[0] <= 1:
        raise SpecError(f"{name}: expected the first in (0, 1]; found {levels[0]:g} in [{listed}]")
    for i, (high, low) in enumerate(pairwise(levels)):
        if low >= high:
            raise SpecError(
                f"{name}: expected strictly decreasing values; found {low:g} after {high:g} "
                f"at index {i + 1} of [{listed}]"
            )
    if levels[-1] != 0:
        raise SpecError(
            f"{name}: expected 0 as the last (otherwise noise stays in the image); found "
            f"{levels[-1]:g} in [{listed}]"
        )
    return (*levels[:-1], 0.0)  # -0.0 would not survive a comparison of texts


def _resolutions(value: object) -> tuple[tuple[int, int], ...]:
    pairs = []
    found = items("resolutions", value, "[width, height] pairs")
    if len(found) > MAX_RESOLUTIONS:
        raise SpecError(f"resolutions: expected at most {MAX_RESOLUTIONS}; found {len(found):,}")
    for i, item in enumerate(found):
        pair = items(f"resolutions[{i}]", item, "two whole numbers")
        if len(pair) != 2 or any(
            isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair
        ):
            raise SpecError(
                f"resolutions[{i}]: expected [width, height] in pixels; found {shown(item)}"
            )
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _listed(counts: tuple[int, ...]) -> str:
    *many, last = map(str, counts)
    return f"{', '.join(many)} or {last} steps" if many else f"{last} step{'s' * (last != '1')}"
