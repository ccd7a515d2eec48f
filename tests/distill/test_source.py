"""What every command reads: files of any spelling, folders, and numbers that are finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill import cli
from distill.contract.lora_keys import delta, normalise
from distill.contract.metadata import read_header, read_lora
from distill.contract.tiny import TINY_DIR
from distill.lora.source import open_source

LORA = TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors"
KEY = "diffusion_model.transformer_blocks.0.attn.to_q.lora_B.weight"
OUT = "out"


def sample(lora: Path, out: Path) -> list[object]:
    return ["sample", lora, "--prompt", "a red letter K", "--out", out]


def evaluate(lora: Path, out: Path) -> list[object]:
    return ["eval", lora, "--count", 1, "--teacher-steps", 1, "--sheet", out]


def export(lora: Path, out: Path) -> list[object]:
    return ["export", lora, "--out", out]


def bake(lora: Path, out: Path) -> list[object]:
    return ["bake", TINY_DIR / "transformer", lora, "--out", out]


COMMANDS = (sample, evaluate, export, bake)


def run(words: list[object]) -> int:
    return cli.main([*map(str, words)])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_not_finite_is_refused_before_anything_is_written(
    command: Callable[[Path, Path], list[object]],
    value: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors = load_file(LORA)
    tensors[KEY][0, 0] = value
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken, read_header(LORA))
    assert run(command(broken, tmp_path / "out.safetensors")) == 2
    assert f"broken.safetensors: key {KEY!r}: expected finite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [broken]


def peft_folder(folder: Path, alpha: float | None) -> Path:
    """The shipped LoRA (alpha = rank) as PEFT saves it with another alpha; None: no config."""
    folder.mkdir()
    tensors, scale = {}, 1 if alpha is None else 32 / alpha
    for key, tensor in load_file(LORA).items():
        name = key.replace("diffusion_model.", "base_model.model.")
        if not key.endswith(".alpha"):
            tensors[name] = tensor.float() * (scale if ".lora_B." in key else 1)
    header = {"turbo.spec": read_header(LORA)["turbo.spec"]}
    save_file(tensors, folder / "adapter_model.safetensors", header)
    if alpha is not None:
        config = {"peft_type": "LORA", "r": 32, "lora_alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(path: Path) -> dict[str, torch.Tensor]:
    lora = normalise(*read_lora(path), source=path.name)
    return {name: delta(module) for name, module in lora.modules.items()}


@pytest.mark.parametrize("alpha", [8, 64])
def test_a_folder_that_peft_saved_is_its_lora(alpha: float, tmp_path: Path) -> None:
    source = open_source(peft_folder(tmp_path / "mine", alpha))
    assert source.name == "mine"
    expected = deltas(LORA)
    for name, module in source.lora.modules.items():
        torch.testing.assert_close(delta(module), expected[name], rtol=1e-5, atol=1e-7)
    assert source.lora.alpha_source == "adapter_config.json"


def test_what_was_assumed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_source(peft_folder(tmp_path / "mine", None))
    assert "adapter_model.safetensors: neither tensors nor header" in caplog.text


@pytest.mark.parametrize("keys", ["comfyui", "diffusers"])
@pytest.mark.parametrize("name", ["lora_alpha", "network_alpha", "alpha"])
def test_alpha_of_a_header_is_exported_once(
    name: str, keys: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Handed on in the header, it would contradict the tensors, or be applied a second time."""
    folder = peft_folder(tmp_path / "mine", 8)
    tensors = load_file(folder / "adapter_model.safetensors")
    spec = read_header(LORA)["turbo.spec"]
    header = {"turbo.spec": spec, name: "8", "lora_rank": "32"}
    save_file(tensors, tmp_path / "their.safetensors", header)
    out = tmp_path / "out.safetensors"
    words = [tmp_path / "their.safetensors", "--out", out, "--dtype", "fp32", "--keys", keys]
    assert run(["export", *words]) == 0
    assert f"alpha     from the header's {name!r}" in capsys.readouterr().out
    assert not {name, "lora_rank"} & read_header(out).keys()
    expected, found = deltas(LORA), deltas(out)
    for module, change in found.items():
        torch.testing.assert_close(change, expected[module], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "four"])
@pytest.mark.parametrize("command", [sample, evaluate])
def test_a_guidance_that_is_not_finite_is_refused(
    command: Callable[[Path, Path], list[object]],
    value: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run([*command(LORA, tmp_path / OUT), f"--guidance={value}"])
    assert stopped.value.code == 2
    assert f"--guidance: expected a finite number, found '{value}'" in capsys.readouterr().err
