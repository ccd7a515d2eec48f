"""RUN/report.html: all about a run on one page that needs nothing else, for a browser or a phone.

Training writes it after previews and checkpoints, `turbo-distill report RUN` at any time.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import shlex
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ..config import GatesSection
from ..contract.latent_grid import sigmas_text
from ..contract.metadata import read_header
from ..evaluation.gates import failures
from ..models.family import family_of, spec_of
from ..stages import Stage
from ..utils.files import replace_text
from ..utils.terminal import duration, plural, size
from .curves import charts, draw
from .run_dir import RunDir, by_step
from .run_reader import Line, RunRecord, ratios, read_run

log = logging.getLogger(__name__)

EVERY_S = 20  # in training; a page takes up to a second
PICTURES = 12  # previews on the page
PICTURE_WIDTH = 960  # pixels; wider ones are scaled down
MEANINGS = {
    "saturation": "clipped channel values",
    "chroma": "strength of the colours",
    "contrast": "spread of an image's values",
    "sharpness": "energy of the finest detail",
    "diversity": "distance between images of a prompt",
    "prompt": "how well the prompt is met",
}


class Reporter:
    """Keeps the report of a run in training up to date, and never stands in its way: at most one
    page in EVERY_S seconds, and whatever goes wrong is logged.
    """

    def __init__(self, run_dir: Path, writes: bool) -> None:
        self.run_dir, self.writes = run_dir, writes  # only the main rank writes
        self._written = -math.inf  # seconds

    def keep(self, *, now: bool = False) -> None:
        """Writes the page if it is time to, or `now`."""
        if not self.writes or not (now or time.monotonic() - self._written >= EVERY_S):
            return
        try:
            write_report(self.run_dir)
        except Exception as error:  # a page is not worth a run
            log.warning(
                "%s could not be written (%s: %s); training goes on. `turbo-distill report %s` "
                "makes it later.",
                RunDir(self.run_dir).report,
                type(error).__name__,
                error,
                self.run_dir,
            )
        self._written = time.monotonic()


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Raises ConfigError for a folder that holds no run, OSError."""
    path = path or RunDir(run_dir).report
    text = render(read_run(run_dir))
    replace_text(path, text)
    return path


def render(run: RunRecord) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined
    )
    ends = tuple(end for _, _, end in run.stages())
    return environment.get_template("report.html").render(
        name=run.config.name,
        status=status(run),
        lead=lead(run),
        tiles=list(tiles(run)),
        recipe=recipe(run),
        machine=list(run.machine.items()) or [("machine", "not recorded")],
        gates=gates(run),
        previews=previews(run),
        charts=[(chart, draw(chart, ends)) for chart in charts(run)],
        speed=speed(run),
        files=list(files(run)),
        footer=f"Written {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by Turbo Distill. "
        "This page loads nothing from the network.",
    )


def status(run: RunRecord) -> str:
    """finished, or how far."""
    return "finished" if run.finished else f"step {run.step} of {run.config.total_steps}"


def lead(run: RunRecord) -> str:
    spec = spec_of(run.config)
    path = run.config.model.path
    base = family_of(path).title(path)
    text = f"A LoRA that makes {base} draw in {plural(spec.steps, 'step')}: {spec.method}."
    if not run.finished:
        text += f" Not finished: {status(run)}."
    return text


def tiles(run: RunRecord) -> Iterator[dict[str, str]]:
    """The figures that one looks for first."""
    done = min(100, 100 * run.step / run.config.total_steps)
    yield _tile("steps", f"{run.step:,}", f"of {run.config.total_steps:,} ({done:.0f} %)")
    if preview := run.preview(run.chosen):
        failed = preview["preview/failed"]
        value, style = ("all passed", "good") if not failed else (f"{len(failed)} failed", "bad")
        yield _tile("gates", value, f"step {preview['step']}", style)
        distance = preview["preview/score"]
        yield _tile("distance to teacher", _number(distance), "0 = alike")
    yield _tile("training time", duration(run.seconds()), "without previews")
    if memory := max((line.get("memory_gib") or 0 for line in run.training), default=0):
        yield _tile("memory", f"{memory:.1f} GiB", "fullest rank")


def _tile(label: str, value: str, note: str = "", style: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "style": style}


