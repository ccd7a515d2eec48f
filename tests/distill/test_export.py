"""The exported LoRA is the student: for us, for diffusers and for ComfyUI's core."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from distill import cli
from distill.config import AdapterSection, Config, GuidanceSection
from distill.contract.lora_keys import LoraFormatError, LoraModule, delta, normalise
from distill.contract.metadata import read_lora, tensor_sha256, write_lora
from distill.contract.resolve import resolve_spec
from distill.contract.spec import TurboSpec
from distill.lora import convert
from distill.lora.low_rank import Deviation, deviation, truncate
from distill.lora.student import export_lora, load_student
from distill.models import qwen_image
from distill.models.family import spec_of
from distill.models.roles import STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.trainer import train
from distill.training.checkpoint import latest_checkpoint, load_checkpoint

SPEC = TurboSpec((1.0, 0.7155, 0.0), method="pcm")


@pytest.fixture
def roles(transformer: QwenImageTransformer2DModel) -> Roles:
    """A student that differs from its teacher, with alpha unlike its rank."""
    adapter = AdapterSection(rank=2, alpha=3.0, modulation=True)
    roles = Roles(transformer, adapter, GuidanceSection(), Text(torch.zeros(1, 2, 24)), 0)
    for i, parameter in enumerate(roles.parameters(STUDENT)):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data.copy_(0.2 * noise)
    return roles


@pytest.fixture
def lora(roles: Roles, tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    return export_lora(
        roles, SPEC, path, title="student", extra={"ss_steps": "3"}, dtype=torch.float32
    )


def student_velocity(roles: Roles) -> tuple[tuple[torch.Tensor, torch.Tensor, Text], torch.Tensor]:
    torch.manual_seed(3)
    inputs = torch.randn(2, 16, 4, 4), torch.rand(2), Text(torch.randn(2, 3, 24))
    with torch.no_grad():
        return inputs, roles.velocity(STUDENT, *inputs)


def test_it_carries_its_spec_and_names(lora: Path) -> None:
    tensors, metadata = read_lora(lora)
    assert resolve_spec(lora, metadata)[0] == SPEC
    assert metadata["ss_steps"] == "3"
    assert metadata["ss_network_dim"] == "2"
    assert float(tensors["diffusion_model.transformer_blocks.0.attn.to_q.alpha"]) == 3.0
    assert {key.split(".")[0] for key in tensors} == {"diffusion_model"}


def test_diffusers_loads_it(
    lora: Path, roles: Roles, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    inputs, expected = student_velocity(roles)
    transformer = new_transformer()
    # What load_lora_weights of diffusers' pipeline does with such a file
    from diffusers import QwenImagePipeline

    state, metadata = QwenImagePipeline.lora_state_dict(str(lora), return_lora_metadata=True)
    QwenImagePipeline.load_lora_into_transformer(state, transformer, metadata=metadata)
    with torch.no_grad():
        assert torch.allclose(qwen_image.velocity(transformer, *inputs), expected, atol=1e-5)


def test_our_own_loading_restores_the_student(
    lora: Path, roles: Roles, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    inputs, expected = student_velocity(roles)
    adapter = AdapterSection(rank=2, modulation=True)  # another alpha: the scale is adopted
    other = Roles(new_transformer(), adapter, GuidanceSection(), Text(torch.zeros(1, 2, 24)), 9)
    load_student(other, lora)
    with torch.no_grad():
        assert torch.allclose(other.velocity(STUDENT, *inputs), expected, atol=1e-5)
        assert not torch.allclose(other.velocity(TEACHER, *inputs), expected, atol=1e-3)


def test_a_file_of_another_rank_or_kind_is_refused(
    lora: Path, tmp_path: Path, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    negative = Text(torch.zeros(1, 2, 24))
    wide = AdapterSection(rank=4, modulation=True)
    with pytest.raises(ValueError, match="expected rank 4, found 2"):
        load_student(Roles(new_transformer(), wide, GuidanceSection(), negative, 0), lora)
    narrow = AdapterSection(rank=2)
    with pytest.raises(ValueError, match="modules differ"):
        load_student(Roles(new_transformer(), narrow, GuidanceSection(), negative, 0), lora)
    (tmp_path / "no.safetensors").write_bytes(b"<html>")
    with pytest.raises(LoraFormatError, match=r"no\.safetensors"):
        load_student(
            Roles(new_transformer(), narrow, GuidanceSection(), negative, 0),
            tmp_path / "no.safetensors",
        )


@pytest.mark.comfy
def test_core_loads_every_key(lora: Path, comfyui: object) -> None:
    """`comfy.lora` finds all modules and computes the same delta."""
    import comfy.lora
    import comfy.supported_models

    tensors, metadata = read_lora(lora)
    modules = normalise(tensors, metadata, source=lora.name).modules
    key_map = {f"diffusion_model.{name}": f"diffusion_model.{name}.weight" for name in modules}
    loaded = comfy.lora.load_lora(load_file(lora), key_map)
    assert set(loaded) == set(key_map.values())
    for name, module in modules.items():
        key = f"diffusion_model.{name}.weight"
        zero = torch.zeros(module.up.shape[0], module.down.shape[1])
        patched = comfy.lora.calculate_weight([(1.0, loaded[key], 1.0, None, None)], zero, key)
        assert torch.allclose(patched, delta(module), atol=1e-5)


def test_the_header_is_json_where_it_says_so(lora: Path) -> None:
    _, metadata = read_lora(lora)
    assert json.loads(metadata["turbo.spec"])["sigmas"] == [1.0, 0.7155, 0.0]


# ------------------------------------------------------------------------------------ lower rank


def random_module(out: int, rank: int, into: int, scale: float = 1.0) -> LoraModule:
    generator = torch.Generator().manual_seed(out * 100 + rank)
    up, down = (torch.randn(shape, generator=generator) for shape in ((out, rank), (rank, into)))
    return LoraModule("m", down, up, scale * rank, "tensor")


@pytest.mark.parametrize(
    "module",
    [
        random_module(12, 6, 9),
        random_module(12, 6, 9, scale=-0.25),
        random_module(4, 6, 9),  # the rank exceeds the layer
    ],
)
@pytest.mark.parametrize("rank", [1, 3])
def test_truncation_is_the_best_there_is(module: LoraModule, rank: int) -> None:
    dense = delta(module).double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    expected = u[:, :rank] * s[:rank] @ vh[:rank]
    small = truncate(module, rank)
    assert small.rank == rank
    assert small.scale == 1
    torch.testing.assert_close(delta(small).double(), expected, rtol=1e-4, atol=1e-5)
    lost = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
    assert deviation(small, module).relative == pytest.approx(lost, rel=1e-4)


def test_a_module_of_no_higher_rank_stays_as_it_is() -> None:
    module = random_module(12, 6, 9)
    assert truncate(module, 6) is module
    assert deviation(module, module).relative == 0


def test_the_deviation_is_that_of_the_dense_matrices() -> None:
    new, old = random_module(12, 2, 9, 0.5), random_module(12, 6, 9)
    found = deviation(new, old)
    assert found.difference == pytest.approx((delta(new) - delta(old)).square().sum().item())
    assert found.reference == pytest.approx(delta(old).square().sum().item())
    both = found + Deviation(0.0, found.reference)
    assert both.relative == pytest.approx(found.relative / 2**0.5)
    nothing = LoraModule("m", torch.zeros(1, 9), torch.zeros(12, 1), 1.0)
    assert deviation(nothing, nothing).relative == 0
    assert deviation(old, nothing).relative == float("inf")


# --------------------------------------------------------------------------------- the command


def run_export(*words: object) -> int:
    return cli.main(["export", *map(str, words)])


def mixed_lora(path: Path, *, spec: TurboSpec | None = SPEC, header: Any = None) -> Path:
    """A LoRA of two ranks with alphas, in kohya's spelling or, with a spec, as we write it."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, rank, alpha in (("attn.to_q", 2, 3.0), ("img_mlp.net.2", 5, 2.5)):
        into = 32 if name == "attn.to_q" else 128
        stem = "lora_unet_transformer_blocks_1_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(32, rank, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    if spec:
        return write_lora(path, tensors, spec=spec, title="Mixed", author="me", extra=header)
    save_file(tensors, path, header)
    return path


