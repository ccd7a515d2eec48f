"""The index of a finished cache: which texts and images there are, and in which file each lies.

CACHE/index.json is a function of the plan and the shards; every rank that finds all shards in
place writes the same bytes. CACHE/quarantine.jsonl lists what could not be used, or not whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..contract.shown import plain, shown
from .chunks import CachePlan, TeacherChunk, TextChunk
from .fingerprint import Identity
from .sample import Problem
from .shards import (
    KINDS,
    REAL,
    TEACHER,
    TEXT,
    Record,
    foreign_items,
    json_lines,
    read_record,
    remove_leftovers,
    write_bytes,
)

INDEX_FILE, QUARANTINE_FILE = "index.json", "quarantine.jsonl"


@dataclass(frozen=True)
class CacheReport:
    prompts: int
    texts: int
    real_images: int
    teacher_images: int
    upscaled: int  # of the real images, within the limit
    set_aside: int
    buckets: dict[str, int]  # real images, or without any the teacher's
    cut: int = 0  # texts of which the end is not embedded

    def lines(self, cache: Path) -> str:
        sizes = ", ".join(f"{size}: {count}" for size, count in self.buckets.items())
        text = (
            f"{self.texts} texts embedded, {self.prompts} of them from prompt files\n"
            f"{self.real_images} real images, {self.upscaled} of them scaled up\n"
            f"{self.teacher_images} images by the teacher\n" + f"sizes: {sizes}\n" * bool(sizes)
        )
        if told := self.told():
            text += f"{told}, see {cache / QUARANTINE_FILE}\n"
        return text + f"{cache / INDEX_FILE}\n"

    def told(self) -> str:
        """How many items the quarantine list has; empty if none."""
        aside = f"{self.set_aside} items set aside" * bool(self.set_aside)
        return ", ".join(filter(None, (aside, f"{self.cut} prompts cut" * bool(self.cut))))


def merge(plan: CachePlan, identity: Identity) -> CacheReport | None:
    """Writes index and quarantine list if all shards are there; None if other ranks still work.

    Raises ConfigError if nothing usable is left.
    """
    collected = _collect(plan)
    if collected is None:
        return None
    problems = [p.line() for p in plan.problems]
    for chunk in plan.images:  # named as they are now: the folder may have moved
        source = {"source": plan.sources[chunk.source].label}
        problems += [p | source for p in collected[REAL][chunk.path]["problems"]]
    for kind in (TEXT, TEACHER):
        problems += [p for record in collected[kind].values() for p in record["problems"]]
    problems = list({json.dumps(p, sort_keys=True): p for p in problems}.values())
    cut = _cut(collected[TEXT].values())
    write_bytes(plan.cache / QUARANTINE_FILE, json_lines(problems + cut))
    index, report = _index(plan, identity, collected, len(problems), len(cut))
    _require_something(plan, report, problems)
    write_bytes(plan.cache / INDEX_FILE, json.dumps(index, sort_keys=True).encode())
    remove_leftovers(plan.cache)
    return report


def _cut(records: Iterable[Record]) -> list[dict[str, str]]:
    """The texts that are embedded in part, with those that are the same to the model."""
    ends: dict[str, tuple[int, int]] = {}  # letters and tokens that are embedded
    for record in records:
        lengths = {item["text"]: item["length"] for item in record["items"]}
        ends |= {text: (end, lengths[text]) for text, end in record.get("cut", {}).items()}
    same = Counter(text[:end] for text, (end, _) in ends.items())
    lines = []
    for text, (end, tokens) in ends.items():
        twins = same[text[:end]] - 1
        reason = f"cut: {tokens:,} tokens are embedded, and nothing after {text[:end][-30:]!r}"
        reason += f"; equal up to there: {twins} others" * bool(twins)
        lines.append(Problem("prompts", text, reason).line())
    return lines


def _collect(plan: CachePlan) -> dict[str, dict[Path, Record]] | None:
    """The records of all shards of the plan, in its order."""
    records: dict[str, dict[Path, Record]] = {kind: {} for kind in KINDS}
    texts: list[TextChunk] = [*plan.alone, *plan.texts]
    teachers: list[TeacherChunk] = []
    for chunk in plan.images:
        if not chunk.path.exists():
            return None
        record = records[REAL][chunk.path] = read_record(chunk.path)
        captions = plan.captions(record)
        texts += [captions] if captions else []
        if plan.wanted:
            teachers += plan.teacher_of_images(chunk, record)
    if plan.wanted:
        for index in range(len(plan.texts)):
            teachers += plan.teacher_of_prompts(index)
    for kind, paths in ((TEXT, [c.path for c in texts]), (TEACHER, [c.path for c in teachers])):
        for path in paths:
            if not path.exists():
                return None
            records[kind][path] = read_record(path)
    return records


class _Columns:
    """Items of one kind as columns, each key once per row that refers to it."""

    def __init__(self, plan: CachePlan, kind: str, records: dict[Path, Record]) -> None:
        self.homes = {
            item["key"]: path
            for path, record in reversed(records.items())
            for item in record["items"]
            if item["here"]
        }
        if any(item["key"] not in self.homes for r in records.values() for item in r["items"]):
            foreign = foreign_items(plan.cache, kind, plan.name)
            self.homes = {key: path for key, (path, _) in foreign.items()} | self.homes
        paths = sorted(set(self.homes.values()))
        self.files = [path.relative_to(plan.cache).as_posix() for path in paths]
        self._number = {path: i for i, path in enumerate(paths)}

    def file(self, key: str) -> int:
        return self._number[self.homes[key]]


def _index(
    plan: CachePlan,
    identity: Identity,
    collected: dict[str, dict[Path, Record]],
    problems: int,
    cut: int,
) -> tuple[dict[str, Any], CacheReport]:
    # All items by kind, and texts by their words
    columns = {kind: _Columns(plan, kind, records) for kind, records in collected.items()}
    items = {
        kind: [item for record in records.values() for item in record["items"]]
        for kind, records in collected.items()
    }
    texts = {item["text"]: item for item in items[TEXT]}
    rows = {text: row for row, text in enumerate(texts)}
    if plan.negative.texts[0] not in rows:
        raise ConfigError(
            f"data.negative: {shown(plan.negative.texts[0])} cannot be embedded by this model: "
            f"{collected[TEXT][plan.negative.path]['problems'][0]['reason']}"
        )
    # Images as columns
    order = {tuple(bucket): i for i, bucket in enumerate(plan.buckets)}

    def images(kind: str, caption: str) -> dict[str, Any]:
        usable = [item for item in items[kind] if item[caption] in rows]
        return {
            "files": columns[kind].files,
            "key": [item["key"] for item in usable],
            "file": [columns[kind].file(item["key"]) for item in usable],
            "bucket": [order[tuple(item["bucket"])] for item in usable],
            "text": [rows[item[caption]] for item in usable],
        }

    real, teacher = images(REAL, "caption"), images(TEACHER, "text")
    prompts = [rows[text] for text in plan.prompts if text in rows]

    # What a person is told, and what training reads
    trained = real if real["key"] else teacher
    report = CacheReport(
        prompts=len(prompts),
        texts=len(texts),
        real_images=len(real["key"]),
        teacher_images=len(teacher["key"]),
        upscaled=sum(item["upscaled"] for item in items[REAL]),
        set_aside=problems,
        buckets={
            f"{width}x{height}": trained["bucket"].count(i)
            for (width, height), i in order.items()
            if i in trained["bucket"]
        },
        cut=cut,
    )
    index = {
        "identity": identity,
        "counts": asdict(report),
        "texts": {
            "files": columns[TEXT].files,
            "key": [item["key"] for item in texts.values()],
            "file": [columns[TEXT].file(item["key"]) for item in texts.values()],
            "length": [item["length"] for item in texts.values()],
        },
        "negative": rows[plan.negative.texts[0]],
        "prompts": prompts,
        REAL: real,
        TEACHER: teacher,
    }
    return index, report


def _require_something(
    plan: CachePlan, report: CacheReport, problems: list[dict[str, str]]
) -> None:
    reasons = (f"{plain(p['item']) or p['source']}: {p['reason']}" for p in problems)
    first = next((f" The first reason: {reason}." for reason in reasons), "")
    where = f" All reasons: {plan.cache / QUARANTINE_FILE}."
    if plan.image_count and not report.real_images:
        raise ConfigError(
            f"data.images: none of the {plan.image_count} images can be used.{first}{where}"
        )
    if plan.prompts and not report.prompts:
        raise ConfigError(
            f"data.prompts: none of the {len(plan.prompts)} prompts can be used.{first}{where}"
        )
