"""LoRAs in diffusers' names on each family's model in ComfyUI, where layers are fused or renamed.

The truth is the same LoRA added to the weights in float32, without any LoRA code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, HEADER, close, family_forward, linears, load_family, random_lora
from torch import Tensor
from toy_lora import Update


def write(
    folder: Path, updates: Mapping[str, Update], stem: str = "{}", name: str = "a", **more: Tensor
) -> Path:
    tensors = dict(more)
    for module, update in updates.items():
        key = stem.format(module)
        if key.startswith("lora_unet_"):
            key = key.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = update.down
            tensors[f"{key}.lora_up.weight"] = update.up
        else:
            tensors[f"{key}.lora_A.weight"] = update.down
            tensors[f"{key}.lora_B.weight"] = update.up
        tensors[f"{key}.alpha"] = torch.tensor(update.alpha)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path, HEADER)
    return path


def in_wan(core: Iterable[str]) -> dict[str, str]:
    """Diffusers' name -> core's, as diffusers' own converter of LoRAs has it."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    names = list(core)
    marked = {
        f"diffusion_model.{name}.lora_{half}.weight": torch.full((1, 1), float(index))
        for index, name in enumerate(names)
        for half in "AB"
    }
    found = _convert_non_diffusers_wan_lora_to_diffusers(marked)
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): names[int(value)]
        for key, value in found.items()
        if key.endswith(".lora_A.weight")
    }


