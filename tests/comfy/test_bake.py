"""Baked models in a real ComfyUI: the same latents from two thirds of the weights."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.contract.bake import rounding
from distill.contract.bake.fold import is_folded
from distill.contract.tiny import TINY_DIR
from distill.utils.comfyui import ComfyServer, ComfyUIError

SIGMAS = (1.0, 0.4, 0.0)  # those of the `inputs` fixture
Bake = Callable[..., Path]


@pytest.fixture
def bake_to(
    pack: Any,
    tiny_folder: Path,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    tmp_path: Path,
) -> Bake:
    """Bakes the toy model with a LoRA on all of its layers: (dtype, base) -> file."""

    def run(dtype: str = "bf16", base: Path | None = None) -> Path:
        lora = write_lora(make_updates(), "turbo.safetensors", nodes=SIGMAS)
        out = tmp_path / f"baked_{dtype}.safetensors"
        plan = pack("distill.contract.bake.plan").plan_bake(
            base or tiny_folder / "transformer", lora, out, dtype
        )
        pack("distill.contract.bake.merge").bake(plan)
        return out

    return run


@pytest.fixture
def load(pack: Any) -> Callable[[Path], Any]:
    return pack("nodes.baked_model").load_baked


@pytest.fixture
def unfolded(pack: Any, model: Any, make_updates: Callable[..., Any]) -> Any:
    """base + LoRA with all of its modulation layers; what stays is rounded to bf16 as in the file,
    with no code of the bake.
    """
    net = model.model.diffusion_model
    deltas = {f"{name}.weight": update.delta() for name, update in make_updates().items()}
    for name, parameter in net.named_parameters():
        merged = parameter + deltas.get(name, 0)
        if not is_folded(name.rpartition(".")[0]):
            merged = merged.bfloat16().float()
        parameter.copy_(merged)
    spec = pack("distill.contract.spec").TurboSpec(SIGMAS)
    pack("nodes.spec_attachment").attach(
        model, pack("nodes.spec_attachment").Attached(spec, "test", "unfolded")
    )
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------- same latents


def test_folded_is_unfolded(
    bake_to: Bake, load: Any, unfolded: Any, forward: Any, sample: Any, prompt: Any
) -> None:
    """One forward at two sigmas in one batch, and two steps of Turbo Sampler."""
    baked = load(bake_to())
    assert relative(forward(baked), forward(unfolded)) < 1e-6
    latent = {"samples": torch.zeros(2, 16, 8, 6)}
    expected, _ = sample(unfolded, prompt, latent, 3)
    found, warnings = sample(baked, prompt, latent, 3)  # no sigmas given: the file's spec
    assert relative(found["samples"], expected["samples"]) < 1e-6
    assert warnings == []


def test_bf16_weights_computed_in_float32(
    bake_to: Bake, load: Any, unfolded: Any, forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core's manual cast, as on cards without bf16: the tables are not rounded with the weights."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **_: torch.bfloat16)
    baked = load(bake_to())
    assert baked.model.diffusion_model.img_in.weight.dtype == torch.bfloat16
    assert baked.model.manual_cast_dtype == torch.float32
    assert relative(forward(baked), forward(unfolded)) < 1e-6


def test_in_bf16_it_is_as_close_to_the_truth_as_the_unfolded_model(
    bake_to: Bake,
    load: Any,
    unfolded: Any,
    inputs: Any,
    forward: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **_: torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: None)
    truth = forward(unfolded)
    arguments = (inputs.x.bfloat16(), inputs.sigma, inputs.context.bfloat16())
    folded_net = load(bake_to()).model.diffusion_model
    unfolded_net = unfolded.model.diffusion_model.to(torch.bfloat16)
    found, usual = (net(*arguments) for net in (folded_net, unfolded_net))
    assert found.dtype == torch.bfloat16
    assert 0 < relative(found, truth) < 1.1 * relative(usual, truth)


def test_reference_images_at_timestep_zero(
    bake_to: Bake, load: Any, unfolded: Any, tiny_folder: Path, inputs: Any, tmp_path: Path
) -> None:
    """As Qwen-Image-Edit-2511 has them; the file says so, and core's detection reads it."""
    base = tmp_path / "edit"
    shutil.copytree(tiny_folder / "transformer", base)
    weights = base / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"__index_timestep_zero__": torch.empty(0)}, weights)
    arguments = (inputs.x, inputs.sigma, inputs.context)
    reference = {"ref_latents": [torch.randn(2, 16, 1, 4, 4)]}
    found = load(bake_to(base=base)).model.diffusion_model(*arguments, **reference)
    method = {"ref_latents_method": "index_timestep_zero"}
    expected = unfolded.model.diffusion_model(*arguments, **reference, **method)
    assert relative(found, expected) < 1e-6


