"""What a run would stumble over, and what a person should know before it."""

from __future__ import annotations

from collections.abc import Iterator

from ...config import Config, DataSection
from .disk import checkpoints, checkpoints_bytes, free_bytes
from .shape import Shape

GB = 1e9


def problems(config: Config, shape: Shape) -> Iterator[str]:
    """What a run would stumble over, or a person should know before it."""
    if isinstance(config.data, DataSection):
        if not config.data.cache.is_dir():
            yield f"data.cache: {config.data.cache} is missing; run `turbo-distill prepare`."
        for key in ("prompts", "images"):
            for path in getattr(config.data, key):
                if not path.exists():
                    yield f"data.{key}: {path} does not exist."
    if config.preview.prompt_file is not None and not config.preview.prompt_file.is_file():
        yield f"preview.prompt_file: {config.preview.prompt_file} does not exist or is no file."
    if config.init_from is not None and not config.init_from.exists():
        yield f"init_from: {config.init_from} does not exist."
    for i, lora in enumerate(config.model.loras):
        if not lora.path.exists():
            yield f"model.loras.{i}.path: {lora.path} does not exist."
    methods = [stage.method for stage in config.stages]
    begun = config.init_from is not None
    if not begun and "dmd2" in methods and "pcm" not in methods[: methods.index("dmd2")]:
        yield "stages: dmd2 without a pcm stage before it tends to lose diversity."
    for i, stage in enumerate(config.stages):
        gan = getattr(stage, "gan", None)
        prepared = isinstance(config.data, DataSection)
        if getattr(gan, "real_ratio", 0) and prepared and not config.data.images:
            yield f"stages.{i}.gan.real_ratio: {gan.real_ratio}, but data.images is empty."
    needed, free = checkpoints_bytes(config, shape), free_bytes(config.run_dir)
    if free < needed:
        yield (
            f"run_dir: {free / GB:.1f} GB are free where {config.run_dir} lies, "
            f"{checkpoints(config)} checkpoints take {needed / GB:.1f}; lower keep_checkpoints or "
            "choose another disk."
        )
    if not config.save_every:
        yield "save_every: 0, so an interrupted run cannot be resumed."
    if config.run_dir.exists():
        yield f"run_dir: {config.run_dir} exists already."
