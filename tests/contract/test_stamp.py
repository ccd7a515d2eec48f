"""`turbo-distill stamp`: spec and alpha come in, and not a bit of the weights changes."""

from __future__ import annotations

import json
import os
import stat
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from distill.cli import main
from distill.contract.describe import describe
from distill.contract.known import find
from distill.contract.lora_keys import LoraFormatError
from distill.contract.metadata import read_header, read_lora, tensor_sha256
from distill.contract.shift import EmpiricalShift, LinearShift, StaticShift, read_shift
from distill.contract.spec import SpecError, TurboSpec
from distill.contract.stamp import Wanted, known_file, stamp
from distill.contract.tensor_file import read_layout

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
SPELLINGS = {  # down, up, alpha of a module "img_in"
    "comfyui": (
        "diffusion_model.img_in.lora_A.weight",
        "diffusion_model.img_in.lora_B.weight",
        "diffusion_model.img_in.alpha",
    ),
    "diffusers": (
        "transformer.img_in.lora_A.weight",
        "transformer.img_in.lora_B.weight",
        "transformer.img_in.alpha",
    ),
    "diffusers 0": (
        "unet.img_in.lora.down.weight",
        "unet.img_in.lora.up.weight",
        "unet.img_in.alpha",
    ),
    "underscore": (
        "transformer.img_in_lora.down.weight",
        "transformer.img_in_lora.up.weight",
        "transformer.img_in.alpha",
    ),
    "linear layer": (
        "transformer.img_in.lora_linear_layer.down.weight",
        "transformer.img_in.lora_linear_layer.up.weight",
        "transformer.img_in.alpha",
    ),
    "kohya": (
        "lora_unet_img_in.lora_down.weight",
        "lora_unet_img_in.lora_up.weight",
        "lora_unet_img_in.alpha",
    ),
    "peft": (
        "base_model.model.img_in.lora_A.default.weight",
        "base_model.model.img_in.lora_B.default.weight",
        "base_model.model.img_in.alpha",
    ),
}
SIGMAS = (1.0, 0.5, 0.0)


def raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """dtype, shape and bytes of every tensor, read by hand."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {
        key: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for key, entry in header.items()
    }


def write(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None):
    safetensors.torch.save_file(tensors, path, header)
    return path


def lora(
    path: Path,
    header: dict[str, str] | None = None,
    spelling: str = "comfyui",
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 3,
) -> Path:
    """A LoRA of odd sizes without alpha tensors."""
    down, up, _ = SPELLINGS[spelling]
    draw = torch.Generator().manual_seed(0)
    return write(
        path,
        {
            down: torch.randn(rank, 5, generator=draw).to(dtype),
            up: torch.randn(7, rank, generator=draw).to(dtype),
        },
        header,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_byte_stays_and_alpha_comes_under_the_files_own_names(
    spelling: str, dtype: str, tmp_path: Path
) -> None:
    source = lora(
        tmp_path / "a.safetensors", {"lora_alpha": "6", "x": "é"}, spelling, DTYPES[dtype]
    )
    before = source.read_bytes()
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    old, new = raw(source), raw(tmp_path / "b.safetensors")
    alpha = SPELLINGS[spelling][2]
    assert source.read_bytes() == before
    assert {key: new[key] for key in old} == old
    assert new.keys() - old.keys() == {alpha}
    assert new[alpha] == ("F32", [], torch.tensor(6.0).numpy().tobytes())
    assert safetensors.torch.load_file(tmp_path / "b.safetensors")[alpha].item() == 6
    assert read_header(tmp_path / "b.safetensors").items() >= {"lora_alpha": "6", "x": "é"}.items()
    found = describe(tmp_path / "b.safetensors")
    assert (found["alpha_source"], found["scales"], found["sigmas"]) == (
        "tensor",
        {"2": 1},
        list(SIGMAS),
    )


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_blocks_0_self_attn_q",
        "lora_transformer_single_transformer_blocks_3_proj_out",
        "lycoris_layers_0_attention_to_q",
        "lora_unet_transformer_blocks_0_attn_to_q",
    ],
)
def test_flattened_names_of_every_model_keep_their_spelling(stem: str, tmp_path: Path) -> None:
    """FLUX, Wan, Z-Image: only their models could say where the dots were."""
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(3, 5),
        f"{stem}.lora_up.weight": torch.ones(7, 3),
    }
    source = write(tmp_path / "a.safetensors", tensors, {"ss_network_alpha": "6"})
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    assert safetensors.torch.load_file(tmp_path / "b.safetensors")[f"{stem}.alpha"].item() == 6
    assert describe(source)["alpha_source"] == "metadata"
    assert describe(tmp_path / "b.safetensors")["scales"] == {"2": 1}


def test_one_module_in_two_spellings_is_refused_still(tmp_path: Path) -> None:
    flat = "lora_unet_transformer_blocks_0_attn_to_q"
    dotted = "diffusion_model.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_down.weight": torch.ones(3, 5) for stem in (flat, dotted)}
    tensors |= {f"{stem}.lora_up.weight": torch.ones(7, 3) for stem in (flat, dotted)}
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(LoraFormatError, match="is given twice"):
        stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))


def test_odd_bytes_of_every_width_stay_aligned_and_in_place(tmp_path: Path) -> None:
    """Wide tensors lie first, whatever is added, so that programs can use them where they lie."""
    down, up, alpha = SPELLINGS["comfyui"]
    draw = torch.Generator().manual_seed(1)
    tensors = {
        down: torch.randn(1, 3, generator=draw).to(torch.float8_e5m2),
        up: torch.randn(5, 1, generator=draw).bfloat16(),
        "note.bytes": torch.arange(6, dtype=torch.uint8),
        "note.long": torch.arange(3),
        "note.empty": torch.zeros(0, 4),
        "note.double": torch.randn(3, generator=draw, dtype=torch.float64),
    }
    source = write(tmp_path / "a.safetensors", tensors)
    report = stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS, alpha=0.1))
    new = raw(tmp_path / "b.safetensors")
    assert {key: new[key] for key in tensors} == raw(source)
    assert report["alpha_added"] == 1
    for key, entry in read_layout(tmp_path / "b.safetensors").entries.items():
        width = tensors[key].element_size() if key in tensors else 4
        assert entry.start % width == 0, key
    read = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert read[alpha] == torch.tensor(0.1)
    assert all(torch.equal(read[key].double(), t.double()) for key, t in tensors.items())


def test_bytes_that_are_no_numbers_stay_too(tmp_path: Path) -> None:
    """A NaN's payload and the sign of zero are bits like others."""
    down, up, _ = SPELLINGS["comfyui"]
    odd = torch.tensor([0x7FC1, 0x8000, 0x0001], dtype=torch.int32).to(torch.int16)
    tensors = {
        down: torch.zeros(1, 3).bfloat16(),
        up: -torch.zeros(4, 1).bfloat16(),
        "note": odd.view(torch.bfloat16),
    }
    source = write(tmp_path / "a.safetensors", tensors)
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    assert raw(tmp_path / "b.safetensors") == raw(source)


def test_a_file_larger_than_a_block_is_copied_whole(tmp_path: Path) -> None:
    down, up, _ = SPELLINGS["comfyui"]
    numbers = torch.arange(3_000_001, dtype=torch.float32)
    tensors = {down: numbers[None], up: torch.ones(3, 1), "z": numbers.flip(0)}
    source = write(tmp_path / "a.safetensors", tensors)
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS, alpha=2.0))
    new = raw(tmp_path / "b.safetensors")
    assert {key: new[key] for key in tensors} == raw(source)


def test_little_memory_is_enough_for_any_size(tmp_path: Path) -> None:
    down, up, _ = SPELLINGS["comfyui"]
    tensors = {down: torch.ones(8, 1_000_000), up: torch.ones(3, 8)}
    source = write(tmp_path / "a.safetensors", tensors)
    tracemalloc.start()
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS, alpha=2.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.stat().st_size > 32e6
    assert peak < 12e6  # two blocks of 4 MiB, of the hash by which a known file is found


