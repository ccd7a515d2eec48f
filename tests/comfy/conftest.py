"""A Qwen-Image of toy size with random weights, LoRAs for it, and short ways to run nodes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
Pack = Callable[[str], ModuleType]

# Prime factors that differ everywhere, so that a transposed or misplaced shape cannot fit.
SHAPE = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 6, 6),
}
TURBO_SIGMAS = (1.0, 0.7155, 0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs ComfyUI."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("comfy")


@pytest.fixture(autouse=True)
def _as_core_runs_nodes() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def server(comfyui_path: Path) -> Iterator[ComfyServer]:
    """One ComfyUI with our pack for every test that asks for it."""
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_prompt() -> Callable[..., dict[str, Any]]:
    """The tiny demo's API prompt with nodes added or replaced, and the model that is sampled."""
    text = (ROOT / "tests" / "data" / "tiny_demo_api.json").read_text(encoding="utf-8")

    def make(
        nodes: dict[str, Any] | None = None, *, model: str = "1", count: int = 2, seed: int = 1
    ) -> dict[str, Any]:
        prompt = json.loads(text) | (nodes or {})
        prompt["3"]["inputs"]["batch_size"] = count
        prompt["4"]["inputs"] |= {"model": [model, 0], "noise_seed": seed}
        return prompt

    return make


@pytest.fixture(scope="session")
def listen() -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """Queues a prompt as the front end does, and returns its messages by type.

    until: messages to wait for, in any order; by default the one that the prompt has ended well.
    """

    def run(
        server: ComfyServer, prompt: dict[str, Any], *until: str
    ) -> dict[str, list[dict[str, Any]]]:
        awaited = set(until or ["execution_success"])
        return asyncio.run(asyncio.wait_for(_messages(server.url, prompt, awaited), 120))

    return run


async def _messages(
    url: str, prompt: dict[str, Any], until: set[str]
) -> dict[str, list[dict[str, Any]]]:
    import aiohttp  # comes with ComfyUI's requirements

    messages: dict[str, list[dict[str, Any]]] = {}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/ws?clientId=test") as socket,
    ):
        await socket.receive()  # the status: the socket is known to the server
        body = {"prompt": prompt, "client_id": "test"}
        async with session.post(f"{url}/prompt", json=body) as answer:
            assert answer.status == 200, await answer.text()
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                event = message.json()
                messages.setdefault(event["type"], []).append(event["data"])
                if until <= messages.keys():
                    break
    return messages


@pytest.fixture
def output(comfyui: Path, tmp_path: Path) -> Iterator[Path]:
    """ComfyUI's output folder, empty."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    (tmp_path / "output").mkdir()
    yield tmp_path / "output"
    folder_paths.set_output_directory(before)


# ------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformer/ and vae/ as diffusers writes them, with random weights."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(**SHAPE)
    for parameter in transformer.parameters():  # no zero-initialised layer may hide a mistake
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
    )
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def model(pack: Pack, tiny_folder: Path) -> Any:
    """A fresh ModelPatcher of the toy transformer, in float32 on the CPU."""
    return pack("nodes.tiny").load_transformer(tiny_folder / "transformer")


@pytest.fixture(scope="session")
def base_weights(tiny_folder: Path) -> dict[str, Tensor]:
    """The toy transformer's weights by module name (without ".weight")."""
    weights = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return {
        key.removesuffix(".weight"): weight for key, weight in weights.items() if weight.ndim == 2
    }


# -------------------------------------------------------------------------------------------- LoRAs


@dataclass(frozen=True)
class Update:
    """One layer of a LoRA, with the arithmetic written out once more, independently of the pack."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    alpha: float

    def delta(self) -> Tensor:
        return self.up @ self.down * (self.alpha / self.down.shape[0])


@pytest.fixture(scope="session")
def make_updates(base_weights: dict[str, Tensor]) -> Callable[..., dict[str, Update]]:
    """Random updates of all linear layers of the toy model: (seed, ranks, alpha) -> {name: Update}.

    ranks take turns over the layers; alpha None means equal to the rank.
    """

    def make(
        seed: int = 0, ranks: tuple[int, ...] = (4,), alpha: float | None = 3.0
    ) -> dict[str, Update]:
        generator = torch.Generator().manual_seed(seed)
        updates = {}
        for index, (name, weight) in enumerate(sorted(base_weights.items())):
            rank = ranks[index % len(ranks)]
            down = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            updates[name] = Update(down, up, rank if alpha is None else alpha)
        return updates

    return make


@pytest.fixture
def write_lora(tmp_path: Path, pack: Pack) -> Callable[..., Path]:
    """Writes updates in ComfyUI's spelling, and a spec: (updates, name, **spec) -> path."""

    def write(updates: Mapping[str, Update], name: str = "turbo.safetensors", **spec: Any) -> Path:
        tensors = {}
        for module, update in updates.items():
            tensors[f"diffusion_model.{module}.lora_A.weight"] = update.down
            tensors[f"diffusion_model.{module}.lora_B.weight"] = update.up
            tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(float(update.alpha))
        turbo_spec = pack("distill.contract.spec").TurboSpec(**{"sigmas": TURBO_SIGMAS, **spec})
        path = tmp_path / name
        save_file(tensors, path, {"turbo.spec": turbo_spec.to_json()})
        return path

    return write


