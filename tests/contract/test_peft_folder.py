"""A folder stands for the LoRA in it; one that holds none says where to look."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.contract.lora_keys import LoraFormatError
from distill.contract.peft_folder import lora_file


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_a_file_is_itself_even_where_it_does_not_exist(tmp_path: Path) -> None:
    assert lora_file(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("adapter_model.safetensors", "optimizer.safetensors"), "adapter_model.safetensors"),
        (("pytorch_lora_weights.safetensors", "README.md"), "pytorch_lora_weights.safetensors"),
    ],
)
def test_pefts_file_or_the_only_one(names: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in names))
    assert lora_file(tmp_path) == tmp_path / expected


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ((), "it holds no .safetensors file"),
        (("a.safetensors", "b.safetensors"), "2 .safetensors files: name one of them, such as"),
        (("adapter_model.bin",), "a Python pickle: save the LoRA again as safetensors"),
        (("student/adapter_model.safetensors",), r"name .*student.adapter_model\.safetensors"),
        (("lora/turbo.safetensors",), r"name .*lora.turbo\.safetensors"),
    ],
)
def test_any_other_folder_says_where_to_look(
    names: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    touch(*(tmp_path / name for name in names))
    with pytest.raises(LoraFormatError, match=hint) as error:
        lora_file(tmp_path)
    assert str(tmp_path) in str(error.value)
