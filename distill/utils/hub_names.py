"""What files that leave this machine call a model: never a path of it."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_CACHE = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]")


def public_name(path: str) -> str:
    """A hub id as it is, also where the path is the hub's cache; of any other folder its own name.

    A folder counts before a hub id of the same spelling, as it does where models are loaded.
    """
    if cached := HUB_CACHE.search(path):
        return "/".join(cached.groups())
    if HUB_ID.fullmatch(path) and not Path(path).is_dir():
        return path
    own = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return own if own.strip(".~") else Path(path).expanduser().resolve().name
