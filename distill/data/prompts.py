"""Prompt files: .txt (one per line), .jsonl, .parquet."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ..config import ConfigError
from .captions import caption_keys, caption_of, no_key, parse_json, text_lines, unusable
from .sample import Problem

SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 1024  # in memory at a time


def read_prompts(
    paths: Sequence[Path], key: str | None = None, option: str = "data.prompts"
) -> tuple[list[str], list[Problem]]:
    """All prompts in order, each once, and the lines that hold none; `option` names the files.

    Raises ConfigError for a file that is missing, unreadable or without a single prompt.
    """
    prompts: dict[str, None] = {}
    problems: list[Problem] = []
    for path in paths:
        found = 0
        for line, entry in _entries(path, key, option):
            if isinstance(entry, Problem):
                problems.append(entry)
            elif not (problem := unusable(entry)):
                prompts[entry.strip()] = None
                found += 1
            elif entry.strip() or _kind(path) != ".txt":
                problems.append(Problem(str(path), line, f"the prompt {problem}"))
        if not found:
            mine = [p for p in problems if p.source == str(path)][:1]
            first = "".join(f" First problem: {p.item}: {p.reason}." for p in mine)
            raise ConfigError(
                f"{option}: {path} holds no prompt; expected {_expected(path, key)}.{first}"
            )
    return list(prompts), problems


def optional(module: str, purpose: str) -> ModuleType:
    """Imports a package that only some inputs need. Raises ConfigError if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{purpose} needs the package {module!r}, which is not installed: pip install {module}"
        ) from error


def _expected(path: Path, key: str | None) -> str:
    keys = f"{key!r} (data.caption_key)" if key else "one of 'prompt', 'caption', 'text'"
    return {
        ".txt": "one prompt per line, in UTF-8",
        ".jsonl": f"one JSON object per line with {keys}",
        ".parquet": f"a text column {keys}",
    }[_kind(path)]


def _kind(path: Path) -> str:
    return path.suffix.lower()


def _entries(path: Path, key: str | None, option: str) -> Iterator[tuple[str, str | Problem]]:
    if not path.is_file():
        raise ConfigError(f"{option}: {path} does not exist or is no file.")
    if _kind(path) not in SUFFIXES:
        raise ConfigError(
            f"{option}: {path}: expected a name that ends in {', '.join(SUFFIXES)}, "
            f"found {path.suffix or 'none'!r}."
        )
    if _kind(path) == ".parquet":
        yield from _parquet(path, key, option)
        return
    try:
        for number, line in enumerate(text_lines(path), 1):
            item = f"line {number}"
            if isinstance(line, ValueError):
                yield item, Problem(str(path), item, str(line))
            else:
                yield item, line if _kind(path) == ".txt" else _json_prompt(path, item, line, key)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{option}: {path}: is damaged ({error}); save the file as UTF-8."
        ) from error


def _json_prompt(path: Path, item: str, line: str, key: str | None) -> str | Problem:
    if not line.strip():
        return Problem(str(path), item, "the line is empty")
    try:
        prompt = caption_of(parse_json(line), key)
    except ValueError as error:
        return Problem(str(path), item, f"is not JSON: {error}")
    return prompt if prompt is not None else Problem(str(path), item, no_key(key))


def _parquet(path: Path, key: str | None, option: str) -> Iterator[tuple[str, str | Problem]]:
    parquet = optional("pyarrow.parquet", f"{option}: {path}")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ConfigError(f"{option}: {path} is no readable parquet file: {error}") from error
    columns = file.schema_arrow.names
    column = next((name for name in caption_keys(key) if name in columns), None)
    if column is None:
        raise ConfigError(
            f"{option}: {path}: expected {_expected(path, key)}, found the columns "
            f"{', '.join(columns)}. Name the right one in data.caption_key."
        )
    row = 0
    batches = file.iter_batches(PARQUET_ROWS, columns=[column])
    while True:
        try:
            values = [
                value for batch in itertools.islice(batches, 1) for value in batch[0].to_pylist()
            ]
        except (OSError, ValueError, NotImplementedError) as error:
            reason = f"cannot be read, nor can the rows behind it: {error}"
            yield f"row {row}", Problem(str(path), f"row {row}", reason)
            return
        if not values:
            return
        for value in values:
            item = f"row {row}"
            row += 1
            yield item, value if isinstance(value, str) else Problem(str(path), item, "is no text")