def own_linears(model: Any) -> dict[str, list[int]]:
    """Core's linear layers: name -> [out, in]."""
    return {
        key.removeprefix("diffusion_model."): [module.out_features, module.in_features]
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


FLUX2 = {  # diffusers' names that core's map lacks; by scripts/convert_flux2_to_diffusers
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}


def add_densely(name: str, model: Any, deltas: Mapping[str, Tensor]) -> None:
    """Adds to the weights what core's map says, in float32."""
    from comfy.lora import model_lora_keys_unet

    core = model_lora_keys_unet(model, {})
    weights = dict(model.named_parameters())
    renamed = {"wan": lambda: in_wan(own_linears(model)), "flux2": lambda: FLUX2}.get(name, dict)()
    for module, delta in deltas.items():
        spellings = (module, f"transformer.{module}", f"diffusion_model.{module}")
        to = next((core[key] for key in spellings if key in core), None)
        if to is None:
            to = f"diffusion_model.{renamed[module]}.weight"
        key, offset, change = (to, None, None) if isinstance(to, str) else (*to, None)[:3]
        weight = weights[key].data
        weight = weight if offset is None else weight.narrow(*offset)
        weight += delta if change is None else change(delta)


def dense(name: str, *loras: Mapping[str, Update]) -> Tensor:
    """The output with the LoRAs in the weights."""
    patcher = load_family(name)
    for updates in loras:
        add_densely(name, patcher.model, {key: update.delta() for key, update in updates.items()})
    return family_forward(name, patcher)


@pytest.fixture
def apply(pack: Any) -> Callable[..., Any]:
    return pack("nodes.apply_lora").apply_lora


EXACT = {"merge": 1e-6, "bypass": 1e-5}


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_every_family(
    name: str, mode: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    """One, two stacked, the first again, none again: each as in the weights."""
    model = load_family(name)
    first, second = random_lora(linears(name)), random_lora(linears(name), 1)
    one, report = apply(model, write(tmp_path, first, "transformer.{}"), mode=mode)
    two, _ = apply(one, write(tmp_path, second, name="b"), mode=mode)
    base = dense(name)
    close(family_forward(name, model), base, 0)
    close(family_forward(name, one), dense(name, first), EXACT[mode])
    close(family_forward(name, two), dense(name, first, second), EXACT[mode])
    close(family_forward(name, one), dense(name, first), EXACT[mode])
    close(family_forward(name, model), base, 0)
    assert (dense(name, first) - base).norm() > 0.05 * base.norm()
    assert f"matched: {len(first)} of {len(first)}" in report.to_text()


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("stem", ["base_model.model.{}", "lora_unet_{}", "diffusion_model.{}"])
@pytest.mark.parametrize("name", FAMILIES)
def test_spellings_of_diffusers_names(
    name: str, stem: str, mode: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    updates = random_lora(linears(name))
    patched, _ = apply(load_family(name), write(tmp_path, updates, stem), mode=mode)
    close(family_forward(name, patched), dense(name, updates), EXACT[mode])


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("stem", ["diffusion_model.{}", "lora_unet_{}"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cores_own_names(
    name: str, stem: str, mode: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    """Fused layers as core and the models' makers call them, each one whole matrix."""
    model = load_family(name)
    updates = random_lora(own_linears(model.model))
    patched, _ = apply(model, write(tmp_path, updates, stem), mode=mode)
    changed = load_family(name)
    for key, update in updates.items():
        changed.model.diffusion_model.get_submodule(key).weight.data += update.delta()
    close(family_forward(name, patched), family_forward(name, changed), EXACT[mode])


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_some_of_the_fused_rows(name: str, apply: Any, tmp_path: Path, comfyui: Path) -> None:
    """A LoRA of q and v alone leaves k's rows of the output as they were, to the bit."""
    parts = r"att(entio)?n\.(to|add)_[qv](_proj)?$"
    shapes = {key: shape for key, shape in linears(name).items() if re.search(parts, key)}
    updates = random_lora(shapes)
    model = load_family(name)
    patched, _ = apply(model, write(tmp_path, updates), mode="bypass")
    close(family_forward(name, patched), dense(name, updates), EXACT["bypass"])
    fused = next(
        module for module in model.model.modules() if "forward" in vars(module)
    )  # one that has something beside it
    x = torch.randn(3, fused.in_features)
    found = fused(x)
    family_forward(name, model)
    width = fused.out_features // 3 if name == "z-image" else tiny_families.WIDTH
    assert torch.equal(found[:, width : 2 * width], fused(x)[:, width : 2 * width])
    assert not torch.allclose(found[:, :width], fused(x)[:, :width], atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_the_size_of_a_slice_is_checked(
    name: str, apply: Any, tmp_path: Path, comfyui: Path
) -> None:
    shapes = linears(name)
    module = next(key for key in shapes if key.endswith("to_k"))
    updates = random_lora(shapes | {module: [shapes[module][0] + 1, shapes[module][1]]})
    rows = shapes[module][0]
    message = rf"only \d+ of its \d+ modules.*{module} \(LoRA \[{rows + 1}, \d+\], model rows "
    with pytest.raises(
        ValueError, match=rf"{message}{rows}\.\.{2 * rows - 1} of \S*qkv \[{rows}, "
    ):
        apply(load_family(name), write(tmp_path, updates))


def test_one_layer_by_two_names_is_refused(apply: Any, tmp_path: Path, comfyui: Path) -> None:
    shapes = linears("flux")
    module = "transformer_blocks.0.ff.net.2"
    both = {module: shapes[module], "double_blocks.0.img_mlp.2": shapes[module]}
    with pytest.raises(
        ValueError, match=r"are the same layer \(model double_blocks\.0\.img_mlp\.2"
    ):
        apply(load_family("flux"), write(tmp_path, random_lora(both)))


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_saved_with_fused_layers(
    name: str, apply: Any, tmp_path: Path, output: Path, comfyui: Path
) -> None:
    """ModelSave, and a merge node, behind mode bypass."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave

    updates = random_lora(linears(name))
    model = load_family(name)
    patched, _ = apply(model, write(tmp_path, updates), mode="bypass")
    ModelSave().save(patched, "m/x")
    (file,) = (output / "m").glob("*.safetensors")
    saved = load_file(file)
    changed = load_family(name)
    add_densely(name, changed.model, {key: update.delta() for key, update in updates.items()})
    for key, weight in changed.model.named_parameters():
        torch.testing.assert_close(saved[f"model.{key}"], weight.data, rtol=1e-5, atol=1e-5)
    (half,) = ModelMergeSimple().merge(model, patched, 0.0)
    close(family_forward(name, half), dense(name, updates), 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_sees_fused_rows(apply: Any, tmp_path: Path, comfyui: Path) -> None:
    from torch._dynamo.utils import counters

    model = load_family("flux")
    layer = model.model.diffusion_model.single_blocks[0].linear1
    code = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(3, layer.in_features)
    patched, _ = apply(model, write(tmp_path, random_lora(linears("flux"))), mode="bypass")
    found = {}
    for kind, patcher in {"none": model, "lora": patched}.items():
        family_forward("flux", patcher)
        found[kind] = code(x)
        assert torch.equal(found[kind], layer(x))
    assert not torch.allclose(found["none"], found["lora"], atol=1e-2)
    frames = dict(counters["frames"])
    family_forward("flux", model)
    assert torch.equal(code(x), found["none"])
    assert dict(counters["frames"]) == frames


def test_names_of_wan_are_diffusers_own(pack: Any, comfyui: Path) -> None:
    core = [*own_linears(load_family("wan").model)] + [
        f"blocks.{i}.cross_attn.{part}_img" for i in range(2) for part in "kv"
    ]
    other = pack("distill.contract.module_names").diffusers_name
    assert {other(name): name for name in core} == in_wan(core)


# ------------------------------------------------------------------------------ Qwen-Image-2.1


class Qwen21Block(torch.nn.Module):
    """The linear layers of a block of Qwen-Image-2.1, as newer cores fuse them or as they are."""

    def __init__(self, width: int, inner: int, fused: bool) -> None:
        super().__init__()
        linear = torch.nn.Linear
        self.fused, self.inner = fused, inner
        self.attn = torch.nn.ModuleDict({"to_q": linear(width, width, bias=False)})
        parts = {"gate_up": 2 * inner} if fused else {"gate_layer": inner, "proj": inner}
        self.img_mlp = torch.nn.ModuleDict(
            {name: linear(width, rows, bias=False) for name, rows in parts.items()}
        )
        self.img_mlp["out"] = linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["to_q"](x)
        if self.fused:
            gate, up = self.img_mlp["gate_up"](x).chunk(2, dim=-1)
        else:
            gate, up = self.img_mlp["gate_layer"](x), self.img_mlp["proj"](x)
        return x + self.img_mlp["out"](torch.nn.functional.silu(gate) * up)


QWEN21 = {
    "attn.to_q": [24, 24],
    "img_mlp.gate_layer": [72, 24],
    "img_mlp.proj": [72, 24],
    "img_mlp.out": [24, 72],
}


def qwen21(fused: bool) -> Any:
    """A MODEL of two such blocks, fused from the very weights of those that are not."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    class Net(torch.nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.dtype = torch.float32
            self.transformer_blocks = torch.nn.ModuleList(Qwen21Block(24, 72, fused) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            for block in self.transformer_blocks:
                x = block(x)
            return x

    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", "num_layers": 2})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.QwenImage(config, unet_model=Net)
    for index, block in enumerate(model.diffusion_model.transformer_blocks):
        generator = torch.Generator().manual_seed(index)
        weights = {
            name: torch.randn(shape, generator=generator) * 0.2 for name, shape in QWEN21.items()
        }
        if fused:
            parts = [weights.pop("img_mlp.gate_layer"), weights.pop("img_mlp.proj")]
            weights["img_mlp.gate_up"] = torch.cat(parts)
        block.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


@pytest.fixture
def newer_map(monkeypatch: pytest.MonkeyPatch, comfyui: Path) -> None:
    """Core's key map with the entries that a core which fuses these layers gives."""
    import comfy.lora

    original = comfy.lora.model_lora_keys_unet

    def newer(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
        found = original(model, key_map)
        for key in list(model.state_dict()):
            if not key.endswith(".img_mlp.gate_up.weight"):
                continue
            stem = key.removeprefix("diffusion_model.").removesuffix("gate_up.weight")
            for start, part in ((0, "gate_layer"), (72, "proj")):
                for prefix in ("", "transformer.", "diffusion_model."):
                    found[f"{prefix}{stem}{part}"] = (key, (0, start, 72))
        return found

    monkeypatch.setattr(comfy.lora, "model_lora_keys_unet", newer)


@pytest.mark.usefixtures("newer_map")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "as it is"])
@pytest.mark.parametrize("mode", EXACT)
def test_gate_and_projection_of_qwen_image_2_1(
    mode: str, fused: bool, apply: Any, tmp_path: Path
) -> None:
    from comfy.model_management import load_models_gpu

    names = {
        f"transformer_blocks.{i}.{key}": shape for i in (0, 1) for key, shape in QWEN21.items()
    }
    updates = random_lora(names)
    patched, _ = apply(qwen21(fused), write(tmp_path, updates, "transformer.{}"), mode=mode)
    truth = qwen21(fused=False).model.diffusion_model
    for name, update in updates.items():
        truth.get_submodule(name).weight.data += update.delta()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    load_models_gpu([patched, *patched.get_nested_additional_models()])
    close(patched.model.diffusion_model(x), truth(x), EXACT[mode])


def test_names_of_qwen_image_2_1_are_diffusers_own() -> None:
    import diffusers

    with torch.device("meta"):
        net = diffusers.QwenImage21Transformer2DModel(
            num_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            context_in_dim=20,
            axes_dims_rope=(4, 4, 4),
        )
    block = net.transformer_blocks[0]
    for name, shape in QWEN21.items():
        assert list(block.get_submodule(name).weight.shape) == shape


@pytest.mark.parametrize(
    ("image_model", "family", "same"),
    [
        ("qwen_image", "qwen-image", True),
        ("lumina2", "z-image", True),
        ("wan2.1", "wan2.2", True),
        ("flux2", "flux2", True),
        ("flux2", "flux", False),
        ("qwen_image", "qwen-image-2.1", False),
        ("qwen_image21", "qwen-image-2.1", True),
    ],
)
def test_core_calls_some_families_otherwise(
    image_model: str, family: str, same: bool, pack: Any
) -> None:
    assert pack("nodes.apply_lora")._is_family(image_model, family) == same
