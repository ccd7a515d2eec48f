"""`turbo-distill demo`: from nothing to a 2-step LoRA, a picture and figures, on a CPU."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image

from ..config import TINY, Config, load_config
from ..contract.metadata import read_lora
from ..contract.tiny import IMAGE_SIZE, SHIFT, STEPS, TINY_DIR, embed_prompt
from ..lora.student import load_student
from ..models.family import spec_of
from ..models.load import load_transformer, load_vae
from ..models.roles import Roles
from ..models.sample import in_chunks, sample_student, sample_teacher, teacher_sigmas
from ..models.text import Text
from ..models.vae import decode
from ..tiny import classifier
from ..tiny.metrics import Gate, Judge, LetterMetrics, gates, letter_batch
from ..tiny.quality import noise_of
from ..trainer import train
from ..training.run_dir import RunDir
from ..utils.comfyui import ComfyServer, find_comfyui, missing_requirements
from ..utils.files import replace_file, replace_text
from ..utils.images import labelled_grid, save_png
from ..utils.progress import progress
from ..utils.terminal import table
from ..utils.values import SEED_MAX
from .options import path_argument, whole
from .result import Result

ABOUT = """\
Distils the embedded tiny Qwen-Image with PCM, then draws the same noise with the
teacher at 50 guided steps, the teacher at 2 steps and the student at 2 steps. If a
ComfyUI is found (COMFYUI_PATH, or the one that the tests fetched), it renders the LoRA
once more through our nodes. Nothing is downloaded, no GPU is needed. Exit code 1: the
student did not pass the gates that the printed table shows."""
EXAMPLES = """\
turbo-distill demo
turbo-distill demo --out second --seed 1
turbo-distill demo --out full --lora distill/tiny/model/lora/tiny_turbo_2_steps.safetensors
COMFYUI_PATH=../ComfyUI turbo-distill demo --force"""

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RUN = "run"  # the run folder inside the demo's
MARKS = (f"{RUN}/config.yaml", "figures.json")  # one of them is in every demo's folder
PROMPTS = (
    "a red letter K",
    "a yellow letter R",
    "a white letter S",
    "a green letter E",
    "a blue letter X",
    "a yellow letter H",
    "a handwritten seven",
    "an even number",
)
TEACHER_50 = "teacher\n50 steps, CFG\n100 forwards"
TEACHER_2 = "teacher\n2 steps, CFG\n4 forwards"
STUDENT_2 = "student (LoRA)\n2 steps\n2 forwards"
PER_PROMPT = 10  # images per letter prompt in the figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    demo = parser.add_argument_group("demo")
    demo.add_argument(
        "--out", type=path_argument, default=Path("demo"), help="folder to write (default: demo)"
    )
    demo.add_argument(
        "--force", action="store_true", help="overwrite an earlier demo in that folder"
    )
    demo.add_argument(
        "--seed", type=whole(0, SEED_MAX), default=0, help="of training and noise (default: 0)"
    )
    demo.add_argument(
        "--lora",
        type=path_argument,
        metavar="FILE",
        help="draw with this LoRA of the tiny model (rank 32, 2 steps) instead of distilling one; "
        "the one in distill/tiny/model/lora comes from the whole recipe",
    )


def run(args: argparse.Namespace) -> Result:
    out: Path = args.out
    if args.lora:
        read_lora(args.lora)  # an error before anything is removed
        if out.resolve() in args.lora.resolve().parents:
            raise FileExistsError(f"--out: {out} holds {args.lora}; name another folder.")
    if out.exists() and any(out.iterdir()):
        if not args.force or not any((out / name).is_file() for name in MARKS):
            raise FileExistsError(
                f"{out} is not empty. Name another folder with --out; --force overwrites one that "
                "holds an earlier demo."
            )
        shutil.rmtree(out)
    config = demo_config(out / RUN, args.seed)
    if args.lora:
        say(f"1/3  nothing to distil: {args.lora}")
        lora = args.lora
    else:
        steps = config.total_steps
        say(f"1/3  distilling a 2-step LoRA from the tiny Qwen-Image ({steps} PCM updates)")
        lora = train(config)

    say("2/3  drawing with teacher and student")
    studio = Studio(config, lora)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lora, out / lora.name)
    save_png(studio.picture(args.seed), out / "demo.png")
    metrics = studio.metrics(args.seed)
    passed = report(metrics, out)

    say("3/3  the same LoRA in ComfyUI")
    rendered = through_comfyui(out, lora)
    say(f"     {rendered}")
    return Result(
        values={
            "figures": by_name(metrics),
            "passed": passed,
            "picture": str(out / "demo.png"),
            "lora": str(out / lora.name),
            "comfyui": rendered,
        },
        done="demonstrated" if passed else "the student fails a gate; demonstrated",
        wrote=(out / "demo.png", out / lora.name, out / "figures.md"),
        next=f"open {out if args.lora else RunDir(out / RUN).report}, then turbo-distill train "
        "configs/tiny_cpu.yaml",
        code=0 if passed else 1,
    )


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def demo_config(run_dir: Path, seed: int) -> Config:
    """The preset `configs/tiny_demo.yaml`."""
    return load_config(CONFIGS / "tiny_demo.yaml", [f"run_dir={run_dir}", f"seed={seed}"])


class Studio:
    """Teacher and student of the tiny model, side by side on the same noise."""

    def __init__(self, config: Config, lora: Path) -> None:
        self.spec = spec_of(config)
        self.roles = Roles(
            load_transformer(TINY, torch.float32),
            config.adapter,
            config.guidance,
            Text(embed_prompt("")[None]),
            0,
        )
        load_student(self.roles, lora)
        self.vae = load_vae(TINY)

    def draw(self, noise: torch.Tensor, text: Text) -> dict[str, torch.Tensor]:
        """Images [N, 3, 64, 64] by arm."""
        arms = {
            TEACHER_50: lambda x, c: sample_teacher(self.roles, teacher_sigmas(STEPS, SHIFT), x, c),
            TEACHER_2: lambda x, c: sample_teacher(self.roles, self.spec.sigmas(), x, c),
            STUDENT_2: lambda x, c: sample_student(self.roles, self.spec, x, c),
        }
        with torch.no_grad():
            return {
                arm: torch.cat(
                    [decode(self.vae, z) for z in in_chunks(sampler, noise, text, 100).split(50)]
                )
                for arm, sampler in progress(arms.items(), what="drawing", unit="arm")
            }

    def picture(self, seed: int) -> Image.Image:
        """The same noise in every column."""
        text = Text(torch.stack([embed_prompt(p) for p in PROMPTS]))
        images = self.draw(noise_of(len(PROMPTS), seed + 1), text)
        return labelled_grid(
            list(images.items()), columns=[p.removeprefix("a ") for p in PROMPTS], scale=2
        )

    def metrics(self, seed: int) -> dict[str, LetterMetrics]:
        text, number = letter_batch(PER_PROMPT)
        images = self.draw(noise_of(len(number), seed + 2), text)
        judge = Judge(classifier.load(TINY_DIR / "classifier.safetensors"))
        return {arm: judge.letters(x, number, images[TEACHER_50]) for arm, x in images.items()}


def report(metrics: dict[str, LetterMetrics], out: Path) -> bool:
    """Prints and writes the figures; says whether the student passes all gates."""
    teacher, naive, student = metrics.values()
    passed, naive_passed = gates(student, teacher), gates(naive, teacher)
    rows = []
    for name, value in asdict(teacher).items():
        values = [value, asdict(naive)[name], asdict(student)[name]]
        cells = [name.replace("_", " "), *(f"{v:.3f}" for v in values)]
        if gate := passed.get(name):
            cells += [f"{gate.value:.2f}", gate.rule, verdict(gate), verdict(naive_passed[name])]
        else:
            cells += [f"{values[2] / value:.2f}", "", "", ""]
        rows.append(cells)
    header = ["", "teacher 50", "teacher 2", "student 2", "ratio", "gate", "student", "teacher 2"]
    text = table(header, rows)
    say(text)
    replace_text(out / "figures.md", text + "\n")
    text = json.dumps(by_name(metrics), indent=2)
    replace_text(out / "figures.json", text)
    return all(gate.passed for gate in passed.values())


def by_name(metrics: dict[str, LetterMetrics]) -> dict[str, dict[str, float]]:
    """For JSON, with the arms' names on one line."""
    return {" ".join(arm.split("\n")[:2]): asdict(f) for arm, f in metrics.items()}