def recipe(run: RunRecord) -> dict[str, Any]:
    config, spec = run.config, spec_of(run.config)
    world = config.engine.world or 1
    rows = [
        [
            stage.label,
            f"{first:,} - {last:,}",
            stage.samples * world,
            f"{stage.lr:g}",
            f"{stage.guidance_scale or config.guidance.scale:g}",
            f"{stage.ema:g}",
            progress_of(run, first, last),
        ]
        for stage, first, last in run.stages()
    ]
    adapter = config.adapter
    facts = [
        ("sigmas", sigmas_text(spec)),
        ("sampler", f"{spec.sampler}, {plural(spec.steps, 'forward')} per image"),
        ("sizes", ", ".join(f"{w}x{h}" for w, h in spec.resolutions) or "not recorded"),
        ("LoRA", f"rank {adapter.rank}, alpha {adapter.alpha or adapter.rank:g}"),
        ("base", f"{PurePath(spec.base).name}, {config.model.dtype}"),
        ("seed", config.seed),
    ]
    head = ["stage", "steps", "samples per step", "learning rate", "guidance", "EMA", "done"]
    return {"head": head, "rows": rows, "facts": facts}


def progress_of(run: RunRecord, first: int, last: int) -> str:
    done = min(max(run.step - first + 1, 0), last - first + 1)
    return f"{100 * done / (last - first + 1):.0f} %"


def gates(run: RunRecord) -> dict[str, Any] | None:
    """Of the chosen preview, else of the newest."""
    preview = run.preview(run.chosen)
    if preview is None:
        return None
    if run.config.select == "last":
        why = "The recipe takes the last step's student (select: last)."
    elif run.chosen is None:
        why = "Nothing is chosen yet: that is for the last stage's previews."
    else:
        judged = [p for p in run.previews if p["step"] > _last_stage_begin(run)]
        why = (
            f"Chosen among {plural(len(judged), 'preview')} of the last stage: gates first, then "
            "the smallest distance to the teacher."
        )
    rows = [gate_row(name, value, run.config.gates) for name, value in ratios(preview).items()]
    return {"lead": f"Step {preview['step']}. {why}", "rows": rows}


def _last_stage_begin(run: RunRecord) -> int:
    return run.config.total_steps - run.config.stages[-1].steps


def gate_row(name: str, ratio: float, section: GatesSection) -> dict[str, str]:
    low, high = (getattr(section, f"{name}_{end}", None) for end in ("min", "max"))
    if low is None and high is None:
        verdict, style = "", ""
    else:
        kept = not failures({name: ratio}, section)
        verdict, style = ("passed", "good") if kept else ("failed", "bad")
    return {
        "name": name,
        "meaning": MEANINGS.get(name, ""),
        "ratio": _number(ratio),
        "allowed": allowed(low, high),
        "verdict": verdict,
        "style": style,
    }


