"""What may change when a run is continued, and what would make its state meaningless.

A checkpoint is weights of one shape on one base, at a place in a list of stages. That is kept; all
else may be another from here on: more steps, further stages, rates, data, previews.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..config import Config
from ..stages import AnyStage, DMD2Stage, stage_ranges

ABSENT = "(absent)"
# Of a stage that is under way: what its optimisers' and discriminator's state was made for
STRUCTURE = ("method", "gan", "gan.features", "gan.layers", "gan.width")
BASE = ("model.path", "model.loras")
# What candidates of `select: best` were drawn from, and judged by
JUDGED = ("preview.prompts", "preview.images", "preview.seed", "preview.teacher", "guidance.",
          "gates.clip")  # fmt: skip

Change = tuple[str, Any, Any]  # key, before, after


def changes(old: Config, new: Config) -> list[Change]:
    """Every key whose value differs, but for where and on how many processes it runs; `batch` and
    `accumulate` count as the samples of one update on all ranks.
    """
    return _different(_flat(_values(old)), _flat(_values(new)))


def differences(old: Config, new: Config) -> list[str]:
    """`changes` for people, one line each; a stage that only one of the two has is one line."""
    shared = min(len(old.stages), len(new.stages))
    further = tuple(f"stages.{i}." for i in range(shared, max(len(old.stages), len(new.stages))))
    lines = [_line(change) for change in changes(old, new) if not change[0].startswith(further)]
    gone = (_line((f"stages.{i}", _shown(s), ABSENT)) for i, s in _beyond(old, shared))
    added = (_line((f"stages.{i}", ABSENT, _shown(s))) for i, s in _beyond(new, shared))
    return [*lines, *gone, *added]


def _beyond(config: Config, shared: int) -> Iterator[tuple[int, AnyStage]]:
    yield from list(enumerate(config.stages))[shared:]


def _shown(stage: AnyStage) -> str:
    return f"{stage.label}, {stage.steps} steps"


def refusals(old: Config, new: Config, done: int, same: Collection[str] = ()) -> list[str]:
    """Lines that say why `new` cannot go on from a checkpoint of `old` after `done` steps.

    same: keys that name the same content, wherever it lies by now.
    """
    if not done:
        return []
    found = [
        f"{_line(change)} (another base)"
        for change in changes(old, new)
        if any(_under(change[0], key) and key not in same for key in BASE)
    ]
    found += [f"{_line(c)} (the weights have that shape)" for c in _adapter(old, new, done)]
    sampling = (_flat(_sampling(config), "spec") for config in (old, new))
    found += [f"{_line(c)} (the student was trained for it)" for c in _different(*sampling)]
    return [*found, *_stages(old, new, done)]


def rejudged(old: Config, new: Config, same: Collection[str] = ()) -> bool:
    """Whether candidates of `select: best` from before could not be compared with those to come."""
    return any(
        key.startswith(JUDGED) or (_under(key, "data") and "data.cache" not in same)
        for key, _, _ in changes(old, new)
    )


def _adapter(old: Config, new: Config, done: int) -> list[Change]:
    def shape(config: Config) -> dict[str, Any]:
        adapter = config.adapter
        values = {"rank": adapter.rank, "alpha": float(adapter.alpha or adapter.rank),
                  "modulation": adapter.modulation}  # fmt: skip
        fake = any(isinstance(s, DMD2Stage) for s, begin, _ in stage_ranges(old.stages)
                   if begin < done)  # fmt: skip
        return values | ({"fake_rank": adapter.fake_rank or adapter.rank} if fake else {})

    return _different(_flat(shape(old), "adapter"), _flat(shape(new), "adapter"))


def _sampling(config: Config) -> dict[str, Any]:
    values = config.spec.schedule
    nodes = [float(node) for node in values.pop("nodes")]
    return {"nodes": nodes, "shift": values.get("shift"), "terminal": values.get("terminal"),
            "sampler": config.spec.sampler}  # fmt: skip


def _stages(old: Config, new: Config, done: int) -> Iterator[str]:
    """Stages that have begun stay where they are, what is finished as it was."""
    if new.total_steps < done:
        yield f"  stages: {old.total_steps} steps in all -> {new.total_steps} ({done} are done)"
        return
    after = list(stage_ranges(new.stages))
    ranks = (old.engine.world or 1, new.engine.world or 1)
    for i, (stage, begin, end) in enumerate(stage_ranges(old.stages)):
        if begin >= done:
            return
        where = f"stages.{i}"
        if i >= len(after):
            yield f"  {where}: {stage.method} -> {ABSENT} ({done - begin} steps of it are done)"
            return
        other, _, new_end = after[i]
        different = _different(_flat(_stage(stage, ranks[0]), where), _flat(_stage(other, ranks[1]),
                                                                           where))  # fmt: skip
        under_way = done < end or (done == end and new_end > end)
        if under_way:
            different = [c for c in different if c[0].removeprefix(f"{where}.") in STRUCTURE]
            if new_end < done:
                different.append((f"{where}.steps", stage.steps, other.steps))
        reason = f"{done - begin} steps of it are done" if under_way else "it is finished"
        yield from (f"{_line(change)} ({reason})" for change in different)


def _values(config: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json", exclude={"run_dir", "engine"})
    values["stages"] = [_stage(stage, config.engine.world or 1) for stage in config.stages]
    return values


def _stage(stage: AnyStage, ranks: int) -> dict[str, Any]:
    """Samples by what an update gets, however ranks and micro-batches divide them. A role that
    learns on a share of the micro-batches gets others where they are divided in another way.
    """
    values = stage.model_dump(mode="json")
    samples = values.pop("batch") * ranks
    if not (values.get("fake_accumulate") or (values.get("gan") or {}).get("accumulate")):
        samples *= values.pop("accumulate")
    return values | {"samples per update": samples}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    return {
        k: v
        for key, sub in items
        for k, v in _flat(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _different(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    keys = sorted(a.keys() | b.keys())
    pairs = ((key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys)
    return [(key, before, after) for key, before, after in pairs if before != after]


def _under(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _line(change: Change) -> str:
    key, before, after = change
    return f"  {key}: {before} -> {after}"
