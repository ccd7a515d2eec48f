"""T1's headline arm in a few of its updates, by the precision of base and LoRA products.

    python -m benchmarks.recipe.precision --seeds 3 --work DIR     10 minutes of one core

Every precision has the same seeds, data and noise. Beside T1's figures: psnr of the student's
letters to those of the float32 student of its seed, and how far its weights are from that one's,
as a share of how far that one is from its start. What is finished lies in --work.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from peft.tuners import lora

from distill.models.mixed_precision import LoraLinear
from distill.models.roles import STUDENT, Roles
from distill.utils.terminal import table

from .kept import kept
from .report import over_seeds
from .tiny_lab import SHARP, Arm, Lab, recipe_stages

STEPS = (50, 10, 10)
FLOAT32, PEFT = "float32", "bf16, products in float32"
PRECISIONS = {FLOAT32: torch.float32, PEFT: torch.bfloat16, "bf16": torch.bfloat16}
APART = "weights apart"
FIGURES = ("letter_accuracy", "mixed_ink", "frechet", "precision", "recall", "saturation", "psnr")


class BaseLab(Lab):
    """A lab whose base computes in another precision."""

    def __init__(self, seed: int, work: Path, dtype: torch.dtype) -> None:
        super().__init__(seed, work)
        self.dtype = dtype

    def roles(self, teacher: str, overrides: tuple[str, ...] = ()) -> Roles:
        roles = super().roles(teacher, overrides)
        for name, parameter in roles.transformer.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(self.dtype)
        return roles


def peft_products() -> mock._patch[object]:
    """PEFT's own forward meanwhile, which multiplies in float32."""
    return mock.patch.object(LoraLinear, "forward", lora.Linear.forward)


def flat(roles: Roles) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in roles.parameters(STUDENT)])


def run_seed(seed: int, work: Path) -> dict[str, dict[str, float]]:
    """Figures by precision."""
    recipe = zip(recipe_stages(), STEPS, strict=True)
    arm = Arm("precision", "headline", tuple({**keys, "steps": steps} for keys, steps in recipe))
    judge = Lab(seed, work)
    start = flat(judge.roles(SHARP))
    students: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    found: dict[str, dict[str, float]] = {}
    for name, dtype in PRECISIONS.items():
        lab = BaseLab(seed, work / name.replace(" ", "-"), dtype)
        with peft_products() if name == PEFT else nullcontext():
            roles, _ = lab._trained(arm, [])
            images = lab.student_images(roles)[: len(judge.prompt)]
        students[name] = flat(roles), images
        (weights, _), (exact, reference) = students[name], students[FLOAT32]
        figures = judge._letter_figures(images, reference)
        found[name] = {key: figures[key] for key in FIGURES} | {
            APART: ((weights - exact).norm() / (exact - start).norm()).item(),
        }
    return found


def text_of(runs: list[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds."""
    keys = (*FIGURES, APART)
    rows = [[name, *over_seeds([run[name] for run in runs], keys)] for name in PRECISIONS]
    return table([f"{len(runs)} seeds", *(key.replace("_", " ") for key in keys)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--work", type=Path, default=Path("runs/precision"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in range(args.first, args.first + args.seeds):
        file = args.work / f"figures-{seed}.json"
        runs.append(kept(file, lambda seed=seed: run_seed(seed, args.work)))
        sys.stdout.write(text_of(runs) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
