"""The prompts of a run's previews, which training does without: what a student does for prompts
that it has learnt says little.

RUN/held_out.json   the prompts, where they come from, and whether they are held out

They are `preview.prompt_file`'s, else a function of the data's content. A run that continues keeps
them. Where the data has too few prompts to spare some, the first ones are shown and trained on.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from ..config import Config, ConfigError
from ..contract.shown import shown
from ..data.batch import HELD_SHARE, Data, Divisible, Examples
from ..data.prompts import read_prompts
from ..utils.files import replace_text
from .engine import Engine
from .run_dir import RunDir, read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    data: Data  # to train on
    examples: Examples | None  # to look at


def split(config: Config, data: Data, engine: Engine) -> Split:
    """Divides the data of a run, on all ranks alike; the run folder is there.

    Raises ConfigError for a prompt file that is of no use.
    """
    if not config.preview.every and not isinstance(data, Divisible):
        return Split(data, None)
    examples, held_out = engine.on_main(lambda: _decided(config, data))
    rest = _without(data, examples) if held_out else data
    assert rest is not None  # else the main rank would not hold them out
    return Split(rest, examples)


def _decided(config: Config, data: Data) -> tuple[Examples, bool]:
    record = _recorded(config)
    same = record if record.get("source") == _source(config) else {}
    examples = _of_file(config, data) or _of_record(same, data)
    if examples is None:
        examples, held_out = _of_content(config, data)
    else:
        kept = same.get("prompts") == list(examples.prompts)
        wanted = not kept or bool(same["held_out"])
        held_out = wanted and _without(data, examples) is not None
    if record and record["prompts"] != list(examples.prompts):
        log.warning("previews show other prompts from here on; this run may have trained on them")
    if not held_out and not record:
        log.warning(
            "the %d prompts of the previews are trained on, for the data can spare one prompt and "
            "image in %d; preview.prompt_file names others",
            len(examples.prompts),
            HELD_SHARE,
        )
    _forget_candidates(config, record, examples)
    record = {"source": _source(config), "held_out": held_out, "prompts": list(examples.prompts)}
    replace_text(RunDir(config.run_dir).held_out, json.dumps(record, indent=2, ensure_ascii=False))
    return examples, held_out


def _without(data: Data, examples: Examples) -> Data | None:
    return data.without(examples.prompts) if isinstance(data, Divisible) else None


def _source(config: Config) -> dict[str, Any]:
    """What the prompts are chosen by, besides the data."""
    file = config.preview.prompt_file
    return {"file": None if file is None else str(file), "count": config.preview.prompts}


def _recorded(config: Config) -> dict[str, Any]:
    """What an earlier start of this run wrote. Raises ConfigError."""
    path = RunDir(config.run_dir).held_out
    record = read_json(path)
    prompts, held_out = record.get("prompts"), record.get("held_out")
    words = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if record and not (words and isinstance(held_out, bool)):
        raise ConfigError(
            f"{path}: expected prompts and whether they are held out, found {shown(record)}. "
            "Delete the file; the run goes on without."
        )
    return record


def _of_file(config: Config, data: Data) -> Examples | None:
    """Raises ConfigError."""
    file = config.preview.prompt_file
    if file is None:
        return None
    prompts = read_prompts([file], None, "preview.prompt_file")[0][: config.preview.prompts]
    examples = data.examples_of(prompts) if isinstance(data, Divisible) else None
    if examples is None:
        raise ConfigError(
            f"preview.prompt_file: {file}: not all of its first {len(prompts)} prompts are in the "
            "data. Run `turbo-distill prepare` again with this recipe: it embeds what is missing, "
            "and names what the model cannot read."
        )
    return examples


def _of_record(record: dict[str, Any], data: Data) -> Examples | None:
    """What the run showed before, where its data still has it and can still spare it."""
    if not record or not isinstance(data, Divisible):
        return None
    examples = data.examples_of(record["prompts"])
    if examples is None or (record["held_out"] and _without(data, examples) is None):
        return None
    return examples


def _of_content(config: Config, data: Data) -> tuple[Examples, bool]:
    """Prompts that the data can spare, else its first ones; and whether it can."""
    count = config.preview.prompts
    prompts = data.to_hold_out(count) if isinstance(data, Divisible) else []
    if prompts and isinstance(data, Divisible) and (examples := data.examples_of(prompts)):
        return examples, True
    return data.examples(count), False


def _forget_candidates(config: Config, record: dict[str, Any], examples: Examples) -> None:
    """Those of `select: best` were judged by what an earlier start showed."""
    run = RunDir(config.run_dir)
    if not run.best.is_file():
        return
    if record:
        same = record["prompts"] == list(examples.prompts)
    else:  # by an older version, which wrote the prompts alone
        same = run.prompts.is_file() and run.prompts.read_text("utf-8") == as_lines(examples)
    if not same:
        log.warning("candidates of before were judged by other prompts: they no longer count")
        run.best.unlink()


def as_lines(examples: Examples) -> str:
    """The prompts for people, one per line."""
    return "".join(f"{' '.join(prompt.split())}\n" for prompt in examples.prompts)