def test_alpha_of_a_peft_folder_comes_into_the_file_alone(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    lora(folder / "adapter_model.safetensors", spelling="peft")
    config = {"r": 3, "lora_alpha": 12, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    report = stamp(folder, tmp_path / "b.safetensors", Wanted(SIGMAS))
    tensors, header = read_lora(tmp_path / "b.safetensors")
    assert tensors["base_model.model.img_in.alpha"].item() == pytest.approx(12 * 3**0.5)
    assert "adapter_config.json" not in header
    assert report["alpha_from"].startswith("from adapter_config.json")
    assert describe(tmp_path / "b.safetensors")["scales"] == {f"{12 * 3**0.5 / 3:.6g}": 1}


def test_alpha_that_nobody_states_is_not_made_up(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors")
    report = stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    assert raw(tmp_path / "b.safetensors") == raw(source)
    assert report["alpha_added"] == 0
    assert "assumed alpha = rank" in report["warnings"][0]


@pytest.mark.parametrize(
    ("header", "tensor", "where"),
    [
        ({"lora_alpha": "6"}, None, "the header's 'lora_alpha' says 6"),
        ({}, 6.0, "the tensor of module img_in says 6"),
    ],
)
def test_two_alphas_are_named(
    header: dict[str, str], tensor: float | None, where: str, tmp_path: Path
) -> None:
    source = lora(tmp_path / "a.safetensors", header)
    if tensor is not None:
        tensors = safetensors.torch.load_file(source) | {
            "diffusion_model.img_in.alpha": torch.tensor(tensor)
        }
        write(source, tensors)
    with pytest.raises(LoraFormatError, match=f"a.safetensors: .*--alpha says 4, {where}"):
        stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS, alpha=4.0))
    assert not (tmp_path / "b.safetensors").exists()
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS, alpha=6.0))
    assert describe(tmp_path / "b.safetensors")["scales"] == {"2": 1}


def test_hashes_are_made_anew_where_there_were_some(tmp_path: Path) -> None:
    stale = {"modelspec.hash_sha256": "0x12", "sshs_model_hash": "12", "lora_alpha": "6"}
    stamp(lora(tmp_path / "a.safetensors", stale), tmp_path / "b.safetensors", Wanted(SIGMAS))
    header, digest = (
        read_header(tmp_path / "b.safetensors"),
        tensor_sha256(tmp_path / "b.safetensors"),
    )
    assert header["modelspec.hash_sha256"] == f"0x{digest}"
    assert header["sshs_model_hash"] == digest
    stamp(lora(tmp_path / "c.safetensors"), tmp_path / "d.safetensors", Wanted(SIGMAS))
    assert read_header(tmp_path / "d.safetensors").keys() == {"turbo.spec"}


def test_the_schedule_of_a_known_file_is_written_into_a_renamed_copy(tmp_path: Path) -> None:
    name = "Qwen-Image-2.1-viggle-turbo-v0.2.1-6step-lora-r256.safetensors"
    row = find(name)
    assert row is not None
    stamp(lora(tmp_path / name), tmp_path / "mine.safetensors", Wanted())
    header = read_header(tmp_path / "mine.safetensors")
    assert TurboSpec.from_json(header["turbo.spec"]) == row.spec
    report = stamp(
        lora(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", Wanted(like=row.name)
    )
    assert TurboSpec.from_values(report["spec"]) == row.spec
    assert "stated by the author" in report["spec_source"]


def test_like_takes_names_of_files_and_helps_with_others() -> None:
    assert known_file("Qwen/Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors") is (
        known_file("Wuli-Qwen-Image-2512-Turbo-LoRA-2steps")
    )
    with pytest.raises(SpecError, match=r"known_files.md\); found 'turbo8_lara'. Did you mean"):
        known_file("turbo8_lara")
    with pytest.raises(SpecError, match="Z-Image-Turbo: this is a whole model"):
        known_file("z_image_turbo_bf16.safetensors")


def test_nothing_known_and_nothing_said_is_an_error(tmp_path: Path) -> None:
    source = lora(tmp_path / "style.safetensors")
    with pytest.raises(
        SpecError, match=r"style.safetensors: expected a sampling schedule.* Here: --sigmas"
    ):
        stamp(source, tmp_path / "b.safetensors", Wanted())
    assert list(tmp_path.iterdir()) == [source]


def test_by_hand_keeps_the_rest_of_what_the_file_says(tmp_path: Path) -> None:
    spec = TurboSpec((1.0, 0.7, 0.0), sampler="renoise", base="x/y", method="dmd2", created_by="me")
    header = {"turbo.spec": spec.to_json(), "modelspec.usage_hint": "2 steps at sigmas 1, 0.7, 0"}
    source = lora(tmp_path / "a.safetensors", header)
    report = stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS, fields={"cfg": 2.0}))
    written = TurboSpec.from_json(read_header(tmp_path / "b.safetensors")["turbo.spec"])
    assert (written.sigmas(), written.sampler, written.base) == (SIGMAS, "renoise", "x/y")
    assert (written.cfg, written.method, written.created_by) == (2, "dmd2", "me")
    assert report["spec_replaced"]
    assert report["spec_source"] == "--sigmas; cfg by hand"
    assert "sigmas 1, 0.5, 0;" in read_header(tmp_path / "b.safetensors")["modelspec.usage_hint"]


