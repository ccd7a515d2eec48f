"""T1: the recipe on the tiny Qwen-Image, against its teacher at 50 guided steps.

    python -m benchmarks.recipe.t1 --seeds 5 --out docs/evidence

A seed fixes training and noise. Figures are those of the averaged student on 500 letters (ten per
prompt) and 120 digits, against 1,000 real letters. Stages are those of configs/tiny_cpu.yaml;
tables "warm start" and "design" give every arm the same, smaller number of forwards. What is
finished lies in --work: a second call goes on from there, --report only writes the tables of
what is there, and --pictures draws letters of every arm of --tables, with the first seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import torch
from PIL import Image

from distill.contract.tiny import COLOURS, LETTERS, SHIFT, STEPS
from distill.utils.images import labelled_grid, save_png

from .decay import selection_tables
from .report import arm_table, save_figure, save_text, trace_figure
from .tiny_lab import BLURRED, SHARP, Arm, Keys, Lab, Metrics, make_encoder, recipe_stages

PCM, DMD2, GAN = recipe_stages()
NO_GAN = {key: value for key, value in GAN.items() if key != "gan"}

# The short recipe, whose forwards are the budget of all arms that are compared with it
SHORT_PCM = {**PCM, "steps": 200}
SHORT = 45_000  # forwards of the transformer, counted per image
ENDLESS = {"steps": 10**6}
TRAJECTORY = {key: PCM[key] for key in ("batch", "lr", "warmup", "ema")} | ENDLESS

# Behind the blurred teacher, which is drawn without guidance
SOFT_PCM = {**PCM, "steps": 300}
SOFT_DMD2 = {**DMD2, "steps": 150, "guidance_scale": 1.0, "lr": 3e-4, "fake_updates": 1}
SOFT_GAN = {
    "ratio": 5.0,
    "ramp": 20,
    "updates": 4,
    "r1_weight": 1.0,  # a larger one forbids pixels the differences that sharpness is made of
    "augment": ["translate"],  # strokes in a second colour are to be seen
    "teacher_steps": 8,
    "teacher_shift": SHIFT,
}


def guided(keys: Keys, scale: float, **more: Any) -> Keys:
    return {**keys, "guidance_scale": scale, **more}


def judged(real: float, **keys: Any) -> tuple[Keys, Keys]:
    """Behind the blurred teacher: the warm start, then DMD2 with a GAN that outweighs it and whose
    discriminator keeps up.
    """
    return SOFT_PCM, {**SOFT_DMD2, "gan": {**GAN["gan"], **SOFT_GAN, "real_ratio": real, **keys}}


def design(name: str, **keys: Any) -> Arm:
    """A choice in DMD2, after the short warm start."""
    return Arm("design", name, (SHORT_PCM, {**DMD2, **ENDLESS, **keys}), SHORT)


def arms(encoder: Path) -> list[Arm]:
    """encoder: folder of the model whose features stand in for DINO's."""
    short = (SHORT_PCM, {**DMD2, **ENDLESS})
    soft = {"teacher": BLURRED}
    latent = {"features": "latent", "halo": 0, "augment": []}
    vit = {"features": str(encoder)}
    return [
        Arm("main", "pcm", (PCM,)),
        Arm("main", "pcm -> dmd2", (PCM, DMD2)),
        Arm("main", "pcm -> dmd2 -> dmd2", (PCM, DMD2, NO_GAN)),
        Arm("main", "pcm -> dmd2 -> dmd2+gan", (PCM, DMD2, GAN)),
        *(
            Arm("guidance", f"dmd2 at guidance {scale:g}", (PCM, guided(DMD2, scale)))
            for scale in (2.0, 3.5)
        ),
        # Real data behind a blurred teacher, and who judges it
        Arm("blurred", "no gan", (SOFT_PCM, SOFT_DMD2), **soft),
        *(Arm("blurred", f"gan, real {real:g}", judged(real), **soft) for real in (0, 0.5, 1)),
        Arm("judges", "pixels", judged(1), **soft),
        Arm("judges", "ViT features", judged(1, **vit), **soft),
        Arm("judges", "ViT features, R1 of weight 100", judged(1, **vit, r1_weight=100.0), **soft),
        Arm("judges", "ViT features, one update", judged(1, **vit, updates=1), **soft),
        Arm("judges", "teacher's features", judged(1, **latent), **soft),
        # Losses and the warm start, at equal compute
        Arm("warm start", "pcm -> dmd2", short, SHORT),
        Arm("warm start", "dmd2", ({**DMD2, **ENDLESS},), SHORT),
        Arm("warm start", "pcm", ({**PCM, **ENDLESS},), SHORT),
        Arm("warm start", "consistency", ({**TRAJECTORY, "method": "consistency"},), SHORT),
        Arm("warm start", "progressive", ({**TRAJECTORY, "method": "progressive"},), SHORT),
        # Design choices on pcm -> dmd2, at equal compute
        *(design(f"{n} fake updates", fake_updates=n) for n in (1, 3, 5)),
        *(
            design(f"{n} fake updates at {rate:g}", fake_updates=n, fake_lr=rate)
            for n, rate in ((3, 1e-4), (5, 1e-4), (5, 4e-5))
        ),
        design("no moving average", ema=0.0),
        design("times without shift", shift=1.0, fake_shift=1.0),
        Arm("design", "rank 8", short, SHORT, overrides=("adapter.rank=8",)),
        Arm("design", "fake score of full rank", short, SHORT, overrides=FULL_FAKE),
        # Past the peak: at the preset's rates, and at ten times the student's
        Arm("decay", "rates of the preset", (PCM, {**DMD2, "steps": 400}), trace=50),
        Arm("decay", "student at PCM's rate", (PCM, {**DMD2, "steps": 200, "lr": 1e-3}), trace=25),
    ]


