"""A LoRA beside the weights is seen by all that compiles, saves, merges or extracts them."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

LATENT = {"samples": torch.zeros(1, 16, 1, 8, 8)}
SAVED = "model.diffusion_model."
LAYER = "transformer_blocks.0.attn.to_q"
SIGMAS = torch.tensor([1.0, 0.7155, 0.0])


def close(actual: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


@pytest.fixture
def loras(make_updates: Callable[..., Any], write_lora: Callable[..., Path]) -> list[Any]:
    """(updates, path) of two LoRAs whose layers differ in rank."""
    first, second = make_updates(1), make_updates(2, ranks=(3,))
    return [
        (first, write_lora(first, "a.safetensors")),
        (second, write_lora(second, "b.safetensors")),
    ]


@pytest.fixture
def bypass(pack: Any) -> Callable[..., Any]:
    """(MODEL, path, strength) -> MODEL with that LoRA beside its weights."""

    def put(model: Any, path: Path, strength: float = 1.0) -> Any:
        return pack("nodes.apply_lora").apply_lora(model, path, strength, "bypass")[0]

    return put


# --------------------------------------------------------------------------------- as it was before


def test_the_bits_are_those_of_a_sum_after_the_layer(
    model: Any, bypass: Any, loras: Any, forward: Any, inputs: Any
) -> None:
    """W x, plus the first LoRA, plus the second, each rounded as it is added."""
    (first, first_path), (second, second_path) = loras
    net = model.model.diffusion_model

    def add(update: Any, scale: float, module: Any, args: Any, output: Tensor) -> Tensor:
        return output + (args[0] @ update.down.T * scale) @ update.up.T

    found = forward(bypass(bypass(model, first_path), second_path, 0.5))
    forward(model)  # the LoRAs come off
    hooks = [
        net.get_submodule(name).register_forward_hook(
            partial(add, update, update.alpha / len(update.down) * strength)
        )
        for updates, strength in ((first, 1.0), (second, 0.5))
        for name, update in updates.items()
    ]
    expected = net(inputs.x, inputs.sigma, inputs.context)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, expected)


def test_nothing_stays_on_the_model(model: Any, bypass: Any, loras: Any, forward: Any) -> None:
    """Without the LoRA a layer is the very object that it was, whatever was put over it."""
    import comfy.sd

    (_, first), (_, second) = loras
    net = model.model.diffusion_model
    before = forward(model)
    stacked = bypass(bypass(model, first), second)
    mixed, _ = comfy.sd.load_bypass_lora_for_models(stacked, None, load_file(second), 1.0, 0)
    for patched in (stacked, mixed, stacked, bypass(mixed, first)):
        forward(patched)
        assert all("forward" in net.get_submodule(name).__dict__ for name in loras[0][0])
    assert torch.equal(forward(model), before)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_what_another_pack_put_on_later_keeps_working(
    model: Any, bypass: Any, loras: Any, forward: Any
) -> None:
    """A forward put around ours holds on to it: then ours passes on, and does not count twice."""
    layer = model.model.diffusion_model.get_submodule(LAYER)
    base, patched = forward(model), bypass(model, loras[0][1])
    expected = forward(patched)
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 1.0
    assert torch.equal(forward(model), base)
    assert torch.equal(forward(patched), expected)
    del layer.forward
    assert torch.equal(forward(patched), expected)


# --------------------------------------------------------------------------------------- compiling


@pytest.fixture
def put(bypass: Any, loras: Any) -> dict[str, Callable[[Any], Any]]:
    """Ways to put LoRAs beside the weights of a MODEL, by name: ours, and core's own."""
    import comfy.sd

    (_, one), (_, two) = loras
    style = load_file(two)

    def with_core(model: Any) -> Any:
        return comfy.sd.load_bypass_lora_for_models(model, None, style, 0.7, 0)[0]

    return {
        "none": lambda model: model,
        "one": lambda model: bypass(model, one),
        "two": lambda model: bypass(model, two),
        "half": lambda model: bypass(model, one, 0.5),
        "both": lambda model: bypass(bypass(model, one), two),
        "core": with_core,
        "one core": lambda model: with_core(bypass(model, one)),
        "core one": lambda model: bypass(with_core(model), one),
    }