# ------------------------------------------------------------------------------------- other sigmas


def test_another_sigma_stops_with_a_message(
    bake_to: Bake, load: Any, sample: Any, prompt: Any
) -> None:
    baked = load(bake_to())
    latent = {"samples": torch.zeros(1, 16, 8, 6)}
    with pytest.raises(ValueError, match=r"sigma 0\.5 is not in the table.*1, 0\.4"):
        sample(baked, prompt, latent, 0, sigmas=torch.tensor([1.0, 0.5, 0.0]))


def test_a_sigma_in_bf16_is_the_same_sigma(bake_to: Bake, load: Any, inputs: Any) -> None:
    net = load(bake_to()).model.diffusion_model
    exact = net(inputs.x, inputs.sigma, inputs.context)
    assert torch.equal(net(inputs.x, inputs.sigma.bfloat16(), inputs.context), exact)
    assert torch.equal(net(inputs.x, inputs.sigma.bfloat16().float(), inputs.context), exact)


# ------------------------------------------------------------------------------------------ smaller


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def test_no_modulation_weights_are_resident(bake_to: Bake, load: Any, unfolded: Any) -> None:
    """Counted by hand: two blocks of width 48, two sigmas."""
    folded, whole = (m.model.diffusion_model for m in (load(bake_to()), unfolded))
    layers = 2 * 2 * (48 + 1) * 288 + (48 + 1) * 96 + (256 + 1) * 48 + (48 + 1) * 48
    rows = 2 * (2 * 2 * 288 + 96)
    assert bytes_of(whole) - bytes_of(folded) == 4 * (layers - rows)


# ------------------------------------------------------------------------------------------- 8 bits


@pytest.mark.parametrize(("dtype", "limit"), [("fp8", 0.1), ("int8", 0.06)])
def test_eight_bits(
    dtype: str, limit: float, bake_to: Bake, load: Any, unfolded: Any, forward: Any
) -> None:
    """Core's own quantised layers hold the file's very values."""
    from comfy.quant_ops import QuantizedTensor

    path = bake_to(dtype)
    baked = load(path)
    tensors = load_file(path)
    layers = [
        (name, layer)
        for name, layer in baked.model.diffusion_model.named_modules()
        if isinstance(getattr(layer, "weight", None), QuantizedTensor)
    ]
    assert len(layers) == 2 * 12
    for name, layer in layers:
        expected = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        torch.testing.assert_close(layer.weight.dequantize().float(), expected, rtol=0, atol=0)
    assert 1e-4 < relative(forward(baked), forward(unfolded)) < limit


def test_losses_are_those_of_core(comfyui: Path) -> None:
    """What the report says of merging into fp8 is what core's own code does."""
    from comfy.quant_ops import QuantizedTensor

    generator = torch.Generator().manual_seed(9)  # not that of the rounding
    base = torch.randn(512, 512, generator=generator) * 0.02
    down, up = (torch.randn(shape, generator=generator) for shape in ((8, 512), (512, 8)))
    scale = (0.01 * base.norm() / (up @ down).norm()).item()
    losses = rounding.Losses()
    losses.add(base, down, up, scale)

    layer = QuantizedTensor.from_float(base, "TensorCoreFP8E4M3Layout", scale="recalculate")
    delta = scale * up @ down
    before = layer.dequantize()
    after = layer.requantize_from_float(
        before + delta, scale="recalculate", stochastic_rounding=1
    ).dequantize()
    error = relative(after - before, delta)
    assert losses.delta(rounding.FP8_CORE) == pytest.approx(error, rel=0.03)
    expected = relative(after, base + delta)
    assert losses.weight(rounding.FP8_CORE) == pytest.approx(expected, rel=0.03)