FULL_FAKE = ("adapter.fake_rank=160",)  # the blocks are 160 wide

KEYS = (
    "letter_accuracy",
    "colour_accuracy",
    "mixed_ink",
    "digit_accuracy",
    "frechet",
    "precision",
    "recall",
    "background_spread",
    "intra_distance",
    "edge_energy",
    "sharpness",
    "saturation",
    "psnr",
)
CURVES = ("frechet", "precision", "intra_distance", "saturation")
TITLES = {
    "main": "The recipe, stage by stage",
    "guidance": "Guidance of the teacher in DMD2 (PCM at 3.5)",
    "blurred": "Real data behind a blurred teacher",
    "judges": "Who judges, behind the blurred teacher",
    "warm start": "Losses and the warm start, at equal compute",
    "design": "Design choices, at equal compute",
    "decay": "Past the peak",
}


class Reference(NamedTuple):
    """What the students of one teacher are compared with."""

    key: str  # in t1.json
    file: str  # in a seed's work folder


REFERENCES = {
    SHARP: Reference("references", "references.json"),
    BLURRED: Reference("blurred references", "soft.json"),
}


def having(runs: list[dict[str, Any]], table: str) -> list[dict[str, Any]]:
    """The runs in which that table is complete."""
    return [run for run in runs if any(arm.startswith(f"{table}/") for arm in run["arms"])]


def of_table(name: str, encoder: Path) -> list[Arm]:
    return [arm for arm in arms(encoder) if arm.table == name]


def write_report(runs: list[dict[str, Any]], encoder: Path, out: Path) -> None:
    save_text(out / "t1.json", json.dumps({"runs": runs}, indent=1))
    tables = []
    for name, title in TITLES.items():
        key = REFERENCES[of_table(name, encoder)[0].teacher].key
        if rows := [{**run, "references": run[key]} for run in having(runs, name)]:
            tables.append(arm_table(title, rows, name, KEYS, references=True))
    if decayed := having(runs, "decay"):
        traces = {
            arm.removeprefix("decay/"): {run["seed"]: run["arms"][arm]["trace"] for run in decayed}
            for arm in decayed[0]["arms"]
            if arm.startswith("decay/")
        }
        tables.append(selection_tables(traces))
        teacher = [run[REFERENCES[SHARP].key][f"teacher, {STEPS} steps"] for run in runs]
        figure = trace_figure(traces, teacher, CURVES, "updates, PCM's included")
        save_figure(figure, out / "t1_decay.png")
    save_text(out / "t1.md", "\n".join(tables))


def run_seed(seed: int, work: Path, tables: list[str], encoder: Path) -> None:
    """Fills the seed's work folder with the arms of these tables, and with what they refer to."""
    lab = Lab(seed, work)
    chosen = [arm for arm in arms(encoder) if arm.table in tables]
    for teacher in dict.fromkeys(arm.teacher for arm in chosen):
        lab.kept(REFERENCES[teacher].file, lambda teacher=teacher: lab.references(teacher))
    for arm in chosen:
        lab.run(arm)


def picture(lab: Lab, table: Sequence[Arm]) -> Image.Image:
    """Every letter once, a row per arm below real ones and the teacher's."""
    drawn = {
        "real, through the VAE": lab.real_images(),
        f"teacher, {STEPS} steps": lab.teacher_images(table[0].teacher),
        **{arm.name: lab.samples(arm) for arm in table},
    }
    chosen = [i * len(COLOURS) + i % len(COLOURS) for i in range(len(LETTERS))]
    return labelled_grid([(fill(name, 20), images[chosen]) for name, images in drawn.items()])


def finished(work: Path, encoder: Path) -> list[dict[str, Any]]:
    """What is in the work folder: every seed, with the tables that are complete."""
    runs = []
    for folder in sorted(work.glob("seed*")):
        run: dict[str, Any] = {"seed": int(folder.name.removeprefix("seed")), "arms": {}}
        for reference in REFERENCES.values():
            if (folder / reference.file).is_file():
                run[reference.key] = read_json(folder / reference.file)
        for table in TITLES:
            chosen = of_table(table, encoder)
            if all((folder / arm.file).is_file() for arm in chosen):
                run["arms"] |= {arm.path: read_json(folder / arm.file) for arm in chosen}
        runs.append(run)
    return runs


def read_json(file: Path) -> Metrics:
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--tables", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--work", type=Path, default=Path("runs/t1"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--pictures", action="store_true", help="draw the first seed's letters")
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = args.work / "encoder"
    if not args.report:
        if "judges" in args.tables:
            make_encoder(encoder)
        for seed in range(args.first, args.first + args.seeds):
            run_seed(seed, args.work, args.tables, encoder)
    if args.pictures:
        lab = Lab(args.first, args.work)
        for name in args.tables:
            sheet = picture(lab, of_table(name, encoder))
            save_png(sheet, args.out / f"t1_{name.replace(' ', '_')}.png")
    write_report(finished(args.work, encoder), encoder, args.out)


if __name__ == "__main__":
    main()
