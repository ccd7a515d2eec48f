"""Run folders and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import Config, ConfigError, load_config, save_config
from .files import replace_file
from .roles import Roles

if TYPE_CHECKING:
    from .methods import Method

# Keys that may differ between a run and its continuation
FREE_ON_RESUME = frozenset({"run_dir", "preview_every", "save_every", "log_every"})


def prepare_run_dir(config: Config, resume: bool) -> None:
    """Makes the run folder and writes `config.yaml`; on resume checks that it is the same run.

    Raises ConfigError.
    """
    saved = config.run_dir / "config.yaml"
    if resume:
        if not saved.is_file():
            raise ConfigError(f"{saved}: nothing to resume. Leave out --resume to start this run.")
        changed = differences(load_config(saved), config)
        if changed:
            raise ConfigError(
                f"{saved}: the configuration changed since this run began:\n"
                + "\n".join(changed)
                + "\nResume with "
                "the old values, or start a new run in another run_dir."
            )
        return
    if saved.exists():
        raise ConfigError(
            f"{config.run_dir} already holds a run. Continue it with --resume, or name another "
            "folder with run_dir=..."
        )
    save_config(config, saved)


def differences(old: Config, new: Config) -> list[str]:
    """Keys whose values differ, one line each."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            items = enumerate(value)
        else:
            return {prefix: value}
        return {
            k: v
            for key, sub in items
            for k, v in flat(sub, f"{prefix}.{key}" if prefix else str(key)).items()
        }

    a, b = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [
        f"  {key}: {a.get(key, '(absent)')} -> {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if key not in FREE_ON_RESUME and a.get(key) != b.get(key)
    ]


def save_checkpoint(run_dir: Path, step: int, roles: Roles, method: Method) -> Path:
    """Everything that the next step depends on; randomness needs no state, it is a function of the
    step.
    """
    state = {
        "step": step,
        "adapters": {
            role: {name: p.detach() for name, p in roles.named_parameters(role).items()}
            for role in roles.adapters
        },
        "optimizers": {
            name: optimizer.state_dict() for name, optimizer in method.optimizers.items()
        },
    }
    path = run_dir / "checkpoints" / f"step-{step:06d}.pt"
    replace_file(path, lambda p: torch.save(state, p))
    return path


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = sorted((run_dir / "checkpoints").glob("step-*.pt"))
    return found[-1] if found else None


@torch.no_grad()
def load_adapters(roles: Roles, saved: dict[str, dict[str, torch.Tensor]]) -> None:
    for role, weights in saved.items():
        for name, parameter in roles.named_parameters(role).items():
            parameter.copy_(weights[name])


def load_optimizers(method: Method, saved: dict[str, dict[str, Any]]) -> None:
    for name, optimizer in method.optimizers.items():
        optimizer.load_state_dict(saved[name])
