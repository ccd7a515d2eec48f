"""Distillation methods: each a pure loss and a class with a `step`."""

from __future__ import annotations

from ..config import AnyStage
from ..contract.spec import TurboSpec
from ..engine import Engine
from ..roles import Roles
from .base import Method
from .pcm import PCM

METHODS: dict[str, type[Method]] = {"pcm": PCM}


def build_method(stage: AnyStage, roles: Roles, spec: TurboSpec, engine: Engine) -> Method:
    return METHODS[stage.method](stage, roles, spec, engine)


__all__ = ["METHODS", "Method", "build_method"]