def allowed(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return "any" if low is high is None else f"≤ {high:g}" if low is None else f"≥ {low:g}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def previews(run: RunRecord) -> dict[str, Any] | None:
    lines = {line["step"]: line for line in run.previews}
    files = {step: RunDir(run.folder).preview(step) for step in lines}
    steps = [step for step, file in files.items() if file.is_file()]
    if not steps:
        return None
    shown = spread(steps, PICTURES, run.chosen)
    lead = "The same prompts and noise every time: the student's rows above the teacher's."
    if len(shown) < len(steps):
        lead += f" {len(shown)} of {len(steps)}; all lie in previews/."
    pictures = [
        picture(files[step], lines[step], stage_of(run, step), run.chosen == step) for step in shown
    ]
    return {"lead": f"{lead} Click to enlarge.", "pictures": pictures}


def stage_of(run: RunRecord, step: int) -> str:
    return next((stage.label for stage, _, last in run.stages() if step <= last), "")


def spread(steps: list[int], count: int, wanted: int | None) -> list[int]:
    """At most `count` of them, evenly, the first, the last and `wanted` among them."""
    if len(steps) <= count:
        return steps
    places = {round(i * (len(steps) - 1) / (count - 1)) for i in range(count)}
    if wanted in steps and steps.index(wanted) not in places:
        inner = places - {0, len(steps) - 1}
        places.discard(min(inner, key=lambda place: abs(place - steps.index(wanted))))
        places.add(steps.index(wanted))
    return [steps[place] for place in sorted(places)]


def picture(file: Path, line: Line, stage: str, chosen: bool) -> dict[str, Any]:
    source, width, height = embedded(file, file.stat().st_mtime_ns)
    failed = line["preview/failed"]
    return {
        "step": line["step"],
        "stage": stage,
        "score": _number(line["preview/score"]),
        "failed": f"{plural(len(failed), 'gate')} failed" if failed else "",
        "chosen": chosen,
        "source": source,
        "width": width,
        "height": height,
    }


@lru_cache(maxsize=2 * PICTURES)  # while training only the newest one is new
def embedded(file: Path, changed_ns: int) -> tuple[str, int, int]:
    """A picture as a data URI, its width and height in pixels."""
    with Image.open(file) as image:
        shown = image.convert("RGB")
    shown.thumbnail((PICTURE_WIDTH, 100 * PICTURE_WIDTH))
    buffer = io.BytesIO()
    shown.save(buffer, format="WEBP", quality=80, method=2)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/webp;base64,{data}", *shown.size


def speed(run: RunRecord) -> dict[str, Any]:
    """By stage, from the log."""
    rows = [_speed_row(run, stage, first, last) for stage, first, last in run.stages()]
    head = ["stage", "steps logged", "s per step", "samples per s", "memory GiB", "skipped steps"]
    return {"head": head, "rows": rows}


def _speed_row(run: RunRecord, stage: Stage, first: int, last: int) -> list[str]:
    lines = [line for line in run.training if first <= line["step"] <= last]
    if not lines:
        return [stage.label, "0", "", "", "", ""]
    seconds, rate, memory = (
        [line[key] for line in lines if line.get(key) is not None]
        for key in ("seconds_per_step", "samples_per_second", "memory_gib")
    )
    return [
        stage.label,
        f"{lines[-1]['step'] - first + 1:,}",
        f"{sum(seconds) / len(seconds):.3g}" if seconds else "",
        f"{sum(rate) / len(rate):.3g}" if rate else "",
        f"{max(memory):.1f}" if memory else "",
        str(lines[-1].get("skipped", 0)),
    ]


def files(run: RunRecord) -> Iterator[dict[str, str]]:
    """What lies in the folder, most useful first, with a command where there is one."""
    folder, name, paths = run.folder, run.config.name, RunDir(run.folder)
    lora, where = run.newest_lora, shlex.quote(str(folder))
    if lora:
        what = "The finished LoRA" if lora == run.lora else "The best student so far"
        hint = read_header(lora).get("modelspec.usage_hint", "")
        quoted = shlex.quote(str(lora))
        yield _file(
            folder,
            lora,
            f"{what}: copy it to ComfyUI/models/loras, the node Turbo LoRA Loader reads the rest "
            f"from the file. {hint}",
            f"turbo-distill sample {quoted} --prompt {prompt_of(run)} --out pictures\n"
            f"turbo-distill eval {quoted}\n"
            f"turbo-distill export {quoted} --out small.safetensors --rank 16",
        )
    yield _file(folder, run.lora.with_suffix(".workflow.json"), "Drag it into ComfyUI, press Run.")
    yield _file(folder, run.lora.with_suffix(".md"), "Model card, for where you publish the LoRA.")
    checkpoints = list(by_step(paths.checkpoints).values())
    if checkpoints:
        use = "Optimiser, adapters and averages: a run continues exactly from here."
        command = "" if run.finished else f"turbo-distill train {where}/config.yaml --resume"
        yield _file(folder, checkpoints[-1], use, command)
    yield _file(folder, paths.config, f"The recipe of {name} with every key.")
    yield _file(folder, paths.log, "All figures, one JSON object per line.")
    board = f"tensorboard --logdir {where}"
    yield _file(folder, paths.tensorboard, "The same for TensorBoard; it needs no network.", board)
    yield _file(folder, paths.previews, "Every preview in full size.")


def prompt_of(run: RunRecord) -> str:
    """The first prompt of the previews, quoted for a shell."""
    listed = RunDir(run.folder).prompts
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    return shlex.quote(lines[0] if lines else "a cat in the rain")


def _file(folder: Path, path: Path, use: str, command: str = "") -> dict[str, str]:
    bytes_ = [f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*"))]
    return {
        "name": path.relative_to(folder).as_posix() + ("/" if path.is_dir() else ""),
        "size": size(sum(bytes_)) if path.exists() else "not yet there",
        "use": use,
        "command": command,
    }