def test_what_was_said_per_step_may_be_said_anew(tmp_path: Path) -> None:
    spec = TurboSpec((1.0, 0.7, 0.0), strength=(1.0, 0.8), boundary=1)
    source = lora(tmp_path / "a.safetensors", {"turbo.spec": spec.to_json()})
    with pytest.raises(SpecError, match="one for each of 3 steps; found 2"):
        stamp(source, tmp_path / "b.safetensors", Wanted((1.0, 0.7, 0.4, 0.0)))
    fields = {"strength": 0.9}
    report = stamp(source, tmp_path / "b.safetensors", Wanted((1.0, 0.7, 0.4, 0.0), fields=fields))
    assert (report["spec"]["strength"], report["spec"]["version"]) == (0.9, 1)


def test_a_damaged_spec_is_mended_by_hand_only(tmp_path: Path) -> None:
    header = {"turbo.spec": '{"sigmas": [0, 1]}', "modelspec.base_model": "Qwen/Qwen-Image-2.1"}
    source = lora(tmp_path / "a.safetensors", header)
    with pytest.raises(SpecError, match=r"a.safetensors: sigmas: expected the first"):
        stamp(source, tmp_path / "b.safetensors", Wanted())
    stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    written = TurboSpec.from_json(read_header(tmp_path / "b.safetensors")["turbo.spec"])
    assert (written.base, written.family) == ("Qwen/Qwen-Image-2.1", "qwen-image-2.1")


def test_the_base_tells_the_family_and_family_goes_before_it(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors")
    base = {"base": "Tongyi-MAI/Z-Image"}
    assert stamp(source, tmp_path / "1.sft", Wanted(SIGMAS, fields=base))["family"] == "z-image"
    both = base | {"family": "flux"}
    assert stamp(source, tmp_path / "2.sft", Wanted(SIGMAS, fields=both))["family"] == "flux"
    odd = stamp(source, tmp_path / "3.sft", Wanted(SIGMAS, alpha=3.0, fields={"family": "z-imag"}))
    assert "'z-imag' was written. Did you mean 'z-image'?" in odd["warnings"][0]
    assert "nothing names the model" in odd["warnings"][1]


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["stamp", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = lora(tmp_path / "a.safetensors"), tmp_path / "new" / "b.safetensors"
    options = (
        "--nodes",
        "1, .9375, .75, 0",
        "--also-nodes",
        "1 .5 0",
        "--shift",
        "linear:256=0.5,8192=0.9",
        "--family",
        "qwen-image-2.1",
        "--guidance",
        "2.5",
        "--strength",
        "0.8",
        "--alpha",
        "1.5",
    )
    code, text, err = run(capsys, source, "--out", out, *options, "--json")
    found = json.loads(text)
    assert code == 0
    assert found["wrote"] == [str(out)]
    assert found["spec"]["shift"] == {"rule": "linear", "tokens": [256, 8192], "mu": [0.5, 0.9]}
    assert found["spec"]["ladder"] == [[1, 0.5, 0]]
    assert (found["spec"]["version"], found["alpha_added"]) == (2, 1)
    assert found["spec"]["guidance"] == 2.5
    assert found["alpha_from"] == "--alpha"
    assert "stamped a.safetensors" in err
    again = tmp_path / "c.safetensors"
    code, text, _ = run(capsys, source, "--out", again, "--sigmas", "1, .5, 0", "--base", "a/b\x1b")
    assert code == 0
    assert "2 steps at sigmas 1, 0.5, 0" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sigmas", "1, .5, 0", "--nodes", "1 0"], "not allowed with argument"),
        (["--nodes", "1 .5 0", "--shift", "statik:3"], "Did you mean 'static'"),
        (["--nodes", "1 .5 0", "--shift", "static"], "expected for example static:3"),
        (["--nodes", "1 .5 0", "--alpha", "0"], "expected a number above 0"),
    ],
)
def test_wrong_usage(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lora(tmp_path / "a.safetensors")
    with pytest.raises(SystemExit):
        main(["stamp", str(source), "--out", str(tmp_path / "b"), *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shift", "static:3"], "--shift and --terminal: expected --nodes"),
        (["--nodes", "1 .5"], "nodes: expected 0 as the last"),
        (["--sigmas", "1 .5 0", "--boundary", "2"], "boundary: expected fewer than 2 steps"),
        (["--nodes", "1 .5 0", "--strength", "1, .8, .6"], "one for each of 2 steps; found 3"),
        (["--like", "Qwen-Image-Lightning-4step-mine"], "Did you mean 'Qwen-Image-Lightning-4st"),
    ],
)
def test_what_is_no_spec_is_told_and_nothing_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lora(tmp_path / "a.safetensors")
    code, _, err = run(capsys, source, "--out", tmp_path / "b.safetensors", *options)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == [source]


def test_never_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = lora(tmp_path / "a.safetensors")
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for out in (source, tmp_path / "link.safetensors"):
        code, _, err = run(capsys, source, "--out", out, "--sigmas", "1 0")
        assert code == 2
        assert "the LoRA itself" in err
    other = lora(tmp_path / "other.safetensors", rank=2)
    code, _, err = run(capsys, source, "--out", other, "--sigmas", "1 0")
    assert (code, source.read_bytes()) == (2, before)
    assert "exists; delete it" in err


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.0.weight": torch.ones(2, 2)}, "looks like a whole model"),
        ({"diffusion_model.img_in.lora_A.weight": torch.ones(2, 2)}, "no up"),
        ({"diffusion_model.img_in.dora_scale": torch.ones(2)}, "DoRA"),
    ],
)
def test_what_is_no_lora_is_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(LoraFormatError, match=f"a.safetensors: .*{message}"):
        stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    assert list(tmp_path.iterdir()) == [source]


