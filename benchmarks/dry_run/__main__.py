"""`turbo-distill train CONFIG --dry-run` beside a count of real steps on meta tensors.

    python -m benchmarks.dry_run configs/qwen_image_2512_2step.yaml     minutes, no GPU, no weights

Every stage's own step is run on a base of its full width with a few blocks, and what is linear in
their number is extrapolated. FLOP by torch.utils.flop_counter; bytes by the storages that live.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from distill.config import Config, load_config
from distill.models.family import family_of
from distill.training.estimate.disk import checkpoint_bytes
from distill.training.estimate.memory import between_steps, in_step
from distill.training.estimate.shape import host_bytes, model_shape
from distill.training.estimate.work import Flop, stage_flop
from distill.utils.terminal import table

from .count import flop_of, memory_of, whole

WITH_MASKS = ("qwen-image-2.1",)
Found = dict[str, tuple[float, float]]  # what -> (dry run, counted)


def compare(config: Config, index: int) -> tuple[Found, Found]:
    """FLOP per sample, and bytes, of a stage. What only one of them knows is 0 in the other."""
    stage, shape = config.stages[index], model_shape(config)
    flop = _flat(
        {role: as_multiplied(kinds) for role, kinds in stage_flop(stage, config, shape).items()}
    )
    counted_flop = _flat(whole(flop_of, config, index, (1, 2), shape.blocks))
    memory = _flat({"between steps": between_steps(stage, config, shape)})
    memory |= _flat(in_step(stage, config, shape))
    memory["between steps, host"] = host_bytes(config, shape)
    memory["between steps, checkpoint"] = checkpoint_bytes(stage, config, shape)
    counted = _flat(whole(memory_of, config, index, (2, 4), shape.blocks))
    return _beside(flop, counted_flop), _beside(memory, counted)


def as_multiplied(kinds: Flop) -> Flop:
    """Weights of 8 bits are unpacked first, so their products count as the base's others."""
    found: Flop = defaultdict(float)
    for kind, flop in kinds.items():
        found["bfloat16" if kind in ("fp8", "int8") else kind] += flop
    return found


def _flat(items: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{a}, {b}": value for a, kinds in items.items() for b, value in kinds.items()}


def _beside(a: dict[str, float], b: dict[str, float]) -> Found:
    return {name: (a.get(name, 0.0), b.get(name, 0.0)) for name in {**a, **b}}


def rows(found: Found, unit: float) -> Iterator[list[str]]:
    for name, (estimated, counted) in found.items():
        ratio = f"{estimated / counted:.3f}" if counted else "-"
        yield [name, f"{estimated / unit:.3f}", f"{counted / unit:.3f}", ratio]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    chosen = parser.parse_args(arguments)
    config = load_config(chosen.config, chosen.overrides)
    base = family_of(config.model.path)
    if base.name in WITH_MASKS:
        parser.error(
            f"model.path: the transformer of {base.name} reads values of its masks, which meta "
            f"tensors do not have; `python -m benchmarks.dry_run.blocks {base.name}` counts its "
            "blocks."
        )
    for index, stage in enumerate(config.stages):
        flop, memory = compare(config, index)
        for title, found, unit in (
            (f"{stage.label}: TFLOP per sample", flop, 1e12),
            (f"{stage.label}: GB", memory, 1e9),
        ):
            text = table([title, "dry run", "counted", "ratio"], list(rows(found, unit)))
            sys.stdout.write(f"{text}\n\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
