"""What a run was begun with, by content: a folder that was moved or renamed is the same one.

RUN/identity.json   key of the recipe -> fingerprint of what it names
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..config import Config, DataSection
from ..data.fingerprint import fingerprint
from ..data.index import INDEX_FILE
from ..models.base_lora import records
from ..models.hub import model_folder
from ..utils.files import replace_text
from .run_dir import RunDir, read_json

Identity = dict[str, Any]


def identity_of(config: Config) -> Identity:
    """Fingerprints of base, LoRAs in the base, and data; without those of what is not here yet.

    Raises OSError, LoraFormatError for a LoRA that cannot be read.
    """
    identity: Identity = {"model.loras": records(config.model.loras)}
    folder = model_folder(config.model.path, ("transformer",), download=False)
    if folder is not None and (found := fingerprint(folder, "transformer")):
        identity["model.path"] = found
    if isinstance(config.data, DataSection):
        index = config.data.cache / INDEX_FILE
        if index.is_file():
            identity["data.cache"] = hashlib.sha256(index.read_bytes()).hexdigest()
    return identity


def read_identity(run_dir: Path) -> Identity:
    """Empty for a run of an earlier release. Raises ConfigError."""
    return read_json(RunDir(run_dir).identity)


def write_identity(run_dir: Path, identity: Identity) -> None:
    replace_text(RunDir(run_dir).identity, json.dumps(identity, indent=2) + "\n")


def same_content(saved: Identity, found: Identity) -> set[str]:
    """Keys that name what they named before."""
    return {key for key in saved.keys() & found.keys() if _facts(saved[key]) == _facts(found[key])}


def other_content(saved: Identity, found: Identity, keys: Collection[str]) -> list[str]:
    """Lines about those of `keys` that name something else."""
    same = same_content(saved, found)
    return [
        f"  {key}: {json.dumps(saved[key])} -> {json.dumps(found[key])} (other content)"
        for key in keys
        if key in saved and key in found and key not in same
    ]


def _facts(value: Any) -> Any:
    """Without the names of files."""
    if isinstance(value, list):
        return [{k: v for k, v in record.items() if k != "name"} for record in value]
    return value
