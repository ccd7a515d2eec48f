"""A DMD2 step of the 20 B by choice and by phase, and the raw passes of Qwen-Image-2.1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel

from benchmarks.speed.core import fill_randomly
from benchmarks.speed.measure import GB, HIGH_WATER, Budget, Clock, Spread
from benchmarks.speed.report import value_table
from benchmarks.speed.train import Choice, Trainee
from distill.contract.shown import first_line
from distill.models.mixed_precision import lora_config
from distill.models.roles import STUDENT

WARM = 1
TEXT_TOKENS = 77
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "gate_layer", "proj", "out")
# Qwen-Image-2.1's published numbers are the class's defaults; these are for a CPU
SMALL_21 = {"num_layers": 2, "num_attention_heads": 1, "context_in_dim": 64}


# ------------------------------------------------------------------------------------------- DMD2


def step_of(trainee: Trainee, choice: Choice, rounds: int) -> dict[str, Any]:
    """Seconds per iteration, GB at the peak, and seconds and GB of each phase of one more."""
    trainee.adopt(choice)
    gpu = trainee.device.type == "cuda"
    for _ in range(WARM):
        trainee.step(choice, Clock(trainee.device))
    HIGH_WATER.restart(trainee.device)
    clocks = [Clock(trainee.device) for _ in range(rounds)]
    for clock in clocks:
        trainee.step(choice, clock)
    peak = torch.cuda.max_memory_allocated(trainee.device) / GB if gpu else None
    with phases(trainee, choice) as found:
        trainee.step(choice, Clock(trainee.device))
    seconds = Spread.of([clock.seconds["iteration"] for clock in clocks])
    return {"iteration": seconds, "peak GB": peak, "phases": found}


@contextmanager
def phases(trainee: Trainee, choice: Choice) -> Iterator[dict[str, dict[str, float]]]:
    """Fills in seconds and, on a GPU, GB at the peak by phase of the steps meanwhile.

    The device is waited for at both ends of each, so their sum is a little more than a step.
    """
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "GB": 0.0})
    method, gpu = trainee.method(choice), trainee.device.type == "cuda"

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            HIGH_WATER.restart(trainee.device)
            clock = Clock(trainee.device)
            with clock("phase"):
                result = function(*args, **kwargs)
            found[name]["seconds"] += clock.seconds["phase"]
            if gpu:
                most = torch.cuda.max_memory_allocated(trainee.device) / GB
                found[name]["GB"] = max(found[name]["GB"], most)
            return result

        return run

    wrapped = [
        (method, "_sample", "student: one forward without and one with gradient"),
        (method, "_update_fake", "fake score: forward, backward, AdamW"),
        (method, "_gradient", "both scores: fake, teacher with and without the prompt"),
        (trainee.roles, "teacher", "of that, the teacher"),
        (trainee.two_calls, "teacher", "of that, the teacher"),
        (method.optimizers[STUDENT], "backward", "student: backward, AdamW"),
        (method.optimizers[STUDENT], "update", "student: backward, AdamW"),
    ]
    for owner, attribute, name in wrapped:
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    try:
        yield found
    finally:
        for owner, attribute, _ in wrapped:
            delattr(owner, attribute)


def steps(
    trainee: Trainee, choices: tuple[Choice, ...], rounds: int, budget: Budget, each_s: float
) -> Iterator[tuple[dict[str, Any], str]]:
    """One choice after another, the trainer's own first: values and text of all so far. Those that
    do not fit are noted.
    """
    found: dict[str, Any] = {}
    for choice in choices:
        if not budget.allows(f"training step, {choice.name}", each_s):
            continue
        try:
            found[choice.name] = step_of(trainee, choice, rounds)
        except RuntimeError as error:  # memory, or a kernel that this card does not have
            budget.skip(f"training step, {choice.name}: {first_line(error)}")
        if found:
            yield found, step_text(found)


def step_text(found: Mapping[str, Any]) -> str:
    """All choices, and the phases of each."""
    rows = {
        name: [row["iteration"].median, row["iteration"].low, row["iteration"].high, row["peak GB"]]
        for name, row in found.items()
    }
    header = ["s per iteration", "median", "lowest", "highest", "GB at the peak"]
    names = list(dict.fromkeys(name for row in found.values() for name in row["phases"]))
    by_phase = {
        name: [row["phases"].get(name, {"seconds": 0})["seconds"] for row in found.values()]
        for name in names
    }
    return "\n\n".join([value_table(header, rows), value_table(["s by phase", *found], by_phase)])


# --------------------------------------------------------------------------------- Qwen-Image-2.1


def model_21(device: torch.device, **numbers: Any) -> QwenImage21Transformer2DModel:
    """Random weights in bf16 (float32 on the CPU), a LoRA of rank 64 on attention and MLP."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            model = QwenImage21Transformer2DModel(**numbers)
    finally:
        torch.set_default_dtype(before)
    fill_randomly(model)
    return adapted_21(model)


def adapted_21(model: QwenImage21Transformer2DModel) -> QwenImage21Transformer2DModel:
    """Frozen but for a LoRA of rank 64, with gradient checkpointing."""
    model.requires_grad_(False)
    targets = rf"transformer_blocks\..*\.({'|'.join(ADAPTED)})"
    model.add_adapter(lora_config(r=64, lora_alpha=64, target_modules=targets))
    model.enable_gradient_checkpointing()
    return model


def inputs_21(
    model: QwenImage21Transformer2DModel, side: int, device: torch.device
) -> dict[str, Any]:
    """One image of `side` pixels: the VAE gives one token per 16 x 16 of them."""
    dtype, latents = model.img_in.weight.dtype, side // 16
    text = torch.zeros(1, TEXT_TOKENS, dtype=torch.bool, device=device)
    slots = torch.ones(1, latents**2 // 4, dtype=torch.bool, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return {
        "hidden_states": normal(1, latents**2, model.config.in_channels),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, model.config.context_in_dim),
        "timestep": torch.full((1,), 0.7, device=device),
        "img_shapes": [[(1, latents, latents)]],
        "img_mask": torch.cat([text, slots], dim=1),
        "return_dict": False,
    }


def passes_21(
    model: QwenImage21Transformer2DModel, side: int, rounds: int, device: torch.device
) -> tuple[dict[str, Any], str]:
    """Seconds and GB of a forward without gradient, and of one with gradient and its backward."""
    inputs, gpu = inputs_21(model, side, device), device.type == "cuda"

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs)[0].float().square().mean().backward()

    found: dict[str, Any] = {}
    for name, function in (("forward", forward), ("forward and backward", forward_backward)):
        function()
        HIGH_WATER.restart(device)
        clocks = [Clock(device) for _ in range(rounds)]
        for clock in clocks:
            with clock("pass"):
                function()
        peak = torch.cuda.max_memory_allocated(device) / GB if gpu else None
        seconds = Spread.of([clock.seconds["pass"] for clock in clocks])
        found[name] = {"seconds": seconds, "peak GB": peak}
    rows = {
        name: [row["seconds"].median, row["seconds"].low, row["seconds"].high, row["peak GB"]]
        for name, row in found.items()
    }
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    text = value_table(["Qwen-Image-2.1, s", "median", "lowest", "highest", "GB"], rows)
    return {"parameters": parameters, **found}, f"{parameters / 1e9:.2f} B parameters.\n\n{text}"
