"""Turbo Compare: the same noise through the teacher and through few-step LoRAs, in one picture."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.samplers
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

from .apply_lora import apply_lora
from .files import LORAS, list_fingerprint, lora_path
from .grid import Panel, draw_grid
from .latents import check_latent
from .sampling import make_plan, sample, seed_input
from .spec_attachment import attached_to, require
from .ui import CATEGORY, show_on_node, with_warnings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NAME = "Turbo Compare"
NONE = "none"
LORA_INPUTS = ("lora_1", "lora_2", "lora_3", "lora_4")
MAX_MODELS = 8
TEACHER_NAME = "teacher"
KEY = "turbo_distill.compare"

Latent = dict[str, Any]
Conditioning = list[Any]


# ------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Contender:
    """One way to sample: a MODEL and how to run it, checked but not yet started."""

    name: str
    settings: str  # "2 steps", "50 steps, CFG 4": for the label
    model: ModelPatcher
    run: Callable[[ModelPatcher], Latent]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Teacher:
    """How the many-step base is sampled; shift 0 leaves that of the MODEL."""

    steps: int
    cfg: float
    shift: float

    def __post_init__(self) -> None:
        for name, value in (("teacher_cfg", self.cfg), ("teacher_shift", self.shift)):
            if not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number; found {value}")

    def on(self, model: ModelPatcher) -> ModelPatcher:
        """The MODEL with this teacher's shift."""
        if not self.shift:
            return model
        return ModelSamplingAuraFlow().patch_aura(model, self.shift)[0]


