"""Previews of a run: the student beside the teacher, on the same prompts and noise every time.

The student is drawn by the sampler and the sigmas that the ComfyUI node uses.

RUN/previews/step-000100.png       a column per prompt; student and teacher in turn, an image each
             prompts.txt           the prompts in full, one per column
             teacher.safetensors   latents of the teacher, drawn once

Image i of every prompt starts from the noise of seed `preview.seed` + i, the noise that ComfyUI
makes of this seed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..config import Config, GatesSection
from ..data.batch import Examples
from ..evaluation import metrics
from ..evaluation.gates import Metrics, failures, measure, ratios, teacher_distance
from ..evaluation.prompt_score import PromptScore, prompt_score
from ..models.family import family_of, spec_of
from ..models.hub import model_folder
from ..models.load import load_vae
from ..models.roles import Roles
from ..models.sample import (
    noise_of_seeds,
    sample_student,
    sample_teacher,
    teacher_sigmas,
)
from ..models.text import Text
from ..utils.files import replace_file, replace_text
from ..utils.images import labelled_grid, save_png
from ..utils.progress import progress
from .engine import Engine
from .held_out import as_lines
from .run_dir import RunDir
from .tensor_files import sha256_of

TOKENS = 4096  # of the images that the teacher draws at a time: one of 1024 x 1024
CAPTION = 6  # pixels per letter
ENLARGE_TO = 128  # pixels per side; smaller images are enlarged in the picture
# Header keys of the teacher's latents: what they depend on, and the hash of their bytes
SETTINGS, SHA256 = "turbo.preview", "turbo.sha256"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preview:
    picture: Image.Image
    measured: Metrics  # of the student
    ratios: Metrics  # to the teacher's
    psnr: float  # dB, student and teacher as pairs
    images: torch.Tensor  # of the student, one per prompt  # [prompts, 3, H, W] in [-1, 1]

    def values(self, gates: GatesSection) -> dict[str, Any]:
        """As the log writes it."""
        failed = failures(self.ratios, gates)
        return {
            **{f"preview/{name}": value for name, value in self.measured.items()},
            **{f"preview/{name}_ratio": value for name, value in self.ratios.items()},
            "preview/psnr": self.psnr,
            "preview/score": teacher_distance(self.ratios),
            "preview/gates_failed": len(failed),
            "preview/failed": failed,
        }


class Previewer:
    """Prompts and noise of a run, and the teacher's answer to them: `draw_teacher` once, then
    `draw` and `judged` for every preview.

    Every rank draws its share, image by image, so that what is drawn does not depend on how many
    there are. The main rank alone decodes and judges; VAE and judge lie in main memory between
    previews.
    """

    def __init__(self, config: Config, engine: Engine, examples: Examples) -> None:
        section = config.preview
        self.config, self.section, self.engine = config, section, engine
        self.spec, self.family = spec_of(config), family_of(config.model.path)
        self.run_dir = RunDir(config.run_dir)
        self.examples, self.prompts, self.size = examples, examples.prompts, examples.size
        self.texts = [text for text in examples.texts for _ in range(section.images)]
        self.prompt = torch.arange(len(self.prompts)).repeat_interleave(section.images)
        self.seeds = [section.seed + i for i in range(section.images)] * len(self.prompts)
        self.sigmas = self._teacher_sigmas()
        self._teacher: torch.Tensor | None = None  # latents, on the main rank
        self._teacher_images: torch.Tensor | None = None
        self._teacher_metrics: Metrics = {}
        engine.on_main(self._load)  # before the base: what is missing should be found at once

    def _load(self) -> None:
        self.vae = load_vae(self.config.model.path, getattr(torch, self.config.model.dtype))
        self.judge: PromptScore | None = prompt_score(self.config)
        replace_text(self.run_dir.prompts, as_lines(self.examples))

    def _teacher_sigmas(self) -> tuple[float, ...]:
        steps, shift = self.section.teacher_steps, self.section.teacher_shift
        if shift is not None:
            return teacher_sigmas(steps, shift)
        folder = model_folder(self.config.model.path, ["scheduler"])
        assert folder is not None  # it would have been downloaded
        return self.family.sigmas(folder, steps, self.size)

    # Drawing, on all ranks

    @torch.no_grad()
    def draw(self, roles: Roles) -> torch.Tensor | None:
        """Latents of the student, prompt by prompt; on the main rank.
        # [prompts x images, C, h, w]
        """

        def draw(x: torch.Tensor, text: Text, seed: int) -> torch.Tensor:
            x, text = x[None].to(roles.device), text.to(roles.device)
            return sample_student(roles, self.spec, x, text, seed).cpu()

        rows = zip(self._noise(roles), self.texts, self.seeds, strict=True)
        return self._joined([partial(draw, *row) for row in rows])

    def _noise(self, roles: Roles) -> torch.Tensor:
        """[prompts x images, C, h, w]"""
        return noise_of_seeds(self.seeds, roles.latent_shape(self.size))

    def _joined(self, work: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor | None:
        drawn = self.engine.shared_out(work)
        return None if drawn is None else torch.cat(drawn)

    @torch.no_grad()
    def draw_teacher(self, roles: Roles) -> None:
        """Before the first step, for it takes minutes on 20 B; a run that continues finds them in
        the file.
        """
        path = self.run_dir.previews / "teacher.safetensors"
        if self.engine.on_main(lambda: self._found(path)):
            return
        batch_size = max(1, TOKENS * self.family.token**2 // (self.size[0] * self.size[1]))
        images = self.section.images
        chunks = [
            (x, text.repeat(len(x)))
            for noise, text in zip(
                self._noise(roles).split(images), self.texts[::images], strict=True
            )
            for x in noise.split(batch_size)
        ]
        hidden = not self.engine.is_main
        with progress(total=len(self.seeds), what="teacher", unit="image", hidden=hidden) as bar:

            def draw(x: torch.Tensor, text: Text) -> torch.Tensor:
                x, text = x.to(roles.device), text.to(roles.device)
                drawn = sample_teacher(roles, self.sigmas, x, text).cpu()
                done = len(x) * self.engine.world_size  # the others do as much
                bar.update(min(done, len(self.seeds) - bar.n))
                return drawn

            latents = self._joined([partial(draw, *chunk) for chunk in chunks])
        self.engine.on_main(lambda: self._keep_teacher(path, latents))

    def _found(self, path: Path) -> bool:
        self._teacher = self._read(path)
        return self._teacher is not None

    def _keep_teacher(self, path: Path, latents: torch.Tensor | None) -> None:
        assert latents is not None
        self._teacher = latents
        metadata = {SETTINGS: self._settings(), SHA256: sha256_of(latents)}
        replace_file(path, lambda p: save_file({"x0": latents}, p, metadata))

    def _settings(self) -> str:
        """What the teacher's latents depend on, the base apart."""
        guidance = self.config.guidance.model_dump()
        return json.dumps([self.prompts, self.seeds, self.size, self.sigmas, guidance])

    def _read(self, path: Path) -> torch.Tensor | None:
        """The teacher's latents of an earlier start of this run, if they are of use."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, latents = file.metadata() or {}, file.get_tensor("x0")
        except SafetensorError as error:
            log.warning("%s is damaged (%s); the teacher draws again", path, error)
            return None
        if SHA256 in metadata and metadata[SHA256] != sha256_of(latents):
            log.warning("%s is damaged (another SHA-256); the teacher draws again", path)
            return None
        return latents.clone() if metadata.get(SETTINGS) == self._settings() else None

    # Judging, on the main rank

    def judged(self, latents: torch.Tensor, step: int) -> Preview:
        """Figures and picture of what `draw` returned; the picture is written too."""
        assert self._teacher is not None
        if self._teacher_images is None:
            self._teacher_images = self._decode(self._teacher)
            self._teacher_metrics = self._measure(self._teacher_images)
        images = self._decode(latents)
        measured = self._measure(images)
        picture = self._picture(images, self._teacher_images)
        save_png(picture, self.run_dir.preview(step))
        same = torch.equal(images, self._teacher_images)
        return Preview(
            picture,
            measured,
            ratios(measured, self._teacher_metrics),
            math.inf if same else metrics.psnr(images, self._teacher_images),
            images[:: self.section.images],
        )

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """One image at a time: the VAE needs more memory than anything else here."""
        device = self.engine.device
        with visiting(self.vae, device) as vae:
            rows = latents.to(vae.dtype).split(1)
            return torch.cat(
                [self.family.vae.decode(vae, x.to(device)).float().cpu() for x in rows]
            )

    def _measure(self, images: torch.Tensor) -> Metrics:
        measured = measure(images, self.prompt)
        if self.judge is not None:
            with visiting(self.judge.network, self.engine.device):
                prompts = [self.prompts[i] for i in self.prompt]
                measured["prompt"] = self.judge(images, prompts)
        return measured

    def _picture(self, student: torch.Tensor, teacher: torch.Tensor) -> Image.Image:
        """Rows of one seed each, student and teacher in turn."""
        rows = []
        for i in range(self.section.images):
            of_seed = slice(i, None, self.section.images)
            label = f"seed {self.section.seed + i}"
            rows += [
                (f"student\n{self.spec.steps} steps\n{label}", self._shown(student[of_seed])),
                (f"teacher\n{len(self.sigmas) - 1} steps\n{label}", self._shown(teacher[of_seed])),
            ]
        scale = max(1, ENLARGE_TO // max(rows[0][1].shape[-2:]))
        width = rows[0][1].shape[-1] * scale // CAPTION
        return labelled_grid(rows, [shortened(p, width) for p in self.prompts], scale)

    def _shown(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled down to `preview.side` where they are larger."""
        factor = self.section.side / max(images.shape[-2:])
        if factor >= 1:
            return images
        size = [max(1, round(side * factor)) for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`module` on `device`, and back in main memory afterwards."""
    module.to(device)
    try:
        yield module
    finally:
        module.to("cpu")
