"""Packs of version 1 are out in the world: what they can read is written for them as they wrote it,
what they cannot read makes them ask for an update. The texts in here are theirs, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.contract.known import KNOWN, KnownFile, find
from distill.contract.metadata import read_header, write_lora
from distill.contract.resolve import of_file
from distill.contract.shift import ExponentialShift, LinearShift, StaticShift
from distill.contract.spec import VERSION, SpecError, TurboSpec
from distill.contract.stamp import Wanted, stamp

TINY = Path(__file__).parents[2] / "distill/tiny/model/lora/tiny_turbo_2_steps.safetensors"
PLAIN = (
    '{"sigmas": [1.0, 0.7155, 0.0], "family": "qwen-image", "base": "Qwen/Qwen-Image-2512", '
    '"sampler": "euler", "cfg": 1.0, "strength": 1.0, "resolutions": [], "method": "", '
    '"created_by": "", "version": 1}'
)
FULL = (
    '{"sigmas": [1.0, 0.8823529411764706, 0.7142857142857143, 0.45454545454545453, 0.0], '
    '"family": "qwen-image", "base": "a/\\u00fc \\"b\\"", "sampler": "renoise", "cfg": 1.5, '
    '"strength": 0.8, "resolutions": [[1328, 1328], [928, 1664]], "method": "pcm -> dmd2", '
    '"created_by": "me", "version": 1}'
)
SHIPPED = (
    '{"sigmas": [1.0, 0.7155, 0.0], "family": "qwen-image", "base": "turbo-distill/tiny", '
    '"sampler": "euler", "cfg": 1.0, "strength": 1.0, "resolutions": [[64, 64]], '
    '"method": "pcm -> dmd2 -> dmd2+gan", "created_by": "turbo-distill", "version": 1}'
)
SECOND = (
    '{"nodes": [1.0, 0.75, 0.5, 0.25, 0.0], "shift": {"rule": "linear", "tokens": [256, 8192], '
    '"mu": [0.5, 0.9]}, "terminal": null, "family": "qwen-image-2.1", "base": '
    '"Qwen/Qwen-Image-2.1", "sampler": "euler", "cfg": 1.0, "guidance": null, "strength": 1.0, '
    '"ladder": [], "boundary": null, "resolutions": [], "method": "", "created_by": "Viggle", '
    '"version": 2}'
)
# What a released pack of version 1 says of SECOND, taken down from one.
THEIR_ANSWER = (
    "version: this spec is of version 2, this copy of Turbo Distill reads up to version 1. "
    "Update the Turbo Distill node pack (or `pip install -U` it)."
)
THEIR_KEYS = tuple(json.loads(PLAIN))

FULL_SPEC = TurboSpec(
    (1, 15 / 17, 5 / 7, 5 / 11, 0),
    base='a/ü "b"',
    sampler="renoise",
    cfg=1.5,
    strength=0.8,
    resolutions=((1328, 1328), (928, 1664)),
    method="pcm -> dmd2",
    created_by="me",
)


def their_reader(text: str) -> dict[str, Any]:
    """The rule of version 1: the version first, then its ten keys and no other, and one number for
    whatever is a list in version 2.
    """
    values = json.loads(text)
    version = values.get("version", 1)
    if version > 1:
        raise SpecError(THEIR_ANSWER.replace("of version 2", f"of version {version}"))
    unknown = values.keys() - set(THEIR_KEYS)
    assert not unknown, f"version 1 would say: unknown key {unknown}"
    assert isinstance(values["sigmas"], list)
    assert all(type(values[key]) is float for key in ("cfg", "strength"))
    return dict(values)


@pytest.mark.parametrize(
    ("text", "spec"), [(PLAIN, TurboSpec((1, 0.7155, 0))), (FULL, FULL_SPEC)], ids=["plain", "full"]
)
def test_what_version_1_wrote_is_read_and_written_as_it_was(text: str, spec: TurboSpec) -> None:
    assert TurboSpec.from_json(text) == spec
    assert spec.to_json() == text


@pytest.mark.parametrize(
    "shift", [StaticShift(2.5), ExponentialShift(0.9162907318741551)], ids=["static", "mu"]
)
def test_nodes_that_mean_the_same_are_written_the_same(shift: Any) -> None:
    spec = TurboSpec((1, 0.5, 0), shift, terminal=0.7155)
    assert spec.to_json() == PLAIN


def test_the_lora_that_was_shipped_is_read_as_it_was() -> None:
    assert read_header(TINY)["turbo.spec"] == SHIPPED
    spec, source = of_file(TINY, read_header(TINY))
    assert spec.sigmas() == (1, 0.7155, 0)
    assert (spec.base, spec.method) == ("turbo-distill/tiny", "pcm -> dmd2 -> dmd2+gan")
    assert (source, spec.to_json()) == ("header of the file", SHIPPED)


def test_version_2_is_written_and_read_as_this() -> None:
    row = find("Qwen-Image-2.1-viggle-turbo-4step-lora-r64.safetensors")
    assert row is not None
    assert row.spec.to_json() == SECOND
    assert TurboSpec.from_json(SECOND) == row.spec


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_an_older_pack_reads_a_stamped_file_or_asks_for_an_update(
    row: KnownFile, tmp_path: Path
) -> None:
    state = {
        "diffusion_model.img_in.lora_A.weight": torch.ones(1, 5),
        "diffusion_model.img_in.lora_B.weight": torch.ones(6, 1),
    }
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    stamp(tmp_path / "a.safetensors", tmp_path / "b.safetensors", Wanted(like=row.name))
    text = read_header(tmp_path / "b.safetensors")["turbo.spec"]
    simple = not (row.spec.by_size or row.spec.guidance or row.spec.ladder or row.spec.boundary)
    if simple:
        read = their_reader(text)
        assert tuple(read) == THEIR_KEYS
        assert tuple(read["sigmas"]) == row.spec.sigmas()
        assert (read["strength"], read["base"]) == (row.spec.strength, row.spec.base)
    else:
        with pytest.raises(SpecError, match="Update the Turbo Distill node pack"):
            their_reader(text)


@pytest.mark.parametrize(
    "more",
    [
        {"shift": LinearShift((256, 8192), (0.5, 0.9))},
        {"guidance": 0},
        {"strength": (1.0, 0.9)},
        {"ladder": ((1.0, 0.0),)},
        {"boundary": 1},
    ],
    ids=lambda more: next(iter(more)),
)
def test_each_thing_that_is_new_makes_an_older_pack_ask(
    more: dict[str, Any], tmp_path: Path
) -> None:
    spec = TurboSpec((1, 0.5, 0), **more)
    tensors = {
        "diffusion_model.img_in.lora_A.weight": torch.ones(1, 5),
        "diffusion_model.img_in.lora_B.weight": torch.ones(6, 1),
    }
    path = write_lora(tmp_path / "a.safetensors", tensors, spec=spec, title="x")
    text = read_header(path)["turbo.spec"]
    with pytest.raises(SpecError) as error:
        their_reader(text)
    assert str(error.value) == THEIR_ANSWER
    assert type(json.loads(text)["version"]) is int


def test_this_pack_says_of_the_next_version_what_they_say_of_this_one() -> None:
    text = json.dumps(json.loads(SECOND) | {"version": VERSION + 1, "solver": "new"})
    with pytest.raises(SpecError) as error:
        TurboSpec.from_json(text, source="x.safetensors")
    ours = THEIR_ANSWER.replace("up to version 1", f"up to version {VERSION}")
    ours = ours.replace("of version 2", f"of version {VERSION + 1}")
    assert str(error.value) == f"x.safetensors: {ours}"
