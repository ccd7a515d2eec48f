"""The work of `prepare` as a list of chunks that depends on the inputs alone.

Chunk n belongs to rank n modulo the number of ranks, with all that follows from it: the captions
of its images and the teacher's images of its prompts. So no rank ever waits for another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import Config, ConfigError, DataSection
from ..contract.shown import plain
from ..models.sizes import Size
from .fingerprint import Identity, buckets_of, text_key, text_salt
from .prompts import read_prompts
from .sample import ImageSource
from .shards import REAL, TEACHER, TEXT, Record, batched, hash_of, shard_path
from .sources import open_images

TEACHER_SHARD = 8  # images per file; each takes many seconds


@dataclass(frozen=True)
class ImageChunk:
    number: int
    source: int
    names: tuple[str, ...]
    path: Path
    first: int  # position of its first image among all


@dataclass(frozen=True)
class TextChunk:
    texts: tuple[str, ...]
    path: Path


@dataclass(frozen=True)
class Unit:
    """One image for the teacher to draw."""

    text: str
    bucket: Size
    copy: str  # tells images of one prompt apart

    def seed(self) -> int:
        return int(hash_of("noise", self.text, self.bucket, self.copy)[:15], 16)


@dataclass(frozen=True)
class TeacherChunk:
    units: tuple[Unit, ...]
    texts: Path  # shard with the embeddings
    path: Path


class CachePlan:
    """Lists all inputs; reads no image."""

    def __init__(self, config: Config, data: DataSection, identity: Identity) -> None:
        self.cache, self.buckets = data.cache, buckets_of(config, data)
        self.wanted, self.shard = data.teacher_images, data.shard
        self._identity, self._text_salt = identity, text_salt(identity)
        self._real_salt = [identity.get(k) for k in ("version", "vae", "dtype")]
        self._teacher_salt = [
            *self._text_salt,
            *(identity.get(k) for k in ("transformer", "teacher", "negative")),
        ]
        self.sources: list[ImageSource] = [
            source
            for path in data.images
            for source in open_images(path, data.caption_key, data.cache)
        ]
        self.images: list[ImageChunk] = []
        self.prompts, self.problems = read_prompts(data.prompts, data.caption_key)
        self.image_count = 0
        for index, source in enumerate(self.sources):
            entries, problems = source.entries()
            self.problems += problems
            for part in batched(entries, data.shard):
                name = hash_of(self._real_salt, self.buckets, data.max_upscale, part)
                path = shard_path(self.cache, REAL, name)
                names = tuple(name for name, _ in part)
                number = len(self.images)
                self.images.append(ImageChunk(number, index, names, path, self.image_count))
                self.image_count += len(part)
        if data.images and not self.image_count:
            last = self.problems[-1:]  # without an item it is about the whole source
            first = "".join(f" {p.source}: {f'{plain(p.item)} {p.reason}'.strip()}." for p in last)
            raise ConfigError(f"data.images: holds no image that can be used.{first}")
        self._given = frozenset(self.prompts)
        self.negative = self._text_chunk([data.negative])
        self.shown = self._shown(config)
        self.texts = [self._text_chunk(part) for part in batched(self.prompts, data.shard)]
        self.name = hash_of([c.path.stem for c in (*self.images, *self.texts)], self.wanted)

    def _shown(self, config: Config) -> TextChunk | None:
        """Prompts for previews alone. They are embedded, and no part of the training data."""
        file = config.preview.prompt_file
        if file is None:
            return None
        prompts, problems = read_prompts([file], None, "preview.prompt_file")
        self.problems += problems
        return self._text_chunk(prompts)

    @property
    def alone(self) -> list[TextChunk]:
        """Texts that no sample has. They are few, and every rank sees to all of them."""
        return [self.negative, *([self.shown] if self.shown else [])]

    def text_key(self, text: str) -> str:
        return text_key(self._identity, text)

    def real_key(self, image: bytes, bucket: Size) -> str:
        return hash_of(REAL, self._real_salt, bucket, image)

    def teacher_key(self, unit: Unit) -> str:
        return hash_of(TEACHER, self._teacher_salt, unit.text, unit.bucket, unit.copy)

    def my_images(self, rank: int, world_size: int) -> list[ImageChunk]:
        return self.images[rank::world_size]

    def my_texts(self, rank: int, world_size: int) -> list[tuple[int, TextChunk]]:
        """Numbered on from the image chunks, so that ranks get even shares."""
        first = len(self.images)
        numbered = enumerate(self.texts)
        return [(i, chunk) for i, chunk in numbered if (first + i) % world_size == rank]

    def captions(self, record: Record) -> TextChunk | None:
        """What is to be embedded for the images of one shard; prompts of files already are."""
        texts = dict.fromkeys(item["caption"] for item in record["items"])
        left = [text for text in texts if text not in self._given]
        return self._text_chunk(left) if left else None

    def _text_chunk(self, texts: list[str]) -> TextChunk:
        name = hash_of(self._text_salt, texts)
        return TextChunk(tuple(texts), shard_path(self.cache, TEXT, name))

    def teacher_of_prompts(self, index: int) -> list[TeacherChunk]:
        """The teacher's images of one chunk of prompts."""
        units, count = [], len(self.prompts)
        chunk = self.texts[index]
        first = index * self.shard
        for lap in range(-(-self.wanted // count)):
            for offset, text in enumerate(chunk.texts):
                if lap * count + first + offset < self.wanted:
                    number = int(hash_of("bucket", text, lap), 16) % len(self.buckets)
                    units.append(Unit(text, self.buckets[number], str(lap)))
        return self._teacher_chunks(units, chunk.path)

    def teacher_of_images(self, chunk: ImageChunk, record: Record) -> list[TeacherChunk]:
        """The teacher's images for the captions of one shard of images, in the images' buckets;
        none where prompts were given.
        """
        texts = self.captions(record)
        if self.prompts or texts is None:
            return []
        units, items = [], {item["name"]: item for item in record["items"]}
        for lap in range(-(-self.wanted // self.image_count)):
            for offset, name in enumerate(chunk.names):
                item = items.get(name)
                if item and lap * self.image_count + chunk.first + offset < self.wanted:
                    copy = f"{item['key']}/{lap}"
                    units.append(Unit(item["caption"], tuple(item["bucket"]), copy))
        return self._teacher_chunks(units, texts.path)

    def _teacher_chunks(self, units: list[Unit], texts: Path) -> list[TeacherChunk]:
        chunks = []
        for part in batched(units, TEACHER_SHARD):
            name = hash_of(self._teacher_salt, [[u.text, u.bucket, u.copy] for u in part])
            chunks.append(TeacherChunk(tuple(part), texts, shard_path(self.cache, TEACHER, name)))
        return chunks
