"""How often a stage runs the base, by role: what the dry run says beside a whole stage of real
steps on a toy model, whose passes are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from distill.config import Config
from distill.data.batch import Data
from distill.methods import METHODS
from distill.models.family import spec_of
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.training.engine import Engine
from distill.training.estimate.work import Passes, passes
from distill.utils.rng import Rng

STEPS = 4
LATENT = {"features": "latent", "width": 8, "ramp": 1}
STAGES: dict[str, dict[str, Any]] = {
    "progressive": {"method": "progressive", "solver_steps": 3},
    "consistency": {"method": "consistency", "points": 4},
    "pcm": {"method": "pcm", "points": 4, "solver_steps": 2, "batch": 2},
    "pcm, one point": {"method": "pcm", "points": 1, "guidance_scale": 1.0},
    "pcm+gan": {"method": "pcm", "points": 4, "accumulate": 2, "gan": {"width": 8}},
    "pcm+gan, shares": {
        "method": "pcm",
        "points": 4,
        "accumulate": 4,
        "gan": {"width": 8, "accumulate": 2, "r1_gamma": 0},
    },
    "dmd2": {"method": "dmd2", "fake_updates": 3, "fake_warmup": 0},
    "dmd2, warm-up": {
        "method": "dmd2",
        "fake_updates": 2,
        "steps": 8,  # of which every sampler step gets as many with warm-up as without
        "fake_warmup": 4,
        "fake_warmup_updates": 5,
    },
    "dmd2, shares": {
        "method": "dmd2",
        "fake_updates": 4,
        "fake_warmup": 100,
        "fake_warmup_updates": 3,
        "accumulate": 4,
        "fake_accumulate": 2,
    },
    "dmd2, reuse": {
        "method": "dmd2",
        "fake_updates": 3,
        "fake_warmup": 0,
        "fake_samples": "reuse",
        "gradient_step": "last",
        "guidance_scale": 1.0,
    },
    "dmd2, decoupled and diverse": {
        "method": "dmd2",
        "fake_updates": 2,
        "steps": 3,  # of 4 sampler steps the first has no draw
        "fake_warmup": 0,
        "decoupled": True,
        "diversity": 0.1,
        "diversity_steps": 3,
    },
    "dmd2+gan": {"method": "dmd2", "fake_updates": 1, "fake_warmup": 0, "gan": LATENT},
    "dmd2+gan, both sides": {
        "method": "dmd2",
        "fake_updates": 1,
        "fake_warmup": 0,
        "accumulate": 4,
        "gan": {
            **LATENT,
            "real_ratio": 0.5,
            "draw_teacher": True,
            "teacher_steps": 3,
            "updates": 2,
            "accumulate": 2,
            "last_step_only": False,
        },
    },
}


@pytest.mark.parametrize(
    ("case", "nodes"),
    [(case, 2) for case in STAGES]
    + [(case, 4) for case in ("dmd2, warm-up", "dmd2, decoupled and diverse", "dmd2+gan")],
)
def test_passes_are_those_of_a_stage_of_real_steps(
    case: str,
    nodes: int,
    new_transformer: Callable[[], QwenImageTransformer2DModel],
    data: Data,
    small_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sigmas = [1 - i / nodes for i in range(nodes + 1)]
    keys = {"lr": 1e-4, "steps": STEPS, **STAGES[case]}
    config = small_config(stages=[keys], spec={"sigmas": sigmas}, guidance={"scale": 3})
    (stage,), transformer = config.stages, new_transformer()
    adapters = (STUDENT, FAKE)
    roles = Roles(transformer, config.adapter, config.guidance, data.negative, 0, adapters)
    engine = Engine(0, 1, torch.device("cpu"))
    method = METHODS[stage.method](stage, roles, spec_of(config), engine)
    found = {role: Passes() for role in (STUDENT, FAKE, TEACHER)}

    def seen(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kind = "plain"
        if torch.is_grad_enabled():
            kind = "through" if roles._role == TEACHER else "trained"
        rows = len(kwargs["hidden_states"])
        setattr(found[roles._role], kind, getattr(found[roles._role], kind) + rows)

    transformer.register_forward_pre_hook(seen, with_kwargs=True)
    for step in range(stage.steps):
        rng = Rng(0, step)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", in_turn(step))
            method.step(data.batch(rng, stage.samples), rng)
    expected = passes(stage, config)
    for role, counted in found.items():
        for kind, rows in vars(counted).items():
            each = rows / stage.steps / stage.samples
            assert each == pytest.approx(getattr(expected.get(role, Passes()), kind)), (role, kind)


def in_turn(step: int) -> Callable[..., torch.Tensor]:
    """torch.randint that gives the sampler's steps one after another; all else is drawn."""
    drawn = torch.randint

    def randint(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 3 and args[2] == ():
            low, high, _ = args
            return torch.tensor(low + step % (high - low))
        return drawn(*args, **kwargs)

    return randint
