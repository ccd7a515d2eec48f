"""What training reads of a cache: memory-mapped, a function of the random numbers alone.

A batch has one size (bucket), drawn by how many images it holds. What its rows are depends on the
stage that the step belongs to:

    "real"      text = captions of x0, the latents of real images drawn from their posteriors; no
                teacher_x0. Without real images: "teacher"
    "teacher"   text = prompts of x0 = teacher_x0, the latents of the teacher's images. Without
                any: "any"
    "any"       text = any prompts and captions; x0 is an image of that size, of another prompt.
                Without real images x0 = teacher_x0 are the teacher's; without those either, zeros
                of the right shape
    "mixed"     as "any", with teacher_x0 beside real images
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ..config import Config, ConfigError, DataSection
from ..models.family import DEFAULT, family, family_of
from ..models.hub import model_folder
from ..models.text import Text
from ..models.vae import Autoencoder
from ..stages import AnyStage, GANSection, stage_ranges
from ..utils.rng import Rng
from .batch import HELD_SHARE, Batch, Examples
from .fingerprint import (
    IDENTITY_FILE,
    read_identity,
    require_same,
    settings,
    text_key,
    with_models,
)
from .index import INDEX_FILE
from .shards import REAL, TEACHER, read_record

PAIRED_METHODS = ("progressive", "consistency", "pcm")  # start from noised x0 of their prompts
Rows = Literal["real", "teacher", "any", "mixed"]
OPEN_FILES = 256


@dataclass(frozen=True)
class Table:
    """Images of one kind as columns; `rows[b]` are those of bucket b."""

    files: list[str]
    key: list[str]
    file: list[int]
    text: torch.Tensor  # [N]
    rows: list[torch.Tensor]

    @staticmethod
    def of(columns: dict[str, Any], buckets: int) -> Table:
        bucket = torch.tensor(columns["bucket"], dtype=torch.long)
        return Table(
            columns["files"],
            columns["key"],
            columns["file"],
            torch.tensor(columns["text"], dtype=torch.long),
            [(bucket == b).nonzero()[:, 0] for b in range(buckets)],
        )

    def counts(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def without(self, texts: Sequence[int]) -> Table | None:
        """Less the images of these texts; None where that is more than one in HELD_SHARE, or all
        of a bucket.
        """
        gone = torch.isin(self.text, torch.tensor(texts, dtype=torch.long))
        rows = [members[~gone[members]] for members in self.rows]
        emptied = any(len(a) and not len(b) for a, b in zip(self.rows, rows, strict=True))
        if emptied or int(gone.sum()) * HELD_SHARE > len(gone):
            return None
        return replace(self, rows=rows)

    def __len__(self) -> int:
        return len(self.key)


def rows_of(stage: AnyStage) -> Rows:
    """What a stage's batches have to be. A discriminator of latents reads the prompts too."""
    if stage.method in PAIRED_METHODS:
        return "real"
    gan = getattr(stage, "gan", None)
    if gan is not None and gan.features == "latent":
        return "real" if gan.real_ratio > 0 else "teacher"
    return "mixed" if gan is not None and gan.real_ratio < 1 else "any"