def deltas(path: Path) -> dict[str, torch.Tensor]:
    tensors, metadata = read_lora(path)
    modules = normalise(tensors, metadata, source=path.name).modules
    return {name: delta(module) for name, module in modules.items()}


@pytest.mark.parametrize("keys", ["comfyui", "diffusers"])
def test_every_spelling_keeps_the_change(keys: str, tmp_path: Path) -> None:
    source = mixed_lora(tmp_path / "mixed.safetensors", header={"ss_steps": "7"})
    out = tmp_path / "out" / "new.safetensors"
    assert run_export(source, "--out", out, "--keys", keys, "--dtype", "fp32") == 0
    expected = deltas(source)
    assert deltas(out).keys() == expected.keys()
    for name, change in deltas(out).items():
        torch.testing.assert_close(change, expected[name])
    tensors, metadata = read_lora(out)
    prefix = {"comfyui": "diffusion_model", "diffusers": "transformer"}[keys]
    assert {key.split(".")[0] for key in tensors} == {prefix}
    assert any(key.endswith(".alpha") for key in tensors) == (keys == "comfyui")
    assert metadata["modelspec.title"] == "Mixed"
    assert metadata["modelspec.author"] == "me"
    assert metadata["ss_steps"] == "7"
    assert metadata["ss_output_name"] == "new"
    assert metadata["modelspec.hash_sha256"] == f"0x{tensor_sha256(out)}"
    assert resolve_spec(out, metadata)[0] == SPEC


