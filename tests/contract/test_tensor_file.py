"""Files are read as the safetensors library reads them, but never mapped, and must be finite."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from distill.contract.lora_keys import LoraFormatError
from distill.contract.tensor_file import (
    check_finite,
    is_finite,
    read_layout,
    read_tensor,
    read_tensors,
)

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    raw = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor[None].view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.flatten().tolist()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(d) for i, d in enumerate(FLOATS + OTHERS)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"a": "b"})
    return path


def test_every_type_is_read_as_the_library_reads_it(file: Path) -> None:
    tensors, metadata = read_tensors(file)
    expected = load_file(file)
    assert metadata == {"a": "b"}
    assert {k: bits(t) for k, t in tensors.items()} == {k: bits(t) for k, t in expected.items()}
    assert all(bits(read_tensor(file, key)) == bits(t) for key, t in expected.items())
    metas = {key: entry.meta() for key, entry in read_layout(file).entries.items()}
    assert {k: (t.shape, t.dtype, t.is_meta) for k, t in metas.items()} == {
        k: (t.shape, t.dtype, True) for k, t in expected.items()
    }


@pytest.fixture
def many_pieces(tmp_path: Path) -> Path:
    """22 MB in two runs, whose tensors end anywhere."""
    path = tmp_path / "large.safetensors"
    wide = {f"w{i}": torch.randn(1_000_003) for i in range(5)}
    save_file(wide | {"half": torch.randn(1_000_001).half()}, path)
    return path


def test_a_file_of_many_pieces(many_pieces: Path) -> None:
    tensors, _ = read_tensors(many_pieces)
    expected = load_file(many_pieces)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert all(torch.equal(read_tensor(many_pieces, key), expected[key]) for key in expected)


@pytest.mark.parametrize("key", ["w0", "w2", "w4", "half"])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_in_any_piece(key: str, place: int, many_pieces: Path) -> None:
    tensors = load_file(many_pieces)
    tensors[key][place] = math.nan
    save_file(tensors, many_pieces)
    with pytest.raises(LoraFormatError, match=rf"key '{key}': expected finite numbers; found 1 of"):
        read_tensors(many_pieces)


BYTES = st.integers(0, 255)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_header_is_an_error_or_what_the_library_reads(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}, path, {"k": "v"})
    raw = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, length - 1))] = data.draw(BYTES)
    path.write_bytes(raw)
    try:
        tensors, _ = read_tensors(path)
    except LoraFormatError:
        return
    try:
        expected = load(bytes(raw))
    except (SafetensorError, KeyError, UnicodeDecodeError):
        return  # the library wants more of texts in metadata, which no tensor depends on
    assert {k: bits(t) for k, t in tensors.items()} == {k: bits(t) for k, t in expected.items()}


def with_entry(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": [2.0, 3]},
        {"shape": [True, 6]},
        {"shape": 6},
        {"dtype": "F16"},
        {"dtype": "F4"},
        {"dtype": None},
        {"data_offsets": [4, 24]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [0, 24, 24]},
        {"data_offsets": [-1, 24]},
    ],
)
def test_an_entry_that_cannot_be(changes: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_entry(**changes))
    with pytest.raises(LoraFormatError, match=r"^x\.safetensors: "):
        read_tensors(path)


def test_tensors_may_not_lie_upon_each_other(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(LoraFormatError, match="not a valid safetensors file: key 'b'"):
        read_tensors(path)


# ------------------------------------------------------------------------------------ not mapped

HELD = """
import sys
from pathlib import Path
import torch
from distill.contract.metadata import read_lora, read_shapes
from distill.contract.bake.weights import open_weights
path = Path(sys.argv[1])
tensors, _ = read_lora(path)
read_shapes(path)
one = open_weights(path).read("weight")
with path.open("r+b") as file:
    if sys.argv[2] == "cut":
        file.truncate(0)
    else:
        file.write(bytes(path.stat().st_size))
print(float(tensors["weight"].sum()), float(one.sum()))
"""


@pytest.mark.parametrize("how", ["cut", "overwritten"])
@pytest.mark.parametrize("rows", [1_000, 50_000])
def test_a_file_that_is_changed_in_place_while_it_is_held(
    how: str, rows: int, tmp_path: Path
) -> None:
    """In a process of its own: mapped, it would die of a bus error."""
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(rows, 100)}, path)
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(path), how], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, 2 * [f"{rows * 100}.0"]), done.stderr


@pytest.mark.parametrize("change", ["cut", "longer"])
def test_a_file_that_is_written_to_while_it_is_read(change: str, file: Path) -> None:
    def wanted(key: str, entry: object) -> bool:
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2] if change == "cut" else raw + b"x")
        return True

    with pytest.raises(LoraFormatError, match="was written to while it was read"):
        read_tensors(file, wanted)


# ------------------------------------------------------------------------------------ only finite


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 3333, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_enough(
    value: float, place: int, dtype: torch.dtype
) -> None:
    tensor = torch.full((100, 100), torch.finfo(dtype).max, dtype=torch.float64)
    tensor[1] = torch.finfo(dtype).min
    assert is_finite(tensor.to(dtype))  # the largest number is one
    tensor.view(-1)[place] = value
    tensor = tensor.to(dtype)
    if dtype is torch.float8_e4m3fn and not tensor.float().isnan().any():
        return  # it has no infinity
    assert not is_finite(tensor)
    with pytest.raises(LoraFormatError, match=r"x: key 'k': expected finite .* 1 of 10,000"):
        check_finite("k", tensor, "x")


@pytest.mark.parametrize("dtype", OTHERS)
def test_whole_numbers_and_nothing_are_finite(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3, dtype=dtype))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.empty(3, device="meta"))


def test_a_file_with_nan_names_tensor_and_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1, math.nan])}, path)
    with pytest.raises(LoraFormatError, match=r"x\.safetensors: key 'bad': expected finite"):
        read_tensors(path)
    assert read_tensors(path, lambda key, entry: key == "good")[0]["bad"].is_meta