def verdict(gate: Gate) -> str:
    return "passes" if gate.passed else "fails"


def through_comfyui(out: Path, lora: Path) -> str:
    """Renders the LoRA through a real ComfyUI and our nodes, where one is found; says what
    happened.
    """
    comfyui = find_comfyui()
    if comfyui is None:
        return "no ComfyUI found; set COMFYUI_PATH to its folder to render through it."
    missing = missing_requirements(comfyui)
    if missing:
        return f"{comfyui} lacks {', '.join(missing)} in this environment; nothing rendered."
    with ComfyServer(comfyui, pack=ROOT) as server:
        shutil.copyfile(lora, server.folder("loras") / lora.name)
        images = server.images(server.queue(comfyui_prompt(lora.name)))
    path = out / "comfyui.png"
    replace_file(path, lambda p: p.write_bytes(images[0]))
    return f"{path}"


def comfyui_prompt(lora_name: str) -> dict[str, object]:
    """API format: the tiny base, our loader and our sampler."""
    nodes = {
        "model": ("TurboDistillTinyLoader", {"lora": "teacher (no LoRA)"}),
        "lora": (
            "TurboDistillLoraLoader",
            {"model": ["model", 0], "lora_name": lora_name, "strength": 1.0, "mode": "auto"},
        ),
        "text": ("TurboDistillTinyText", {"text": PROMPTS[0]}),
        "latent": (
            "EmptySD3LatentImage",
            {"width": IMAGE_SIZE, "height": IMAGE_SIZE, "batch_size": 4},
        ),
        "sample": (
            "TurboDistillSampler",
            {
                "model": ["lora", 0],
                "positive": ["text", 0],
                "latent_image": ["latent", 0],
                "noise_seed": 1,
                "start_step": 0,
            },
        ),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["model", 1]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "turbo"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