# ------------------------------------------------------------------------------------ further LoRAs


def style(updates: dict[str, Any], folded: bool) -> dict[str, Any]:
    return {name: update for name, update in updates.items() if is_folded(name) == folded}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_further_loras_on_the_layers_that_are_left(
    dtype: str,
    pack: Any,
    bake_to: Bake,
    load: Any,
    inputs: Any,
    forward: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
) -> None:
    baked = load(bake_to(dtype))
    more = style(make_updates(seed=2), folded=False)
    path = write_lora(more, "style.safetensors", nodes=SIGMAS)
    patched, report = pack("nodes.apply_lora").apply_lora(baked, path, 0.3)
    assert report.mode == ("merge" if dtype == "bf16" else "bypass")
    found = forward(patched)
    assert relative(found, forward(baked)) > 1e-3

    expected = load(path.with_name(f"baked_{dtype}.safetensors")).model.diffusion_model
    for name, update in more.items():
        layer = expected.get_submodule(name)
        weight = layer.weight.dequantize() if dtype == "fp8" else layer.weight
        plain = torch.nn.Linear(*reversed(weight.shape))
        plain.weight.copy_(weight + 0.3 * update.delta())
        plain.bias.copy_(layer.bias)
        parent, _, child = name.rpartition(".")
        setattr(expected.get_submodule(parent), child, plain)
    assert relative(found, expected(inputs.x, inputs.sigma, inputs.context)) < 1e-5
    assert pack("nodes.spec_attachment").attached_to(patched).spec.sigmas() == SIGMAS


def test_a_lora_on_the_modulation_is_refused_and_told_why(
    pack: Any,
    bake_to: Bake,
    load: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
) -> None:
    path = write_lora(make_updates(seed=2), "style.safetensors", nodes=SIGMAS)
    with pytest.raises(
        ValueError, match=r"style\.safetensors: 7 of its 34 modules.*folded into a table"
    ):
        pack("nodes.apply_lora").apply_lora(load(bake_to()), path)


def test_a_turbo_lora_of_another_schedule_is_refused(
    pack: Any,
    bake_to: Bake,
    load: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
) -> None:
    path = write_lora(style(make_updates(seed=2), folded=False), "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors wants .* baked_bf16\.safetensors"):
        pack("nodes.apply_lora").apply_lora(load(bake_to()), path)


