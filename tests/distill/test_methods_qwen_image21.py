"""Whole steps of the methods on a random 2-layer Qwen-Image-2.1, with prompts of different length:
the teacher stays, the roles move, and neither checkpointing nor micro-batches change an update.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from pydantic import TypeAdapter
from toy_model import toy_shape_21

from distill.config import AdapterSection, GuidanceSection
from distill.contract.shift import LinearShift
from distill.contract.spec import TurboSpec
from distill.data.batch import Batch
from distill.methods import METHODS, Method
from distill.models.pipeline import as_text
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.stages import AnyStage
from distill.training.engine import Engine
from distill.utils.rng import Rng

WIDTH = 24
LENGTHS = (2, 5, 3)
SPEC = TurboSpec((1.0, 0.5, 0.0), LinearShift((256, 8192), (0.5, 0.9)), family="qwen-image-2.1")
ENGINE = Engine(0, 1, torch.device("cpu"))
FEW = {"method": "dmd2", "fake_updates": 2, "fake_warmup": 0}
GAN = {"width": 8, "ramp": 1, "weight": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "progressive": {"method": "progressive", "solver_steps": 2},
    "pcm+gan": {"method": "pcm", "points": 4, "gan": GAN},
    "dmd2": {**FEW, "ida": 0.9, "decoupled": True, "diversity": 0.1},
    "dmd2+gan latent": {**FEW, "gan": {**GAN, "features": "latent"}},
    "dmd2+gan pixels": {**FEW, "gan": {**GAN, "features": "pixels", "crop": 4, "halo": 1}},
}
every_case = pytest.mark.parametrize("case", CASES)


def new_transformer() -> QwenImage21Transformer2DModel:
    torch.manual_seed(0)
    return QwenImage21Transformer2DModel(**toy_shape_21(text_width=WIDTH)).eval()


def small_vae() -> AutoencoderKLQwenImage21:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1
        )
    return vae.eval().requires_grad_(False)


def embedded(length: int) -> torch.Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length))


def batch_of(step: int) -> Batch:
    x0 = Rng(0, step).normal("data/x0", (len(LENGTHS), 64, 4, 6))
    return Batch(x0, as_text([embedded(length) for length in LENGTHS]))


def method_of(
    case: str, transformer: QwenImage21Transformer2DModel, scale: float = 1, **keys: Any
) -> tuple[Roles, Method]:
    """A method whose student is no longer the teacher."""
    guidance = GuidanceSection(scale=scale, rescale=False)
    negative = Text(embedded(4)[None])
    roles = Roles(transformer, AdapterSection(rank=2), guidance, negative, 0, (STUDENT, FAKE))
    generator = torch.Generator().manual_seed(3)
    for parameter in roles.parameters(STUDENT):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(0)
    values = {"steps": 10, "lr": 1e-4, **CASES[case], **keys}
    stage = TypeAdapter(AnyStage).validate_python(values)
    return roles, METHODS[stage.method](stage, roles, SPEC, ENGINE, small_vae)


def weights_of(roles: Roles) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for r in roles.adapters for p in roles.parameters(r)])


@every_case
@pytest.mark.parametrize("scale", [1, 3])
def test_roles_move_and_the_teacher_does_not(case: str, scale: float) -> None:
    roles, method = method_of(case, new_transformer(), scale)
    before = {role: [p.detach().clone() for p in roles.parameters(role)] for role in roles.adapters}
    batch = batch_of(0)
    for step in range(2):
        values = method.step(batch_of(step), Rng(0, step))
        assert all(math.isfinite(v) for v in values.values()), values
        assert values["grad_norm/student"] > 0
    trained = [STUDENT, *([FAKE] if case.startswith("dmd2") else [])]
    for role, old in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(old, roles.parameters(role), strict=True)]
        assert all(moved) if role in trained else not any(moved), role
    t = torch.tensor([0.3, 0.7, 1.0])
    with torch.no_grad():
        expected = roles.family.velocity(new_transformer(), batch.x0, t, batch.text)
        assert torch.equal(roles.velocity(TEACHER, batch.x0, t, batch.text), expected)


@every_case
def test_neither_checkpointing_nor_micro_batches_change_an_update(case: str) -> None:
    found = []
    for checkpointing, keys in ((False, {}), (True, {}), (False, {"accumulate": len(LENGTHS)})):
        transformer = new_transformer()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        roles, method = method_of(case, transformer, **keys)
        method.step(batch_of(0), Rng(0, 0))
        found.append(weights_of(roles))
    for other in found[1:]:
        assert torch.allclose(other, found[0], atol=1e-6)
    assert not torch.allclose(found[0], weights_of(method_of(case, new_transformer())[0]))
