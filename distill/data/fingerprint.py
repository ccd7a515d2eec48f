"""What a cache was made with: fingerprints of the models and the settings that shape its content.

A cache whose identity differs from the configuration is refused, with the difference shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError, DataSection
from ..models.base_lora import records
from ..models.family import family_of
from ..models.sizes import Size
from .shards import TEXT, hash_of, write_bytes

IDENTITY_FILE = "cache.json"


VERSION = 1
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of each weight file

Identity = dict[str, Any]


def fingerprint(folder: Path, part: str) -> str | None:
    """Hash of one component: its configuration, and headers and samples of its weights.

    Reads about a megabyte per weight file, so that naming a 16 GB encoder takes no time. None if
    the component is not there.
    """
    root = folder / part
    weights = sorted(root.glob("*.safetensors"))
    if not weights:
        return None
    digest = hashlib.blake2b(digest_size=16)
    config = root / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values = {k: v for k, v in values.items() if not k.startswith("_")}  # versions, paths
        digest.update(json.dumps(values, sort_keys=True).encode())
    for path in weights:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
            for i in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def buckets_of(config: Config, data: DataSection) -> tuple[Size, ...]:
    return data.buckets or family_of(config.model.path).buckets(data.resolution)


def settings(config: Config, data: DataSection) -> Identity:
    """What the configuration alone says, and of LoRAs in the base what they do."""
    loras = {"loras": records(config.model.loras)} if config.model.loras else {}
    return {
        "version": VERSION,
        "model": config.model.path,
        "buckets": [list(bucket) for bucket in buckets_of(config, data)],
        "dtype": data.dtype,
        "negative": data.negative,
        "teacher": {
            "steps": data.teacher_steps,
            "scale": config.guidance.scale,
            "rescale": config.guidance.rescale,
            **loras,
        },
    }


def with_models(identity: Identity, folder: Path, parts: Sequence[str]) -> Identity:
    """Adds the fingerprints of components."""
    found = {part: fingerprint(folder, part) for part in parts}
    if embedded := family_of(identity["model"]).embedded:
        found["text_encoder"] = embedded.text_encoder
    return identity | found


def text_salt(identity: Identity) -> list[Any]:
    """What embeddings depend on besides their words."""
    return [identity.get(key) for key in ("version", "text_encoder", "dtype")]


def text_key(identity: Identity, text: str) -> str:
    """The name of a text's embedding in a cache."""
    return hash_of(TEXT, text_salt(identity), text)


def differences(wanted: Identity, found: Identity) -> list[str]:
    """Lines that say where a cache is not what the configuration describes.

    What either side leaves open (a component that is not here, no teacher images) fits. The
    model's name counts only where no fingerprint can be compared.
    """
    keys = [key for key in wanted if wanted[key] is not None and found.get(key) is not None]
    if any(key in keys for key in ("text_encoder", "vae")):
        keys.remove("model")
    return [
        f"  {key}: expected {json.dumps(wanted[key])}, found {json.dumps(found[key])}"
        for key in keys
        if wanted[key] != found[key]
    ]


def require_same(wanted: Identity, found: Identity, cache: Path) -> None:
    """Raises ConfigError with the differences."""
    lines = differences(wanted, found)
    if lines:
        raise ConfigError(
            f"data.cache: {cache} was made with other settings than this configuration:\n"
            + "\n".join(lines)
            + "\nSet the configuration back, or name another folder in data.cache and run "
            "`turbo-distill prepare` again."
        )


def read_identity(cache: Path) -> Identity | None:
    path = cache / IDENTITY_FILE
    if not path.is_file():
        return None
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); delete the folder.") from error
    return dict(identity)


def claim(cache: Path, identity: Identity) -> Identity:
    """Writes the identity into the cache, or checks it against what is there."""
    found = read_identity(cache)
    if found is not None:
        require_same(identity, found, cache)
        identity = found | {key: value for key, value in identity.items() if value is not None}
    if identity != found:
        text = json.dumps(identity, indent=2, ensure_ascii=False, sort_keys=True)
        write_bytes(cache / IDENTITY_FILE, text.encode())
    return identity