@pytest.mark.parametrize("keys", ["comfyui", "diffusers"])
def test_diffusers_loads_every_export(
    keys: str, tmp_path: Path, new_transformer: Callable[[], QwenImageTransformer2DModel]
) -> None:
    from diffusers import QwenImagePipeline

    source = mixed_lora(tmp_path / "mixed.safetensors")
    out = tmp_path / "new.safetensors"
    run_export(source, "--out", out, "--keys", keys, "--dtype", "fp32")
    torch.manual_seed(3)
    inputs = torch.randn(2, 16, 4, 4), torch.rand(2), Text(torch.randn(2, 3, 24))
    merged, loaded = new_transformer(), new_transformer()
    with torch.no_grad():
        for name, change in deltas(source).items():
            merged.get_submodule(name).weight += change
        state, metadata = QwenImagePipeline.lora_state_dict(str(out), return_lora_metadata=True)
        QwenImagePipeline.load_lora_into_transformer(state, loaded, metadata=metadata)
        expected = qwen_image.velocity(merged, *inputs)
        assert torch.allclose(qwen_image.velocity(loaded, *inputs), expected, atol=1e-4)
        assert not torch.allclose(
            qwen_image.velocity(new_transformer(), *inputs), expected, atol=1e-2
        )


@pytest.mark.comfy
@pytest.mark.parametrize("keys", ["comfyui", "diffusers"])
def test_core_loads_every_export(
    keys: str, tmp_path: Path, comfyui: object, transformer: QwenImageTransformer2DModel
) -> None:
    import comfy.lora
    import comfy.supported_models

    source = mixed_lora(tmp_path / "mixed.safetensors")
    out = tmp_path / "new.safetensors"
    run_export(source, "--out", out, "--keys", keys, "--dtype", "fp32")
    changes = deltas(source)
    numbers = ("num_layers", "in_channels", "out_channels", "attention_head_dim",
               "num_attention_heads", "joint_attention_dim", "axes_dims_rope")  # fmt: skip
    shape = {name: transformer.config[name] for name in numbers}
    settings = comfy.supported_models.QwenImage({"image_model": "qwen_image", **shape})
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "")
    loaded = comfy.lora.load_lora(load_file(out), comfy.lora.model_lora_keys_unet(model, {}))
    assert set(loaded) == {f"diffusion_model.{name}.weight" for name in changes}
    for name, change in changes.items():
        patch = [(1.0, loaded[f"diffusion_model.{name}.weight"], 1.0, None, None)]
        patched = comfy.lora.calculate_weight(patch, torch.zeros_like(change), name)
        torch.testing.assert_close(patched, change)


