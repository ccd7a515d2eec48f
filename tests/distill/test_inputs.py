"""LoRAs that a run begins with: those in its base, and the one that its student begins as."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from toy_lora import Update, linear_weights, make_updates
from toy_model import small_transformer

from distill import cli
from distill.config import AdapterSection, BaseLora, Config, ConfigError, GuidanceSection
from distill.contract.base_loras import base_hint, base_records
from distill.contract.checks import SpecError
from distill.contract.describe import describe, to_text
from distill.contract.lora_keys import LoraFormatError
from distill.contract.metadata import read_header, read_lora, write_lora
from distill.contract.spec import TurboSpec
from distill.contract.tiny import TINY_DIR
from distill.data.batch import Data
from distill.data.fingerprint import differences, settings
from distill.lora.inputs import base_loras_of, check_init
from distill.lora.model_card import model_card
from distill.lora.source import open_source, open_weights
from distill.lora.student import init_student
from distill.models.base_lora import content, read_base_lora, records
from distill.models.load import load_transformer
from distill.models.pipeline import Pipeline, attach, embed, find_base
from distill.models.roles import STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.trainer import train

Make = Callable[..., Config]
PCM = {"method": "pcm", "steps": 2, "batch": 2, "lr": 1e-3, "points": 4}
ADAPTED = ("to_q", "to_k", "img_mlp.net.2")


@pytest.fixture
def updates(small_model: Path) -> dict[str, Update]:
    """Of some layers that the recipe adapts, of ranks 2 and 3 in turn."""
    layers = linear_weights(small_model / "transformer")
    chosen = {n: w for n, w in layers.items() if n.endswith(tuple(f".{a}" for a in ADAPTED))}
    return make_updates(chosen, ranks=(2, 3), alpha=3.0)


@pytest.fixture
def style(updates: dict[str, Update], tmp_path: Path) -> Path:
    return write(updates, tmp_path / "style.safetensors")


def write(updates: dict[str, Update], path: Path) -> Path:
    tensors = {}
    for name, update in updates.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = update.down
        tensors[f"diffusion_model.{name}.lora_B.weight"] = update.up
        tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(update.alpha))
    save_file(tensors, path)
    return path


def asked() -> tuple[torch.Tensor, torch.Tensor, Text]:
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(2, *size, generator=generator) for size in ((16, 4, 4), (3, 24)))
    return x, torch.tensor([1.0, 0.7155]), Text(text)


def roles_of(transformer: Any, rank: int = 4, alpha: float | None = None) -> Roles:
    adapter = AdapterSection(rank=rank, alpha=alpha)
    return Roles(transformer, adapter, GuidanceSection(), Text(torch.zeros(1, 2, 24)), 0)


# The student begins as a LoRA


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_student_begins_as_the_lora(style: Path, alpha: float | None) -> None:
    """Of smaller ranks, of some layers, at another alpha; and all of it learns."""
    lora, plain = open_weights(style), small_transformer()
    attach(plain, "beside", lora)
    roles = roles_of(small_transformer(), alpha=alpha)
    init_student(roles, lora)
    with torch.no_grad():
        expected = roles.family.velocity(plain, *asked())
        got = roles.velocity(STUDENT, *asked())
        assert not torch.allclose(expected, roles.velocity(TEACHER, *asked()), atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    roles.velocity(STUDENT, *asked()).square().sum().backward()
    for name, parameter in roles.named_parameters(STUDENT).items():
        if ".lora_B." in name and "txt" not in name and "add_" not in name:
            assert parameter.grad.abs().amin(0).gt(0).any(), name  # further ranks too


def test_padding_is_exact(style: Path, updates: dict[str, Update]) -> None:
    roles = roles_of(small_transformer())
    drawn = {n: p.detach().clone() for n, p in roles.named_parameters(STUDENT).items()}
    init_student(roles, open_weights(style))
    for name, parameter in roles.named_parameters(STUDENT).items():
        module = name.split(".lora_")[0]
        update = updates.get(module)
        rank = len(update.down) if update else 0
        if ".lora_A." in name:
            assert torch.equal(parameter[rank:], drawn[name][rank:])
            assert not update or torch.equal(parameter[:rank], update.down)
        else:
            assert not parameter[:, rank:].any()
            assert not update or torch.equal(parameter[:, :rank], update.up * (3.0 / rank))


def test_what_the_student_cannot_begin_as(
    style: Path, updates: dict[str, Update], small_config: Make, tmp_path: Path
) -> None:
    """Told before the base is loaded."""
    with pytest.raises(
        ConfigError, match=r"init_from: .*at most adapter\.rank, 2 \(found 3\).*--rank"
    ):
        train(small_config(init_from=style, adapter={"rank": 2}))
    odd = write(
        {"transformer_blocks.0.img_mod.1": next(iter(updates.values()))}, tmp_path / "m.safetensors"
    )
    with pytest.raises(ConfigError, match=r"not adapted here.*set adapter\.modulation=true"):
        check_init(small_config(), open_weights(odd))
    with pytest.raises(FileNotFoundError):
        train(small_config(init_from=tmp_path / "nothing.safetensors"))
    big = {n: Update(torch.randn(2, 7), u.up[:, :2].clone(), 2) for n, u in updates.items()}
    with pytest.raises(ConfigError, match="of a model of another size"):
        init_student(
            roles_of(small_transformer()), open_weights(write(big, tmp_path / "b.safetensors"))
        )
    assert not small_config().run_dir.exists()


def test_what_is_left_out_or_assumed_is_told(
    updates: dict[str, Update], small_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {
        "text_encoder.x.lora_A.weight": torch.ones(2, 3),
        "text_encoder.x.lora_B.weight": torch.ones(3, 2),
    }
    save_file(keys | to_plain(next(iter(updates.values()))), tmp_path / "t.safetensors")
    check_init(small_config(), open_weights(tmp_path / "t.safetensors"))
    assert "assumed alpha = rank" in caplog.text
    assert "2 keys belong to no layer of the diffusion model" in caplog.text


def test_a_run_begins_as_a_lora_a_run_or_a_stage(
    style: Path, small_config: Make, data: Data, tmp_path: Path
) -> None:
    first = train(small_config(stages=[PCM, {**PCM, "lr": 2e-3}], save_every=2), data=data)
    stage = first.parents[1] / "checkpoints" / "step-000002"
    assert not torch.equal(
        *(next(iter(open_weights(p).modules.values())).up for p in (first, stage))
    )
    for number, origin in enumerate((style, first, first.parents[1], stage)):
        still = {**PCM, "steps": 1, "lr": 1e-12, "ema": 0}
        config = small_config(stages=[still], run_dir=tmp_path / f"from{number}", init_from=origin)
        lora = open_weights(train(config, data=data))
        begun = open_weights(origin)
        for name, module in begun.modules.items():
            expected = module.scale * module.up.float() @ module.down.float()
            ours = lora.modules[name]
            got = ours.scale * ours.up.float() @ ours.down.float()
            torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3)  # the file is bf16
        header = read_header(tmp_path / f"from{number}" / "lora" / "turbo.safetensors")
        record = json.loads(header["turbo.init_from"])
        assert record == {"name": origin.name, "content": content(begun)}
        assert str(tmp_path) not in json.dumps(header)


def test_a_run_that_is_under_way_does_not_begin_again(
    style: Path, small_config: Make, data: Data
) -> None:
    """What it began as may be gone by then."""
    train(small_config(stages=[PCM], init_from=style), data=data)
    style.unlink()
    longer = small_config(stages=[{**PCM, "steps": 3}], init_from=style)
    header = read_header(train(longer, data=data, resume=True))
    assert json.loads(header["turbo.init_from"])["name"] == "style.safetensors"


# LoRAs in the base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_in_float32_and_rounded_once(
    dtype: torch.dtype, style: Path, updates: dict[str, Update], small_model: Path, tmp_path: Path
) -> None:
    other = make_updates({n: u.up @ u.down for n, u in updates.items()}, seed=9)
    loras = [BaseLora(path=style, strength=0.7),
             BaseLora(path=write(other, tmp_path / "o.safetensors"), strength=-0.5)]  # fmt: skip
    bare = load_transformer(str(small_model), dtype)
    merged = load_transformer(str(small_model), dtype, loras=loras)
    for name, weight in bare.state_dict().items():
        module = name.removesuffix(".weight")
        expected = weight
        if module in updates:
            change = 0.7 * updates[module].delta() - 0.5 * other[module].delta()
            expected = (weight.float() + change).to(dtype)
        torch.testing.assert_close(
            merged.state_dict()[name],
            expected,
            rtol=1e-6 if dtype == torch.float32 else 0.008,
            atol=1e-7,
        )


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_merged_before_it_is_quantised(
    kind: str, style: Path, small_model: Path, tmp_path: Path
) -> None:
    """As a merged base on the disk would be."""
    lora = [BaseLora(path=style, strength=0.7)]
    disk = tmp_path / "merged"
    load_transformer(str(small_model), torch.bfloat16, loras=lora).save_pretrained(
        disk / "transformer"
    )
    ours = load_transformer(str(small_model), torch.bfloat16, kind, True, lora)
    theirs = load_transformer(str(disk), torch.bfloat16, kind, True)
    plain = load_transformer(str(small_model), torch.bfloat16, kind, True)
    a, b, c = (
        {n: p.dequantize() if is_traceable_wrapper_subclass(p) else p for n, p in pairs}
        for pairs in (model.named_parameters() for model in (ours, theirs, plain))
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_lora_that_does_not_fit_the_base(
    style: Path, updates: dict[str, Update], small_model: Path, tmp_path: Path
) -> None:
    def merged(path: Path) -> None:
        load_transformer(str(small_model), torch.float32, loras=[BaseLora(path=path)])

    update = next(iter(updates.values()))
    with pytest.raises(
        LoraFormatError, match=r"no linear layer 'transformer_blocks\.7\.attn\.to_q'"
    ):
        merged(write({"transformer_blocks.7.attn.to_q": update}, tmp_path / "a.safetensors"))
    save_file(
        {
            "text_encoder.x.lora_A.weight": torch.ones(2, 3),
            **{f"transformer.{k}": v for k, v in to_plain(update).items()},
        },
        tmp_path / "t.safetensors",
    )
    with pytest.raises(LoraFormatError, match="take whole"):
        merged(tmp_path / "t.safetensors")


def to_plain(update: Update) -> dict[str, torch.Tensor]:
    name = "transformer_blocks.0.attn.to_q"
    return {f"{name}.lora_A.weight": update.down, f"{name}.lora_B.weight": update.up}


def test_content_is_not_spelling(style: Path, tmp_path: Path, updates: dict[str, Update]) -> None:
    tensors, _ = read_lora(style)
    renamed = tmp_path / "renamed.safetensors"
    spec = TurboSpec((1.0, 0.0))
    write_lora(renamed, tensors, spec=spec, title="stamped")
    assert content(read_base_lora(renamed)) == content(read_base_lora(style))
    first = next(iter(updates))
    changed = {**updates, first: Update(updates[first].down, updates[first].up, 2.0)}
    assert content(read_base_lora(write(changed, renamed))) != content(read_base_lora(style))


@pytest.fixture
def distilled(style: Path, small_config: Make, small_model: Path, data: Data) -> Path:
    """A LoRA that was distilled from the base with the style in it."""
    model = {"path": str(small_model), "dtype": "float32", "gradient_checkpointing": False,
             "loras": [{"path": str(style), "strength": 0.7}]}  # fmt: skip
    return train(small_config(model=model, stages=[PCM]), data=data)


def test_the_header_and_the_card_say_so(distilled: Path, style: Path, tmp_path: Path) -> None:
    header = read_header(distilled)
    assert json.loads(header["turbo.base_loras"]) == [
        {"name": "style.safetensors", "strength": 0.7, "content": content(read_base_lora(style))}
    ]
    assert str(tmp_path) not in json.dumps(header)
    assert base_hint(header) == (
        "distilled with 'style.safetensors' at strength 0.7 in the base; apply that too"
    )
    assert "at strength 0.7 in the base" in to_text(describe(distilled))
    card = distilled.with_suffix(".md").read_text("utf-8")
    assert "style.safetensors" in card
    assert "0.7" in card
    spec = TurboSpec.from_json(header["turbo.spec"])
    published = model_card("turbo.safetensors", spec, header)
    assert 'set_adapters(["base0", "turbo"], [0.7, 1])' in published


def test_its_base_is_found_again_by_content(distilled: Path, style: Path, tmp_path: Path) -> None:
    run = open_source(distilled.parents[1])
    assert [lora.path for lora in base_loras_of(run)] == [style]
    assert [lora.path for lora in base_loras_of(open_source(distilled))] == [style]
    away = tmp_path / "away"
    away.mkdir()
    moved = Path(shutil.copy(distilled, away))
    with pytest.raises(
        ConfigError, match=r"the LoRA 'style\.safetensors' in it, at strength 0\.7.*Copy it there"
    ):
        base_loras_of(open_source(moved))
    shutil.copy(distilled, away / style.name)
    with pytest.raises(ConfigError, match="is another LoRA"):
        base_loras_of(open_source(moved))
    shutil.copy(style, away / style.name)
    assert base_loras_of(open_source(moved)) == (BaseLora(path=away / style.name, strength=0.7),)


def test_another_strength_is_another_base(
    distilled: Path, style: Path, small_config: Make, small_model: Path, data: Data, tmp_path: Path
) -> None:
    def again(strength: float, path: Path) -> Path:
        model = {"path": str(small_model), "dtype": "float32", "gradient_checkpointing": False,
                 "loras": [{"path": str(path), "strength": strength}]}  # fmt: skip
        longer = small_config(model=model, stages=[{**PCM, "steps": 3}])
        return train(longer, data=data, resume=True)

    with pytest.raises(ConfigError, match=r"strength: 0\.7 -> 0\.8 \(another base\)"):
        again(0.8, style)
    moved = Path(shutil.move(style, tmp_path / "moved.safetensors"))
    assert again(0.7, moved).is_file()


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "5",
        "[5]",
        '[{"name": "../x", "strength": 1, "content": "a"}]',
        '[{"name": "", "strength": 1, "content": "a"}]',
        '[{"name": "x", "strength": 0, "content": "a"}]',
        '[{"name": "x", "strength": Infinity, "content": "a"}]',
        '[{"name": 7, "strength": 1, "content": "a"}]',
        '[{"name": "x", "content": "a"}]',
        "[" * 20_000,
    ],
)
def test_a_damaged_header_is_told(text: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SpecError, match=r"header 'turbo\.base_loras': expected a list"):
        base_records({"turbo.base_loras": text})
    assert "expected a list" in (base_hint({"turbo.base_loras": text}) or "")
    card = model_card("x.safetensors", TurboSpec((1.0, 0.0)), {"turbo.base_loras": text})
    assert "in the base" not in card
    assert "The model card goes without" in caplog.text


@pytest.fixture
def on_tiny(tmp_path: Path) -> tuple[Path, Path]:
    """The shipped LoRA, said to be distilled from the tiny model with a style in it; the style."""
    layers = linear_weights(TINY_DIR / "transformer")
    style = write(make_updates({n: w for n, w in layers.items() if n.endswith(".to_q")}, alpha=9.0),
                  tmp_path / "style.safetensors")  # fmt: skip
    tensors, header = read_lora(TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors")
    loras = [BaseLora(path=style, strength=0.5)]
    extra = {"turbo.base_loras": json.dumps(records(loras))}
    spec = TurboSpec.from_json(header["turbo.spec"])
    lora = write_lora(tmp_path / "turbo.safetensors", tensors, spec=spec, title="x", extra=extra)
    return lora, style


def test_sample_and_eval_draw_on_the_same_base(
    on_tiny: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, style = on_tiny
    words = ["--prompt", "a red letter K", "--teacher", "--teacher-steps", "2"]
    assert cli.main(["sample", str(lora), *words, "--out", str(tmp_path / "with")]) == 0
    source = open_source(lora)
    base = replace(find_base(source.spec), loras=(BaseLora(path=style, strength=0.5),))
    cpu = torch.device("cpu")
    texts = embed(base, ["a red letter K"], cpu)
    pipeline = Pipeline(base, {"x": source.lora}, base.family.guidance, texts, cpu)
    for arm, image in (
        ("turbo", pipeline.student("x", source.spec, ["a red letter K"], [0], (64, 64))),
        ("teacher", pipeline.teacher(2, ["a red letter K"], [0], (64, 64))),
    ):
        with Image.open(tmp_path / "with" / f"{arm}_001_seed0.png") as drawn:
            assert drawn.tobytes() == image[0].permute(1, 2, 0).numpy().tobytes()
    original = TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors"
    assert cli.main(["sample", str(original), *words, "--out", str(tmp_path / "bare")]) == 0
    with (
        Image.open(tmp_path / "with" / "teacher_001_seed0.png") as a,
        Image.open(tmp_path / "bare" / "teacher_001_seed0.png") as b,
    ):
        assert a.tobytes() != b.tobytes()

    both = [str(lora), str(original), *words, "--out", str(tmp_path / "both")]
    assert cli.main(["sample", *both]) == 2
    assert "with other LoRAs in theirs" in capsys.readouterr().err
    style.unlink()
    for command in (["sample", str(lora), *words, "--out", str(tmp_path / "none")],
                    ["eval", str(lora), "--count", "1"]):  # fmt: skip
        assert cli.main(command) == 2
        assert "its base has the LoRA 'style.safetensors' in it" in capsys.readouterr().err


def test_a_copy_keeps_it_and_no_graph_is_made_that_lacks_the_style(
    on_tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    lora, _ = on_tiny
    out = tmp_path / "copy.safetensors"
    assert cli.main(["export", str(lora), "--out", str(out)]) == 0
    assert read_header(out)["turbo.base_loras"] == read_header(lora)["turbo.base_loras"]
    assert "`style.safetensors` at strength 0.5" in out.with_suffix(".md").read_text("utf-8")
    assert not out.with_suffix(".workflow.json").exists()


def test_a_cache_is_of_the_base_with_its_loras(style: Path, small_config: Make) -> None:
    """Where the teacher drew images for it."""
    plain = small_config()
    model = {**plain.model.model_dump(), "loras": [{"path": style, "strength": 0.7}]}
    merged, stronger = (
        small_config(model={**model, "loras": [{"path": style, "strength": strength}]})
        for strength in (0.7, 0.8)
    )
    a, b, c = (settings(config, config.data) for config in (plain, merged, stronger))
    for one, other in ((a, b), (b, a), (b, c)):
        assert differences(one, other)
    assert not differences(b, b)
    assert not differences(a, {**b, "teacher": None})  # no teacher images
