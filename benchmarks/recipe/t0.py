"""T0: the recipe's claims on a teacher without error, in the plane.

    python -m benchmarks.recipe.t0 --seeds 5 --out docs/evidence

Every arm of a table has the same budget of forward passes (teacher, student and fake score
together; a sample's pass counts one). Arms and pass criteria were fixed in docs/experiments.md
before the first run.
"""

from __future__ import annotations

import argparse
import copy
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from distill.contract.spec import TurboSpec
from distill.models.roles import STUDENT
from distill.models.sample import sample_student, sample_teacher, teacher_sigmas
from distill.models.text import Text
from distill.stages import AnyStage
from distill.utils.rng import Rng

from .mixture import Mixture, metrics
from .report import arm_table, save_figure, save_text, trace_figure
from .toy import PointData, ToyRoles, make_method

BATCH, SAMPLES = 256, 8000
RENOISE = "renoise"
BUDGET = 12_000  # forward passes of a batch
TRUTH, BLURRED = Mixture(std=0.12), Mixture(std=0.2)

TRAJECTORY = {"lr": 1e-3, "distance": "squared", "ema": 0.99}
PCM = {**TRAJECTORY, "method": "pcm", "points": 20}
DMD2 = {
    "method": "dmd2",
    "lr": 5e-4,
    "fake_lr": 2e-3,
    "fake_updates": 5,
    "fake_warmup": 0,
    "shift": 1.0,
    "fake_shift": 1.0,
    "ema": 0.99,
}
KEEP = {"fake_init": "keep"}


def gan(real_ratio: float = 1.0, ratio: float = 0.3) -> dict[str, Any]:
    return {
        "features": "pixels",
        "lr": 1e-3,
        "r1_weight": 1.0,
        "ramp": 50,
        "last_step_only": True,
        "real_ratio": real_ratio,
        "ratio": ratio,
        "teacher_steps": 50,
        "teacher_shift": 1.0,
        "augment": [],
    }


@dataclass(frozen=True)
class Arm:
    """stages: (keys of a stage, its share of the budget)."""

    table: str
    name: str
    stages: tuple[tuple[dict[str, Any], float], ...] = ()
    sigmas: tuple[float, ...] = (1.0, 0.7155, 0.0)
    sampler: str = "euler"
    sampled: str | None = None  # with another sampler than it was trained for
    teacher: Mixture = TRUTH
    trace: int = 0  # figures after every that many steps of the last stage

    @property
    def path(self) -> str:
        return f"{self.table}/{self.name}"


def chain(dmd2: dict[str, Any], share: float = 0.6) -> tuple[tuple[dict[str, Any], float], ...]:
    return ((PCM, 0.4), (dmd2, share))


def full(section: dict[str, Any]) -> tuple[tuple[dict[str, Any], float], ...]:
    return ((PCM, 0.4), (DMD2, 0.3), ({**DMD2, **KEEP, "gan": section}, 0.3))