def test_cores_lora_loader_changes_the_layers_that_are_left_alone(
    pack: Any,
    bake_to: Bake,
    load: Any,
    forward: Any,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A LoRA on all layers: core says in the log that the folded ones do not fit."""
    import comfy.sd

    baked = load(bake_to())
    updates = make_updates(seed=2)
    everything = load_file(write_lora(updates, "all.safetensors", nodes=SIGMAS))
    rest = write_lora(style(updates, folded=False), "rest.safetensors", nodes=SIGMAS)
    by_core, _ = comfy.sd.load_lora_for_models(baked, None, everything, 0.3, 0.0)
    by_us, _ = pack("nodes.apply_lora").apply_lora(baked, rest, 0.3)
    found = forward(by_core)
    assert "transformer_blocks.0.img_mod.1.weight" in caplog.text
    assert relative(forward(by_us), found) < 1e-6
    assert pack("nodes.spec_attachment").attached_to(by_core).spec.sigmas() == SIGMAS


# ------------------------------------------------------------------------------------------ loading


def test_a_copy_for_another_device(bake_to: Bake, load: Any, forward: Any) -> None:
    """Core makes it by calling the loader again."""
    baked = load(bake_to())
    copy, arguments = baked.cached_patcher_init
    assert relative(forward(copy(*arguments, disable_dynamic=True)), forward(baked)) == 0


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def test_a_file_that_is_not_whole(bake_to: Bake, load: Any, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a model made by Turbo Bake"):
        load(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    path = bake_to()
    tensors = load_file(path)
    del tensors["transformer_blocks.1.img_mod.1.weight"]
    rewrite(path, tensors)
    with pytest.raises(ValueError, match=r"1 tensors.*transformer_blocks\.1\.img_mod\.1\.weight"):
        load(path)
    rewrite(path, tensors | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"2 tensors .* more"):
        load(path)


# ---------------------------------------------------------------------------------- published width


@pytest.mark.slow
def test_at_the_published_width(
    pack: Any, load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Core detects it, its plain loader stops, and two thirds of the bytes are resident."""
    import comfy.model_detection
    import comfy.sd
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        shapes = QwenImageTransformer2DModel(num_layers=2).state_dict()
    base = {
        name: torch.empty(meta.shape, dtype=torch.bfloat16).normal_(0, 0.02)
        for name, meta in shapes.items()
    }
    save_file(base, tmp_path / "base.safetensors")
    lora = {
        "transformer_blocks.1.img_mod.1.lora_A.weight": torch.randn(2, 3072),
        "transformer_blocks.1.img_mod.1.lora_B.weight": torch.randn(18432, 2) * 1e-3,
    }
    spec = pack("distill.contract.spec").TurboSpec((1.0, 0.7155, 0.0))
    save_file(lora, tmp_path / "lora.safetensors", {"turbo.spec": spec.to_json()})
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "lora", "out")]
    pack("distill.contract.bake.merge").bake(pack("distill.contract.bake.plan").plan_bake(*files))
    del base

    config = comfy.model_detection.model_config_from_unet(load_file(files[2]), "")
    assert type(config).__name__ == "QwenImage"
    assert config.unet_config["num_layers"] == 2
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer_blocks\.0\.img_mod"):
        comfy.sd.load_diffusion_model(str(files[2]))

    options = {"dtype": torch.bfloat16}
    whole = comfy.sd.load_diffusion_model(str(files[0]), model_options=options)
    before = bytes_of(whole.model.diffusion_model)
    del whole
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "unet_dtype", lambda **_: torch.bfloat16)
        folded = load(files[2])
    assert "missing" not in caplog.text
    # 60 blocks: 0.667; in two, the timestep embedding and norm_out weigh more
    assert bytes_of(folded.model.diffusion_model) / before == pytest.approx(0.645, abs=0.002)
    velocity = folded.model.diffusion_model(
        torch.randn(1, 16, 1, 8, 8), torch.tensor([0.7155]), torch.randn(1, 4, 3584)
    )
    assert velocity.isfinite().all()


# ------------------------------------------------------------------------------------------- server

LORA_NAME = "tiny_turbo_2_steps.safetensors"
BASE_NAME = "tiny/diffusion_pytorch_model.safetensors"
BAKED_NAME = "baked/tiny_turbo.safetensors"


def bake_prompt(file_name: str, base: str = BASE_NAME) -> dict[str, Any]:
    inputs = {"base_model": base, "lora_name": LORA_NAME, "dtype": "bf16", "file_name": file_name}
    return {
        "bake": {"class_type": "TurboDistillBake", "inputs": inputs},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["bake", 1]}},
    }


