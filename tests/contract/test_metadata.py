"""Headers: complete, exact, written whole or not at all; bad files named for what they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distill.contract import metadata as metadata_module
from distill.contract.lora_keys import LoraFormatError, normalise
from distill.contract.metadata import read_header, read_lora, read_shapes, tensor_sha256, write_lora
from distill.contract.resolve import Override, resolve, resolve_spec
from distill.contract.spec import SpecError, TurboSpec

SPEC = TurboSpec((1.0, 0.7155, 0.0), resolutions=((1328, 1328),), method="pcm, dmd2")
WULI = "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"


def tensors(alpha: float = 4.0) -> dict[str, Tensor]:
    stem = "diffusion_model.transformer_blocks.0.attn.to_q"
    return {
        f"{stem}.lora_A.weight": torch.arange(20.0, dtype=torch.bfloat16).reshape(4, 5),
        f"{stem}.lora_B.weight": torch.ones(6, 4, dtype=torch.bfloat16),
        f"{stem}.alpha": torch.tensor(alpha),
    }


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "turbo.safetensors", tensors(), spec=SPEC, title="Turbo")


def test_round_trip(lora_file: Path) -> None:
    state, header = read_lora(lora_file)
    assert header == read_header(lora_file)
    assert all(torch.equal(state[key], t) for key, t in tensors().items())
    assert resolve_spec(lora_file, header) == (SPEC, "header of the file")
    assert set(lora_file.parent.iterdir()) == {lora_file}


def test_header_is_complete(lora_file: Path) -> None:
    header = read_header(lora_file)
    expected = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Qwen-Image/lora",
        "modelspec.implementation": "https://github.com/QwenLM/Qwen-Image",
        "modelspec.title": "Turbo",
        "modelspec.resolution": "1328x1328",
        "ss_base_model_version": "Qwen/Qwen-Image-2512",
        "ss_output_name": "turbo",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
    }
    assert expected.items() <= header.items()
    assert "0.7155" in header["modelspec.usage_hint"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", header["modelspec.date"])


def test_hash_covers_the_tensor_bytes_and_not_the_header(lora_file: Path, tmp_path: Path) -> None:
    raw = lora_file.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    header = read_header(lora_file)
    assert header["modelspec.hash_sha256"] == f"0x{digest}"
    assert header["sshs_model_hash"] == tensor_sha256(lora_file) == digest
    other = write_lora(tmp_path / "b.safetensors", tensors(), spec=SPEC, title="Another")
    assert tensor_sha256(other) == digest
    changed = write_lora(tmp_path / "c.safetensors", tensors(2.0), spec=SPEC, title="Turbo")
    assert tensor_sha256(changed) != digest


def test_mixed_ranks_and_extra_metadata(tmp_path: Path) -> None:
    state = tensors() | {
        "diffusion_model.img_in.lora_A.weight": torch.ones(2, 5),
        "diffusion_model.img_in.lora_B.weight": torch.ones(6, 2),
    }
    extra = {"ss_steps": "100", "modelspec.title": "Mine"}
    path = write_lora(
        tmp_path / "deep" / "er" / "x.safetensors",
        state,
        spec=TurboSpec((1.0, 0.0), family="other"),
        title="T",
        description="d",
        author="a",
        license="l",
        extra=extra,
    )
    header = read_header(path)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert extra.items() <= header.items()
    assert header["modelspec.architecture"] == "other/lora"
    assert [header[f"modelspec.{key}"] for key in ("description", "author", "license")] == list(
        "dal"
    )
    assert "modelspec.resolution" not in header


@pytest.mark.parametrize("extra", [{"turbo.spec": "{}"}, {"format": "np"}, {"ss_steps": 100}])
def test_bad_extra_metadata_writes_nothing(extra: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="extra metadata"):
        write_lora(tmp_path / "x.safetensors", tensors(), spec=SPEC, title="T", extra=extra)
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_no_lora_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(LoraFormatError, match=r"x\.safetensors"):
        write_lora(tmp_path / "x.safetensors", {"w": torch.ones(2)}, spec=SPEC, title="T")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["save_file", "_flush"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    stage: str, lora_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lora_file.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metadata_module, stage, fail)
    with pytest.raises(OSError, match="no space"):
        write_lora(lora_file, tensors(9.0), spec=SPEC, title="New")
    assert lora_file.read_bytes() == before
    assert set(lora_file.parent.iterdir()) == {lora_file}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_is_readable_as_umask_allows(lora_file: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert lora_file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_read_shapes_agrees_without_reading_weights(lora_file: Path) -> None:
    shapes, header = read_shapes(lora_file)
    state, _ = read_lora(lora_file)
    assert header == read_header(lora_file)
    assert {k: (t.shape, t.dtype) for k, t in shapes.items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    assert {t.is_meta for k, t in shapes.items() if "weight" in k} == {True}
    assert next(iter(normalise(shapes).modules.values())).alpha == 4


def test_a_file_without_metadata_has_an_empty_header(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\0" * 4096, "begin with zeros, an unfinished download"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"\n<HTML><head></head></HTML>", "an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git-lfs pointer.*git lfs pull",
        ),
        (b"PK\x03\x04" + b"x" * 100, "PyTorch checkpoint"),
        (b"\x80\x02}q\x00." + b"x" * 100, "pickle"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
        (b'{"error": "not found"}', "JSON text"),
        (b"random bytes of some other format", r"begin with b'random b'"),
        ((2**62).to_bytes(8, "little") + b"xx", "another format"),
        ((7).to_bytes(8, "little") + b"not js}", "found"),
        ((2).to_bytes(8, "little") + b"[]", "found"),
        ((15).to_bytes(8, "little") + b'{"x":{"a":"b"}}', "found"),
    ],
)
@pytest.mark.parametrize("read", [read_header, read_lora, read_shapes])
def test_what_is_no_safetensors_file_is_named(
    read, content: bytes, message: str, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraFormatError, match=message) as error:
        read(path)
    assert str(error.value).startswith("model.safetensors: expected a safetensors file")


@pytest.mark.parametrize("read", [read_header, read_lora, read_shapes])
def test_every_truncation_is_an_error(read, lora_file: Path) -> None:  # type: ignore[no-untyped-def]
    whole = lora_file.read_bytes()
    for size in (7, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        lora_file.write_bytes(whole[:size])
        with pytest.raises(LoraFormatError, match=r"turbo\.safetensors"):
            read(lora_file)
    lora_file.write_bytes(whole[:-1])
    with pytest.raises(
        LoraFormatError, match=f"expected {len(whole):,} bytes.*found {len(whole) - 1:,}"
    ):
        read(lora_file)


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        read_lora(tmp_path / "x.safetensors")


# resolve_spec


def test_header_beats_table() -> None:
    header = {"turbo.spec": TurboSpec((1.0, 0.5, 0.0)).to_json()}
    assert resolve_spec(WULI, header)[0].sigmas() == (1, 0.5, 0)
    spec, source = resolve_spec(WULI, {"modelspec.title": "x"})
    assert spec.sigmas() == (1, 0.7155, 0)
    assert source.startswith("table of known files: Wuli-art/")
    assert resolve_spec(Path("loras") / WULI, None)[0] == spec


def test_an_override_beats_both() -> None:
    """More cases, and who asks: tests/comfy/test_resolve.py."""
    header = {"turbo.spec": TurboSpec((1.0, 0.5, 0.0)).to_json()}
    override = Override((1.0, 0.6, 0.0))
    assert resolve(Path(WULI), header, override).spec == TurboSpec((1.0, 0.6, 0.0))
    found = resolve(Path(WULI), {"turbo.spec": "garbage"}, override)
    assert (found.spec.sigmas(), found.source, found.known) == ((1.0, 0.6, 0.0), "override", False)


def test_a_broken_header_is_not_papered_over_by_the_table() -> None:
    with pytest.raises(SpecError, match=f"{re.escape(WULI)}: expected a JSON object"):
        resolve_spec(WULI, {"turbo.spec": json.dumps([1, 0])})


def test_nothing_known_says_what_to_do() -> None:
    with pytest.raises(
        SpecError, match=r"style.safetensors.*no 'turbo.spec'.*override, for example"
    ):
        resolve_spec("style.safetensors", {})
