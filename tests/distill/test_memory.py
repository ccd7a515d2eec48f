"""Three roles, one copy of the base: what is in memory after a DMD2 step on the tiny model."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch._subclasses import FakeTensor

from distill.config import TINY, AdapterSection, GuidanceSection
from distill.contract.spec import TurboSpec
from distill.contract.tiny import embed_prompt
from distill.data.batch import Batch
from distill.methods import build_method
from distill.models.load import load_transformer
from distill.models.roles import FAKE, STUDENT, Roles
from distill.models.text import Text
from distill.stages import DMD2Stage
from distill.training.engine import Engine
from distill.utils.rng import Rng

ADAM_BYTES = 20  # fp32 weight, gradient, two moments and moving average


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes; views share one."""
    held = (t.untyped_storage() for t in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def alive() -> dict[int, int]:
    gc.collect()
    found = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    return storages(x for x in found if not isinstance(x, FakeTensor))  # what a tracer left


def test_one_copy_of_the_base() -> None:
    before = alive()
    transformer = load_transformer(TINY, torch.float32)
    base = sum(storages(transformer.parameters()).values())
    text = Text(embed_prompt("a red letter K")[None])
    adapter = AdapterSection(rank=2)
    roles = Roles(transformer, adapter, GuidanceSection(), text, 0, (STUDENT, FAKE))
    stage = DMD2Stage(method="dmd2", steps=1, fake_updates=1, fake_warmup=0)
    method = build_method(stage, roles, TurboSpec((1.0, 0.5, 0.0)), Engine(0, 1, roles.device))
    method.step(Batch(torch.randn(1, 16, 8, 8), text), Rng(0, 0))

    now = alive()
    added = sum(size for address, size in now.items() if address not in before)
    adapters = sum(p.numel() for role in roles.adapters for p in roles.parameters(role))
    assert base == 4 * sum(p.numel() for n, p in transformer.named_parameters() if "lora" not in n)
    assert base <= added - ADAM_BYTES * adapters * 0.8  # the fake score has no moving average
    assert added - ADAM_BYTES * adapters < 1.1 * base  # 0.8 MB are tables of positions
