"""alpha is found wherever it stands; two places that disagree are an error that names both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.contract.lora_keys import LoraFormatError, NormalisedLora, delta, normalise
from distill.contract.metadata import read_lora, read_shapes

TO_Q, PROJ = "transformer_blocks.0.attn.to_q", "proj_out"
RANK = 4
HEADERS = {  # every spelling of alpha 2
    "lora_alpha": {"lora_alpha": "2", "lora_rank": "4"},
    "lora_alpha alone": {"lora_alpha": "2.0"},
    "network_alpha": {"network_alpha": "2", "network_dim": "4"},
    "alpha": {"alpha": "2", "rank": "4"},
    "diffusers": {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2})},
    "PEFT's config": {"adapter_config": json.dumps({"lora_alpha": 2, "r": 4})},
    "under another name": {"peft_config": json.dumps({"lora_alpha": 2, "r": 4})},
}


def state(prefix: str = "base_model.model.", *names: str) -> dict[str, Tensor]:
    found = {}
    for name in names or (TO_Q, PROJ):
        found[f"{prefix}{name}.lora_A.weight"] = torch.ones(RANK, 5)
        found[f"{prefix}{name}.lora_B.weight"] = torch.ones(6, RANK)
    return found


def one(header: dict[str, str], tensors: dict[str, Tensor] | None = None) -> NormalisedLora:
    return normalise(tensors or state(), header, source="x.safetensors")


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_every_spelling_of_a_header_is_found(header: dict[str, str]) -> None:
    lora = one(header)
    assert {module.scale for module in lora.modules.values()} == {0.5}
    assert lora.alpha_source == "metadata"
    assert next(iter(header)) in lora.alpha_words
    assert not lora.warnings


@pytest.mark.parametrize("kohya", [{"ss_network_alpha": "2", "ss_network_dim": "4"}])
def test_kohyas_record_holds_for_kohyas_keys(kohya: dict[str, str]) -> None:
    tensors = {
        "lora_unet_proj_out.lora_down.weight": torch.ones(RANK, 5),
        "lora_unet_proj_out.lora_up.weight": torch.ones(6, RANK),
    }
    lora = one(kohya, tensors)
    assert lora.modules[PROJ].scale == 0.5
    assert "ss_network_alpha" in lora.alpha_words
    converted = one(kohya)  # lora_A and lora_B: left aside, and told
    assert converted.modules[PROJ].scale == 1
    assert "'ss_network_alpha' 2 was left aside" in converted.warnings[0]
    assert not one({"ss_network_alpha": "4", "ss_network_dim": "4"}).warnings


def test_nothing_found_beside_pefts_keys_is_a_warning_of_what_was_assumed() -> None:
    lora = one({})
    assert "for 2 of 2 modules; assumed alpha = rank (scale 1)" in lora.warnings[0]
    half = one({}, {**state(), f"{PROJ}.alpha": torch.tensor(2.0)})
    assert "for 1 of 2 modules" in half.warnings[0]
    assert half.alpha_words == (
        "1 modules not given, so equal to the rank (scale 1); "
        "1 modules from the file's .alpha tensors"
    )


def test_use_rslora_of_a_plain_header() -> None:
    assert one({"lora_alpha": "2", "use_rslora": "True"}).modules[PROJ].scale == 2 / math.sqrt(RANK)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ss_network_alpha", "1_6"),
        ("ss_network_alpha", "nan"),
        ("ss_network_dim", "-32"),
        ("ss_network_dim", "0"),
        ("ss_network_dim", "3_2"),
    ],
)
def test_a_record_that_is_no_number_is_left_aside_and_told(key: str, value: str) -> None:
    lora = one({"ss_network_alpha": "4", "ss_network_dim": "4", key: value})
    assert lora.alpha_source == "rank"
    assert f"the header's '{key}' was left aside" in lora.warnings[0]
    assert repr(value) in lora.warnings[0]


@pytest.mark.parametrize("word", ["None", "", "Dynamic"])
def test_words_for_no_number_say_nothing(word: str) -> None:
    assert one({"lora_alpha": word}).alpha_source == "rank"


@pytest.mark.parametrize("value", ["eight", "nan", "inf", "8,0", "1_6"])
@pytest.mark.parametrize("key", ["lora_alpha", "network_alpha", "alpha"])
def test_a_number_that_is_none_is_an_error(key: str, value: str) -> None:
    with pytest.raises(LoraFormatError, match=f"the header's '{key}': expected a finite number"):
        one({key: value})


def test_an_anchored_pattern_is_one_module_and_any_other_the_end_of_a_name() -> None:
    names = (PROJ, f"transformer_blocks.0.{PROJ}")
    tensors = state("", *names)
    for pattern, scales in ((PROJ, [1, 1]), (f"^{PROJ}$", [1, 0.5])):
        config = {"lora_alpha": 2, "alpha_pattern": {pattern: 4}}
        lora = one({"lora_adapter_metadata": json.dumps(config)}, tensors)
        assert [lora.modules[name].scale for name in names] == scales


# ----------------------------------------------------------------------------------- disagreement


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_tensors_and_a_header_that_disagree(header: dict[str, str]) -> None:
    key = next(iter(header))
    with pytest.raises(LoraFormatError, match=rf"'{key}' says 2, the tensor {PROJ}\.alpha says 3"):
        one(header, {**state(), f"{PROJ}.alpha": torch.tensor(3.0)})
    agreed = one(header, {**state(), f"{PROJ}.alpha": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert {module.alpha for module in agreed.modules.values()} == {2}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"lora_alpha": "2", "network_alpha": "3"}, ("lora_alpha", "network_alpha")),
        ({"lora_alpha": "2", "ss_network_alpha": "3"}, ("lora_alpha", "ss_network_alpha")),
        (
            {**HEADERS["diffusers"], "alpha": "3"},
            ("lora_adapter_metadata", "alpha"),
        ),
        (
            {
                **HEADERS["diffusers"],
                "peft_config": json.dumps({"lora_alpha": 2, "use_rslora": True}),
            },
            ("lora_adapter_metadata", "peft_config"),
        ),
    ],
)
def test_two_places_in_a_header_that_disagree(
    header: dict[str, str], named: tuple[str, str]
) -> None:
    with pytest.raises(LoraFormatError, match="alpha is stated twice") as error:
        one(header)
    assert all(f"'{key}'" in str(error.value) for key in named)


def test_places_that_agree_are_no_error() -> None:
    lora = one({**HEADERS["lora_alpha"], **HEADERS["diffusers"], "ss_network_alpha": "2"})
    assert {module.alpha for module in lora.modules.values()} == {2}


def test_tensors_win_over_a_record_of_the_training_and_it_is_told() -> None:
    """LyCORIS's rs_lora and scripts that resize leave another number there; every loader takes the
    tensors.
    """
    tensors = {**state(), f"{TO_Q}.alpha": torch.tensor(3.0), f"{PROJ}.alpha": torch.tensor(3.0)}
    lora = one({"ss_network_alpha": "2"}, tensors)
    assert lora.alpha_source == "tensor"
    assert "'ss_network_alpha', a record of the training's arguments, says 2" in lora.warnings[0]
    assert not one({"ss_network_alpha": "3"}, tensors).warnings


def test_an_alpha_for_another_rank() -> None:
    with pytest.raises(LoraFormatError, match=r"alpha 2 for rank 8, but module .* has rank 4"):
        one({"lora_alpha": "2", "lora_rank": "8"})


# ----------------------------------------------------------------------------- adapter_config.json


def save(folder: Path, config: object, name: str, prefix: str = "base_model.model.") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state(prefix), folder / name)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return folder / name


def read(path: Path) -> NormalisedLora:
    """As weights and as shapes, which agree."""
    found, shapes = (
        normalise(*reader(path), source=path.name) for reader in (read_lora, read_shapes)
    )
    assert {n: m.scale for n, m in found.modules.items()} == {
        n: m.scale for n, m in shapes.modules.items()
    }
    assert (found.alpha_words, found.warnings) == (shapes.alpha_words, shapes.warnings)
    return found


CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2}


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("adapter_model.safetensors", "base_model.model."),
        ("adapter_model.safetensors", "transformer."),
        ("renamed.safetensors", "base_model.model."),
        ("renamed.safetensors", ""),
    ],
)
def test_a_config_beside_a_file_of_pefts_layout(name: str, prefix: str, tmp_path: Path) -> None:
    lora = read(save(tmp_path, CONFIG, name, prefix))
    assert {module.scale for module in lora.modules.values()} == {0.5}
    assert lora.alpha_source == "adapter_config.json"
    assert lora.alpha_words.startswith("from adapter_config.json")
    assert not lora.warnings


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
@pytest.mark.parametrize("config", [CONFIG, "garbage"])
def test_a_config_beside_any_other_file_is_not_its_own(
    config: object, prefix: str, tmp_path: Path
) -> None:
    lora = read(save(tmp_path, config, "style.safetensors", prefix))
    assert lora.alpha_source == "rank"
    assert "adapter_config.json beside it is about a file in PEFT's layout" in lora.warnings[0]


def test_exceptions_and_rslora_as_peft_scales_them(tmp_path: Path) -> None:
    config = {**CONFIG, "alpha_pattern": {PROJ: 6}, "rank_pattern": {PROJ: 4}, "use_rslora": True}
    lora = read(save(tmp_path, config, "adapter_model.safetensors"))
    assert lora.modules[PROJ].scale == 3
    assert lora.modules[TO_Q].scale == 1


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_folder_that_peft_saved_agrees_with_peft(use_rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({n: torch.nn.Linear(5, 6) for n in ("img_in", "proj_out")})
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["img_in", "proj_out"],
        rank_pattern={"proj_out": 2},
        alpha_pattern={"proj_out": 5},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    lora = read(tmp_path / "adapter_model.safetensors")
    for name in ("img_in", "proj_out"):
        expected = adapted.base_model.model[name].get_delta_weight("default")
        torch.testing.assert_close(delta(lora.modules[name]), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json: expected JSON"),
        ("[]", "adapter_config.json: expected an object"),
        ({**CONFIG, "use_dora": True}, "DoRA"),
        ({**CONFIG, "lora_alpha": "8"}, "adapter_config.json: expected lora_alpha to be a number"),
        ({**CONFIG, "r": 32}, "adapter_config.json gives alpha 2 for rank 32"),
        ({**CONFIG, "r": [1]}, "expected r or rank_pattern to be a number"),
        ({**CONFIG, "rank_pattern": [1]}, "'rank_pattern' to be an object"),
        ({**CONFIG, "alpha_pattern": {"(a+)+": 1}}, "is a regular expression"),
    ],
)
def test_a_config_that_cannot_be_its_own_or_is_damaged(
    config: object, message: str, tmp_path: Path
) -> None:
    path = save(tmp_path, config, "adapter_model.safetensors")
    for reader in (read_lora, read_shapes):
        with pytest.raises(LoraFormatError, match=message):
            normalise(*reader(path), source=path.name)


def test_a_config_and_a_header_that_disagree(tmp_path: Path) -> None:
    path = save(tmp_path, CONFIG, "adapter_model.safetensors")
    save_file(state(), path, {"lora_alpha": "3"})
    with pytest.raises(
        LoraFormatError, match=r"adapter_config\.json says 2, the header's 'lora_alpha' says 3"
    ):
        read(path)
