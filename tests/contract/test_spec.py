"""TurboSpec: validation, normalisation, JSON round trip."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.contract.schedule import MAX_STEPS
from distill.contract.spec import SAMPLERS, SpecError, TurboSpec, parse_sigmas


@st.composite
def specs(draw: st.DrawFn) -> TurboSpec:
    inner = draw(st.sets(st.floats(1e-6, 1, exclude_max=False), min_size=1, max_size=8))
    return TurboSpec(
        nodes=(*sorted(inner, reverse=True), 0.0),
        base=draw(st.sampled_from(["Qwen/Qwen-Image", 'a b/ü "quoted"'])),
        sampler=draw(st.sampled_from(SAMPLERS)),
        cfg=draw(st.floats(1, 100)),
        strength=draw(st.floats(1e-3, 10)),
        resolutions=tuple(draw(st.lists(st.tuples(st.integers(1, 9999), st.integers(1, 9999))))),
        method=draw(st.text()),
        created_by=draw(st.text()),
    )


@given(specs())
def test_json_round_trip_is_exact(spec: TurboSpec) -> None:
    assert TurboSpec.from_json(spec.to_json()) == spec


def test_defaults_are_the_plain_case() -> None:
    spec = TurboSpec((1.0, 0.7155, 0.0))
    assert (spec.family, spec.base) == ("qwen-image", "Qwen/Qwen-Image-2512")
    assert (spec.sampler, spec.cfg, spec.strength, spec.version) == ("euler", 1.0, 1.0, 1)
    assert spec.steps == 2


def test_lists_ints_and_tensors_become_tuples_of_floats() -> None:
    spec = TurboSpec(nodes=[1, torch.tensor(0.5), 0], cfg=2, resolutions=[[1328, 1328]])  # type: ignore[arg-type]
    assert spec.sigmas() == (1.0, 0.5, 0.0)
    assert all(type(sigma) is float for sigma in spec.sigmas())
    assert type(spec.cfg) is float
    assert spec.resolutions == ((1328, 1328),)
    assert TurboSpec(torch.tensor([1.0, 0.5, 0.0])).sigmas() == (1.0, 0.5, 0.0)  # type: ignore[arg-type]
    assert hash(spec) == hash(replace(spec))


def test_negative_zero_at_the_end_is_zero() -> None:
    assert math.copysign(1, TurboSpec((1.0, -0.0)).sigmas()[-1]) == 1


def test_with_sigmas_validates_and_keeps_the_rest() -> None:
    spec = TurboSpec((1.0, 0.0), sampler="renoise", method="dmd2")
    assert spec.with_sigmas([1, 0.5, 0]) == replace(spec, nodes=(1.0, 0.5, 0.0))
    with pytest.raises(SpecError, match="sigmas"):
        spec.with_sigmas([0.5, 1, 0])


def falling(steps: int) -> list[float]:
    """1 to 0 in equal steps."""
    return [1 - i / steps for i in range(steps + 1)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": ()}, r"nodes: expected at least two.*found \[\]"),
        ({"nodes": (0.0,)}, "nodes: expected at least two"),
        ({"nodes": (1.2, 0.5, 0.0)}, r"nodes: expected the first in \(0, 1\]; found 1.2"),
        ({"nodes": (0.0, 0.0)}, r"first in \(0, 1\]"),
        (
            {"nodes": (1.0, 0.5, 0.5, 0.0)},
            "strictly decreasing values; found 0.5 after 0.5 at index 2",
        ),
        ({"nodes": (1.0, 0.5)}, "expected 0 as the last.*found 0.5"),
        ({"nodes": (1.0, -0.5)}, "expected 0 as the last"),
        ({"nodes": (math.nan, 0.0)}, r"nodes\[0\]: expected a finite number; found nan"),
        ({"nodes": "1, 0"}, "nodes: expected a list of numbers; found '1, 0'"),
        ({"nodes": (1.0, "0.5", 0.0)}, r"nodes\[1\]: expected a number; found '0.5'"),
        ({"nodes": (True, 0.0)}, r"nodes\[0\]: expected a number; found True"),
        ({"nodes": torch.ones(2, 2)}, r"nodes\[0\]: expected a number"),
        ({"nodes": 1.0}, "nodes: expected a list"),
        ({"nodes": falling(257)}, "nodes: expected at most 256 steps; found 257"),
        ({"resolutions": ((64, 64),) * 1025}, "resolutions: expected at most 1024; found 1,025"),
        (
            {"sampler": "eular"},
            r"sampler: expected one of euler, renoise; found 'eular' \(did you mean 'euler'",
        ),
        ({"sampler": 3}, "sampler: expected text; found 3"),
        ({"cfg": 0.5}, "cfg: expected 1 .no guidance. or more; found 0.5"),
        ({"cfg": math.inf}, "cfg: expected a finite number"),
        ({"cfg": 10**400}, "cfg: expected a number"),
        ({"strength": 0}, "strength: expected more than 0; found 0"),
        ({"base": " "}, "base: expected a name; found empty text"),
        ({"family": None}, "family: expected text; found None"),
        ({"resolutions": ((1328,),)}, r"resolutions\[0\]: expected \[width, height\] in pixels"),
        ({"resolutions": ((1328, 0),)}, r"resolutions\[0\]: expected \[width, height\]"),
        ({"resolutions": (1328, 1328)}, r"resolutions\[0\]: expected a list of two whole numbers"),
        ({"shift": 3}, r"shift: expected null or an object such as .*; found 3"),
        (
            {"shift": {"rule": "linaer"}},
            r"shift.rule: expected one of none, .*Did you mean 'linear'",
        ),
        ({"shift": {"rule": "static"}}, r"rule 'static' expects shift; found \[\]"),
        ({"shift": {"rule": "static", "shift": 0}}, "shift: expected a factor above 0; found 0"),
        ({"shift": {"rule": "exponential", "mu": 99}}, "shift.mu: expected at most 20 in size"),
        (
            {"shift": {"rule": "linear", "tokens": [256, 256], "mu": [0.5, 0.9]}},
            "shift.tokens: expected two different counts",
        ),
        (
            {"shift": {"rule": "linear", "tokens": [256], "mu": [0.5, 0.9]}},
            "shift.tokens: expected two numbers; found",
        ),
        ({"terminal": 1.5, "nodes": (1, 0.5, 0)}, "terminal: expected a sigma between 0 and 1"),
        ({"terminal": 0.5}, "terminal: cannot stretch .*two steps"),
        ({"guidance": -1}, "guidance: expected 0 or more; found -1"),
        (
            {"strength": (1, 0.5)},
            "strength: expected one number, or one for each of 1 steps; found 2",
        ),
        ({"strength": (0.0,)}, "strength: expected more than 0; found 0"),
        ({"ladder": ((1, 0.5),)}, r"ladder\[0\]: expected 0 as the last"),
        ({"ladder": ((1, 0),)}, r"ladder: expected other numbers of steps each; found \[1, 1\]"),
        (
            {"nodes": (1, 0.5, 0), "ladder": ((1, 0),), "boundary": 1},
            "ladder: expected none beside a strength per step or a boundary",
        ),
        (
            {"boundary": 1},
            "boundary: expected fewer than 1 steps for the high-noise expert.*found 1",
        ),
    ],
)
def test_bad_values_name_field_expected_and_found(fields: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TurboSpec(**{"nodes": (1.0, 0.0), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "x.safetensors: expected a JSON object; found text that is not JSON"),
        ("[" * 100_000, "found text that is not JSON"),
        ("[1, 0]", "expected a JSON object; found list"),
        ("{}", "x.safetensors: key 'sigmas' is missing"),
        (
            '{"sigmas": [1, 0], "sampelr": "euler"}',
            r"unknown key 'sampelr' \(did you mean 'sampler'\?\)",
        ),
        ('{"sigmas": [1, NaN, 0]}', r"sigmas\[1\]: expected a finite number"),
        ('{"sigmas": [1, 0], "version": 1.5}', "version: expected a whole number"),
        ('{"sigmas": [1, 0], "version": 0}', "version: expected a whole number"),
        ('{"sigmas": [1, 0], "version": 3}', "Update the Turbo Distill node pack"),
        ('{"sigmas": [1, 0], "shift": null}', "unknown key 'shift'"),
        ('{"nodes": [1, 0], "version": 1}', "unknown key 'nodes'"),
        ('{"nodes": [1, 0], "sigmas": [1, 0]}', "unknown key 'sigmas'"),
        ('{"sigmas": [1, 0.5]}', "sigmas: expected 0 as the last"),
    ],
)
def test_bad_json_names_the_file(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        TurboSpec.from_json(text, source="x.safetensors")
    assert str(error.value).startswith("x.safetensors: ")


def test_newer_version_asks_for_an_update_even_if_its_keys_are_new() -> None:
    text = json.dumps({"sigmas": [1, 0], "version": 7, "solver_order": 2})
    with pytest.raises(SpecError, match=r"version 7.*up to version 2\. Update"):
        TurboSpec.from_json(text)


def test_the_longest_schedule() -> None:
    assert TurboSpec(falling(MAX_STEPS)).steps == MAX_STEPS == 256  # type: ignore[arg-type]


def test_a_million_sigmas_are_refused_at_once() -> None:
    text = json.dumps({"sigmas": falling(1_000_000)})
    start = time.process_time()
    with pytest.raises(SpecError, match="at most 256 steps; found 1,000,000") as error:
        TurboSpec.from_json(text)
    assert time.process_time() - start < 3  # most of it is reading the JSON
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "text", ["1;0,7155;0", "1; 0,7155; 0", "1 0,7155 0", "[1,0,7155,0]", "1,0;0,7155;0"]
)
def test_decimal_commas_are_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"write decimals with a point: 0\.7155"):
        parse_sigmas(text)


@pytest.mark.parametrize("text", ["1,0.7155,0", "1;0.7155;0", "[1, 0.7155, 0]", "1 0.7155 0"])
def test_what_people_type(text: str) -> None:
    assert parse_sigmas(text) == (1.0, 0.7155, 0.0)


def test_a_long_text_is_not_repeated_whole() -> None:
    with pytest.raises(ValueError, match="at most 256 steps; found 9,999") as error:
        parse_sigmas("1 " * 10_000)
    assert len(str(error.value)) < 400
