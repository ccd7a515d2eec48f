"""How a schedule's raw noise levels move with the size of an image.

Every rule multiplies the noise-to-signal ratio u / (1 - u) by a factor; the rules differ in where
the factor comes from. They are those of diffusers: `shift` and `mu` of its
`FlowMatchEulerDiscreteScheduler`, `calculate_shift` of the Qwen-Image and FLUX pipelines, and
`compute_empirical_mu` of FLUX.2's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .checks import SpecError, number, numbers, whole
from .hints import did_you_mean
from .shown import shown

MAX_WORD = 200  # characters of a rule
MAX_MU = 20.0  # e^20; beyond that nothing but noise is left


class Shift:
    """A rule: the factor for an image of `tokens` in so many steps."""

    rule: ClassVar[str]
    by_size: ClassVar[bool] = False  # whether the factor depends on tokens

    def factor(self, tokens: int, steps: int) -> float:
        """By which u / (1 - u) is multiplied. tokens are ignored where `by_size` is False."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """{"rule": ..., its fields}"""
        return {"rule": self.rule, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class StaticShift(Shift):
    """One factor for every size: diffusers' `shift`."""

    rule: ClassVar[str] = "static"
    shift: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", number("shift", self.shift))
        if not 0 < self.shift <= math.exp(MAX_MU):
            raise SpecError(f"shift: expected a factor above 0; found {self.shift}")

    def factor(self, tokens: int, steps: int) -> float:
        return self.shift


@dataclass(frozen=True)
class ExponentialShift(Shift):
    """e^mu for every size: DiffSynth's `exponential_shift_mu`."""

    rule: ClassVar[str] = "exponential"
    mu: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "mu", number("shift.mu", self.mu))
        _check_mu("mu", self.mu)

    def factor(self, tokens: int, steps: int) -> float:
        return math.exp(self.mu)


@dataclass(frozen=True)
class LinearShift(Shift):
    """e^mu, where mu is linear in tokens and `mu` gives it at two of them: dynamic shifting."""

    rule: ClassVar[str] = "linear"
    by_size: ClassVar[bool] = True
    tokens: tuple[int, int]
    mu: tuple[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _pair("tokens", self.tokens))
        object.__setattr__(self, "mu", _pair("mu", self.mu))
        if self.tokens[0] == self.tokens[1] or min(self.tokens) < 1:
            raise SpecError(
                f"shift.tokens: expected two different counts above 0; found {shown(self.tokens)}"
            )
        for mu in self.mu:
            _check_mu("mu", mu)

    def factor(self, tokens: int, steps: int) -> float:
        (low, high), (at_low, at_high) = self.tokens, self.mu
        return _exp(at_low + (at_high - at_low) * (tokens - low) / (high - low))


