"""Running models and nodes as ComfyUI's core does. ComfyUI must be importable: see `comfyui`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_model import ODD

TEXT_WIDTH = ODD["joint_attention_dim"]


@dataclass
class Inputs:
    """Arguments of one forward."""

    x: Tensor  # [B, 16, 1, H/8, W/8]
    sigma: Tensor  # [B]
    context: Tensor  # [B, tokens, width]


def make_inputs() -> Inputs:
    generator = torch.Generator().manual_seed(7)
    return Inputs(
        x=torch.randn(2, 16, 1, 8, 6, generator=generator),
        sigma=torch.tensor([1.0, 0.4]),
        context=torch.randn(2, 5, TEXT_WIDTH, generator=generator),
    )


def make_prompt() -> list[list[Any]]:
    """CONDITIONING of the toy model's text width."""
    generator = torch.Generator().manual_seed(11)
    return [[torch.randn(1, 5, TEXT_WIDTH, generator=generator), {}]]


def forward(inputs: Inputs, patcher: Any) -> Tensor:
    """Loads a MODEL as core does before sampling and runs its diffusion model once."""
    from comfy.model_management import load_models_gpu

    load_models_gpu([patcher, *patcher.get_nested_additional_models()])
    return patcher.model.diffusion_model(inputs.x, inputs.sigma, inputs.context).clone()


def forward_with(inputs: Inputs, load: Callable[[], Any], deltas: Mapping[str, Tensor]) -> Tensor:
    """A fresh MODEL's output after adding deltas to its weights, with no LoRA code at all."""
    net = load().model.diffusion_model
    for name, delta in deltas.items():
        layer = net.get_submodule(name)
        layer.weight = torch.nn.Parameter(layer.weight + delta, requires_grad=False)
    return net(inputs.x, inputs.sigma, inputs.context)


def sample(
    nodes: ModuleType,
    model: Any,
    prompt: Any,
    latent: dict[str, Any],
    seed: int,
    **options: Any,
) -> tuple[dict[str, Any], list[str]]:
    """What the Turbo Sampler node does: latent, warnings. nodes: the pack's `nodes.sampling`."""
    plan = nodes.make_plan(model, latent, **options)
    return nodes.sample(model, prompt, latent, seed, plan), plan.warnings


def run_node(node: Any, **arguments: Any) -> tuple[Any, ...]:
    """Executes a V3 node class and returns its outputs."""
    node.GET_SCHEMA()
    return node.PREPARE_CLASS_CLONE(None).execute(**arguments).args


def count_forwards(monkeypatch: pytest.MonkeyPatch, patcher: Any) -> list[int]:
    """Counts the transformer's calls on a MODEL: the list that comes back grows by batch sizes."""
    batches: list[int] = []
    net = patcher.model.diffusion_model
    original = net._forward

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batches.append(len(x))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(net, "_forward", counted)
    return batches
