"""Tensors in files, and the checksums of both."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from distill.training.tensor_files import (
    SUMS,
    DamagedFile,
    divided,
    read_checked,
    read_sums,
    read_tensors,
    write_sums,
    write_tensors,
)

SHARED = torch.randn(4)
TENSORS = {
    "/adapters/student/a.weight": torch.randn(3, 5),
    "/scalar": torch.tensor(7.0),
    "/half": torch.randn(4).bfloat16(),
    "/count": torch.tensor([1, 2]),
    "/flag": torch.tensor([True, False]),
    "/empty": torch.zeros(0, 2),
    "/view": torch.randn(6, 4).t(),
    "/expanded": torch.randn(1, 4).expand(3, 4),
    "/part": torch.randn(100)[10:20],
    "/one": SHARED,
    "/and the same": SHARED,
}


def write(folder: Path, limit: int = 100) -> dict[str, str]:
    folder.mkdir()
    files = divided(TENSORS, limit)
    sums = {name: write_tensors(folder / name, held) for name, held in files.items()}
    write_sums(folder, sums)
    return sums


def test_tensors_survive_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    sums = write(tmp_path / "here")
    assert len(sums) > 2
    assert read_sums(tmp_path / "here") == sums
    loaded = read_tensors(tmp_path / "here", sums)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


def test_loaded_tensors_are_no_window_into_the_file(tmp_path: Path) -> None:
    """The file may be replaced, shortened or removed while they are in use."""
    sums = write(tmp_path / "here")
    loaded = read_tensors(tmp_path / "here", sums)
    for name in sums:
        (tmp_path / "here" / name).write_bytes(b"")
    assert torch.equal(loaded["/view"], TENSORS["/view"])
    loaded["/view"].add_(1)


def test_files_hold_what_the_limit_allows() -> None:
    tensors = {str(i): torch.zeros(10) for i in range(5)} | {"large": torch.zeros(100)}
    parts = divided(tensors, limit=80)
    assert [list(held) for held in parts.values()] == [["0", "1"], ["2", "3"], ["4"], ["large"]]
    assert list(parts)[:2] == ["00000.safetensors", "00001.safetensors"]
    assert [list(held) for held in divided({}).values()] == [[]]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="coreutils are not here")
def test_the_usual_program_checks_them_too(tmp_path: Path) -> None:
    write(tmp_path / "here")
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "here", check=True)


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/b", "a  b/", "é\n"])
def test_sums_name_files_of_their_folder_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / SUMS).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(DamagedFile, match="SHA256SUMS is damaged"):
        read_sums(tmp_path)


def test_a_file_without_a_sum_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b"{}")
    with pytest.raises(DamagedFile, match=r"state\.json is damaged: SHA256SUMS says nothing"):
        read_checked(tmp_path, "state.json", {})
    digest = hashlib.sha256(b"{}").hexdigest()
    assert read_checked(tmp_path, "state.json", {"state.json": digest}) == b"{}"