def test_rank_reduction_says_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = mixed_lora(tmp_path / "mixed.safetensors")
    out = tmp_path / "small.safetensors"
    assert run_export(source, "--out", out, "--rank", 3, "--dtype", "fp32", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    expected, found = deltas(source), deltas(out)
    ranks = {name: (m["rank_before"], m["rank"]) for name, m in report["modules"].items()}
    assert ranks == {
        "transformer_blocks.1.attn.to_q": (2, 2),
        "transformer_blocks.1.img_mlp.net.2": (5, 3),
    }
    for name, module in report["modules"].items():
        lost = (found[name] - expected[name]).norm() / expected[name].norm()
        assert module["relative_error"] == pytest.approx(lost.item(), rel=1e-3, abs=1e-6)
    whole = [torch.cat([c.flatten() for c in part.values()]) for part in (found, expected)]
    total = (whole[0] - whole[1]).norm() / whole[1].norm()
    assert report["relative_error"] == pytest.approx(total.item(), rel=1e-3)
    assert 0.05 < report["relative_error"] < 1
    header = json.loads(read_lora(out)[1]["turbo.export"])
    assert header["rank_limit"] == 3
    assert header["relative_error"] == pytest.approx(report["relative_error"], abs=1e-7)

    assert run_export(source, "--out", tmp_path / "text.safetensors", "--rank", 3) == 0
    text = capsys.readouterr().out
    assert "transformer_blocks.*.img_mlp.net.2" in text
    assert "all modules together" in text


def test_rounding_counts_as_error_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mixed_lora(tmp_path / "mixed.safetensors")
    errors = {}
    for dtype in ("fp32", "bf16", "fp16"):
        run_export(source, "--out", tmp_path / f"{dtype}.safetensors", "--dtype", dtype, "--json")
        errors[dtype] = json.loads(capsys.readouterr().out)["relative_error"]
        assert {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype] in {
            tensor.dtype for tensor in read_lora(tmp_path / f"{dtype}.safetensors")[0].values()
        }
    assert errors["fp32"] == 0
    assert 1e-4 < errors["fp16"] < 1e-3 < errors["bf16"] < 1e-2


def test_a_public_file_gets_the_spec_of_the_table(tmp_path: Path) -> None:
    name = "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
    source = mixed_lora(tmp_path / name, spec=None)
    assert run_export(source, "--out", tmp_path / "mine.safetensors") == 0
    metadata = read_lora(tmp_path / "mine.safetensors")[1]
    assert resolve_spec("mine", metadata)[0].sigmas() == (1.0, 0.7155, 0.0)


def test_an_unknown_schedule_has_to_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = mixed_lora(tmp_path / "style.safetensors", spec=None)
    out = tmp_path / "mine.safetensors"
    assert run_export(source, "--out", out) == 2
    assert "--sigmas" in capsys.readouterr().err
    assert not out.exists()
    assert run_export(source, "--out", out, "--sigmas", "1, .8, 0", "--sampler", "renoise") == 0
    spec = resolve_spec("mine", read_lora(out)[1])[0]
    assert (spec.sigmas(), spec.sampler, spec.base) == ((1.0, 0.8, 0.0), "renoise", "unknown")
    other = tmp_path / "other.safetensors"
    assert run_export(out, "--out", other, "--sigmas", "1, .7, 0") == 0
    spec = resolve_spec("other", read_lora(other)[1])[0]
    assert (spec.sigmas(), spec.sampler) == ((1.0, 0.7, 0.0), "renoise")  # the rest stays
    assert run_export(out, "--out", tmp_path / "same.safetensors", "--sigmas", "") == 0
    assert resolve_spec("same", read_lora(tmp_path / "same.safetensors")[1])[0].sigmas()[1] == 0.8


def test_alpha_of_the_header_is_applied_and_not_handed_on(tmp_path: Path) -> None:
    """diffusers would apply it a second time."""
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, 32), key.format("B"): torch.ones(32, 2)}
    header = {
        "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})
    }
    source = tmp_path / "peft.safetensors"
    save_file(tensors, source, header)
    out = tmp_path / "out.safetensors"
    assert run_export(source, "--out", out, "--keys", "diffusers", "--sigmas", "1 0") == 0
    assert "lora_adapter_metadata" not in read_lora(out)[1]
    assert deltas(out)["transformer_blocks.0.attn.to_q"][0, 0] == 2 * 8 / 2


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mixed_lora(tmp_path / "mixed.safetensors")
    before = source.read_bytes()
    assert run_export(source, "--out", source) == 2
    assert source.read_bytes() == before
    (tmp_path / "new.md").write_text("my words")  # of the card beside it
    assert run_export(source, "--out", tmp_path / "new.safetensors") == 2
    assert "new.md exists" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()