@pytest.fixture
def turbo_model(
    pack: Pack, model: Any, make_updates: Callable[..., Any], write_lora: Callable[..., Path]
) -> Callable[..., Any]:
    """The toy model with a random Turbo LoRA: (**spec) -> ModelPatcher."""

    def build(**spec: Any) -> Any:
        path = write_lora(make_updates(), **spec)
        return pack("nodes.apply_lora").apply_lora(model, path)[0]

    return build


# ------------------------------------------------------------------------------------------ running


@dataclass
class Inputs:
    """Arguments of one forward."""

    x: Tensor  # [B, 16, 1, H/8, W/8]
    sigma: Tensor  # [B]
    context: Tensor  # [B, tokens, width]


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(7)
    return Inputs(
        x=torch.randn(2, 16, 1, 8, 6, generator=generator),
        sigma=torch.tensor([1.0, 0.4]),
        context=torch.randn(2, 5, SHAPE["joint_attention_dim"], generator=generator),
    )


@pytest.fixture(scope="session")
def forward(comfyui: Path, inputs: Inputs) -> Callable[[Any], Tensor]:
    """Loads a MODEL as core does before sampling and runs its diffusion model once."""

    def run(patcher: Any) -> Tensor:
        from comfy.model_management import load_models_gpu

        load_models_gpu([patcher, *patcher.get_nested_additional_models()])
        return patcher.model.diffusion_model(inputs.x, inputs.sigma, inputs.context).clone()

    return run


@pytest.fixture
def forward_with(
    pack: Pack, tiny_folder: Path, inputs: Inputs
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The toy model's output after adding deltas to its weights, with no LoRA code at all."""

    def run(deltas: Mapping[str, Tensor]) -> Tensor:
        patcher = pack("nodes.tiny").load_transformer(tiny_folder / "transformer")
        net = patcher.model.diffusion_model
        for name, delta in deltas.items():
            layer = net.get_submodule(name)
            layer.weight = torch.nn.Parameter(layer.weight + delta, requires_grad=False)
        return net(inputs.x, inputs.sigma, inputs.context)

    return run


@pytest.fixture(scope="session")
def sample(pack: Pack) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """What the Turbo Sampler node does: (model, prompt, latent, seed, ...) -> latent, warnings."""
    nodes = pack("nodes.sampling")

    def run(
        model: Any, prompt: Any, latent: dict[str, Any], seed: int, **options: Any
    ) -> tuple[dict[str, Any], list[str]]:
        plan = nodes.make_plan(model, latent, **options)
        return nodes.sample(model, prompt, latent, seed, plan), plan.warnings

    return run


@pytest.fixture(scope="session")
def run_node(comfyui: Path) -> Callable[..., tuple[Any, ...]]:
    """Executes a V3 node class as core does and returns its outputs."""

    def run(node: Any, **arguments: Any) -> tuple[Any, ...]:
        node.GET_SCHEMA()
        return node.PREPARE_CLASS_CLONE(None).execute(**arguments).args

    return run


@pytest.fixture
def count_forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[int]]:
    """Counts the transformer's calls on a MODEL: the list that comes back grows by batch sizes."""

    def watch(patcher: Any) -> list[int]:
        batches: list[int] = []
        net = patcher.model.diffusion_model
        original = net._forward

        def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batches.append(len(x))
            return original(x, *args, **kwargs)

        monkeypatch.setattr(net, "_forward", counted)
        return batches

    return watch


@pytest.fixture(scope="session")
def prompt() -> list[list[Any]]:
    """CONDITIONING of the toy model's text width."""
    generator = torch.Generator().manual_seed(11)
    return [[torch.randn(1, 5, SHAPE["joint_attention_dim"], generator=generator), {}]]