def test_a_file_that_changes_meanwhile_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.contract import rewrite

    source = lora(tmp_path / "a.safetensors")
    header_of_entries = rewrite.header_of_entries

    def meanwhile(*args: Any) -> Any:
        lora(source, rank=4)
        return header_of_entries(*args)

    monkeypatch.setattr(rewrite, "header_of_entries", meanwhile)
    with pytest.raises(LoraFormatError, match="was written to while it was read"):
        stamp(source, tmp_path / "b.safetensors", Wanted(SIGMAS))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.skipif(os.name == "nt", reason="no such modes there")
def test_the_copy_may_be_read_as_other_files(tmp_path: Path) -> None:
    stamp(lora(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", Wanted(SIGMAS))
    (tmp_path / "c").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("b.safetensors", "c")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("none", None),
        ("static:3", StaticShift(3.0)),
        ("Linear: 256=0.5, 8192=.9", LinearShift((256, 8192), (0.5, 0.9))),
        (
            "empirical:10=8.73809524e-05*x+1.89833333,200=0.00016927*x-0.45666666,4300",
            EmpiricalShift(
                (10, 200), (8.73809524e-05, 0.00016927), (1.89833333, -0.45666666), 4300
            ),
        ),
    ],
)
def test_a_rule_in_a_word(word: str, rule: Any) -> None:
    assert read_shift(word) == rule


@pytest.mark.parametrize(
    "word", ["", "none:1", "static:", "static:x", "static:-1", "static:1e999", "linear:256=0.5",
             "linear:1=1,1=2", "empirical:10=1+2,3=4+5,6", "linear:" + "1" * 300 + "=1,2=3",
             "exponential:inf", "3"]
)  # fmt: skip
def test_what_is_no_rule(word: str) -> None:
    with pytest.raises(SpecError, match="shift"):
        read_shift(word)


@pytest.mark.parametrize("name", ["b.txt", "b", "b.safetensors.bak", "b.ckpt"])
def test_a_name_that_no_loader_lists_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lora(tmp_path / "a.safetensors")
    code, _, err = run(capsys, source, "--out", tmp_path / name, "--sigmas", "1 .5 0")
    assert code == 2
    assert "expected a name that ends in .safetensors or .sft" in err
    assert not (tmp_path / name).exists()
