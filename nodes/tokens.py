"""Tokens such as %date:yyyy-MM-dd% or %KSampler.seed% that nobody has filled in."""

from __future__ import annotations

import re

# What core's get_save_image_path fills in, and save.py.
FILLED_LATER = {"width", "height", "year", "month", "day", "hour", "minute", "second", "batch_num"}

# %date:...%, %Node.widget% with blanks in the node's name, %word%; not "50% off, 20% more".
_TOKEN = re.compile(r"%(date:[^%]+|[^%\s][^%]*\.\w+|[A-Za-z_]\w*)%")


def unfilled_tokens(text: str) -> list[str]:
    """In their order, with their signs."""
    found = (match[1] for match in _TOKEN.finditer(text))
    return [f"%{token}%" for token in dict.fromkeys(found) if token not in FILLED_LATER]


def prefix_warnings(filename_prefix: str) -> list[str]:
    """That the file's name holds such tokens, and what to do."""
    tokens = unfilled_tokens(filename_prefix)
    if not tokens:
        return []
    return [
        f"{', '.join(tokens)} in filename_prefix was not filled in and is in the file's name. The "
        f"front end fills such tokens where they are typed into the node's own field, not where "
        f"the text comes by a wire: unplug filename_prefix and type it."
    ]


def prompt_warnings(text: str) -> list[str]:
    """That the encoder reads such tokens as they are, and what to do."""
    tokens = unfilled_tokens(text)
    if not tokens:
        return []
    return [
        f"{', '.join(tokens)} in the prompt was not filled in: the model reads it as it is. The "
        f"front end fills such tokens in file names alone; write the words, or join texts with "
        f"core's Concatenate and wire them in."
    ]