ARMS = [
    # 1 and 2: losses, and the warm start
    Arm("main", "progressive", (({**TRAJECTORY, "method": "progressive"}, 1.0),)),
    Arm(
        "main", "consistency", (({**TRAJECTORY, "method": "consistency"}, 1.0),), sampler="renoise"
    ),
    Arm("main", "pcm", ((PCM, 1.0),)),
    Arm("main", "dmd2", ((DMD2, 1.0),)),
    Arm("main", "dmd2, twice the rate", (({**DMD2, "lr": 1e-3}, 1.0),)),
    Arm("main", "pcm -> dmd2", chain(DMD2)),
    Arm("main", "pcm -> dmd2 -> dmd2+gan", full(gan())),
    # 3: real data behind a blurred teacher
    Arm("blurred", "pcm -> dmd2", chain(DMD2), teacher=BLURRED),
    *(
        Arm("blurred", f"gan, real {real:g}, ratio .3", full(gan(real)), teacher=BLURRED)
        for real in (0.0, 0.25, 0.5, 1.0)
    ),
    *(
        Arm("blurred", f"gan, real 1, ratio {ratio:g}", full(gan(1.0, ratio)), teacher=BLURRED)
        for ratio in (0.1, 1.0, 3.0)
    ),
    # 5: design choices, on pcm -> dmd2
    *(
        Arm("samplers", f"trained {a}, sampled {b}", chain(DMD2), sampler=a, sampled=b)
        for a in ("euler", RENOISE)
        for b in ("euler", RENOISE)
    ),
    *(
        Arm("second sigma", f"{sigma:g}", chain(DMD2), sigmas=(1.0, sigma, 0.0))
        for sigma in (0.5, 0.6, 0.7155, 0.75, 0.9)
    ),
    *(Arm("fake updates", f"{n}", chain({**DMD2, "fake_updates": n})) for n in (1, 2, 5)),
    *(
        Arm(
            "fake rate",
            f"{rate:g}, {n} updates",
            chain({**DMD2, "fake_lr": rate, "fake_updates": n}),
        )
        for rate in (2e-4, 5e-4, 2e-3)
        for n in (1, 5)
    ),
    *(Arm("moving average", f"{ema:g}", chain({**DMD2, "ema": ema})) for ema in (0.0, 0.95, 0.99)),
    # 7: past the peak, three times the budget
    Arm("decay", "pcm -> dmd2", chain(DMD2, share=3.0), trace=200),
]


def make_stage(keys: dict[str, Any]) -> AnyStage:
    return TypeAdapter(AnyStage).validate_python({**keys, "steps": 10**6, "batch": BATCH})


def text_of(rows: int) -> Text:
    return Text(torch.zeros(rows, 1, 1))


def noise_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 + seed)
    return torch.randn(SAMPLES, 2, 1, 1, generator=generator)


def measure(latents: torch.Tensor, seed: int) -> dict[str, float]:
    return metrics(latents.flatten(1), TRUTH, torch.Generator().manual_seed(20_000 + seed))


class Lab:
    """Runs arms with one seed. Arms that begin alike share that beginning."""

    def __init__(self, seed: int) -> None:
        self.seed, self.data = seed, PointData(TRUTH)
        self.noise, self.text = noise_of(seed), text_of(SAMPLES)
        self.begun: dict[str, tuple[ToyRoles, int]] = {}

    def run(self, arm: Arm) -> dict[str, Any]:
        """Figures of the averaged student, against the truth."""
        trace: list[Any] = []
        roles, step = self.train(arm, trace)
        passes = {role: count / BATCH for role, count in roles.asked.items()}
        sampled = TurboSpec(arm.sigmas, sampler=arm.sampled or arm.sampler)
        return {"updates": step, "passes": passes, **self.metrics(roles, sampled), "trace": trace}

    def train(self, arm: Arm, trace: list[Any]) -> tuple[ToyRoles, int]:
        """The trained roles, and how many updates that took."""
        roles, step = ToyRoles(arm.teacher, self.seed), 0
        spec = TurboSpec(arm.sigmas, sampler=arm.sampler)
        for number in range(len(arm.stages)):
            beginning = repr(
                replace(arm, table="", name="", sampled=None, stages=arm.stages[: number + 1])
            )
            if beginning not in self.begun:
                step = self._stage(roles, arm, spec, number, step, trace)
                self.begun[beginning] = copy.deepcopy((roles, step))
            roles, step = copy.deepcopy(self.begun[beginning])
        return roles, step

    def _stage(
        self, roles: ToyRoles, arm: Arm, spec: TurboSpec, number: int, step: int, trace: list[Any]
    ) -> int:
        """Trains one stage until its share of the budget is used; returns the steps so far."""
        keys, share = arm.stages[number]
        method = make_method(make_stage(keys), roles, spec, self.seed + number)
        end = roles.asked.total() + share * BUDGET * BATCH
        while roles.asked.total() < end:
            rng = Rng(self.seed, step)
            method.step(self.data.batch(rng, BATCH), rng)
            step += 1
            updates = method.optimizers[STUDENT].updates
            if arm.trace and number == len(arm.stages) - 1 and updates % arm.trace == 0:
                with method.use_ema():
                    trace.append({"updates": updates, **self.metrics(copy.deepcopy(roles), spec)})
        method.adopt_ema()
        return step

    @torch.no_grad()
    def metrics(self, roles: ToyRoles, spec: TurboSpec) -> dict[str, float]:
        latents = sample_student(roles, spec, self.noise, self.text, self.seed)
        return measure(latents, self.seed)


