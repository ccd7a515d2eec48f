"""Read and write a LoRA file and its header.

The header follows Stability's ModelSpec 1.0.1 (`modelspec.*`), kohya's `ss_*`, and carries the
TurboSpec in `turbo.spec`. All values are strings.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from .files import written_whole
from .latent_grid import sigmas_text
from .lora_keys import NormalisedLora, normalise, values_matter
from .peft_folder import config_beside
from .spec import HEADER_KEY, TurboSpec
from .tensor_file import read_layout, read_tensors

_ARCHITECTURES = {  # family -> modelspec architecture and implementation
    "qwen-image": ("Qwen-Image", "https://github.com/QwenLM/Qwen-Image"),
}


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file; no tensor is read.

    Raises OSError if the file cannot be opened, LoraFormatError if it is no whole safetensors file.
    """
    return read_layout(Path(path)).metadata


def read_lora(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in main memory, all of their numbers finite, and metadata as `normalise` wants it.

    The metadata has the text of PEFT's adapter_config.json under that name where one lies beside
    the file. Raises as `read_header` does, LoraFormatError also for NaN and infinity.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    return tensors, metadata | config_beside(path)


def read_shapes(
    path: str | os.PathLike[str], *, finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Like `read_lora`, but meta tensors for all whose values `normalise` does not ask for.

    finite: whether NaN and infinity in those are refused.
    """
    path = Path(path)
    tensors, metadata = read_tensors(
        path, lambda key, entry: values_matter(key, entry.shape), finite=finite
    )
    return tensors, metadata | config_beside(path)


def write_lora(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    spec: TurboSpec,
    title: str,
    description: str = "",
    author: str = "",
    license: str = "",
    extra: Mapping[str, str] | None = None,
    replace: bool = True,
) -> Path:
    """Write a LoRA with a complete header; the file appears whole or not at all.

    tensors: in any spelling that `normalise` reads, usually from `to_comfy`. extra: more metadata
    (`ss_steps`, `turbo.config`), which may replace any key but `turbo.spec` and `format`.
    replace: whether it may take the place of a file. Folders are made. Raises LoraFormatError for
    tensors that are no LoRA, ValueError for extra metadata that is not text, FileExistsError,
    NoRoomError, OSError if the disk refuses.
    """
    path = Path(path)
    owned = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    metadata = _metadata(path, normalise(owned, source=path.name), spec, title)
    optional = {"description": description, "author": author, "license": license}
    metadata |= {f"modelspec.{key}": value for key, value in optional.items() if value}
    metadata |= _checked(extra or {})

    size = sum(tensor.nbytes for tensor in owned.values())
    with written_whole(path, replace=replace, size=size) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as umask has it; safetensors makes files private
        # The hash covers the tensor bytes as laid out in the file, hence write, hash, write.
        save_file(owned, partial, metadata)
        digest = tensor_sha256(partial)
        save_file(owned, partial, metadata | hashes(digest))
        os.chmod(partial, mode)
        _flush(partial)
    return path


def hashes(digest: str) -> dict[str, str]:
    """The header keys that hold a file's `tensor_sha256`: ModelSpec's and sd-scripts'."""
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def tensor_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes after the header, so of the weights alone; lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def architecture_of(family: str) -> tuple[str, str]:
    """ModelSpec's architecture and implementation of a model family."""
    return _ARCHITECTURES.get(family, (family, "custom"))


def _metadata(path: Path, lora: NormalisedLora, spec: TurboSpec, title: str) -> dict[str, str]:
    """Everything but the hash."""
    architecture, implementation = architecture_of(spec.family)
    alphas = {module.alpha for module in lora.modules.values()}
    metadata = {
        "format": "pt",
        HEADER_KEY: spec.to_json(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).replace(microsecond=0).isoformat(),
        "modelspec.prediction_type": "flow",
        "modelspec.tags": f"turbo, few-step, {spec.steps}-step, {spec.family}",
        "modelspec.usage_hint": usage_hint(spec),
        "modelspec.base_model": spec.base,
        "ss_base_model_version": spec.base,
        "ss_sd_model_name": spec.base.rpartition("/")[2],
        "ss_output_name": path.stem,
        "ss_network_module": "networks.lora",
        "ss_network_dim": _only(set(lora.ranks)),
        "ss_network_alpha": _only(alphas),
    }
    if spec.resolutions:
        metadata["modelspec.resolution"] = "x".join(map(str, spec.resolutions[0]))
        metadata["ss_resolution"] = str(spec.resolutions[0])  # kohya's "(1024, 1024)"
    return metadata


def usage_hint(spec: TurboSpec, size: tuple[int, int] | None = None) -> str:
    """One line for a person who samples by hand; size: of the image, see `sigmas_text`."""
    facts = [
        f"{spec.steps} steps at sigmas {sigmas_text(spec, size)}",
        f"sampler {spec.sampler}",
        f"CFG {spec.cfg:g}",
        f"strength {spec.strength_text}",
        f"base {spec.base}",
    ]
    if spec.guidance is not None:
        facts.insert(3, f"guidance {spec.guidance:g}")
    if spec.boundary is not None:
        facts.append(f"high-noise expert for {spec.boundary} steps, then the low-noise one")
    if spec.ladder:
        facts.append(f"steps to choose from: {', '.join(map(str, spec.step_counts))}")
    return "; ".join(facts)


def _only(values: set[Any]) -> str:
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"  # kohya's word for mixed ranks


def _checked(extra: Mapping[str, str]) -> dict[str, str]:
    for key, value in extra.items():
        if key in (HEADER_KEY, "format"):
            raise ValueError(
                f"extra metadata: {key!r} is written from the spec and cannot be replaced"
            )
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"extra metadata: expected text; found {value!r} for {key!r}")
    return dict(extra)


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
