"""Turbo LoRA Loader: which spec wins, what it refuses, what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

WULI = "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"


@pytest.fixture
def apply_lora(pack: Any) -> Any:
    return pack("nodes.apply_lora").apply_lora


@pytest.fixture
def override(pack: Any) -> Any:
    return pack("distill.contract.resolve").Override.parse


@pytest.fixture
def spec_of(pack: Any) -> Callable[[Any], Any]:
    return lambda patched: pack("nodes.spec_attachment").attached_to(patched)


@pytest.fixture
def without_header(
    make_updates: Callable[..., Any], write_lora: Callable[..., Path]
) -> Callable[[str], Path]:
    """A LoRA that fits, without a spec, under the given file name."""

    def write(name: str) -> Path:
        path = write_lora(make_updates(), "with_header.safetensors")
        target = path.with_name(name)
        save_file(load_file(path), target)
        return target

    return write


# ------------------------------------------------------------------------------ which spec wins


def test_a_known_file_is_looked_up(
    apply_lora: Any, model: Any, without_header: Any, spec_of: Any
) -> None:
    patched, report = apply_lora(model, without_header(WULI))
    attached = spec_of(patched)
    assert attached.spec.sigmas() == pytest.approx((1.0, 0.7155, 0.0))
    assert attached.spec.sampler == "euler"
    assert "table of known files" in attached.source
    assert "table of known files" in report.to_text()


def test_the_header_wins_over_the_table(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any, spec_of: Any
) -> None:
    path = write_lora(make_updates(), WULI, nodes=(1.0, 0.5, 0.0), sampler="renoise")
    patched, _ = apply_lora(model, path)
    assert spec_of(patched).spec.sigmas() == (1.0, 0.5, 0.0)
    assert spec_of(patched).spec.sampler == "renoise"
    assert "header" in spec_of(patched).source


def test_an_override_wins_over_both(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any, spec_of: Any, override: Any
) -> None:
    path = write_lora(make_updates(), WULI, nodes=(1.0, 0.5, 0.0), sampler="renoise")
    patched, report = apply_lora(model, path, override=override("1, 0.75, 0"))
    assert spec_of(patched).spec.sigmas() == (1.0, 0.75, 0.0)
    assert spec_of(patched).spec.sampler == "renoise"  # the rest stays the file's
    assert "override of sigmas" in report.spec_source
    patched, _ = apply_lora(model, path, override=override("", "euler"))
    assert spec_of(patched).spec.sigmas() == (1.0, 0.5, 0.0)
    assert spec_of(patched).spec.sampler == "euler"


def test_unknown_is_an_error_and_an_override_the_way_out(
    apply_lora: Any, model: Any, without_header: Any, spec_of: Any, override: Any
) -> None:
    path = without_header("mystery.safetensors")
    with pytest.raises(ValueError, match=r"mystery\.safetensors.*override.*1, 0\.7155, 0"):
        apply_lora(model, path)
    with pytest.raises(ValueError, match="mystery"):
        apply_lora(model, path, override=override("", "renoise"))
    patched, report = apply_lora(model, path, override=override("1 0.6 0", "renoise"))
    assert spec_of(patched).spec.sigmas() == (1.0, 0.6, 0.0)
    assert spec_of(patched).spec.sampler == "renoise"
    assert report.spec_source == "override"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one, zero", "expected numbers"),
        ("1, 0.5", "0 as the last"),
        ("0.5, 1, 0", "strictly decreasing"),
        ("14.6, 2, 0", "the first in"),
        ("1;0,7155;0", "sigmas_override: .*decimals with a point"),
        (", ".join(f"{1 - i / 300}" for i in range(301)), "at most 256 steps; found 300"),
    ],
)
def test_an_override_that_is_no_schedule(
    text: str, message: str, apply_lora: Any, model: Any, without_header: Any, override: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_lora(model, without_header(WULI), override=override(text))


def test_a_damaged_spec_names_the_file(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any, override: Any
) -> None:
    path = write_lora(make_updates())
    save_file(load_file(path), path, {"turbo.spec": '{"sigmas": [1, 2, 0]}'})
    with pytest.raises(ValueError, match=r"turbo\.safetensors.*strictly decreasing"):
        apply_lora(model, path)
    assert apply_lora(model, path, override=override("1, .5, 0"))[1].spec.sigmas() == (1, 0.5, 0)


def test_the_spec_survives_clones_and_other_nodes(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any, spec_of: Any
) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    patched, _ = apply_lora(model, write_lora(make_updates()))
    shifted = ModelSamplingAuraFlow().patch_aura(patched.clone(), 3.1)[0]
    assert spec_of(shifted) == spec_of(patched)
    assert spec_of(model) is None


def test_strength_is_relative_to_the_spec(
    apply_lora: Any,
    model: Any,
    make_updates: Any,
    write_lora: Any,
    forward: Any,
    forward_with: Any,
) -> None:
    updates = make_updates()
    patched, report = apply_lora(model, write_lora(updates, strength=0.8), 0.5)
    expected = forward_with({name: 0.4 * update.delta() for name, update in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    assert "applied strength: 0.4" in report.to_text()


# -------------------------------------------------------------------------------- what it refuses


def test_two_specs_on_one_model(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any, spec_of: Any, override: Any
) -> None:
    first = write_lora(make_updates(1), "first.safetensors")
    second = write_lora(make_updates(2), "second.safetensors", nodes=(1.0, 0.5, 0.0))
    patched, _ = apply_lora(model, first)
    with pytest.raises(
        ValueError, match=r"second\.safetensors wants.*first\.safetensors.*override"
    ):
        apply_lora(patched, second)
    both, _ = apply_lora(patched, second, override=override("1, 0.6, 0"))
    assert spec_of(both).spec.sigmas() == (1.0, 0.6, 0.0)


def test_another_architecture(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    updates = {f"double_{name}": update for name, update in make_updates().items()}
    with pytest.raises(
        ValueError, match=r"turbo\.safetensors: none of its 34 modules.*QwenImage.*no such layer"
    ):
        apply_lora(model, write_lora(updates))


def test_another_width(apply_lora: Any, model: Any, make_updates: Any, write_lora: Any) -> None:
    from dataclasses import replace

    updates = {
        name: replace(update, up=update.up.repeat(2, 1)) for name, update in make_updates().items()
    }
    with pytest.raises(ValueError, match=r"none of its \d+ modules.*LoRA \[\d+, \d+\], model \["):
        apply_lora(model, write_lora(updates))


def test_a_partial_match(apply_lora: Any, model: Any, make_updates: Any, write_lora: Any) -> None:
    updates = make_updates()
    deeper = {name.replace("blocks.1.", "blocks.7."): update for name, update in updates.items()}
    with pytest.raises(
        ValueError, match=r"only \d+ of its \d+ modules.*transformer_blocks\.7\..*no such layer"
    ):
        apply_lora(model, write_lora(deeper))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x02pickle"])
def test_no_safetensors_at_all(content: bytes, apply_lora: Any, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        apply_lora(model, path)


def test_a_whole_model_is_no_lora(apply_lora: Any, model: Any, tiny_folder: Path) -> None:
    path = tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"found none among .*a whole model"):
        apply_lora(model, path)


def test_dora_is_refused_beside_the_weights(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    path = write_lora(make_updates())
    extra = {"diffusion_model.img_in.dora_scale": torch.ones(48, 1)}
    save_file(load_file(path) | extra, path)
    with pytest.raises(ValueError, match=r"DoRA.*cannot stay beside the weights.*mode auto"):
        apply_lora(model, path, mode="bypass")


def test_unknown_mode(apply_lora: Any, model: Any, make_updates: Any, write_lora: Any) -> None:
    with pytest.raises(ValueError, match="mode: expected one of auto, merge, bypass"):
        apply_lora(model, write_lora(make_updates()), mode="fuse")


# ------------------------------------------------------------------------------------ what it says


def test_the_report(apply_lora: Any, model: Any, make_updates: Any, write_lora: Any) -> None:
    updates = make_updates(ranks=(4, 2))
    _, report = apply_lora(model, write_lora(updates))
    text = report.to_text()
    assert text.startswith(
        "turbo.safetensors\n2 steps at sigmas 1, 0.7155, 0; sampler euler; CFG 1"
    )
    assert f"matched: {len(updates)} of {len(updates)} modules, rank 2 (" in text
    assert "alpha: from the file's .alpha tensors" in text
    assert "mode: merge (auto: the base weights are in full precision)" in text
    assert "Warning" not in text


def test_keys_of_a_text_encoder_are_mentioned(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    path = write_lora(make_updates())
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | {"lora_te1_x.lora_up.weight": torch.ones(2, 2)}, path, metadata)
    _, report = apply_lora(model, path)
    assert "1 keys of the file belong to no layer" in report.to_text()


def test_the_node_notices_a_changed_file(
    pack: Any, model: Any, make_updates: Any, write_lora: Any, run_node: Any, tmp_path: Path
) -> None:
    import folder_paths

    node = pack("nodes.lora").TurboLoraLoader
    folder = tmp_path / "loras"
    folder.mkdir()
    folder_paths.add_model_folder_path("loras", str(folder))
    name = f"{tmp_path.name}.safetensors"
    shutil.copy(write_lora(make_updates()), folder / name)
    widgets = {"lora_name": name, "strength": 1.0, "mode": "auto"}

    first = node.fingerprint_inputs(**widgets)
    patched, report = run_node(node, model=model, **widgets)
    assert "sigmas 1, 0.7155, 0" in report
    assert patched is not model
    assert node.fingerprint_inputs(**widgets) == first

    shutil.copy(write_lora(make_updates(), nodes=(1.0, 0.5, 0.0)), folder / name)
    os.utime(folder / name, ns=(1, 1))
    assert node.fingerprint_inputs(**widgets) != first
    assert "sigmas 1, 0.5, 0" in run_node(node, model=model, **widgets)[1]

    inspect = pack("nodes.inspect").TurboInspect
    (text,) = run_node(inspect, lora_name=name)
    assert name in text
    assert "0.5" in text


# ------------------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_lora_that_is_not_finite_is_refused(
    value: float, apply_lora: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    updates = make_updates()
    name = next(iter(updates))
    updates[name].up[0, 0] = value
    with pytest.raises(ValueError, match=rf"turbo\.safetensors: key '.*{name}\.lora_B\.weight'"):
        apply_lora(model, write_lora(updates))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), float("-inf")])
def test_a_strength_that_is_not_finite_is_refused(
    strength: float, apply_lora: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    """A widget has limits, a wire has none."""
    with pytest.raises(ValueError, match="strength: expected a finite number"):
        apply_lora(model, write_lora(make_updates()), strength)


# ------------------------------------------------------------- files that change, or are not plain


@pytest.mark.parametrize("mode", ["merge", "bypass"])
@pytest.mark.parametrize("how", ["cut", "overwritten"])
def test_a_file_that_is_changed_in_place_while_its_model_is_used(
    how: str,
    mode: str,
    apply_lora: Any,
    model: Any,
    make_updates: Any,
    write_lora: Any,
    forward: Any,
    forward_with: Any,
) -> None:
    """tests/contract/test_tensor_file.py has the same in a process that may die of it."""
    updates = make_updates()
    path = write_lora(updates)
    patched, _ = apply_lora(model, path, mode=mode)
    if (maps := Path("/proc/self/maps")).exists():
        assert str(path) not in maps.read_text()
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(100)
        else:
            file.write(bytes(path.stat().st_size))
    expected = forward_with({name: update.delta() for name, update in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"turbo\.safetensors: expected a safetensors file"):
        apply_lora(model, path, mode=mode)


def test_zeros_that_change_nothing_are_no_reason_to_refuse(
    apply_lora: Any, model: Any, make_updates: Any, write_lora: Any, forward: Any, forward_with: Any
) -> None:
    """core's own exports have a `.diff_b` for every bias."""
    updates = make_updates()
    path = write_lora(updates)
    zeros = {f"diffusion_model.{n}.diff_b": torch.zeros(len(u.up)) for n, u in updates.items()}
    header = {"turbo.spec": '{"sigmas": [1, 0.7155, 0]}'}
    save_file(load_file(path) | zeros, path, header)
    patched, report = apply_lora(model, path)
    expected = forward_with({name: update.delta() for name, update in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    assert report.warnings == []
    zeros[next(iter(zeros))][0] = 1
    save_file(load_file(path) | zeros, path, header)
    assert "1 norms or biases" in apply_lora(model, path)[1].to_text()


@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_a_folder_that_peft_saved(
    mode: str,
    pack: Any,
    model: Any,
    make_updates: Any,
    write_lora: Any,
    run_node: Any,
    forward: Any,
    forward_with: Any,
    tmp_path: Path,
) -> None:
    """ComfyUI lists folder/adapter_model.safetensors; alpha stands in the config beside it."""
    import folder_paths

    loras, updates = tmp_path / "loras", make_updates(alpha=9.0)
    plain = {k: t for k, t in load_file(write_lora(updates)).items() if not k.endswith(".alpha")}
    (loras / tmp_path.name).mkdir(parents=True)
    file = loras / tmp_path.name / "adapter_model.safetensors"
    renamed = {key.replace("diffusion_model.", "base_model.model."): t for key, t in plain.items()}
    save_file(renamed, file)
    config = file.with_name("adapter_config.json")
    config.write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 9}')
    folder_paths.add_model_folder_path("loras", str(loras))
    name = f"{tmp_path.name}/adapter_model.safetensors"
    assert name in folder_paths.get_filename_list("loras")

    node = pack("nodes.lora").TurboLoraLoader
    widgets = {"lora_name": name, "strength": 1.0, "mode": mode, "sigmas_override": "1, 0.5, 0"}
    patched, report = run_node(node, model=model, **widgets)
    expected = forward_with({name: update.delta() for name, update in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    assert "alpha: from adapter_config.json" in report
    assert "Warning" not in report
    before = node.fingerprint_inputs(**widgets)
    config.write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2.5}')
    assert node.fingerprint_inputs(**widgets) != before
    patched, _ = run_node(node, model=model, **widgets)
    expected = forward_with({n: u.delta() * 2.5 / 9 for n, u in updates.items()})
    torch.testing.assert_close(forward(patched), expected, rtol=1e-5, atol=1e-5)
    config.unlink()
    _, report = run_node(node, model=model, **widgets)
    assert "Warning: neither tensors nor header nor adapter_config.json give alpha" in report


def test_a_renamed_public_file_is_told_its_name(
    apply_lora: Any, model: Any, without_header: Any
) -> None:
    with pytest.raises(ValueError, match=r"nearly fits 'Wuli-Qwen-Image-2512-Turbo-LoRA-2steps'"):
        apply_lora(model, without_header("wuli_2512_turbo_2steps_mine.safetensors"))