ORDERS = [
    ("none", "one", "none", "two"),  # the base first
    ("one", "two", "none"),
    ("one", "half", "one", "both"),
    ("core", "none", "one", "core", "one core", "core one"),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_compiled_code_sees_the_lora(
    order: tuple[str, ...], put: Any, model: Any, forward: Any
) -> None:
    """Whatever the layer was compiled with before; and what was compiled is used again."""
    from torch._dynamo.utils import counters

    layer = model.model.diffusion_model.get_submodule(LAYER)
    code = torch.compile(layer, backend="eager")
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    found = {}
    patched = {name: put[name](model) for name in order}
    for name in order:
        forward(patched[name])  # as core loads it
        found[name] = code(x)
        assert torch.equal(found[name], layer(x))
    for one, other in itertools.combinations(found, 2):
        same = {one, other} == {"one core", "core one"}
        assert torch.allclose(found[one], found[other], atol=1e-2) == same
    frames = dict(counters["frames"])
    for name in order:
        forward(patched[name])
        assert torch.equal(code(x), found[name])
    assert dict(counters["frames"]) == frames


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("node_first", [False, True], ids=["LoRA, compile", "compile, LoRA"])
@pytest.mark.parametrize(
    ("backend", "order"), [("eager", ORDERS[0]), ("eager", ORDERS[3]), ("inductor", ORDERS[1])]
)
def test_core_compiles_the_lora(
    backend: str,
    order: tuple[str, ...],
    node_first: bool,
    put: Any,
    model: Any,
    sample: Any,
    prompt: Any,
) -> None:
    """Core's TorchCompileModel: each image is that of its own LoRAs."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def compiled(model: Any) -> Any:
        return TorchCompileModel.execute(model, backend).args[0]

    def run(model: Any) -> Tensor:
        return sample(model, prompt, LATENT, 3, sigmas=SIGMAS)[0]["samples"]

    right = {name: run(put[name](model)) for name in order}
    for name in order:
        found = run(put[name](compiled(model)) if node_first else compiled(put[name](model)))
        close(found, right[name], atol=1e-3)  # C++ rounds as the CPU does; LoRAs are 1e-2 apart


# ------------------------------------------------------------------------------ saving and merging


def merged(base_weights: Any, updates: Any, strength: float = 1.0) -> dict[str, Tensor]:
    return {
        name: base_weights[name] + update.delta() * strength for name, update in updates.items()
    }


def saved(model: Any, output: Path) -> dict[str, Tensor]:
    """What core's ModelSave writes, by module."""
    from comfy_extras.nodes_model_merging import ModelSave

    ModelSave().save(model, "m/x")
    (file,) = (output / "m").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    return {
        key.removeprefix(SAVED).removesuffix(".weight"): value for key, value in tensors.items()
    }


def check_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        close(found[name], weight)


def test_model_save(
    model: Any, bypass: Any, loras: Any, base_weights: Any, output: Path, forward: Any
) -> None:
    """The LoRAs are in the file, and the MODEL samples as before, to the bit."""
    (first, first_path), (second, second_path) = loras
    patched = bypass(bypass(model, first_path), second_path, 0.5)
    before = forward(patched)
    expected = merged(merged(base_weights, first), second, 0.5)
    for _ in range(2):
        check_weights(saved(patched, output), expected)
        assert torch.equal(forward(patched), before)
    check_weights(saved(patched.clone(), output), expected)
    check_weights(saved(model, output), base_weights)
    assert torch.equal(forward(patched), before)


def test_checkpoint_save(
    pack: Any,
    tiny_folder: Path,
    model: Any,
    bypass: Any,
    loras: Any,
    base_weights: Any,
    output: Path,
) -> None:
    from comfy_extras.nodes_model_merging import save_checkpoint

    updates, path = loras[0]
    vae = pack("nodes.tiny").load_vae(tiny_folder / "vae")
    save_checkpoint(bypass(model, path), vae=vae, filename_prefix="c", output_dir=str(output))
    (file,) = output.glob("*.safetensors")
    tensors = load_file(file)
    assert any(key.startswith("vae.") for key in tensors)
    for name, weight in merged(base_weights, updates).items():
        close(tensors[f"{SAVED}{name}.weight"], weight)


@pytest.mark.parametrize("which", ["model1", "model2", "both"])
@pytest.mark.parametrize("node", ["simple", "blocks", "add", "subtract"])
def test_merge_nodes(
    node: str,
    which: str,
    model: Any,
    bypass: Any,
    loras: Any,
    base_weights: Any,
    output: Path,
    forward: Any,
    forward_with: Any,
) -> None:
    """Core's arithmetic on weights that have the LoRA in them, saved and sampled alike."""
    from comfy_extras import nodes_model_merging as core

    (first, first_path), (second, second_path) = loras
    one, two = model, model
    one_weights = two_weights = base_weights
    if which in ("model1", "both"):
        one, one_weights = bypass(model, first_path), merged(base_weights, first)
    if which in ("model2", "both"):
        two, two_weights = bypass(model, second_path), merged(base_weights, second)
    before = forward(one), forward(two)
    merge, ratio_one, ratio_two = {
        "simple": (partial(core.ModelMergeSimple().merge, ratio=0.25), 0.25, 0.75),
        "blocks": (
            partial(core.ModelMergeBlocks().merge, input=0.25, middle=0.25, out=0.25),
            0.25,
            0.75,
        ),
        "add": (core.ModelAdd().merge, 1.0, 1.0),
        "subtract": (partial(core.ModelSubtract().merge, multiplier=1.0), 1.0, -1.0),
    }[node]
    (result,) = merge(one, two)
    expected = {
        name: ratio_one * one_weights[name] + ratio_two * two_weights[name] for name in base_weights
    }
    check_weights(saved(result, output), expected)
    if node in ("simple", "blocks"):  # else biases and norms are doubled or gone
        close(forward(result), forward_with({n: expected[n] - base_weights[n] for n in expected}))
    assert torch.equal(forward(one), before[0])
    assert torch.equal(forward(two), before[1])


@pytest.mark.parametrize("which", ["model1", "model2"])
@pytest.mark.parametrize("kind", ["standard", "full_diff"])
def test_lora_save(
    kind: str, which: str, pack: Any, model: Any, bypass: Any, loras: Any, output: Path
) -> None:
    """Core's LoraSave behind a subtraction: what it gives for a merged LoRA."""
    from comfy_extras.nodes_lora_extract import LoraSave
    from comfy_extras.nodes_model_merging import ModelSubtract

    updates, path = loras[0]

    def saved_deltas(patched: Any) -> dict[str, Tensor]:
        one, two = (patched, model) if which == "model1" else (model, patched)
        (difference,) = ModelSubtract().merge(one, two, 1.0)
        LoraSave.execute("l/x", 4, kind, False, difference)
        (file,) = (output / "l").glob("*.safetensors")
        tensors = {key: tensor.float() for key, tensor in load_file(file).items()}
        file.unlink()
        if kind == "full_diff":
            return {name: tensors[f"diffusion_model.{name}.diff"] for name in updates}
        stems = {name: f"diffusion_model.{name}.lora_" for name in updates}
        return {
            name: tensors[f"{stem}up.weight"] @ tensors[f"{stem}down.weight"]
            for name, stem in stems.items()
        }

    found = saved_deltas(bypass(model, path))
    expected = saved_deltas(pack("nodes.apply_lora").apply_lora(model, path, mode="merge")[0])
    for name, update in updates.items():
        close(found[name], expected[name], atol=1e-3)  # they are written in half precision
        assert expected[name].norm() > 0.5 * update.delta().norm()


def test_lora_save_without_a_difference(model: Any, bypass: Any, loras: Any, output: Path) -> None:
    from comfy_extras.nodes_lora_extract import LoraSave

    with pytest.raises(ValueError, match=r"a\.safetensors is beside the weights .*mode merge"):
        LoraSave.execute("l/x", 4, "standard", True, bypass(model, loras[0][1]))
    assert not list(output.rglob("*.safetensors"))


def test_scaling_nodes_scale_the_lora(
    model: Any, bypass: Any, loras: Any, base_weights: Any, output: Path
) -> None:
    """As UNetCrossAttentionMultiply and its kind do it."""
    updates, path = loras[0]
    scaled = bypass(model, path).clone()
    scaled.add_patches({f"diffusion_model.{LAYER}.weight": (None,)}, 0.0, 0.5)
    expected = merged(base_weights, updates)
    check_weights(saved(scaled, output), expected | {LAYER: expected[LAYER] * 0.5})


def test_a_style_lora_leaves_it_beside(pack: Any, model: Any, bypass: Any, loras: Any) -> None:
    import comfy.sd

    patched = bypass(model, loras[0][1])
    patched, _ = comfy.sd.load_lora_for_models(patched, None, load_file(loras[1][1]), 0.5, 0)
    assert len(pack("nodes.bypass").branches(patched)) == 1


def test_hooks_of_conditioning_work_beside_it(
    model: Any, bypass: Any, loras: Any, sample: Any, prompt: Any, forward_with: Any
) -> None:
    """Create Hook LoRA: core asks for the weights to patch in the middle of sampling."""
    import comfy.hooks

    (_, first_path), (_, second_path) = loras
    hooks = comfy.hooks.create_hook_lora(load_file(second_path), 0.5, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt, hooks)
    both = bypass(bypass(model, first_path), second_path, 0.5)
    expected, _ = sample(both, prompt, LATENT, 3)
    found, _ = sample(bypass(model, first_path), hooked, LATENT, 3)
    close(found["samples"], expected["samples"], atol=1e-4)


def test_patchers_end_with_their_last_user(model: Any, bypass: Any, loras: Any) -> None:
    """No reference to itself: core frees memory at the end of a patcher, not of a collection."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        patched = bypass(model, loras[0][1])
        clone = patched.clone()
        ends = weakref.ref(patched), weakref.ref(clone)
        del patched
        del clone
        assert [end() for end in ends] == [None, None]
    finally:
        gc.enable()
