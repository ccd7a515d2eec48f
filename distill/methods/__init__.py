"""Distillation methods: each a pure loss and a class with a `step`."""

from __future__ import annotations

from ..contract.spec import TurboSpec
from ..models.family import path_of
from ..models.load import load_vae
from ..models.roles import Roles
from ..stages import AnyStage
from ..training.engine import Engine
from .base import Method
from .consistency import Consistency
from .dmd2 import DMD2
from .pcm import PCM
from .progressive import Progressive

METHODS: dict[str, type[Method]] = {
    "progressive": Progressive,
    "consistency": Consistency,
    "pcm": PCM,
    "dmd2": DMD2,
}


def build_method(
    stage: AnyStage, roles: Roles, spec: TurboSpec, engine: Engine, model_path: str | None = None
) -> Method:
    """`model_path` (configuration key model.path) is where a method that judges images finds the
    VAE; without it the spec's base is asked.
    """
    path = model_path or path_of(spec)

    def vae():
        return load_vae(path, roles.dtype).to(engine.device)

    return METHODS[stage.method](stage, roles, spec, engine, vae)


__all__ = ["METHODS", "Method", "build_method"]
