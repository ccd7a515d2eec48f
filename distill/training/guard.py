"""What stops a run that cannot succeed, and what it says then."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ..config import Config, DataSection
from ..models.family import family_of, trained_sizes
from ..stages import Stage
from .optim import Optimizer


class Diverged(RuntimeError):
    """No finite update for many steps; the message says where and what to lower."""


class OutOfMemory(RuntimeError):
    """The device is full; the message says what to lower."""


class NanGuard:
    """Counts the steps in which an optimiser skipped a non-finite update.

    The optimisers decide by the gradient averaged over the ranks, so all ranks count alike.
    """

    def __init__(self, limit: int, skipped: int = 0) -> None:
        self.limit = limit
        self.skipped = skipped  # steps in all
        self.in_a_row = 0
        self._finite: dict[str, float] = {}  # the latest losses and gradient norms
        self._finite_step = 0

    def check(
        self,
        step: int,
        stage: Stage,
        values: dict[str, float],
        optimizers: Iterable[Optimizer],
    ) -> None:
        """Looks at the step just made. Raises Diverged after `limit` bad ones in a row."""
        bad = [o for o in optimizers if o.skipped]
        for optimizer in bad:
            optimizer.skipped = 0
        if not bad:
            self.in_a_row = 0
            self._finite |= {k: v for k, v in values.items() if math.isfinite(v)}
            self._finite_step = step
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise Diverged(self._diagnosis(step, stage, values))

    def _diagnosis(self, step: int, stage: Stage, values: dict[str, float]) -> str:
        now = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if not math.isfinite(v))
        before = ", ".join(f"{k} {v:.4g}" for k, v in self._finite.items())
        return (
            f"stage {stage.method}, step {step}: {self.in_a_row} steps in a row without a finite "
            f"update ({self.skipped} in all); they were skipped, the weights are those of before. "
            f"Not finite: {now or 'the gradient'}. "
            + (f"Last finite, step {self._finite_step}: {before}. " if before else "")
            + f"Lower lr ({stage.lr:g}) or clip ({stage.clip:g}), raise warmup ({stage.warmup}), "
            "or set model.dtype=float32 to tell overflow from bad data; then start a new run, or "
            "continue this one with --resume if only single batches are at fault (nan_limit)."
        )


@contextmanager
def forbid_global_rng(device: torch.device) -> Iterator[None]:
    """Checks that nobody draws from the global generators: a run could not repeat that on resume.

    Raises RuntimeError.
    """
    before = _generators(device)
    yield
    changed = [
        name for name, state in _generators(device).items() if not _same(state, before[name])
    ]
    if changed:
        raise RuntimeError(
            f"a training step drew from the global generator of {', '.join(changed)}, so the run "
            "would not continue exactly from a checkpoint. Draw from `Rng` instead."
        )


def _generators(device: torch.device) -> dict[str, object]:
    states: dict[str, object] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if device.type == "cuda":
        states["torch.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def is_out_of_memory(error: RuntimeError) -> bool:
    """Also where a library or the CPU says it in its own words."""
    words = ("out of memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _one_at_a_time(stage: Stage) -> str:
    """The keys that leave a stage its samples per update and compute them one after another."""
    gan = getattr(stage, "gan", None)
    counts = {
        "accumulate": stage.accumulate,
        "fake_accumulate": getattr(stage, "fake_accumulate", None),
        "gan.accumulate": gan.accumulate if gan else None,
    }
    keys = [f"{key}={n * stage.batch}" for key, n in counts.items() if n]
    return (
        f"batch of the stage, now {stage.batch} per rank: batch=1 {' '.join(keys)} updates from "
        "as many samples, one after another (slower)"
    )


def memory_advice(config: Config, stage: Stage | None, error: BaseException) -> str:
    """What to lower, most effective first, with the values of this run."""
    model, advice = config.model, []
    if not model.gradient_checkpointing:
        advice.append("model.gradient_checkpointing=true (less memory for activations, slower)")
    if stage and stage.batch > 1:
        advice.append(_one_at_a_time(stage))
    if isinstance(config.data, DataSection):
        width, height = max(trained_sizes(config), key=math.prod)
        key = "data.buckets" if config.data.buckets else "data.resolution"
        advice.append(f"{key}, whose largest size is {width}x{height} (a new cache)")
    if model.dtype == "float32":
        advice.append("model.dtype=bfloat16 (half the memory for the base)")
    if config.engine.shard == 1:
        if model.quantize == "none":
            advice.append("model.quantize=fp8 (or int8; half the memory of bfloat16 for the base)")
        own = family_of(model.path).modulated_blocks
        if own and not model.offload_modulation and not config.adapter.modulation:
            advice.append(
                "model.offload_modulation=true (a third of the base in main memory, slower)"
            )
    if model.quantize == "none" and not model.offload_modulation:
        advice.append(
            f"engine.shard, now {config.engine.shard}: GPUs that share one copy of the base"
        )
    advice.append(f"adapter.rank, now {config.adapter.rank}")
    where = f"in stage {stage.method}" if stage else "while loading"
    first_line = str(error).strip().split("\n")[0]
    return f"out of memory {where}: {first_line}\nLower, in this order:\n" + "\n".join(
        f"  - {line}" for line in advice
    )
