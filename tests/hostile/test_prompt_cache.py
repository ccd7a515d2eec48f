"""An entry of the prompt cache that is damaged, or is none: encoded anew, whatever is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile import Surface, check, few, row
from mutations import damaged, json_like, safetensors_bytes, safetensors_parts
from safetensors.torch import save_file

pytestmark = pytest.mark.comfy

ENTRY = [
    [
        torch.ones(1, 5, 8),
        {"pooled_output": None, "attention_mask": torch.ones(1, 5), "guidance": 3.5},
    ]
]


@pytest.fixture
def cache(pack: Any, tmp_path: Path) -> Any:
    return pack("nodes.prompt_cache").PromptCache(tmp_path)


@pytest.fixture
def surface(cache: Any) -> Surface:
    """Documents no exception at all. Tells what was found: nothing, or conditioning."""

    def load(key: str) -> str:
        found = cache.load(key)
        if found is None:
            return "nothing"
        for cond, options in found:
            assert isinstance(cond, torch.Tensor)
            assert isinstance(options, dict)
            kinds = torch.Tensor | str | int | float | bool | None
            assert all(isinstance(value, kinds) for value in options.values())
        return "conditioning"

    return Surface("PromptCache.load", load, ())


def entry(layout: Any, **tensors: torch.Tensor) -> Callable[[Path], None]:
    """A file with this layout, as JSON or as it stands, and these tensors, "_" for "."."""
    text = layout if isinstance(layout, str) else json.dumps(layout)
    state = {name.replace("_", "."): tensor for name, tensor in tensors.items()}
    return lambda path: save_file(state, path, {"turbo.conditioning": text})


COND = torch.ones(1, 5, 8)
ROWS = [
    row("empty", Path.touch),
    row("zeros", lambda path: path.write_bytes(bytes(4096))),
    row("another file", lambda path: save_file({"x": COND}, path)),
    row("no JSON", entry("{", **{"0_": COND})),
    row("null", entry("null", **{"0_": COND})),
    row("deeply nested", entry("[" * 200_000, **{"0_": COND})),
    row("no entries", entry([], **{"0_": COND})),
    row("no entries and no tensors", entry([])),
    row("an entry that is text", entry(["x"])),
    row("an entry that is a number", entry([5], **{"0_": COND})),
    row("an entry that is a list", entry([[]], **{"0_": COND})),
    row("an object of entries", entry({"0": {}}, **{"0_": COND})),
    row("a conditioning that is text", entry([{"": "x"}])),
    row("a conditioning that is a number", entry([{"": 5}])),
    row("an option that is a list", entry([{"hooks": [1]}], **{"0_": COND})),
    row("an option that is an object", entry([{"control": {"a": 1}}], **{"0_": COND})),
    row("an index below zero", entry([{}], **{"-1_": COND})),
    row("an index in superscript", entry([{}], **{"²_": COND})),
    row("an index of 5000 digits", entry([{}], **{"1" * 5000 + "_": COND})),
    row("a number of 5000 digits", entry('[{"a": ' + "1" * 5000 + "}]", **{"0_": COND})),
    row("a folder", Path.mkdir),
    row("a pipe", os.mkfifo),
    row("a link to itself", lambda path: path.symlink_to(path)),
    row("a device", lambda path: path.symlink_to("/dev/zero")),
]


@pytest.mark.parametrize(("make", "refused"), few(ROWS))
def test_an_entry_that_is_none(
    make: Callable[[Path], object], refused: None, cache: Any, surface: Surface
) -> None:
    make(cache.path("k"))
    assert check(surface, "k", refused) == "nothing"


def test_entries_that_are_old_may_be_kept(cache: Any, surface: Surface) -> None:
    assert cache.store("k", ENTRY)
    assert check(surface, "k", None) == "conditioning"


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", few(["bytes", "header", "layout"]))
def test_any_damage(what: str, count: int, cache: Any, surface: Surface) -> None:
    assert cache.store("k", ENTRY)
    path = cache.path("k")
    whole = path.read_bytes()
    header, data = safetensors_parts(path)
    layout = json.loads(header["__metadata__"]["turbo.conditioning"])

    def with_layout(value: Any) -> bytes:
        metadata = {"turbo.conditioning": json.dumps(value)}
        return safetensors_bytes({**header, "__metadata__": metadata}, data)

    examples, make = {
        "bytes": (damaged(whole, head=len(whole) - len(data)), bytes),
        "header": (json_like(header), lambda value: safetensors_bytes(value, data)),
        "layout": (json_like(layout), with_layout),
    }[what]

    def put(example: Any) -> str:
        path.write_bytes(make(example))
        return "k"

    hostile.survive(surface, examples, put, count, count < 1000)
