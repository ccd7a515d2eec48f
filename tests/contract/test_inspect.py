"""`turbo-distill inspect`: exit codes, text and JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distill.cli import main
from distill.contract.describe import describe, to_text
from distill.contract.lora_keys import LoraFormatError
from distill.contract.metadata import read_lora, write_lora
from distill.contract.spec import HEADER_KEY, TurboSpec

SPEC = TurboSpec((1.0, 0.7155, 0.0), sampler="renoise", method="pcm, dmd2")
STATE = {
    "diffusion_model.img_in.lora_A.weight": torch.ones(4, 5, dtype=torch.bfloat16),
    "diffusion_model.img_in.lora_B.weight": torch.ones(6, 4, dtype=torch.bfloat16),
    "diffusion_model.img_in.alpha": torch.tensor(2.0),
    "diffusion_model.proj_out.lora_A.weight": torch.ones(8, 5),
    "diffusion_model.proj_out.lora_B.weight": torch.ones(6, 8),
    "diffusion_model.proj_out.alpha": torch.tensor(8.0),
}


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    return write_lora(
        tmp_path / "t.safetensors", STATE, spec=SPEC, title="Turbo", extra={"note": "a\x1b[31mb\n"}
    )


def inspect(*argv: str) -> int:
    return main(["inspect", *argv])


def test_json(lora_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(lora_file), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec"]["sigmas"] == [1.0, 0.7155, 0.0]
    assert found["spec"]["sampler"] == "renoise"
    expected = {
        "file": "t.safetensors",
        "file_size_bytes": lora_file.stat().st_size,
        "formats": ["diffusion_model.<module>.lora_A/lora_B"],
        "adapters": [],
        "modules": 2,
        "ranks": {"4": 1, "8": 1},
        "alpha_source": "tensor",
        "scales": {"0.5": 1, "1": 1},
        "dtypes": {"bfloat16": 2, "float32": 2},
        "parameters": 4 * 11 + 8 * 11,
        "other_keys": [],
        "not_finite": {},
        "spec_source": "header of the file",
    }
    assert expected.items() <= found.items()
    assert found["metadata"]["modelspec.title"] == "Turbo"


def test_text_shows_the_schedule_and_hides_terminal_escapes(
    lora_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(str(lora_file)) == 0
    out = capsys.readouterr().out
    assert "2 steps at sigmas 1, 0.7155, 0; sampler renoise; CFG 1" in out
    assert "4 (1x), 8 (1x)" in out
    assert "pcm, dmd2" in out
    assert "\x1b" not in out
    assert r"a\x1b[31mb\n" in out
    assert len(out.splitlines()) > 10


def test_a_lora_without_a_known_schedule_is_described_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "style.safetensors"
    state = {k: t for k, t in STATE.items() if "alpha" not in k} | {"stray": torch.ones(1)}
    safetensors.torch.save_file(state, path)
    assert inspect(str(path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec"] is None
    assert "give them as an override" in found["spec_source"]
    assert found["alpha_source"] == "rank"
    text = to_text(describe(path))
    assert "unknown: style.safetensors" in text
    assert "equal to the rank" in text
    assert "1 keys, such as stray" in text


def test_known_public_name_is_found_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
    safetensors.torch.save_file(STATE, path)
    found = describe(path)
    assert found["spec"]["sigmas"] == found["sigmas"] == [1.0, 0.7155, 0.0]
    assert found["spec_source"].startswith("table of known files")


def test_a_folder_that_peft_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = {
        key.replace("diffusion_model.", "base_model.model."): tensor
        for key, tensor in STATE.items()
        if "proj_out" not in key and "alpha" not in key
    }
    safetensors.torch.save_file(peft, tmp_path / "adapter_model.safetensors")
    assert inspect(str(tmp_path)) == 0
    assert "assumed alpha = rank (scale 1)" in capsys.readouterr().out
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 1}')
    assert inspect(str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == "adapter_model.safetensors"
    assert found["scales"] == {"0.25": 1}
    assert found["alpha_source"] == "adapter_config.json"
    assert found["alpha_from"].startswith("from adapter_config.json (core")
    assert found["warnings"] == []


def test_a_folder_without_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(tmp_path)) == 2
    assert "expected a LoRA file or a folder with adapter_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diffusion_model.proj_out.lora_B.weight", math.nan),
        ("diffusion_model.img_in.lora_A.weight", -math.inf),
        ("diffusion_model.img_in.alpha", math.nan),
        ("stray", math.inf),
    ],
)
def test_a_file_with_nan_is_described_and_the_exit_code_tells(
    key: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {k: t.clone() for k, t in (STATE | {"stray": torch.ones(2)}).items()}
    state[key].view(-1)[0] = value
    path = tmp_path / "bad.safetensors"
    safetensors.torch.save_file(state, path, {HEADER_KEY: SPEC.to_json()})
    with pytest.raises(LoraFormatError, match=f"key '{key}': expected finite numbers"):
        read_lora(path)
    assert inspect(str(path), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 1
    assert found["modules"] == 2
    assert found["not_finite"] == {key: 1}
    assert found["spec"]["sigmas"] == [1.0, 0.7155, 0.0]
    assert inspect(str(path)) == 1
    shown = capsys.readouterr()
    assert f"found 1 numbers in 1 tensors, such as {key}, that are NaN or infinite" in shown.out
    assert "turbo-distill sample" not in shown.err, "such a file is of no use there"


MEMORY = """
import resource, sys
from distill.contract.describe import describe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(describe(sys.argv[1])["not_finite"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    down, up = torch.ones(1000, 25_000), torch.ones(25_000, 1000)  # 100 MB each
    up[-1, -1] = math.nan
    name = "diffusion_model.img_in.lora_{}.weight"
    safetensors.torch.save_file({name.format("A"): down, name.format("B"): up}, path)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    counts, mib = done.stdout.splitlines()
    assert counts == str({name.format("B"): 1})
    assert int(mib) < 100


def test_zeros_that_change_nothing_are_read_without_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "exported.safetensors"
    zeros = {"diffusion_model.img_in.diff_b": torch.zeros(6)}
    safetensors.torch.save_file(STATE | zeros, path)
    assert describe(path)["other_keys"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "HTML page"),
        (None, "No such file"),
        (safetensors.torch.save({}), "no tensors at all"),
    ],
)
def test_bad_input_is_exit_code_two_and_one_line_on_stderr(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert inspect(str(path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("turbo-distill inspect: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_million_sigmas_in_a_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.safetensors"
    sigmas = ", ".join(f"{1 - i / 1_000_000:.6f}" for i in range(1_000_001))
    safetensors.torch.save_file(STATE, path, {"turbo.spec": f'{{"sigmas": [{sigmas}]}}'})
    start = time.process_time()
    inspect(str(path))
    assert time.process_time() - start < 3
    assert "expected at most 256 steps; found 1,000,000" in capsys.readouterr().out


def test_levels_that_run_into_each_other_at_a_size_are_no_schedule_and_the_rest_is_shown(
    tmp_path: Path,
) -> None:
    shift = {"rule": "linear", "tokens": [1, 4096], "mu": [0, 19]}
    spec = json.dumps({"version": 2, "nodes": [1, 1 - 2**-53, 0], "shift": shift})
    path = tmp_path / "t.safetensors"
    safetensors.torch.save_file(STATE, path, {HEADER_KEY: spec})
    found = describe(path)
    assert (found["spec"], found["sigmas"], found["modules"]) == (None, None, 2)
    assert "sigmas: expected strictly decreasing" in to_text(found)
