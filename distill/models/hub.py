"""Where a base model's files lie: a folder, or the snapshot of a hub id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..config import ConfigError
from .family import family_of


def model_folder(path: str, parts: Sequence[str], download: bool = True) -> Path | None:
    """The local folder of a base model; of a hub id the snapshot, which is downloaded if allowed.

    None: not here and not allowed to download. Raises ConfigError for a name that leads nowhere.
    """
    path = family_of(path).locate(path)
    if Path(path).is_dir():
        return Path(path)
    processor = ["processor"] * ("tokenizer" in parts)  # where Qwen3-VL keeps its own
    patterns = ["model_index.json", *(f"{part}/*" for part in [*parts, *processor])]
    try:
        folder = snapshot_download(path, allow_patterns=patterns, local_files_only=not download)  # nosec B615 # the user names it
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        if not download:
            return None
        raise ConfigError(
            f"model.path: {path} is neither a folder here nor a model that the Hugging Face hub "
            f"gives out ({type(error).__name__}: {error})"
        ) from error
    return Path(folder)
