"""`turbo-distill inspect FILE [--json]`: what is in a LoRA file and how it wants to be sampled."""

from __future__ import annotations

import argparse
import json
import sys

from .contract.describe import describe, to_text
from .contract.lora_keys import LoraFormatError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("file", metavar="FILE", help="a LoRA in safetensors format")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the description; 0 if it is a LoRA, 2 with a message on stderr if it is not."""
    try:
        description = describe(args.file)
    except (LoraFormatError, OSError) as error:
        sys.stderr.write(f"turbo-distill inspect: {error}\n")
        return 2
    sys.stdout.write(
        json.dumps(description, indent=2) + "\n" if args.json else to_text(description)
    )
    return 0
