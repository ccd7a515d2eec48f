"""One question, three who ask it: the loader node, the command line and bake say the same schedule
of the same file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.contract.bake.plan import plan_bake
from distill.contract.metadata import read_header
from distill.contract.resolve import Override, resolve
from distill.contract.spec import SpecError, TurboSpec
from distill.lora.source import open_source

WULI = "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
WULI_SIGMAS = pytest.approx((1.0, 0.7155, 0.0))
HEADER = TurboSpec((1.0, 0.5, 0.0), base="me/mine", sampler="renoise", strength=0.5).to_json()
DAMAGED = '{"sigmas": [1, 2, 0]}'
NEWER = '{"version": 99, "steps": 2}'
HAND = (1.0, 0.6, 0.0)


@dataclass(frozen=True)
class Case:
    """A file name, its header, what a person sets, and what of it comes out."""

    name: str = "mystery.safetensors"
    header: dict[str, str] = field(default_factory=dict)
    override: Override = field(default_factory=Override)
    expected: dict[str, Any] = field(default_factory=dict)
    known: bool = True  # whether the base is
    source: str = ""  # how its origin begins
    error: str = ""


CASES = {
    "header": Case(
        header={"turbo.spec": HEADER},
        expected={"sigmas": (1.0, 0.5, 0.0), "sampler": "renoise", "base": "me/mine"},
        source="header of the file",
    ),
    "header beats table": Case(
        WULI, {"turbo.spec": HEADER}, expected={"sigmas": (1.0, 0.5, 0.0)}, source="header"
    ),
    "table": Case(
        WULI,
        {"modelspec.title": "x"},
        expected={"sigmas": WULI_SIGMAS, "sampler": "euler", "base": "Qwen/Qwen-Image-2512"},
        source="table of known files: Wuli-art/",
    ),
    "nothing known": Case(error=r"mystery\.safetensors.*no 'turbo\.spec' in the header"),
    "a sampler alone is no schedule": Case(
        override=Override(sampler="renoise"), error=r"mystery\.safetensors.*override, for example"
    ),
    "by hand": Case(
        override=Override(HAND),
        expected={"sigmas": HAND, "sampler": "euler", "base": "unknown", "strength": 1.0},
        known=False,
        source="override",
    ),
    "by hand, sampler too": Case(
        override=Override(HAND, "renoise"),
        expected={"sigmas": HAND, "sampler": "renoise"},
        known=False,
        source="override",
    ),
    "by hand, the base by another trainer's header": Case(
        header={"modelspec.base_model": "Qwen/Qwen-Image"},
        override=Override(HAND),
        expected={"sigmas": HAND, "base": "Qwen/Qwen-Image"},
        known=False,
        source="override",
    ),
    "by hand, a blank base in another trainer's header": Case(
        header={"modelspec.base_model": " "},
        override=Override(HAND),
        expected={"sigmas": HAND, "base": "unknown"},
        known=False,
        source="override",
    ),
    "a header whose base nobody knew": Case(
        header={"turbo.spec": TurboSpec(HAND, base="unknown").to_json()},
        expected={"sigmas": HAND, "base": "unknown"},
        known=False,
        source="header of the file",
    ),
    "sigmas over header": Case(
        header={"turbo.spec": HEADER},
        override=Override(HAND),
        expected={"sigmas": HAND, "sampler": "renoise", "base": "me/mine", "strength": 0.5},
        source="override of sigmas; the rest: header of the file",
    ),
    "sampler over header": Case(
        header={"turbo.spec": HEADER},
        override=Override(sampler="euler"),
        expected={"sigmas": (1.0, 0.5, 0.0), "sampler": "euler", "strength": 0.5},
        source="override of sampler; the rest: header of the file",
    ),
    "both over table": Case(
        WULI,
        override=Override(HAND, "renoise"),
        expected={"sigmas": HAND, "sampler": "renoise", "base": "Qwen/Qwen-Image-2512"},
        source="override of sigmas and sampler; the rest: table of known files",
    ),
    "a damaged header": Case(
        WULI, {"turbo.spec": DAMAGED}, error=r"Wuli.*strictly decreasing values"
    ),
    "a damaged header and another sampler": Case(
        header={"turbo.spec": DAMAGED},
        override=Override(sampler="renoise"),
        error="strictly decreasing values",
    ),
    "a damaged header and sigmas by hand": Case(
        header={"turbo.spec": DAMAGED},
        override=Override(HAND),
        expected={"sigmas": HAND, "sampler": "euler"},
        known=False,
        source="override",
    ),
    "a damaged header, sigmas by hand and a name of the table": Case(
        WULI,
        {"turbo.spec": DAMAGED},
        override=Override(HAND),
        expected={"sigmas": HAND, "base": "unknown"},
        known=False,
        source="override",
    ),
    "a newer header": Case(header={"turbo.spec": NEWER}, error="version 99"),
    "a newer header and sigmas by hand": Case(
        header={"turbo.spec": NEWER},
        override=Override(HAND),
        expected={"sigmas": HAND, "base": "unknown"},
        known=False,
        source="override",
    ),
    "no schedule by hand": Case(
        header={"turbo.spec": HEADER},
        override=Override((1.0, 1.0, 0.0)),
        error="strictly decreasing values",
    ),
}


@pytest.fixture
def write(
    make_updates: Callable[..., Any], write_lora: Callable[..., Path], tmp_path: Path
) -> Callable[[Case], Path]:
    def write_case(case: Case) -> Path:
        tensors = load_file(write_lora(make_updates(), "whole.safetensors"))
        folder = tmp_path / "loras"
        folder.mkdir()
        save_file(tensors, folder / case.name, case.header)
        return folder / case.name

    return write_case


@pytest.fixture
def askers(
    pack: Any, model: Any, tiny_folder: Path, tmp_path: Path
) -> dict[str, Callable[[Path, Override], tuple[Any, str | None]]]:
    """Each returns the spec, and where it is from if it says so."""
    node, contract = pack("nodes.apply_lora"), pack("distill.contract.resolve")

    def loader(path: Path, override: Override) -> tuple[Any, str]:
        by_hand = contract.Override(override.sigmas, override.sampler)
        report = node.apply_lora(model, path, override=by_hand)[1]
        return report.spec, report.spec_source

    def command_line(path: Path, override: Override) -> tuple[Any, str]:
        source = open_source(path, override)
        return source.spec, source.spec_source

    def bake(path: Path, override: Override) -> tuple[Any, None]:
        base = tmp_path / "base"
        shutil.copytree(tiny_folder / "transformer", base)
        file = base / "diffusion_pytorch_model.safetensors"
        save_file({name: w.to(torch.bfloat16) for name, w in load_file(file).items()}, file)
        return plan_bake(base, path, tmp_path / "out.safetensors", override=override).spec, None

    def itself(path: Path, override: Override) -> tuple[Any, str]:
        found = resolve(path, read_header(path), override)
        return found.spec, found.source

    return {"contract": itself, "node": loader, "command line": command_line, "bake": bake}


@pytest.mark.parametrize("name", CASES)
def test_all_say_the_same(name: str, write: Callable[[Case], Path], askers: Any) -> None:
    case = CASES[name]
    path = write(case)
    for asker, ask in askers.items():
        if case.error:
            with pytest.raises(ValueError, match=case.error) as raised:
                ask(path, case.override)
            assert type(raised.value).__name__ in ("SpecError", "UnknownSchedule"), asker
            continue
        spec, source = ask(path, case.override)
        found = {key: getattr(spec, key) for key in case.expected} | {"sigmas": spec.sigmas()}
        assert found == {"sigmas": found["sigmas"], **case.expected}, asker
        assert source is None or source.startswith(case.source), asker
    if not case.error:
        assert resolve(path, read_header(path), case.override).known == case.known


def test_the_command_line_names_its_options(write: Callable[[Case], Path]) -> None:
    with pytest.raises(SpecError, match="On the command line: --sigmas"):
        open_source(write(CASES["nothing known"]))