def test_the_server_bakes_loads_and_paints(
    server: ComfyServer, tiny_prompt: Callable[..., dict[str, Any]]
) -> None:
    folder = server.folder("diffusion_models")
    shutil.copytree(TINY_DIR / "transformer", folder / "tiny")
    shutil.copy(TINY_DIR / "lora" / LORA_NAME, server.folder("loras"))
    history = server.queue(bake_prompt("baked/tiny_turbo"))
    assert "48 merged, 0 folded" in history["outputs"]["show"]["text"][0]
    assert [path.name for path in (folder / "baked").iterdir()] == ["tiny_turbo.safetensors"]

    loader = {"class_type": "TurboDistillBakedLoader", "inputs": {"model_name": BAKED_NAME}}
    painted = [
        np.stack([np.asarray(Image.open(io.BytesIO(png)), dtype=int) for png in pictures])
        for pictures in (
            server.images(server.queue(tiny_prompt({"baked": loader}, model="baked"))),
            server.images(server.queue(tiny_prompt())),
        )
    ]
    assert painted[0].std() > 20
    assert np.abs(painted[0] - painted[1]).max() <= 4  # of 255; the merge is rounded to bf16

    with pytest.raises(ComfyUIError, match="exists already"):
        server.queue(bake_prompt("baked/tiny_turbo.safetensors "))
    with pytest.raises(ComfyUIError, match="is a baked model already"):
        server.queue(bake_prompt("twice", base=BAKED_NAME))
    with pytest.raises(ComfyUIError, match=r"file_name: expected a name inside"):
        server.queue(bake_prompt("../../escaped"))
    plain = {"class_type": "TurboDistillBakedLoader", "inputs": {"model_name": BASE_NAME}}
    with pytest.raises(ComfyUIError, match="expected a model made by Turbo Bake"):
        server.queue(tiny_prompt({"baked": plain}, model="baked"))


# ------------------------------------------------------------------------------ without folding


@pytest.fixture(scope="module")
def wan(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.1 of one block, in core's names and random bf16."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    torch.manual_seed(0)
    model = WanModel(
        dim=128, ffn_dim=256, num_heads=1, num_layers=1, operations=comfy.ops.disable_weight_init
    )
    weights = {name: torch.randn_like(t) * 0.05 for name, t in model.state_dict().items()}
    path = tmp_path_factory.mktemp("wan") / "wan.safetensors"
    save_file({name: t.bfloat16() for name, t in weights.items()}, path)
    return path


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 1e-2), ("fp8", 6e-2), ("int8", 6e-2)])
def test_another_family_is_baked_without_folding(
    dtype: str, limit: float, wan: Path, pack: Any, tmp_path: Path
) -> None:
    """As Turbo Baked Loader gives it: core's own model of merged weights, with the schedule."""
    import comfy.sd

    base, generator = load_file(wan), torch.Generator().manual_seed(1)
    lora, merged = {}, {name: tensor.float() for name, tensor in base.items()}
    for name in ("blocks.0.self_attn.q", "blocks.0.ffn.0", "blocks.0.cross_attn.o"):
        out_features, in_features = base[f"{name}.weight"].shape
        down = torch.randn(2, in_features, generator=generator) * 0.3
        up = torch.randn(out_features, 2, generator=generator) * 0.3
        lora |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        merged[f"{name}.weight"] += up @ down
    spec = pack("distill.contract.spec").TurboSpec(SIGMAS, family="wan2.1", base="of/nobody")
    lora = {f"diffusion_model.{name}": tensor for name, tensor in lora.items()}
    save_file(lora, tmp_path / "lora.safetensors", {"turbo.spec": spec.to_json()})
    save_file(merged, tmp_path / "merged.safetensors")
    out = tmp_path / "baked.safetensors"
    plan = pack("distill.contract.bake.plan").plan_bake(
        wan, tmp_path / "lora.safetensors", out, dtype
    )
    pack("distill.contract.bake.merge").bake(plan)

    model = pack("nodes.baked_model").load_baked(out)
    assert type(model.model).__name__ == "WAN21"
    assert pack("nodes.spec_attachment").attached_to(model).spec == spec
    options = {"dtype": torch.float32}
    dense = comfy.sd.load_diffusion_model(str(tmp_path / "merged.safetensors"), options)
    x, context = torch.randn(1, 16, 1, 4, 4), torch.randn(1, 8, 4096)
    found, expected = (run_wan(one, x, context) for one in (model, dense))
    assert (found - expected).norm() / expected.norm() < limit
    without = run_wan(comfy.sd.load_diffusion_model(str(wan), options), x, context)
    assert (without - expected).norm() / expected.norm() > 5 * limit


def run_wan(model: Any, x: Tensor, context: Tensor) -> Tensor:
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    dtype = model.model.get_dtype_inference()
    net = model.model.diffusion_model
    return net(x.to(dtype), torch.tensor([500.0]).to(dtype), context.to(dtype)).float()