@dataclass(frozen=True)
class EmpiricalShift(Shift):
    """e^mu, where mu = slope tokens + intercept is known for two numbers of steps and linear in the
    steps between; above `limit` tokens it is that of the second number for any steps.
    """

    rule: ClassVar[str] = "empirical"
    by_size: ClassVar[bool] = True
    steps: tuple[int, int]
    slope: tuple[float, float]
    intercept: tuple[float, float]
    limit: int

    def __post_init__(self) -> None:
        for name in ("steps", "slope", "intercept"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        object.__setattr__(self, "limit", whole("shift.limit", self.limit))
        if self.steps[0] == self.steps[1]:
            raise SpecError(f"shift.steps: expected two different; found {shown(self.steps)}")

    def factor(self, tokens: int, steps: int) -> float:
        few, many = (
            slope * tokens + intercept
            for slope, intercept in zip(self.slope, self.intercept, strict=True)
        )
        if tokens > self.limit:
            return _exp(many)
        low, high = self.steps
        return _exp(few + (many - few) * (steps - low) / (high - low))


RULES: dict[str, type[Shift]] = {
    kind.rule: kind for kind in (StaticShift, ExponentialShift, LinearShift, EmpiricalShift)
}
NO_RULE = "none"
EXAMPLES = {  # rule -> as people type it
    NO_RULE: "none",
    "static": "static:3",
    "exponential": "exponential:0.9163",
    "linear": "linear:256=0.5,8192=0.9",
    "empirical": "empirical:10=8.738e-5*x+1.898,200=1.693e-4*x+0.4567,4300",
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_LINE = rf"(\d+)=({_NUMBER})\*x(?=[-+])({_NUMBER})"  # of x tokens, at so many steps


def parse_shift(value: object) -> Shift | None:
    """What `Shift.to_json` gave; None and {"rule": "none"} are no shift. Raises SpecError."""
    if value is None or isinstance(value, Shift):
        return value
    if not isinstance(value, Mapping):
        raise SpecError(
            f'shift: expected null or an object such as {{"rule": "static", "shift": 3}}; found '
            f"{shown(value)}"
        )
    rest = dict(value)
    rule = rest.pop("rule", None)
    if rule == NO_RULE and not rest:
        return None
    if not isinstance(rule, str) or rule not in RULES:
        raise SpecError(
            f"shift.rule: expected one of {', '.join((NO_RULE, *RULES))}; found {shown(rule)}."
            + (did_you_mean(rule, RULES) if isinstance(rule, str) else "")
        )
    expected = [field.name for field in fields(RULES[rule])]  # type: ignore[arg-type]
    if set(rest) != set(expected):
        raise SpecError(
            f"shift: rule {rule!r} expects {', '.join(expected)}; found {shown(list(rest))}"
        )
    return RULES[rule](**rest)


def read_shift(text: str) -> Shift | None:
    """A rule in one word, as EXAMPLES has them: `linear` gives mu at two numbers of tokens,
    `empirical` mu of x tokens at two numbers of steps and the tokens beyond which the second holds.

    Raises SpecError.
    """
    word = re.sub(r"\s", "", text).lower()
    rule, _, rest = word.partition(":")
    if rule not in EXAMPLES:
        raise SpecError(
            f"shift: expected one of {', '.join(EXAMPLES.values())}; found {shown(text)}."
            + did_you_mean(rule, EXAMPLES)
        )
    forms = {
        NO_RULE: "",
        "static": f"({_NUMBER})",
        "exponential": f"({_NUMBER})",
        "linear": rf"(\d+)=({_NUMBER}),(\d+)=({_NUMBER})",
        "empirical": rf"{_LINE},{_LINE},(\d+)",
    }
    found = re.fullmatch(forms[rule], rest) if len(word) < MAX_WORD else None
    if found is None or (rule == NO_RULE and word != rule):
        raise SpecError(f"shift: expected for example {EXAMPLES[rule]}; found {shown(text)}")
    values = [float(part) for part in found.groups()]
    match rule, values:
        case "static", [shift]:
            return StaticShift(shift)
        case "exponential", [mu]:
            return ExponentialShift(mu)
        case "linear", [low, at_low, high, at_high]:
            return LinearShift((_int(low), _int(high)), (at_low, at_high))
        case "empirical", [few, s_few, i_few, many, s_many, i_many, limit]:
            steps = _int(few), _int(many)
            return EmpiricalShift(steps, (s_few, s_many), (i_few, i_many), _int(limit))
        case _:
            return None


def describe_shift(shift: Shift | None) -> str:
    """A few words for people."""
    match shift:
        case StaticShift():
            return f"static shift {shift.shift:g}"
        case ExponentialShift():
            return f"exponential shift, mu {shift.mu:.6g}"
        case LinearShift():
            (low, high), (at_low, at_high) = shift.tokens, shift.mu
            return f"shift by size, mu {at_low:g} at {low} tokens to {at_high:g} at {high}"
        case EmpiricalShift():
            return f"shift by size and steps, to {shift.limit} tokens"
        case _:
            return "no shift"


def _pair(name: str, value: object) -> tuple[Any, Any]:
    pair = numbers(f"shift.{name}", value)
    if len(pair) != 2:
        raise SpecError(f"shift.{name}: expected two numbers; found {shown(value)}")
    if name in ("tokens", "steps"):
        return whole(f"shift.{name}[0]", pair[0]), whole(f"shift.{name}[1]", pair[1])
    return pair[0], pair[1]


def _int(value: float) -> int:
    return whole("shift", value)


def _check_mu(name: str, mu: float) -> None:
    if abs(mu) > MAX_MU:
        raise SpecError(f"shift.{name}: expected at most {MAX_MU:g} in size; found {mu}")


def _exp(mu: float) -> float:
    return math.exp(max(-MAX_MU, min(MAX_MU, mu)))
