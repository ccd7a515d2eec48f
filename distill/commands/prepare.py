"""`turbo-distill prepare [CONFIG] [key=value ...]`: prompts and images become the cache that
training reads.

A run that was stopped continues when it is started again.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from ..config import Config, ConfigError, DataSection, apply_override, load_config, parse_config
from ..utils.lock import single_writer
from ..utils.values import user_path
from .result import Result

log = logging.getLogger(__name__)

ABOUT = """\
Embeds prompts, encodes images and, where the recipe asks for them, draws images
with the teacher; training then needs neither text encoder nor image files. Prompts
come from .txt, .jsonl and .parquet files, images from folders with captions,
WebDataset shards and folders of `datasets`. Run it again after an interruption or
with more data: what is there is kept. What cannot be used is listed, not hidden."""
EXAMPLES = """\
turbo-distill prepare configs/qwen_image_2512_2step.yaml
turbo-distill prepare data.cache=cache data.prompts=prompts.txt data.images=photos
torchrun --nproc-per-node 8 -m distill prepare configs/qwen_image_2512_2step.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG|key=value",
        help="a recipe with a data section, overrides of it, or the keys alone, e.g. "
        "model.path=Qwen/Qwen-Image-2512 data.cache=cache data.prompts=prompts.txt",
    )


def run(args: argparse.Namespace) -> Result:
    config, data = read_arguments(args.arguments)
    from ..data.builder import Builder, Rank, identify
    from ..data.chunks import CachePlan
    from ..data.fingerprint import claim
    from ..data.index import INDEX_FILE, QUARANTINE_FILE, merge
    from ..models.family import for_base, tell_licence

    config = for_base(config)
    folder, identity = identify(config, data)
    plan = CachePlan(config, data, identity)
    rank = Rank.from_environment()
    if rank.number == 0:
        tell_licence(config)
    with single_writer(data.cache) if rank.number == 0 else nullcontext():  # of all its ranks
        identity = claim(data.cache, identity)
        Builder(config, data, plan, folder, rank).run()
        report = merge(plan, identity)
    if report is None:  # the last one to finish has it
        log.info("rank %d is done; other ranks are still at work", rank.number)
        return Result(quiet=True)
    index = data.cache / INDEX_FILE
    values = {"cache": str(data.cache), "index": str(index), **asdict(report)}
    told = report.told()
    if told:
        values["quarantine"] = str(data.cache / QUARANTINE_FILE)
    recipe = next((word for word in args.arguments if not is_override(word)), "CONFIG")
    return Result(
        text=report.lines(data.cache),
        values=values,
        done=f"prepared ({told})" if told else "prepared",
        wrote=(index,),
        next=f"turbo-distill train {shlex.quote(recipe)} --dry-run",
    )


def is_override(word: str) -> bool:
    """Whether it is key=value, and no path such as runs/lr=1/config.yaml."""
    key, equals, _ = word.partition("=")
    return bool(equals) and not {"/", "\\"} & set(key)


def read_arguments(arguments: list[str]) -> tuple[Config, DataSection]:
    """Raises ConfigError unless there is something to prepare."""
    overrides = [word for word in arguments if is_override(word)]
    files = [word for word in arguments if not is_override(word)]
    if len(files) > 1:
        raise ConfigError(f"expected one configuration file, found {', '.join(files)}.")
    if files:
        config = load_config(user_path(files[0]), overrides)
    else:
        # preparing needs no stage, a configuration does
        values: dict[str, Any] = {"stages": [{"method": "dmd2", "steps": 1}]}
        for override in overrides:
            apply_override(values, override)
        config = parse_config(values, "command line")
    if not isinstance(config.data, DataSection):
        raise ConfigError(
            f"data: {config.data!r} is embedded, there is nothing to prepare; expected a section "
            "with cache, prompts and images."
        )
    if not config.data.prompts and not config.data.images:
        raise ConfigError(
            "data: nothing to prepare: expected files in data.prompts, data.images, or both."
        )
    return config, config.data
