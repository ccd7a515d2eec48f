"""Tensors of a checkpoint of version 1, which torch.distributed.checkpoint wrote: a pickle says
where each lies. It is read without making a single object that it asks for.

checkpoints/step-000100/  .metadata  __0_0.distcp ...  state.json
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from ..contract.shown import shown

METADATA = ".metadata"
MODULES = frozenset(  # whose classes torch.distributed.checkpoint writes down
    {
        "torch",
        "torch.serialization",
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.filesystem",
        "pathlib",
        "pathlib._local",  # from Python 3.13 on
    }
)


class UnsafePickle(ValueError):
    """A pickle that asks for what no checkpoint holds."""


class Record:
    """Stands for whatever class a pickle names."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class RecordUnpickler(pickle.Unpickler):
    """Resolves no name, so that nothing is imported and nothing is called."""

    def find_class(self, module: str, name: str) -> type[Record]:
        if module not in MODULES:
            raise UnsafePickle(
                f"{METADATA} asks for {module}.{name}, which no checkpoint needs; nothing of it "
                "was run. Do not trust the folder it came in."
            )
        return Record


def read_old_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, in main memory; any number of ranks may have written them.

    Raises UnsafePickle, OSError, and whatever a damaged file makes of pickle and torch.load.
    """
    with (folder / METADATA).open("rb") as file:
        metadata: Any = RecordUnpickler(file).load()
    tensors: dict[str, torch.Tensor] = {}
    for index, stored in metadata.storage_data.items():
        name, part = index.fqn, stored.relative_path
        if name in tensors or Path(part).name != part:
            raise ValueError(f"{METADATA} is damaged: {shown(name)} in {shown(part)}")
        with (folder / part).open("rb") as file:
            file.seek(stored.offset)
            content = io.BytesIO(file.read(stored.length))
        tensors[name] = torch.load(content, map_location="cpu", weights_only=True).contiguous()
    return tensors