@torch.no_grad()
def references(seed: int) -> dict[str, dict[str, float]]:
    """The floor (real against real) and the undistilled teachers."""
    real = TRUTH.sample(SAMPLES, torch.Generator().manual_seed(30_000 + seed))
    rows = {"real": measure(real, seed)}
    for name, teacher in (("teacher", TRUTH), ("blurred teacher", BLURRED)):
        roles = ToyRoles(teacher, seed)
        for sigmas in (teacher_sigmas(50, 1.0), (1.0, 0.7155, 0.0)):
            latents = sample_teacher(roles, sigmas, noise_of(seed), text_of(SAMPLES))
            rows[f"{name}, {len(sigmas) - 1} steps"] = measure(latents, seed)
    return rows


def run_seed(seed: int, arms: list[Arm]) -> dict[str, Any]:
    torch.set_num_threads(1)
    lab = Lab(seed)
    results = {arm.path: lab.run(arm) for arm in arms}
    return {"seed": seed, "references": references(seed), "arms": results}


KEYS = ("nll", "high_quality", "spread", "imbalance", "sliced_w1")
TITLES = {
    "main": "Losses and the warm start",
    "blurred": "Real data behind a blurred teacher",
    "samplers": "ODE against re-noise",
    "second sigma": "The second sigma",
    "fake updates": "Updates of the fake score per update of the student",
    "fake rate": "Rate of the fake score; the student's is 0.0005",
    "moving average": "Moving average of the student",
    "decay": "Past the peak: three times the budget",
}


def write_report(result: dict[str, Any], out: Path) -> None:
    """t0.md with the tables, t0_decay.png with the figures over the updates."""
    runs = result["runs"]
    present = {arm.partition("/")[0] for arm in runs[0]["arms"]}
    parts = [
        arm_table(TITLES[name], runs, name, KEYS, name == "main")
        for name in TITLES
        if name in present
    ]
    save_text(out / "t0.md", "\n".join(parts))
    if "decay" in present:
        arm = "decay/pcm -> dmd2"
        traces = {"pcm -> dmd2": {run["seed"]: run["arms"][arm]["trace"] for run in runs}}
        real = [runs[0]["references"]["real"]]
        figure = trace_figure(traces, real, ("nll", "spread", "sliced_w1"), "DMD2 updates")
        save_figure(figure, out / "t0_decay.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread")
    parser.add_argument("--only", nargs="*", default=[], help="tables or arms, main or main/pcm")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    args = parser.parse_args()
    unknown = set(args.only) - {arm.table for arm in ARMS} - {arm.path for arm in ARMS}
    if unknown:
        parser.error(f"--only: expected a table or {', '.join(a.path for a in ARMS)}; {unknown}")
    arms = [a for a in ARMS if not args.only or {a.table, a.path} & set(args.only)]
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(run_seed, range(args.seeds), [arms] * args.seeds))
    file = args.out / "t0.json"
    if args.only and file.is_file():  # what was left out stays as it is
        before = {run["seed"]: run["arms"] for run in json.loads(file.read_text())["runs"]}
        runs = [{**run, "arms": {**before.get(run["seed"], {}), **run["arms"]}} for run in runs]
    settings = {"batch": BATCH, "budget": BUDGET, "samples": SAMPLES}
    result = {"settings": settings, "truth": asdict(TRUTH), "runs": runs}
    save_text(file, json.dumps(result, indent=1))
    write_report(result, args.out)


if __name__ == "__main__":
    main()
