"""docs/images/recipe.png: what each method makes of the same noise, on the exact teacher of T0.

python -m benchmarks.recipe.picture --out docs/images/recipe.png     2 minutes on one core
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from distill.contract.spec import TurboSpec
from distill.models.sample import sample_student, sample_teacher, teacher_sigmas

from .report import save_figure
from .t0 import ARMS, BLURRED, TRUTH, Arm, Lab
from .toy import ToyRoles

POINTS = 2500
STUDENTS = {
    "main/progressive": "progressive",
    "main/pcm": "PCM",
    "main/dmd2": "DMD2 from the teacher",
    "main/pcm -> dmd2": "PCM, then DMD2",
    "blurred/gan, real 1, ratio 3": "blurred teacher, GAN on real data",
}


def panels(lab: Lab) -> dict[str, torch.Tensor]:
    """Title -> samples [N, 2]."""
    spec = TurboSpec(sigmas=(1.0, 0.7155, 0.0))

    @torch.no_grad()
    def teacher(mixture: Any, sigmas: tuple[float, ...]) -> torch.Tensor:
        return sample_teacher(ToyRoles(mixture, lab.seed), sigmas, lab.noise, lab.text)

    many = teacher_sigmas(50, 1.0)
    found = {
        "teacher, 50 steps": teacher(TRUTH, many),
        "teacher, 2 steps": teacher(TRUTH, spec.sigmas()),
        "blurred teacher, 50 steps": teacher(BLURRED, many),
    }
    arms: dict[str, Arm] = {arm.path: arm for arm in ARMS}
    for path, title in STUDENTS.items():
        roles, _ = lab.train(arms[path], [])
        with torch.no_grad():
            found[title] = sample_student(roles, spec, lab.noise, lab.text, lab.seed)
    return {title: x.flatten(1)[:POINTS] for title, x in found.items()}


def draw(found: dict[str, torch.Tensor]) -> Any:
    from matplotlib.figure import Figure

    order = list(found)
    order = [*order[:2], *order[3:7], order[2], order[7]]
    figure = Figure(figsize=(11, 5.8))
    for axis, title in zip(figure.subplots(2, 4).flat, order, strict=True):
        axis.scatter(*found[title].T, s=1, alpha=0.35, linewidths=0)
        axis.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal")
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/images/recipe.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    save_figure(draw(panels(Lab(args.seed))), args.out)


if __name__ == "__main__":
    main()
