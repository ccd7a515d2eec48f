"""LoRA keys: every spelling gives the same deltas; what cannot be applied is refused."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_model import toy_shape, toy_shape_21

from distill.contract.lora_keys import (
    LoraFormatError,
    NormalisedLora,
    delta,
    normalise,
    to_comfy,
    to_diffusers,
)
from distill.contract.module_names import BLOCK_MODULES, TOP_MODULES, flatten, unflatten

TO_Q = "transformer_blocks.0.attn.to_q"


@dataclass(frozen=True)
class Spelling:
    """How a program writes the keys of a module."""

    prefix: str
    down: str
    up: str
    flat: bool = False

    def __call__(self, module: str, suffix: str) -> str:
        return f"{self.prefix}{flatten(module) if self.flat else module}{suffix}"


AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
SPELLINGS = {
    "bare": Spelling("", *AB),
    "bare kohya halves": Spelling("", *DOWN_UP),
    "transformer.": Spelling("transformer.", *AB),
    "diffusion_model.": Spelling("diffusion_model.", *AB),
    "diffusion_model. down/up": Spelling("diffusion_model.", *DOWN_UP),
    "base_model.model.": Spelling("base_model.model.", *AB),
    "unet.base_model.model.": Spelling("unet.base_model.model.", *AB),
    "transformer.base_model.model.": Spelling("transformer.base_model.model.", *AB),
    "base_model.model.transformer.": Spelling("base_model.model.transformer.", *AB),
    "pipe.dit.": Spelling("pipe.dit.", *AB),
    "lora_unet_": Spelling("lora_unet_", *DOWN_UP, flat=True),
    "lora_unet_ A/B": Spelling("lora_unet_", *AB, flat=True),
    "lora_transformer_": Spelling("lora_transformer_", *DOWN_UP, flat=True),
    "lycoris_": Spelling("lycoris_", *DOWN_UP, flat=True),
    "adapter default": Spelling("", ".lora_A.default.weight", ".lora_B.default.weight"),
    "adapter student": Spelling("transformer.", ".lora_A.student.weight", ".lora_B.student.weight"),
    "adapter of adapter": Spelling("", ".lora_A.a_0.default.weight", ".lora_B.a_0.default.weight"),
    "no .weight": Spelling("diffusion_model.", ".lora_A", ".lora_B"),
    ".lora.down": Spelling("transformer.", ".lora.down.weight", ".lora.up.weight"),
    "_lora.down": Spelling("transformer.", "_lora.down.weight", "_lora.up.weight"),
    "lora_linear_layer": Spelling(
        "", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    ),
}

modules = st.one_of(
    st.sampled_from(TOP_MODULES),
    st.builds(
        lambda n, leaf: f"transformer_blocks.{n}.{leaf}",
        st.integers(0, 120),
        st.sampled_from(BLOCK_MODULES),
    ),
)


def halves(rank: int, seed: int = 0, out: int = 6, into: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, into, generator=generator),
        torch.randn(out, rank, generator=generator),
    )


def make(spell: Spelling, ranks: dict[str, int]) -> dict[str, Tensor]:
    state = {}
    for seed, (name, rank) in enumerate(ranks.items()):
        state[spell(name, spell.down)], state[spell(name, spell.up)] = halves(rank, seed)
    return state


def one(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> NormalisedLora:
    return normalise(state, metadata, source="x.safetensors")


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=25)  # of each of the spellings
@given(ranks=st.dictionaries(modules, st.integers(1, 4), min_size=1, max_size=6), alpha=st.data())
def test_every_spelling_gives_the_same_lora(
    spelling: str, ranks: dict[str, int], alpha: st.DataObject
) -> None:
    spell = SPELLINGS[spelling]
    state = make(spell, ranks)
    alphas = {name: alpha.draw(st.none() | st.floats(-8, 64, width=32)) for name in ranks}
    for name, value in alphas.items():
        if value is not None:
            state[spell(name, ".alpha")] = torch.tensor(value)
    lora = one(state)
    assert set(lora.modules) == set(ranks)
    assert not lora.other_keys
    for seed, (name, rank) in enumerate(ranks.items()):
        module, (down, up) = lora.modules[name], halves(rank, seed)
        value = rank if alphas[name] is None else alphas[name]
        assert (module.rank, module.alpha) == (rank, value)
        torch.testing.assert_close(delta(module), up @ down * (value / rank))


@pytest.mark.parametrize("write", [to_comfy, to_diffusers])
@given(ranks=st.dictionaries(modules, st.integers(1, 4), min_size=1), scale=st.floats(-4, 4))
def test_written_keys_read_back_to_the_same_deltas(
    write: Callable[[NormalisedLora], dict[str, Tensor]], ranks: dict[str, int], scale: float
) -> None:
    state = make(SPELLINGS["bare"], ranks)
    for name, rank in ranks.items():
        state[f"{name}.alpha"] = torch.tensor(rank * scale)
    lora = one(state)
    again = one(write(lora))
    assert set(again.modules) == set(ranks)
    for name in ranks:
        torch.testing.assert_close(delta(again.modules[name]), delta(lora.modules[name]))


def test_to_comfy_is_comfys_own_spelling() -> None:
    lora = one(make(SPELLINGS["base_model.model."], {TO_Q: 2}))
    written = to_comfy(lora, dtype=torch.bfloat16)
    assert {key: (t.dtype, list(t.shape)) for key, t in written.items()} == {
        f"diffusion_model.{TO_Q}.lora_A.weight": (torch.bfloat16, [2, 5]),
        f"diffusion_model.{TO_Q}.lora_B.weight": (torch.bfloat16, [6, 2]),
        f"diffusion_model.{TO_Q}.alpha": (torch.float32, []),
    }
    assert to_comfy(lora)[f"diffusion_model.{TO_Q}.lora_A.weight"].dtype is torch.float32


@given(modules)
def test_unflatten_undoes_flatten(name: str) -> None:
    assert unflatten(flatten(name)) == name


@pytest.mark.parametrize(
    "flat",
    [
        "double_blocks_0_img_attn_qkv",
        "transformer_blocks_x_attn_to_q",
        "transformer_blocks_0_attn",
        "",
        "img_in_1",
    ],
)
def test_unflatten_does_not_guess(flat: str) -> None:
    assert unflatten(flat) is None


def test_vocabulary_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    shape = toy_shape(heads=1, text_width=32, layers=1)
    model = diffusers.QwenImageTransformer2DModel(**shape)
    weights = {
        name.removesuffix(".weight") for name, _ in model.named_parameters() if "weight" in name
    }
    ours = {f"transformer_blocks.0.{leaf}" for leaf in BLOCK_MODULES} | set(TOP_MODULES)
    assert weights <= ours
    assert ours - weights == {"time_text_embed.addition_t_embedding"}  # Qwen-Image-Layered only


def test_every_linear_layer_of_qwen_image_21_is_known() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.QwenImage21Transformer2DModel(**toy_shape_21())
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert "transformer_blocks.1.img_mlp.gate_layer" in names
    assert [unflatten(flatten(name)) for name in names] == names


def test_known_modules_resolve_flattened_names_of_any_family() -> None:
    state = make(Spelling("lora_unet_", *DOWN_UP, flat=True), {"blocks.3.self_attn.q": 2})
    with pytest.raises(LoraFormatError, match="2 of 2 keys name no module of this model"):
        one(state)
    lora = normalise(state, known_modules=["blocks.3.self_attn.q", "blocks.3.self_attn.k"])
    assert list(lora.modules) == ["blocks.3.self_attn.q"]
    with pytest.raises(LoraFormatError, match="another architecture"):  # two answers are none
        normalise(state, known_modules=["blocks.3.self_attn.q", "blocks.3_self.attn.q"])


def test_formats_and_adapters_are_reported() -> None:
    lora = one(make(SPELLINGS["adapter student"], {TO_Q: 2}))
    assert lora.formats == ("transformer.<module>.lora_A/lora_B",)
    assert lora.adapters == ("student",)
    assert lora.ranks == {2: 1}


def test_meta_tensors_are_enough() -> None:
    state = {key: t.to("meta") for key, t in make(SPELLINGS["bare"], {TO_Q: 2}).items()}
    assert one(state).modules[TO_Q].rank == 2


# alpha


def peft_header(**config: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


def test_alpha_comes_from_tensors_then_header_then_rank() -> None:
    state = make(SPELLINGS["transformer."], {TO_Q: 4})
    header = peft_header(lora_alpha=8, r=4)
    assert (one(state).modules[TO_Q].alpha, one(state).alpha_source) == (4, "rank")
    assert (one(state, header).modules[TO_Q].alpha, one(state, header).alpha_source) == (
        8,
        "metadata",
    )
    state[f"transformer.{TO_Q}.alpha"] = torch.tensor([8.0], dtype=torch.bfloat16)
    assert (one(state, header).modules[TO_Q].alpha, one(state, header).alpha_source) == (
        8,
        "tensor",
    )


def test_modules_without_an_alpha_tensor_fall_back_on_their_own() -> None:
    state = make(SPELLINGS["bare"], {TO_Q: 4, "img_in": 2}) | {"img_in.alpha": torch.tensor(1.0)}
    lora = one(state)
    assert {name: module.scale for name, module in lora.modules.items()} == {TO_Q: 1, "img_in": 0.5}
    assert lora.alpha_source == "mixed"


def test_alpha_pattern_and_rslora() -> None:
    ranks = {TO_Q: 4, "transformer_blocks.10.attn.to_q": 4, "proj_out": 9}
    pattern = {TO_Q: 2, "transformer.proj_out": 3}
    state = make(SPELLINGS["transformer."], ranks)
    scales = {
        n: m.scale
        for n, m in one(state, peft_header(lora_alpha=8, alpha_pattern=pattern)).modules.items()
    }
    assert scales == {
        TO_Q: 0.5,
        "transformer_blocks.10.attn.to_q": 2,
        "proj_out": pytest.approx(1 / 3),
    }
    rslora = one(state, peft_header(lora_alpha=8, use_rslora=True))
    assert {n: m.scale for n, m in rslora.modules.items()} == {
        TO_Q: 4,
        "transformer_blocks.10.attn.to_q": 4,
        "proj_out": pytest.approx(8 / 3),
    }


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scale_agrees_with_peft_itself(use_rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict(
        {"img_in": torch.nn.Linear(5, 6), "proj_out": torch.nn.Linear(5, 6)}
    )
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["img_in", "proj_out"],
        rank_pattern={"proj_out": 2},
        alpha_pattern={"proj_out": 5},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    adapted = peft.inject_adapter_in_model(config, model)
    plain = {"lora_alpha": 6, "r": 4, "alpha_pattern": {"proj_out": 5}, "use_rslora": use_rslora}
    lora = one(dict(peft.get_peft_model_state_dict(adapted)), peft_header(**plain))
    for name in ("img_in", "proj_out"):
        torch.testing.assert_close(
            delta(lora.modules[name]), adapted[name].get_delta_weight("default")
        )


@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({"ss_network_alpha": "8.0", "ss_network_dim": "16"}, 0.5),
        ({"ss_network_alpha": "2"}, 0.5),
        ({"ss_network_alpha": "8", "ss_network_dim": "Dynamic"}, 1),
        ({"ss_network_alpha": "None", "ss_network_dim": "16"}, 1),
        ({"ss_network_dim": "16"}, 1),
        ({}, 1),
    ],
)
def test_kohya_header(header: dict[str, str], scale: float) -> None:
    state = make(SPELLINGS["lora_unet_"], {TO_Q: 4})
    assert one(state, header).modules[TO_Q].scale == scale
    # musubi-tuner multiplies the scale into lora_A / lora_B and leaves the header as it was.
    converted = make(SPELLINGS["diffusion_model."], {TO_Q: 4})
    assert one(converted, header).modules[TO_Q].scale == 1


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"lora_adapter_metadata": "{"}, "expected JSON"),
        ({"lora_adapter_metadata": "[]"}, "expected an object; found list"),
        (peft_header(lora_alpha="8"), "expected transformer.lora_alpha to be a number; found '8'"),
        (peft_header(lora_alpha=10**400), "to be a number"),
        (peft_header(lora_alpha=8, use_dora=True), "DoRA"),
        (peft_header(lora_alpha=8, alpha_pattern=[1]), "'alpha_pattern' to be an object"),
        (peft_header(lora_alpha=8, alpha_pattern={"(a+)+": 1}), "is a regular expression"),
    ],
)
def test_bad_header_is_an_error_not_scale_one(header: dict[str, str], message: str) -> None:
    with pytest.raises(LoraFormatError, match=message) as error:
        one(make(SPELLINGS["bare"], {TO_Q: 2}), header)
    assert str(error.value).startswith("x.safetensors: ")


# refusals

PAIR = make(SPELLINGS["bare"], {TO_Q: 2})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{TO_Q}.dora_scale": torch.ones(6)}, "DoRA"),
        ({f"{TO_Q}.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
        ({f"base_model.model.{TO_Q}.lora_magnitude_vector.default.weight": torch.ones(6)}, "DoRA"),
        ({f"{TO_Q}.hada_w1_a": torch.ones(6, 2)}, "LoHa"),
        ({f"lycoris_{flatten(TO_Q)}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({f"{TO_Q}.oft_blocks": torch.ones(2, 2, 2)}, "OFT"),
        ({f"{TO_Q}.lora_B.bias": torch.ones(6)}, "bias"),
        ({f"{TO_Q}.lora_B.default.bias": torch.ones(6)}, "bias"),
        ({f"{TO_Q}.diff": torch.ones(6, 5)}, "a full change of a weight"),
        ({f"{TO_Q}.diff_b": torch.ones(6)}, "a full change of a weight"),
        ({f"{TO_Q}.lora_mid.weight": torch.ones(2, 2, 1, 1)}, "Tucker"),
        (
            {"img_in.lora_A.weight": torch.ones(2, 5)},
            r"'img_in' has 'img_in.lora_A.weight' but no up",
        ),
        ({"img_in.lora_up.weight": torch.ones(6, 2)}, r"no down \(lora_A\) half"),
        (
            {"img_in.lora_A.weight": torch.ones(2, 5), "img_in.lora_B.weight": torch.ones(6, 3)},
            r"expected one rank; found 2 rows in 'img_in.lora_A.weight' \[2, 5\], 3 columns",
        ),
        (
            {"img_in.lora_A.weight": torch.ones(2, 5, 1, 1)},
            r"floating-point matrix; found shape \[2, 5, 1, 1\]",
        ),
        ({"img_in.lora_A.weight": torch.ones(2, 5, dtype=torch.int8)}, "torch.int8"),
        ({"img_in.lora_A.weight": torch.ones(0, 5)}, "matrix; found shape"),
        (
            {f"transformer.{TO_Q}.lora_A.weight": torch.ones(2, 5)},
            "is given twice, by 'transformer_blocks",
        ),
        ({f"{TO_Q}.lora_A.fake.weight": torch.ones(2, 5)}, "is given twice.*save only the adapter"),
        ({f"{TO_Q}.alpha": torch.ones(2)}, "expected one number; found shape"),
        ({f"{TO_Q}.alpha": torch.tensor(float("nan"))}, "expected a finite number"),
        (
            {f"{TO_Q}.alpha": torch.tensor(1.0), f"transformer.{TO_Q}.alpha": torch.tensor(1.0)},
            "alpha of module .* is given twice",
        ),
        (
            {"lora_unet_single_blocks_3_linear1.lora_down.weight": torch.ones(2, 5)},
            "1 of 3 keys name no module",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused(extra: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoraFormatError, match=message) as error:
        one({**PAIR, **extra})
    assert str(error.value).startswith("x.safetensors: ")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "found no tensors at all"),
        (["transformer_blocks.0.attn.to_q.weight", "img_in.bias"], "looks like a whole model"),
        (["model.diffusion_model.img_in.weight"], "a whole model"),
        (["decoder.head.0.gamma", "encoder.conv1.weight"], "a VAE"),
        (["model.layers.0.self_attn.q_proj.weight"], "a text encoder"),
        (
            ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
            "LoRA of a text encoder alone",
        ),
        (["emb_params"], "something else"),
        (["img_in.alpha"], "something else"),
    ],
)
def test_files_without_lora_keys(keys: list[str], message: str) -> None:
    with pytest.raises(LoraFormatError, match=message):
        one({key: torch.ones(()) for key in keys})


def test_keys_of_a_text_encoder_and_strays_are_reported_not_applied() -> None:
    text = {
        "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(2, 5),
        "lora_te1_x.alpha": torch.ones(()),
    }
    stray = {"logit_scale": torch.ones(()), "img_in.alpha": torch.ones(())}
    lora = one({**PAIR, **text, **stray})
    assert list(lora.modules) == [TO_Q]
    assert set(lora.other_keys) == {*text, *stray}


# other programs


def test_diffusers_reads_both_spellings() -> None:
    diffusers = pytest.importorskip("diffusers")
    state = make(SPELLINGS["bare"], {TO_Q: 4, "transformer_blocks.1.img_mod.1": 2, "proj_out": 1})
    state[f"{TO_Q}.alpha"] = torch.tensor(6.0)
    lora = one(state)
    for written in (to_comfy(lora), to_diffusers(lora)):
        converted = diffusers.QwenImagePipeline.lora_state_dict(written)
        read = one(converted)
        for name, module in lora.modules.items():
            torch.testing.assert_close(delta(read.modules[name]), delta(module))


@pytest.mark.comfy
def test_core_comfyui_loads_every_key_and_applies_the_same_delta(
    comfyui: Path, caplog: pytest.LogCaptureFixture
) -> None:
    comfy_lora = importlib.import_module("comfy.lora")
    state = make(SPELLINGS["adapter student"], {TO_Q: 4, "img_in": 2})
    lora = one(state, peft_header(lora_alpha=6))  # alpha that core would miss in the original file
    to_load = {f"diffusion_model.{name}": name for name in lora.modules}
    patches = comfy_lora.load_lora(to_comfy(lora), to_load)
    assert "not loaded" not in caplog.text
    for name, module in lora.modules.items():
        patch = [(1.0, patches[name], 1.0, None, None)]
        weight = comfy_lora.calculate_weight(patch, torch.zeros(6, 5), name)
        torch.testing.assert_close(weight, delta(module))