def sample_guided(
    model: ModelPatcher,
    positive: Conditioning,
    negative: Conditioning | None,
    latent: Latent,
    seed: int,
    steps: int,
    cfg: float,
) -> Latent:
    """What core's KSampler does with euler, simple and denoise 1."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive if negative is None else negative)  # unused at CFG 1
    guider.set_cfg(cfg)
    model_sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(model_sampling, "simple", steps)
    euler = comfy.samplers.sampler_object("euler")
    return SamplerCustomAdvanced.execute(Noise_RandomNoise(seed), guider, euler, sigmas, latent)[0]


def teacher_contender(
    model: ModelPatcher,
    teacher: Teacher,
    negative: Conditioning | None,
    positive: Conditioning,
    latent: Latent,
    seed: int,
) -> Contender:
    """The base by itself. Raises ValueError where guidance is asked for without a negative."""
    if teacher.cfg != 1 and negative is None:
        raise ValueError(
            f"{NAME}: the teacher is to run at CFG {teacher.cfg:g}, which needs a negative prompt. "
            f"Wire one into `negative` (an empty prompt will do), or set teacher_cfg to 1, or "
            f"teacher_steps to 0 to leave the teacher out."
        )
    guided = partial(
        sample_guided,
        positive=positive,
        negative=negative,
        latent=latent,
        seed=seed,
        steps=teacher.steps,
        cfg=teacher.cfg,
    )
    settings = f"{teacher.steps} steps, CFG {teacher.cfg:g}"
    return Contender(TEACHER_NAME, settings, teacher.on(model), guided)


def lora_contender(
    model: ModelPatcher, lora_name: str, positive: Conditioning, latent: Latent, seed: int
) -> Contender:
    """The base with a LoRA, as Turbo LoRA Loader puts it on. Raises ValueError like it."""
    patched, report = apply_lora(model, lora_path(lora_name))
    contender = turbo_contender(patched, positive, latent, seed)
    return replace(contender, warnings=[*report.warnings, *contender.warnings])


def turbo_contender(
    model: ModelPatcher, positive: Conditioning, latent: Latent, seed: int
) -> Contender:
    """A MODEL with a Turbo spec, run as Turbo Sampler runs it. Raises ValueError like it."""
    name = PurePath(require(model, NAME).file).stem
    plan = make_plan(model, latent, positive=positive)
    turbo = partial(sample, positive=positive, latent=latent, seed=seed, plan=plan)
    steps = len(plan.sigmas) - 1
    settings = f"{steps} step{'s' if steps > 1 else ''}"
    return Contender(name, settings, model, turbo, plan.warnings)


def _check_base(model: ModelPatcher) -> None:
    if (attached := attached_to(model)) is not None:
        raise ValueError(
            f"{NAME}: `model` carries the Turbo LoRA {attached.file} already. Wire the base model "
            f"there, and this MODEL into `turbo_models`."
        )


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Meter:
    """Forwards per picture and seconds of sampling, without loading, encoding and decoding."""

    pictures: int
    forwards: float = 0
    seconds: float = 0.0

    def on(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of the MODEL that reports here."""
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._count)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self._time)
        return clone

    def _count(self, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.forwards += len(x) / self.pictures  # core may run both halves of CFG as one batch
        return executor(x, *args, **kwargs)

    def _time(self, executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        comfy.model_management.synchronize()
        start = time.perf_counter()
        samples = executor(*args, **kwargs)
        comfy.model_management.synchronize()
        self.seconds += time.perf_counter() - start
        return samples


@dataclass(frozen=True)
class Result:
    """A contender that has run."""

    contender: Contender
    images: torch.Tensor  # [B, H, W, 3]
    forwards: float
    seconds: float

    @property
    def figures(self) -> str:
        return f"{self.contender.settings}, {self.forwards:g} forwards, {self.seconds:.2f} s"

    def panel(self) -> Panel:
        return Panel(self.contender.name, self.figures, self.images)


def run(contender: Contender, vae: Any, latent: Latent) -> Result:
    """Samples and decodes; raises core's InterruptProcessingException where a person stops it."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    meter = Meter(len(latent["samples"]))
    sampled = contender.run(meter.on(contender.model))
    images = vae.decode(sampled["samples"])
    images = images.reshape(-1, *images.shape[-3:])  # Wan-type VAEs: [B, 1, H, W, 3]
    return Result(contender, images.cpu(), meter.forwards, meter.seconds)


def to_report(results: Sequence[Result], seed: int) -> str:
    """What was compared, a line per model, and the warnings."""
    count, height, width = results[0].images.shape[:3]
    lines = [
        f"{count} picture(s) of {width} x {height} from the noise of seed {seed}",
        *(f"{done.contender.name}: {done.figures}" for done in results),
        "(forwards per picture; seconds of sampling all pictures, without loading and decoding)",
    ]
    return with_warnings(lines, warnings_of(results))


def warnings_of(results: Sequence[Result]) -> list[str]:
    """Every contender's warnings with its name."""
    contenders = [done.contender for done in results]
    return [f"{one.name}: {warning}" for one in contenders for warning in one.warnings]


# ------------------------------------------------------------------------------------------- node


class TurboCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillCompare",
            display_name=NAME,
            category=CATEGORY,
            description="One labelled picture of the same noise drawn by the many-step teacher and "
            "by few-step LoRAs, with forwards and seconds of each. Every LoRA is loaded and "
            "sampled as Turbo LoRA Loader and Turbo Sampler do it.",
            search_aliases=[
                "compare loras",
                "turbo comparison",
                "xy plot",
                "lora grid",
                "teacher vs student",
                "side by side",
                "benchmark lora",
            ],
            inputs=_inputs(),
            outputs=[
                io.Image.Output(
                    display_name="grid",
                    tooltip="Labelled pictures, those of the same noise side by side.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Settings, forwards and seconds of each model, and the warnings.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **widgets) -> str:
        return list_fingerprint(LORAS, *chosen(widgets))

    @classmethod
    def execute(
        cls,
        model,
        positive,
        vae,
        latent_image,
        noise_seed,
        teacher_steps,
        teacher_cfg,
        teacher_shift,
        cell_size,
        negative=None,
        turbo_models=None,
        **loras,
    ) -> io.NodeOutput:
        _check_base(model)
        check_latent(NAME, model, latent_image)
        shared = (positive, latent_image, noise_seed)
        contenders = [lora_contender(model, name, *shared) for name in chosen(loras)]
        contenders += [turbo_contender(turbo, *shared) for turbo in (turbo_models or {}).values()]
        if teacher_steps:
            teacher = Teacher(teacher_steps, teacher_cfg, teacher_shift)
            contenders.insert(0, teacher_contender(model, teacher, negative, *shared))
        if not contenders:
            raise ValueError(
                f"{NAME}: nothing to compare. Choose a LoRA, wire a MODEL with a Turbo LoRA into "
                f"`turbo_models`, or set teacher_steps above 0."
            )
        results = []
        for index, contender in enumerate(contenders):
            progress = f"{index + 1} of {len(contenders)}: {contender.name}, {contender.settings}"
            show_on_node(progress, cls.hidden.unique_id)
            results.append(run(contender, vae, latent_image))
        report = to_report(results, noise_seed)
        shown = show_on_node(report, cls.hidden.unique_id, warnings_of(results))
        grid = draw_grid([done.panel() for done in results], cell_size)
        return io.NodeOutput(grid, report, ui=shown)


def chosen(widgets: dict[str, Any]) -> list[str]:
    """The LoRA names among the node's widget values, in their order, without empty slots; None for
    one that comes by a wire and is not there yet.
    """
    return [widgets[name] for name in LORA_INPUTS if widgets.get(name, NONE) != NONE]


def _inputs() -> list[io.Input]:
    files = folder_paths.get_filename_list(LORAS)
    return [
        io.Model.Input("model", tooltip="The base model, without a Turbo LoRA: the teacher."),
        io.Conditioning.Input("positive", tooltip="The prompt, the same for every model."),
        io.Vae.Input("vae", tooltip="Decodes every model's latents."),
        io.Latent.Input("latent_image", tooltip="An empty latent; a batch for several noises."),
        seed_input("Every model starts from the noise of this seed, drawn on the CPU."),
        *(
            io.Combo.Input(
                name,
                options=[NONE, *files],
                default=NONE,
                tooltip="A few-step LoRA in models/loras, as trained: strength 1, mode auto.",
            )
            for name in LORA_INPUTS
        ),
        io.Int.Input(
            "teacher_steps",
            default=50,
            min=0,
            max=1000,
            tooltip="Steps of the base model by itself (euler, simple). 0 leaves the teacher out.",
        ),
        io.Float.Input(
            "teacher_cfg",
            default=4.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance of the teacher. Above 1 it needs `negative` and two forwards per "
            "step. The few-step models run without guidance.",
        ),
        io.Float.Input(
            "teacher_shift",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="The teacher's timestep shift, as in ModelSamplingAuraFlow (Qwen-Image: 3.1). "
            "0 leaves it as the MODEL has it.",
        ),
        io.Int.Input(
            "cell_size",
            default=512,
            min=0,
            max=4096,
            tooltip="Longest side of each picture in the grid, in pixels. 0: as generated.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="The teacher's negative prompt; an empty one will do.",
        ),
        io.Autogrow.Input(
            "turbo_models",
            template=io.Autogrow.TemplatePrefix(
                io.Model.Input("turbo_model"), prefix="turbo_model_", min=0, max=MAX_MODELS
            ),
            optional=True,
            tooltip="Further MODELs that carry a Turbo LoRA: at another strength, with a style "
            "LoRA, baked, or Turbo Tiny Model.",
        ),
    ]