def test_an_output_that_appeared_meanwhile_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = mixed_lora(tmp_path / "mixed.safetensors"), tmp_path / "out.safetensors"
    check = convert.check_finite

    def check_slowly(*arguments: Any) -> None:
        check(*arguments)
        out.write_text("of another")

    monkeypatch.setattr(convert, "check_finite", check_slowly)
    assert run_export(source, "--out", out) == 2
    assert "out.safetensors appeared while it was being written" in capsys.readouterr().err
    assert out.read_text() == "of another"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


def test_what_fp16_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "transformer_blocks.0.attn.to_q.lora_{}.weight"
    tensors = {key.format("A"): torch.full((1, 32), 1e6), key.format("B"): torch.ones(32, 1)}
    source = write_lora(tmp_path / "big.safetensors", tensors, spec=SPEC, title="big")
    out = tmp_path / "out.safetensors"
    assert run_export(source, "--out", out, "--dtype", "fp16") == 2
    assert "fp16 cannot hold" in capsys.readouterr().err
    assert not out.exists()
    assert run_export(source, "--out", out, "--dtype", "bf16") == 0


# ---------------------------------------------------------------------------------- run folders


def test_a_run_gives_its_newest_averaged_student_and_then_its_lora(
    small_config: Callable[..., Config],
    data: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = small_config(save_every=3, keep_checkpoints=0)
    finished = train(config, data=data)  # type: ignore[arg-type]
    kept = finished.read_bytes()
    finished.unlink()
    newest = latest_checkpoint(config.run_dir)
    assert newest is not None
    newest.rename(newest.with_name("last"))  # as if the run had stopped in between
    out = tmp_path / "half.safetensors"
    assert run_export(config.run_dir, "--out", out, "--dtype", "fp32", "--json") == 0
    assert "6 of 8 steps" in json.loads(capsys.readouterr().out)["source"]
    half = latest_checkpoint(config.run_dir)
    assert half is not None
    assert half.name == "step-000006"
    checkpoint = load_checkpoint(half)
    names = list(checkpoint.adapters[STUDENT])
    tensors, metadata = read_lora(out)
    for name, average in zip(names, checkpoint.method[STUDENT]["average"], strict=True):
        key = "diffusion_model." + name.replace(f".{STUDENT}.", ".")
        assert torch.equal(tensors[key], average)
    raw = checkpoint.adapters[STUDENT]
    assert any(
        not torch.equal(raw[name], tensors["diffusion_model." + name.replace(".student.", ".")])
        for name in names
    )
    assert metadata["ss_steps"] == "6"
    assert metadata["modelspec.title"] == config.name
    assert resolve_spec(out, metadata)[0] == spec_of(config)

    finished.write_bytes(kept)
    out = tmp_path / "whole.safetensors"
    assert run_export(config.run_dir, "--out", out) == 0
    expected = deltas(finished)
    assert all(torch.equal(change, expected[name]) for name, change in deltas(out).items())


def test_a_folder_without_a_run_or_a_checkpoint_is_refused(
    small_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.training.run_start import prepare_run_dir

    out = tmp_path / "out.safetensors"
    assert run_export(tmp_path, "--out", out) == 2
    assert "no run folder" in capsys.readouterr().err
    config = small_config()
    prepare_run_dir(config, resume=False)
    assert run_export(config.run_dir, "--out", out) == 2
    assert "nor a checkpoint" in capsys.readouterr().err
