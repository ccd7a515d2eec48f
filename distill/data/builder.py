"""Does one rank's share of the work: real images, then prompts, then the teacher's images; each
model is loaded only if there is work for it, and freed before the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from ..config import Config, ConfigError, DataSection
from ..models.family import family_of
from ..models.hub import model_folder
from ..models.load import load_vae
from ..models.sizes import nearest, upscale
from ..models.text_encoder import TextEncoder
from ..utils.images import to_unit
from ..utils.launch import Launch
from ..utils.progress import progress
from .chunks import CachePlan, ImageChunk, TeacherChunk, TextChunk
from .fingerprint import Identity, settings, with_models
from .images import BROKEN_IMAGE, decode_image, fit
from .sample import Problem, Sample
from .shards import (
    REAL,
    TEACHER,
    TEXT,
    Record,
    batched,
    foreign_items,
    read_record,
    write_shard,
)
from .teacher import Teacher

Known = dict[str, tuple[Path, Record]]
Scaled = str | tuple[dict[str, Any], torch.Tensor]  # or why there is none
NOT_FINITE = "the latents are not finite"
READER = 2  # with another one that read these files, what it set aside is read again
DECODERS = 4  # threads that decode and scale images while the VAE computes
AHEAD, AHEAD_BYTES = 4 * DECODERS, 256 << 20  # image files that wait for them


@dataclass(frozen=True)
class Rank:
    number: int = 0
    world_size: int = 1
    local: int = 0  # on this machine
    progress: bool = True

    @staticmethod
    def from_environment() -> Rank:
        """As torchrun sets it; ranks need no connection to each other."""
        launch = Launch.of_this_process()
        return Rank(launch.rank, launch.world_size, launch.local_rank)

    @property
    def device(self) -> torch.device:
        return (
            torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")
        )

    def bar(self, total: int, done: int, what: str) -> tqdm[Any]:
        """Progress of this rank; the first one shows it for all, their shares being even."""
        hidden = not self.progress or self.number > 0 or total == done
        return progress(total=total, done=done, what=what, unit="item", hidden=hidden)


def identify(config: Config, data: DataSection) -> tuple[Path, Identity]:
    """The base model's folder, and the identity of what will be made with it.

    Raises ConfigError where a component is missing or the cache holds something else.
    """
    parts = ["text_encoder"]
    parts += ["vae"] * bool(data.images) + ["transformer"] * bool(data.teacher_images)
    folder = model_folder(config.model.path, [*parts, "tokenizer", "scheduler"])
    assert folder is not None  # it would have been downloaded
    identity = with_models(settings(config, data), folder, parts)
    for part in parts:
        if identity[part] is None:
            raise ConfigError(
                f"model.path: {folder / part} holds no weights (*.safetensors). Expected a "
                "model in diffusers layout, as `hf download Qwen/Qwen-Image-2512` makes it."
            )
    if not data.teacher_images:
        identity["teacher"] = None
    return folder, identity


class Builder:
    """One rank at work on a plan."""

    def __init__(
        self, config: Config, data: DataSection, plan: CachePlan, folder: Path, rank: Rank
    ) -> None:
        self.config, self.data, self.plan, self.folder, self.rank = config, data, plan, folder, rank
        self.family = family_of(config.model.path)
        self.dtype = getattr(torch, data.dtype)
        self.images = plan.my_images(rank.number, rank.world_size)
        self.prompts = plan.my_texts(rank.number, rank.world_size)
        self._known: dict[str, Known] = {}

    def run(self) -> None:
        self.real_images()
        self.texts()
        if self.data.teacher_images:
            self.teacher_images()

    def known(self, kind: str) -> Known:
        """What an earlier plan has made already; looked up once."""
        if kind not in self._known:
            self._known[kind] = foreign_items(self.data.cache, kind, self.plan.name)
        return self._known[kind]

    # Real images

    def real_images(self) -> None:
        todo = [chunk for chunk in self.images if not _is_done(chunk)]
        if not todo:
            return
        known = self.known(REAL)
        vae = load_vae(self.config.model.path).to(self.rank.device)
        total, left = (sum(len(c.names) for c in part) for part in (self.images, todo))
        bar = self.rank.bar(total, total - left, "real images")
        with bar, ThreadPoolExecutor(DECODERS) as pool:
            for chunk, samples in self._samples(todo):
                tensors, items, problems = {}, [], []
                source = self.plan.sources[chunk.source].label
                for sample, result in _ahead(pool, self._scaled, samples):
                    bar.update()
                    if isinstance(result, str):
                        problems.append(Problem(source, sample, result).line())
                        continue
                    item, pixels = result
                    key = item["key"]
                    if key not in known and f"{key}.mean" not in tensors:
                        mean, std = self._encode(vae, pixels)
                        if not (mean.isfinite().all() and std.isfinite().all()):
                            problems.append(Problem(source, sample, NOT_FINITE).line())
                            continue
                        tensors[f"{key}.mean"], tensors[f"{key}.std"] = mean, std
                    items.append(item | {"here": key not in known})
                self._write(chunk.path, tensors, items, problems, reader=READER)

    def _samples(self, todo: list[ImageChunk]) -> Iterator[tuple[ImageChunk, Iterator[Sample]]]:
        """Every chunk with its samples, to be taken in turn; each source is read in one pass."""
        for index in dict.fromkeys(chunk.source for chunk in todo):
            chunks = [chunk for chunk in todo if chunk.source == index]
            names = [name for chunk in chunks for name in chunk.names]
            samples = self.plan.sources[index].read(names)
            for chunk in chunks:
                yield chunk, islice(samples, len(chunk.names))

    def _scaled(self, sample: Sample) -> Scaled:
        """The item and its pixels, or the reason why there are none."""
        if sample.problem:
            return sample.problem
        try:
            image = decode_image(sample.image)
        except BROKEN_IMAGE as error:
            return f"cannot be decoded: {str(error) or type(error).__name__}"
        bucket = nearest(image.size, self.plan.buckets)
        factor = upscale(image.size, bucket)
        if factor > self.data.max_upscale:
            return (
                f"too small: {image.width}x{image.height} would grow by {factor:.2f} to cover "
                f"{bucket[0]}x{bucket[1]}; data.max_upscale allows {self.data.max_upscale:g}"
            )
        item = {
            "name": sample.name,
            "key": self.plan.real_key(sample.image, bucket),
            "bucket": list(bucket),
            "caption": sample.caption,
            "upscaled": factor > 1,
        }
        return item, fit(image, bucket)

    @torch.no_grad()
    def _encode(self, vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One image at a time, so that its latents do not depend on its neighbours."""
        images = to_unit(pixels[None].to(self.rank.device))
        mean, std = self.family.vae.encode(vae, images)
        return mean[0].to("cpu", self.dtype), std[0].to("cpu", self.dtype)

    # Prompts

    def texts(self) -> None:
        chunks = [*self.plan.alone, *(chunk for _, chunk in self.prompts)]
        captions = (self.plan.captions(read_record(chunk.path)) for chunk in self.images)
        chunks += [chunk for chunk in captions if chunk]
        chunks = list({chunk.path: chunk for chunk in chunks}.values())
        todo = [chunk for chunk in chunks if not chunk.path.exists()]
        if not todo:
            return
        known = self.known(TEXT)
        encoder = self._text_encoder()
        total, left = (sum(len(c.texts) for c in part) for part in (chunks, todo))
        with self.rank.bar(total, total - left, "prompts") as bar:
            for chunk in todo:
                self._embed(chunk, encoder, known, bar.update)

    def _text_encoder(self) -> TextEncoder:
        dtype = getattr(torch, self.config.model.dtype)
        return self.family.text_encoder(self.folder, self.rank.device, dtype)

    def _embed(
        self,
        chunk: TextChunk,
        encoder: TextEncoder,
        known: Known,
        advance: Callable[[int], object],
    ) -> None:
        reasons = {text: encoder.refuses(text) for text in chunk.texts}
        problems = [Problem("prompts", t, reason).line() for t, reason in reasons.items() if reason]
        kept = {text: encoder.cut(text) for text in chunk.texts if not reasons[text]}
        cut = {text: len(part) for text, part in kept.items() if part}
        keys = {text: self.plan.text_key(text) for text in chunk.texts if not reasons[text]}
        fresh = [text for text, key in keys.items() if key not in known]
        advance(len(chunk.texts) - len(fresh))
        fresh.sort(key=lambda text: (len(text), text))  # little padding
        tensors = {}
        for part in batched(fresh, self.data.text_batch):
            for text, embedding in zip(part, encoder.encode(part), strict=True):
                tensors[keys[text]] = embedding.to("cpu", self.dtype)
            advance(len(part))
        items = []
        for text, key in keys.items():
            length = len(tensors[key]) if key in tensors else known[key][1]["length"]
            items.append({"key": key, "here": key in tensors, "text": text, "length": length})
        self._write(chunk.path, tensors, items, problems, **({"cut": cut} if cut else {}))

    # The teacher's images

    def teacher_chunks(self) -> list[TeacherChunk]:
        chunks = []
        for index, _ in self.prompts:
            chunks += self.plan.teacher_of_prompts(index)
        for chunk in self.images:
            chunks += self.plan.teacher_of_images(chunk, read_record(chunk.path))
        return chunks

    def teacher_images(self) -> None:
        chunks = self.teacher_chunks()
        todo = [chunk for chunk in chunks if not chunk.path.exists()]
        if not todo:
            return
        known = self.known(TEACHER)
        negative = self._embedding(self.plan.negative.path, self.data.negative)
        assert negative is not None
        teacher = Teacher(
            self.config, self.folder, self.data.teacher_steps, negative, self.rank.device
        )
        total, left = (sum(len(c.units) for c in part) for part in (chunks, todo))
        with self.rank.bar(total, total - left, "teacher images") as bar:
            for chunk in todo:
                tensors, items, problems = {}, [], []
                for unit in chunk.units:
                    bar.update()
                    key = self.plan.teacher_key(unit)
                    prompt = self._embedding(chunk.texts, unit.text)
                    if prompt is None:  # it was set aside as a prompt
                        continue
                    if key not in known and f"{key}.x0" not in tensors:
                        x0 = teacher.draw(prompt, unit.bucket, unit.seed())
                        if not x0.isfinite().all():
                            problems.append(Problem("teacher", unit.text, NOT_FINITE).line())
                            continue
                        tensors[f"{key}.x0"] = x0.to("cpu", self.dtype)
                    item = {"key": key, "here": key not in known, "text": unit.text}
                    items.append(item | {"bucket": list(unit.bucket)})
                self._write(chunk.path, tensors, items, problems)

    def _embedding(self, path: Path, text: str) -> torch.Tensor | None:
        """From a shard of this plan, or from the one of an earlier plan that it refers to."""
        key = self.plan.text_key(text)
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                return file.get_tensor(key)
        if all(item["key"] != key for item in read_record(path)["items"]):
            return None
        home, _ = self.known(TEXT)[key]
        with safe_open(home, framework="pt") as file:
            return file.get_tensor(key)

    def _write(
        self,
        path: Path,
        tensors: dict[str, torch.Tensor],
        items: list[dict[str, Any]],
        problems: list[dict[str, str]],
        **more: Any,
    ) -> None:
        record = {"plan": self.plan.name, "items": items, "problems": problems} | more
        write_shard(path, tensors, record)


def _is_done(chunk: ImageChunk) -> bool:
    """Whether all of its images are in the cache, as far as this version can read them."""
    if not chunk.path.exists():
        return False
    record = read_record(chunk.path)
    return not record["problems"] or record.get("reader") == READER


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Sample], Scaled], samples: Iterator[Sample]
) -> Iterator[tuple[str, Scaled]]:
    """What becomes of each sample, in order, and the name for its problems.

    Some are worked on ahead, but no more than AHEAD, nor than AHEAD_BYTES.
    """
    waiting: deque[tuple[str, int, Future[Scaled]]] = deque()
    for sample in samples:
        size = len(sample.image)
        while len(waiting) >= AHEAD or (
            waiting and size + sum(s for _, s, _ in waiting) > AHEAD_BYTES
        ):
            name, _, future = waiting.popleft()
            yield name, future.result()
        name = sample.culprit or sample.name
        waiting.append((name, size, pool.submit(work, sample)))
    for name, _, future in waiting:
        yield name, future.result()
