"""Schedules from headers of other programs, from files beside a LoRA, and who goes before whom."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.cli import main
from distill.contract import known
from distill.contract.describe import describe, to_text
from distill.contract.lora_keys import LoraFormatError
from distill.contract.metadata import read_header, read_shapes
from distill.contract.others import MAX_BYTES, levels
from distill.contract.resolve import Override, UnknownSchedule, of_file, resolve
from distill.contract.shift import StaticShift
from distill.contract.spec import SpecError, TurboSpec

WULI = "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
VIGGLE = "Qwen-Image-2.1-viggle-turbo-v0.2.1-6step-lora-r256.safetensors"
BASE_SCHEDULE = "1.0,0.7,0.4,0.15,0.0"
STATE = {
    "diffusion_model.img_in.lora_A.weight": torch.ones(4, 5),
    "diffusion_model.img_in.lora_B.weight": torch.ones(6, 4),
    "diffusion_model.img_in.alpha": torch.tensor(4.0),
}


def lora(
    folder: Path,
    header: dict[str, str] | None = None,
    name: str = "mystery.safetensors",
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors or STATE, folder / name, header)
    return folder / name


def found(path: Path) -> tuple[TurboSpec, str]:
    return of_file(path, read_header(path))


def nothing_is_known(path: Path) -> bool:
    with pytest.raises(UnknownSchedule, match=path.stem):
        found(path)
    return True


# ----------------------------------------------------------------------------------- header keys


@pytest.mark.parametrize("key", ["inference_sigmas", "sample_sigmas", "base_schedule"])
@pytest.mark.parametrize(
    "value",
    [
        "[1.0, 0.94, 0.4, 0]",
        "[1.0, 0.94, 0.4]",
        "1.0, 0.94, 0.4, 0.0",
        "1, .94, .4",
        "1 0.94 0.4",
        "[1000, 940, 400, 0]",
        "[1000.0, 940.0, 400.0]",
        "1000,940,400",
    ],
)
def test_lists_as_json_and_as_text_with_a_final_zero_or_without(
    key: str, value: str, tmp_path: Path
) -> None:
    spec, source = found(lora(tmp_path, {key: value}))
    assert spec.sigmas() == pytest.approx((1, 0.94, 0.4, 0), abs=1e-12)
    assert spec.sigmas()[-1] == 0
    assert source == f"header key {key} of the file"


def test_sigmas_by_hand_keep_the_rest_of_a_spec_with_a_strength_per_step(tmp_path: Path) -> None:
    theirs = TurboSpec((1, 0.5, 0), base="me/mine", family="flux", strength=(1, 0.8), guidance=3.5)
    path = lora(tmp_path, {"turbo.spec": theirs.to_json()})
    same = resolve(path, read_header(path), Override((1.0, 0.3, 0.0))).spec
    other = resolve(path, read_header(path), Override((1.0, 0.9, 0.3, 0.0))).spec
    assert (same.strength, other.strength) == ((1, 0.8), 1)
    for spec in (same, other):
        assert (spec.base, spec.family, spec.guidance) == ("me/mine", "flux", 3.5)


def test_sigmas_of_a_model_that_is_no_flow_model_are_no_timesteps(tmp_path: Path) -> None:
    for value, first in (("[14.6, 6.3, 0]", "14.6"), ("80 20", "80"), ("[1.0001, 0.5, 0]", "1.0")):
        with pytest.raises(SpecError, match=rf"expected the first in \(0, 1\]; found {first}"):
            found(lora(tmp_path, {"sample_sigmas": value}))


def test_what_a_person_gave_is_not_called_nodes(tmp_path: Path) -> None:
    path = lora(tmp_path)
    with pytest.raises(SpecError, match=r"^sigmas: expected 0 as the last"):
        resolve(path, read_header(path), Override((1.0, 0.5)))


@pytest.mark.parametrize(
    ("base", "expected", "family"),
    [
        (None, "unknown", "qwen-image"),
        (" ", "unknown", "qwen-image"),
        ("Qwen/Qwen-Image-2.1", "Qwen/Qwen-Image-2.1", "qwen-image-2.1"),
        ("somebody/model", "somebody/model", "qwen-image"),
        ("x" * 1001, "unknown", "qwen-image"),
        ("\ud800", "unknown", "qwen-image"),
    ],
)
def test_the_base_of_the_header_tells_the_family(
    base: str | None, expected: str, family: str, tmp_path: Path
) -> None:
    header = {"inference_sigmas": "[1, 0.5]"}
    header |= {"modelspec.base_model": base} if base is not None else {}
    path = lora(tmp_path)
    spec, _ = of_file(path, header)
    assert (spec.base, spec.family) == (expected, family)
    assert resolve(path, header).known == (expected != "unknown")
    by_hand = resolve(path, header, Override((1.0, 0.3, 0.0))).spec
    assert (by_hand.base, by_hand.family) == (expected, family)


def test_flashgens_levels_are_shifted_where_its_key_format_says_so(tmp_path: Path) -> None:
    plain, _ = found(lora(tmp_path, {"base_schedule": BASE_SCHEDULE}))
    assert plain.sigmas() == (1, 0.7, 0.4, 0.15, 0)
    header = {"base_schedule": BASE_SCHEDULE, "key_format": "minimax-h3-native"}
    shifted, _ = found(lora(tmp_path, header))
    assert shifted.nodes == plain.nodes
    assert shifted.shift == StaticShift(12.0)
    golden = (1, 0.96552, 0.88889, 0.67925, 0)  # 12 u / (1 + 11 u)
    assert shifted.sigmas() == pytest.approx(golden, abs=6e-6)
    other = {"inference_sigmas": "[1, 0.5]", "key_format": "minimax-h3-native"}
    assert found(lora(tmp_path, other))[0].sigmas() == (1, 0.5, 0)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "null",
        "{}",
        "[]",
        '"1, 0.5, 0"x',
        "dynamic",
        "[true, 0]",
        "[1, null]",
        '["1", "0.5"]',
        "[[1, 0.5]]",
        "[" * 100_000,
        "3",
    ],
)
def test_what_is_no_list_of_numbers_counts_for_nothing(value: str, tmp_path: Path) -> None:
    assert levels(value) is None
    assert nothing_is_known(lora(tmp_path, {"inference_sigmas": value}))
    spec, source = found(lora(tmp_path, {"inference_sigmas": value}, WULI))
    assert (spec.sigmas(), source[:5]) == ((1, 0.7155, 0), "table")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[0.4, 0.94, 1]", "expected strictly decreasing values; found 0.94 after 0.4"),
        ("[1, 1, 0]", "expected strictly decreasing values; found 1 after 1"),
        ("[1, NaN, 0]", r"nodes\[1\]: expected a finite number; found nan"),
        ("1, nan, 0", r"nodes\[1\]: expected a finite number"),
        ("[1, -0.5]", "strictly decreasing|expected 0 as the last"),
        ("[0, 0]", r"first in \(0, 1\]"),
        ("[Infinity, 0]", r"nodes\[0\]: expected a finite number"),
        (f"[1{'0' * 400}, 1, 0]", r"nodes\[0\]: expected a finite number"),
        (f"[1, 1{'0' * 400}, 0]", r"nodes\[1\]: expected a finite number"),
        (str([1 - i / 1000 for i in range(1001)]), "at most 256 steps; found 1,000"),
    ],
)
def test_numbers_that_are_no_schedule_are_told_with_file_and_key(
    value: str, message: str, tmp_path: Path
) -> None:
    path = lora(tmp_path, {"inference_sigmas": value})
    with pytest.raises(SpecError, match=message) as error:
        found(path)
    assert str(error.value).startswith("mystery.safetensors: header key inference_sigmas: ")
    assert len(str(error.value)) < 3000
    by_hand = resolve(path, read_header(path), Override((1.0, 0.5, 0.0)))
    assert by_hand.spec.sigmas() == (1, 0.5, 0)


def test_two_keys_that_disagree(tmp_path: Path) -> None:
    header = {"inference_sigmas": "[1, 0.5]", "sample_sigmas": "1, 0.5, 0"}
    assert found(lora(tmp_path, header))[0].sigmas() == (1, 0.5, 0)
    header["base_schedule"] = "1, 0.4"
    with pytest.raises(SpecError, match="expected one schedule in the header") as error:
        found(lora(tmp_path, header))
    assert "mystery.safetensors" in str(error.value)
    assert "inference_sigmas says [1, 0.5]; " in str(error.value)
    assert "base_schedule says 1, 0.4" in str(error.value)


# ----------------------------------------------------------------------------- files beside a LoRA


def test_model_index_speaks_for_the_only_lora_of_a_folder(tmp_path: Path) -> None:
    path = lora(tmp_path / "a", {"modelspec.base_model": "Qwen/Qwen-Image-2.1"})
    index = tmp_path / "a" / "model_index.json"
    index.write_text('{"_class_name": "X", "sample_sigmas": [1.0, 0.9, 0.5]}')
    spec, source = found(path)
    assert (spec.sigmas(), spec.family) == ((1, 0.9, 0.5, 0), "qwen-image-2.1")
    assert source == "sample_sigmas in model_index.json beside the file"
    for name in ("second.safetensors", "second.sft", "second.SAFETENSORS"):
        second = lora(tmp_path / "a", name=name)
        assert nothing_is_known(path)
        assert nothing_is_known(second)
        second.unlink()
    assert found(path)[0] == spec


@pytest.mark.parametrize(
    "text", ["not json", "[1, 0.5]", "{}", '{"sample_sigmas": "dynamic"}', "[" * 100_000]
)
def test_a_model_index_without_levels_counts_for_nothing(text: str, tmp_path: Path) -> None:
    path = lora(tmp_path)
    (tmp_path / "model_index.json").write_text(text)
    assert nothing_is_known(path)


def test_a_model_index_with_wrong_levels_is_told(tmp_path: Path) -> None:
    path = lora(tmp_path)
    (tmp_path / "model_index.json").write_text('{"sample_sigmas": [0.5, 1]}')
    with pytest.raises(SpecError, match=r"model_index.json: sample_sigmas: nodes: expected str"):
        found(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"sigmas": [1, 0.6, 0], "version": 1, "base": "a/b"}', (1, 0.6, 0)),
        ('{"sigmas": [1, 0.6, 0]}', (1, 0.6, 0)),
        ('{"nodes": [1, 0.5, 0], "shift": {"rule": "static", "shift": 3}}', (1, 0.75, 0)),
        ('\ufeff{"nodes": [1, 0.5, 0], "version": 2, "guidance": 3.5}', (1, 0.5, 0)),
    ],
)
def test_a_sidecar_is_a_spec_of_either_version(
    text: str, expected: tuple[float, ...], tmp_path: Path
) -> None:
    path = lora(tmp_path)
    path.with_name("mystery.turbo.json").write_text(text, encoding="utf-8")
    spec, source = found(path)
    assert spec.sigmas() == expected
    assert source == "mystery.turbo.json beside the file"
    lora(tmp_path, name="other.safetensors")
    assert nothing_is_known(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "text that is not JSON"),
        ("sigmas: 1, 0", "text that is not JSON"),
        ("[" * 100_000, "text that is not JSON"),
        ("[1, 0]", "expected a JSON object; found list"),
        ("{}", "key 'sigmas' is missing"),
        ('{"sigmas": [0.5, 1, 0]}', "sigmas: expected strictly decreasing"),
        ('{"nodes": [true, 0]}', r"nodes\[0\]: expected a number; found True"),
        ('{"nodes": [1, NaN, 0]}', r"nodes\[1\]: expected a finite number"),
        (f'{{"nodes": [1{"0" * 400}, 0]}}', r"nodes\[0\]: expected a number"),
        ('{"nodes": [1, 0], "version": 3}', "Update the Turbo Distill node pack"),
        ('{"nodes": [1, 0], "shfit": null}', r"unknown key 'shfit' \(did you mean 'shift'\?\)"),
        ('{"sigmas": [1, 0]}' + " " * MAX_BYTES, r"a few lines of JSON; found over 1,000,000 b"),
    ],
)
def test_a_sidecar_that_is_no_spec_is_told_by_its_name(
    text: str, message: str, tmp_path: Path
) -> None:
    path = lora(tmp_path, name=WULI)  # the table is not asked where the sidecar is wrong
    path.with_name(f"{path.stem}.turbo.json").write_text(text)
    start = time.process_time()
    with pytest.raises(SpecError, match=message) as error:
        found(path)
    assert str(error.value).startswith(f"{path.stem}.turbo.json: ")
    assert time.process_time() - start < 3


def test_folders_named_as_the_files_beside_a_lora_are_none(tmp_path: Path) -> None:
    path = lora(tmp_path)
    (tmp_path / "mystery.turbo.json").mkdir()
    (tmp_path / "model_index.json").mkdir()
    assert nothing_is_known(path)


# ------------------------------------------------------------------------------------- who counts


@dataclass(frozen=True)
class Voice:
    """One place that gives a schedule: how it speaks up, and how its answer begins."""

    sigmas: tuple[float, ...]
    source: str
    header: dict[str, str] | None = None
    beside: Callable[[Path], tuple[Path, str]] | None = None
    override: Override | None = None


def text_of(sigmas: tuple[float, ...]) -> str:
    return json.dumps(list(sigmas))


SPEC = TurboSpec((1.0, 0.8, 0.0))
VOICES = {  # in the order that they are asked
    "override": Voice((1.0, 0.9, 0.0), "override of sigmas", override=Override((1.0, 0.9, 0.0))),
    "turbo.spec": Voice((1.0, 0.8, 0.0), "header of the file", {"turbo.spec": SPEC.to_json()}),
    "other header": Voice(
        (1.0, 0.7, 0.0), "header key inference_sigmas", {"inference_sigmas": "[1.0, 0.7]"}
    ),
    "model_index": Voice(
        (1.0, 0.6, 0.0),
        "sample_sigmas in model_index.json",
        beside=lambda path: (path.with_name("model_index.json"), '{"sample_sigmas": [1, 0.6]}'),
    ),
    "sidecar": Voice(
        (1.0, 0.5, 0.0),
        "mystery.turbo.json beside",
        beside=lambda path: (path.with_suffix(".turbo.json"), '{"sigmas": [1, 0.5, 0]}'),
    ),
    "hash": Voice((1.0, 0.4, 0.0), "table of known files: by its hash (found by hash; stated by"),
    "name": Voice((1.0, 0.3, 0.0), "table of known files: by its name (found by name; inferred"),
}


def row(name: str, certainty: str, pattern: str = "-", sha256: str = "") -> known.KnownFile:
    spec = TurboSpec(VOICES[name].sigmas)
    return known.KnownFile(name, pattern, spec, certainty, f"by its {name}", (sha256,))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TurboSpec, str]]:
    """What comes of the voices that speak up."""

    def ask(*names: str) -> tuple[TurboSpec, str]:
        header: dict[str, str] = {}
        for name in names:
            header |= VOICES[name].header or {}
        path = lora(tmp_path, header)
        rows = []
        if "name" in names:  # before the other, so that the order of rows decides nothing
            rows.append(row("name", "inferred", pattern="mystery"))
        if "hash" in names:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append(row("hash", "stated", sha256=digest))
        monkeypatch.setattr(known, "KNOWN", tuple(rows))
        for name in names:
            if beside := VOICES[name].beside:
                file, text = beside(path)
                file.write_text(text)
        override = VOICES["override"].override if "override" in names else None
        resolved = resolve(path, read_header(path), override)
        return resolved.spec, resolved.source

    return ask


@pytest.mark.parametrize("name", [name for name in VOICES if name != "override"])
def test_each_is_heard_alone(name: str, asked: Any) -> None:
    spec, source = asked(name)
    assert spec.sigmas() == VOICES[name].sigmas
    assert source.startswith(VOICES[name].source)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(VOICES, 2)))
def test_the_earlier_one_counts(first: str, second: str, asked: Any) -> None:
    spec, source = asked(first, second)
    assert spec.sigmas() == VOICES[first].sigmas
    assert source.startswith(VOICES[first].source)
    if first == "override":
        assert f"the rest: {VOICES[second].source}" in source


def test_all_at_once_and_nobody(asked: Any) -> None:
    assert asked(*VOICES)[0].sigmas() == VOICES["override"].sigmas
    spec, source = asked(*list(VOICES)[1:])
    assert (spec, source) == (SPEC, "header of the file")


def test_nobody(asked: Any) -> None:
    with pytest.raises(UnknownSchedule, match=r"no mystery.turbo.json beside it"):
        asked()


def test_a_damaged_spec_of_ours_is_not_talked_over(tmp_path: Path) -> None:
    header = {"turbo.spec": "{}", "inference_sigmas": "[1, 0.5]"}
    with pytest.raises(SpecError, match=r"mystery.safetensors: key 'sigmas' is missing"):
        found(lora(tmp_path, header))


# ------------------------------------------------------------------------------ refused, inspected


PDD = STATE | {
    "diffusion_model.proj_out.weight": torch.ones(4, 6, 5),
}
IBFLOW = STATE | {"proj_out_means.weight": torch.ones(6, 5)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (PDD, "an output layer for each step .PDD, parallel decoding distillation"),
        (IBFLOW, "an output mixture .IBFlow."),
        (STATE | {"proj_out_logweights.bias": torch.ones(6)}, "an output mixture .IBFlow."),
        (STATE | {"x.proj_out_loggamma": torch.ones(1)}, "an output mixture .IBFlow."),
    ],
)
def test_pdd_and_ibflow_are_known_by_what_is_in_them(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = lora(tmp_path, {"inference_sigmas": "[1, 0.5]"}, tensors=tensors)
    with pytest.raises(LoraFormatError, match=rf"mystery.safetensors: key .* {message}"):
        describe(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Qwen-Image-2.1-Fun-Acc-4Step.safetensors", "one output head for each of its four steps"),
        ("IBFlow-Qwen-2NFE.safetensors", "replaces the model's output by a mixture"),
    ],
)
def test_pdd_and_ibflow_are_known_by_name(name: str, reason: str, tmp_path: Path) -> None:
    path = lora(tmp_path, name=name)
    with pytest.raises(SpecError, match=reason):
        found(path)
    assert reason in describe(path)["spec_source"]
    assert describe(path)["spec"] is None


@pytest.mark.parametrize(
    ("name", "size", "golden"),
    [
        (VIGGLE, None, (1, 0.96775, 0.93336, 0.85719, 0.66676, 0.4001, 0)),
        (VIGGLE, (1024, 1024), (1, 0.96775, 0.93336, 0.85719, 0.66676, 0.4001, 0)),
        (VIGGLE, (2048, 2048), (1, 0.98238, 0.96299, 0.9177, 0.788, 0.55337, 0)),
        (WULI, None, (1, 0.7155, 0)),
        (WULI, (1024, 1024), (1, 0.7155, 0)),
        (WULI, (2048, 2048), (1, 0.7155, 0)),
    ],
)
def test_inspect_tells_the_sigmas_of_a_size(
    name: str,
    size: tuple[int, int] | None,
    golden: tuple[float, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = lora(tmp_path, name=name)
    words = [str(path)] if size is None else [str(path), "--size", f"{size[0]}x{size[1]}"]
    assert main(["inspect", *words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["sigmas"] == pytest.approx(golden, abs=6e-6)
    assert values["sigmas_at"] == (list(size or (1024, 1024)) if name == VIGGLE else None)
    assert main(["inspect", *words]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("sampling"))
    told = line.partition(" at sigmas ")[2]
    assert [float(word) for word in told.partition(" (at ")[0].partition(";")[0].split(", ")] == (
        pytest.approx(golden, abs=6e-6)
    )
    width, height = size or (1024, 1024)
    assert (f"(at {width}x{height}; other sizes have others)" in line) == (name == VIGGLE)
    assert "table of known files" in text


def test_inspect_names_where_a_schedule_is_from(tmp_path: Path) -> None:
    path = lora(tmp_path, {"base_schedule": BASE_SCHEDULE})
    assert "header key base_schedule of the file" in to_text(describe(path))
    assert read_shapes(path)[1]["base_schedule"] == BASE_SCHEDULE