class PreparedData:
    """A finished cache. Holds the index in memory, and no embedding or latent beyond a batch.

    stages: for each stage the step that it ends before, and its rows; vae: what made the latents.
    """

    def __init__(
        self,
        cache: Path,
        stages: Sequence[tuple[int, Rows]] = ((1, "real"),),
        vae: Autoencoder | None = None,
    ) -> None:
        self.cache, self.vae = cache, vae or family(DEFAULT).vae
        index = read_index(cache)
        self.sizes: list[tuple[int, int]] = [(w, h) for w, h in index["identity"]["buckets"]]
        self.real = Table.of(index[REAL], len(self.sizes))
        self.teacher = Table.of(index[TEACHER], len(self.sizes))
        self._texts, self._identity = index["texts"], index["identity"]
        self._negative: int = index["negative"]
        self._lengths = torch.tensor(self._texts["length"])
        captions = self.real.text if len(self.real) else self.teacher.text
        prompts = torch.tensor(index["prompts"], dtype=torch.long)
        self._first = list(dict.fromkeys(torch.cat([prompts, captions]).tolist()))
        self._from_files = frozenset(index["prompts"])
        self._pool = torch.tensor(self._first, dtype=torch.long).unique()
        self._open = lru_cache(OPEN_FILES)(partial(safe_open, framework="pt"))
        self._stages = [(end, self._possible(rows)) for end, rows in stages]
        self._weigh()

    def _weigh(self) -> None:
        self._weights = {rows: self._bucket_weights(rows) for _, rows in self._stages}

    @property
    def has_images(self) -> bool:
        return len(self.real) + len(self.teacher) > 0

    @property
    def negative(self) -> Text:
        return Text(self._embedding(self._negative)[None])

    @property
    def trained_sizes(self) -> tuple[tuple[int, int], ...]:
        """Those that batches of some stage can have."""
        weights = torch.stack(list(self._weights.values())).sum(0)
        return tuple(size for size, w in zip(self.sizes, weights.tolist(), strict=True) if w)

    def rows_at(self, step: int) -> Rows:
        return next((rows for end, rows in self._stages if step < end), self._stages[-1][1])

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        """`batch_size` samples of this rank; all ranks draw the same bucket."""
        kind = self.rows_at(rng.step)
        generator = rng.generator("data/bucket")
        bucket = int(torch.multinomial(self._weights[kind], 1, generator=generator))
        everyone = replace(rng, rank=0, world_size=1)  # draws the rows of all ranks
        count, mine = (
            batch_size * rng.world_size,
            slice(rng.rank * batch_size, (rng.rank + 1) * batch_size),
        )

        def chosen(table: Table, stream: str) -> torch.Tensor:
            members = table.rows[bucket]
            return members[everyone.integers(stream, count, len(members))]

        x0 = torch.zeros(batch_size, *self.latent_shape(bucket))
        teacher_x0 = None
        if len(self.teacher) and (kind in ("teacher", "mixed") or not len(self.real)):
            images = chosen(self.teacher, "data/teacher")
            texts = self.teacher.text[images]
            x0 = teacher_x0 = self._teacher_x0(images[mine])
        if kind != "teacher" and len(self.real):
            images = chosen(self.real, "data/real")
            texts = self.real.text[images]
            x0 = self._posterior(images[mine], rng.normal("data/posterior", tuple(x0.shape)))
        if kind in ("any", "mixed"):
            texts = self._pool[everyone.integers("data/prompt", count, len(self._pool))]
        return Batch(x0, self._padded(texts, mine), teacher_x0)

    def examples(self, count: int) -> Examples:
        """Prompts in the order of their files, then captions; in the size of most images."""
        rows = self._first[:count]
        return self._examples(rows, [self._prompt(row) for row in rows])

    def examples_of(self, prompts: Sequence[str]) -> Examples | None:
        """These prompts; None unless all of them are in the cache."""
        rows = self._rows_of(prompts)
        return None if None in rows else self._examples([r for r in rows if r is not None], prompts)

    def _examples(self, rows: list[int], prompts: Sequence[str]) -> Examples:
        counts = self.real.counts() if len(self.real) else self.teacher.counts()
        texts = tuple(Text(self._embedding(row)[None]) for row in rows)
        return Examples(tuple(prompts), texts, self.sizes[counts.index(max(counts))])

    def _rows_of(self, prompts: Sequence[str]) -> list[int | None]:
        """By their words; None for what is not there."""
        keys = [text_key(self._identity, prompt) for prompt in prompts]
        wanted = set(keys)
        rows = {key: row for row, key in enumerate(self._texts["key"]) if key in wanted}
        return [rows.get(key) for key in keys]

    # Prompts that are not trained on

    def to_hold_out(self, count: int) -> list[str]:
        """By the hashes of their words, those of prompt files first."""
        keys = self._texts["key"]
        held: list[int] = []
        for row in sorted(self._first, key=lambda r: (r not in self._from_files, keys[r])):
            if len(held) == count or (len(held) + 1) * HELD_SHARE > len(self._pool):
                break
            if self._tables_without([*held, row]):
                held.append(row)
        return [self._prompt(row) for row in held] if len(held) == count else []

    def without(self, prompts: Sequence[str]) -> PreparedData | None:
        """Less these prompts and their images; None where too little would be left."""
        held = [row for row in self._rows_of(prompts) if row is not None]
        mine = torch.isin(self._pool, torch.tensor(held, dtype=torch.long))
        tables = self._tables_without(held)
        if tables is None or int(mine.sum()) * HELD_SHARE > len(self._pool):
            return None
        rest = copy(self)
        rest.real, rest.teacher = tables
        rest._pool = self._pool[~mine]
        rest._weigh()
        return rest

    def _tables_without(self, rows: list[int]) -> tuple[Table, Table] | None:
        real, teacher = self.real.without(rows), self.teacher.without(rows)
        return (real, teacher) if real is not None and teacher is not None else None

    def latent_shape(self, bucket: int) -> tuple[int, int, int]:
        width, height = self.sizes[bucket]
        return self._channels, height // self.vae.pixels, width // self.vae.pixels

    @property
    def _channels(self) -> int:
        for table, suffix in ((self.real, "mean"), (self.teacher, "x0")):
            if len(table):
                shape = self._file(table.files[table.file[0]]).get_slice(f"{table.key[0]}.{suffix}")
                return int(shape.get_shape()[0])
        return self.vae.channels

    def _possible(self, rows: Rows) -> Rows:
        if rows == "real" and not len(self.real):
            rows = "teacher"
        return "any" if rows == "teacher" and not len(self.teacher) else rows

    def _bucket_weights(self, rows: Rows) -> torch.Tensor:
        """Images per bucket; where both kinds are needed, only buckets that hold both."""
        real, teacher = self.real.counts(), self.teacher.counts()
        counts = teacher if rows == "teacher" or not len(self.real) else real
        if not self.has_images:
            counts = [1] * len(self.sizes)
        elif rows == "mixed" and len(self.real) and len(self.teacher):
            counts = [r if t else 0 for r, t in zip(real, teacher, strict=True)]
        if not any(counts):
            raise ConfigError(
                f"data.cache: {self.cache}: no size has both real images and images by the "
                f"teacher (real: {real}, teacher: {teacher} of {self.sizes}). Raise "
                "data.teacher_images, or list the sizes of the real images in data.buckets."
            )
        return torch.tensor(counts, dtype=torch.float64)

    def _file(self, name: str) -> Any:
        return self._open(self.cache / name)

    def _posterior(self, rows: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        table, samples = self.real, []
        for i, noise in zip(rows.tolist(), eps, strict=True):
            file, key = self._file(table.files[table.file[i]]), table.key[i]
            mean, std = (file.get_tensor(f"{key}.{name}").float() for name in ("mean", "std"))
            samples.append(mean + std * noise)
        return torch.stack(samples)

    def _teacher_x0(self, rows: torch.Tensor) -> torch.Tensor:
        table = self.teacher
        return torch.stack(
            [
                self._file(table.files[table.file[i]]).get_tensor(f"{table.key[i]}.x0").float()
                for i in rows.tolist()
            ]
        )

    def _embedding(self, row: int) -> torch.Tensor:
        file = self._file(self._texts["files"][self._texts["file"][row]])
        return file.get_tensor(self._texts["key"][row]).float()

    def _prompt(self, row: int) -> str:
        """Its words; only the record of the shard knows them."""
        record = read_record(self.cache / self._texts["files"][self._texts["file"][row]])
        key = self._texts["key"][row]
        return next(item["text"] for item in record["items"] if item["key"] == key)

    def _padded(self, texts: torch.Tensor, mine: slice) -> Text:
        """This rank's rows, padded to the longest text of all ranks, which wait for it anyhow."""
        lengths = self._lengths[texts]
        longest = int(lengths.max())
        rows = [self._embedding(row) for row in texts[mine].tolist()]
        embeds = torch.stack(
            [torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]
        )
        if int(lengths.min()) == longest:
            return Text(embeds)
        return Text(embeds, torch.arange(longest) < lengths[mine][:, None])


def read_index(cache: Path) -> dict[str, Any]:
    """Raises ConfigError where there is no finished cache."""
    path = cache / INDEX_FILE
    if not path.is_file():
        state = (
            f"was not finished ({INDEX_FILE} is missing); run the same `turbo-distill prepare` "
            "again, it continues"
            if (cache / IDENTITY_FILE).is_file()
            else "holds no prepared data; make it with `turbo-distill prepare CONFIG`"
        )
        raise ConfigError(f"data.cache: {cache} {state}.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(
            f"{path}: is not JSON ({error}). Delete this file and run `turbo-distill prepare` "
            "again; it makes the file anew from what is there."
        ) from error


def open_prepared(config: Config, data: DataSection) -> PreparedData:
    """The cache that a configuration names, checked against it.

    Raises ConfigError: not there or not finished, made with another model or other settings, or
    without the images that a stage needs.
    """
    read_index(data.cache)
    found = read_identity(data.cache) or {}
    wanted = settings(config, data)
    folder = model_folder(config.model.path, ("text_encoder", "vae", "transformer"), download=False)
    if folder is not None:
        parts = ["vae", "text_encoder", *(["transformer"] if found.get("transformer") else [])]
        wanted = with_models(wanted, folder, parts)
    require_same(wanted, found, data.cache)
    stages = [(end, rows_of(stage)) for stage, _, end in stage_ranges(config.stages)]
    vae = family_of(config.model.path).vae
    prepared = PreparedData(data.cache, stages, vae)
    needing = [s.method for s in config.stages if s.method in PAIRED_METHODS]
    if needing and not prepared.has_images:
        raise ConfigError(
            f"data.cache: {data.cache} holds prompts only, but the stage {needing[0]!r} "
            "starts from images. Add data.images or data.teacher_images and run `turbo-distill "
            "prepare` again."
        )
    for stage in config.stages:
        gan = getattr(stage, "gan", None)
        if isinstance(gan, GANSection) and gan.real_ratio > 0 and not len(prepared.real):
            raise ConfigError(
                f"stages: {stage.method}: gan.real_ratio: expected 0 for a cache without real "
                f"images, found {gan.real_ratio:g}. Add data.images and run "
                "`turbo-distill prepare` again, or set it to 0."
            )
    return prepared
