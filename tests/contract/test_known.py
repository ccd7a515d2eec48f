"""The table of public files: real names get the right schedule, other files are not claimed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from distill.contract.known import (
    CERTAINTY,
    KNOWN,
    REFUSED,
    TABLE,
    KnownFile,
    family_of,
    find,
    nearest,
    normalised_name,
    refused,
)
from distill.contract.latent_grid import sigmas_at
from distill.contract.resolve import resolve_spec
from distill.contract.spec import SpecError

DOCS = Path(__file__).parents[2] / "docs" / "known_files.md"
SIZES = ((1024, 1024), (2048, 2048))

TWO = (1, 0.7155, 0)
LIGHTNING_4 = (1, 0.9, 0.75, 0.5, 0)
LIGHTNING_8 = (1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3, 0)
WULI_4 = (1, 0.88235, 0.71429, 0.45455, 0)
VIGGLE_4 = ((1, 0.85719, 0.66676, 0.4001, 0), (1, 0.9177, 0.788, 0.55337, 0))
VIGGLE_6 = (
    (1, 0.96775, 0.93336, 0.85719, 0.66676, 0.4001, 0),
    (1, 0.98238, 0.96299, 0.9177, 0.788, 0.55337, 0),
)
TURBO8 = (
    (1, 0.93336, 0.85719, 0.7693, 0.66676, 0.54555, 0.4001, 0.22229, 0),
    (1, 0.96299, 0.9177, 0.86101, 0.788, 0.69042, 0.55337, 0.34683, 0),
)
QWEN_TURBO = (1, 0.97845, 0.95418, 0.92663, 0.89508, 0.84515, 0.70453, 0.41457, 0)
PRUNA_8 = (1, 0.93333, 0.85714, 0.76923, 0.66667, 0.54545, 0.4, 0.22222, 0)
FLUX_8 = (
    (1, 0.95672, 0.90453, 0.84035, 0.75951, 0.65457, 0.51284, 0.3109, 0),
    (1, 0.99438, 0.98699, 0.97682, 0.96195, 0.93815, 0.89392, 0.78315, 0),
)
FLUX2_8 = (
    (1, 0.94739, 0.88248, 0.80027, 0.69282, 0.54619, 0.33467, 0.00299, 0),
    (1, 0.97922, 0.95158, 0.91294, 0.85513, 0.75903, 0.56831, 0.00778, 0),
)
WAN_4 = (1, 0.9375, 0.83333, 0.625, 0)


@dataclass(frozen=True)
class Published:
    """A row's files as their authors name them, and how they are sampled.

    sigmas: at 1024 x 1024 and at 2048 x 2048, to five digits; one tuple where they are the same.
    """

    names: tuple[str, ...]
    sigmas: tuple[Any, ...]
    base: str
    family: str = "qwen-image"
    guidance: float | None = None
    strength: float = 1
    boundary: int | None = None

    def at(self, i: int) -> tuple[float, ...]:
        """Those of SIZES[i]."""
        return self.sigmas[i] if isinstance(self.sigmas[0], tuple) else self.sigmas


def lightning(model: str, *names: str, sigmas: tuple[float, ...] = LIGHTNING_4) -> Published:
    return Published(names, sigmas, f"Qwen/{model}")


def qwen21(*names: str, sigmas: tuple[Any, ...]) -> Published:
    return Published(names, sigmas, "Qwen/Qwen-Image-2.1", "qwen-image-2.1")


def wan(family: str, base: str, *names: str, boundary: int | None = None) -> Published:
    return Published(names, WAN_4, f"Wan-AI/{base}", family, boundary=boundary)


PUBLISHED = {  # name of the row -> its files
    "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps": lightning(
        "Qwen-Image-2512",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors",
        sigmas=TWO,
    ),
    "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps": lightning(
        "Qwen-Image-2512",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V1.0-bf16.safetensors",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V1.0-bf16_ComfyUi.safetensors",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V2.0-bf16.safetensors",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V3.0-bf16.safetensors",
        sigmas=WULI_4,
    ),
    "Qwen-Image-Lightning-4steps": lightning(
        "Qwen-Image",
        "Qwen-Image-Lightning-4steps-V1.0.safetensors",
        "Qwen-Image-Lightning-4steps-V1.0-bf16.safetensors",
        "Qwen-Image-Lightning-4steps-V2.0.safetensors",
        "Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors",
    ),
    "Qwen-Image-Lightning-8steps": lightning(
        "Qwen-Image",
        "Qwen-Image-Lightning-8steps-V1.0.safetensors",
        "Qwen-Image-Lightning-8steps-V1.1-bf16.safetensors",
        "Qwen-Image-Lightning-8steps-V2.0.safetensors",
        sigmas=LIGHTNING_8,
    ),
    "Qwen-Image-fp8-e4m3fn-Lightning-4steps": lightning(
        "Qwen-Image", "Qwen-Image-fp8-e4m3fn-Lightning-4steps-V1.0-fp32.safetensors"
    ),
    "Qwen-Image-Edit-Lightning-4steps": lightning(
        "Qwen-Image-Edit", "Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors"
    ),
    "Qwen-Image-Edit-Lightning-8steps": lightning(
        "Qwen-Image-Edit",
        "Qwen-Image-Edit-Lightning-8steps-V1.0.safetensors",
        sigmas=LIGHTNING_8,
    ),
    "Qwen-Image-Edit-2509-Lightning-4steps": lightning(
        "Qwen-Image-Edit-2509",
        "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
    ),
    "Qwen-Image-Edit-2509-Lightning-8steps": lightning(
        "Qwen-Image-Edit-2509",
        "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-8steps-V1.0-fp32.safetensors",
        sigmas=LIGHTNING_8,
    ),
    "Qwen-Image-Edit-2511-Lightning-4steps": lightning(
        "Qwen-Image-Edit-2511", "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors"
    ),
    "Qwen-Image-Edit-2511-Lightning-8steps": lightning(
        "Qwen-Image-Edit-2511",
        "Qwen-Image-Edit-2511-Lightning-8steps-V1.0-bf16.safetensors",
        sigmas=LIGHTNING_8,
    ),
    "Qwen-Image-2512-Lightning-4steps": lightning(
        "Qwen-Image-2512", "Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors"
    ),
    "Qwen-Image-2512-Lightning-8steps": lightning(
        "Qwen-Image-2512",
        "Qwen-Image-2512-Lightning-8steps-V1.0-bf16.safetensors",
        sigmas=LIGHTNING_8,
    ),
    "qwen_image_distill_3step": lightning(
        "Qwen-Image", "qwen_image_distill_3step.safetensors", sigmas=(1, 0.6325, 0.02, 0)
    ),
    "qwen_image_2.1_turbo_lora_avg_rank_178": qwen21(
        "qwen_image_2.1_turbo_lora_avg_rank_178_bf16.safetensors", sigmas=QWEN_TURBO
    ),
    "Qwen-Image-2.1-viggle-turbo-4step-lora": qwen21(
        "Qwen-Image-2.1-viggle-turbo-4step-lora-r64.safetensors", sigmas=VIGGLE_4
    ),
    "Qwen-Image-2.1-viggle-turbo-6step-lora": qwen21(
        "Qwen-Image-2.1-viggle-turbo-v0.2-5step-lora-r256.safetensors",
        "Qwen-Image-2.1-viggle-turbo-v0.2.1-6step-lora-r128.safetensors",
        "Qwen-Image-2.1-viggle-turbo-v0.2.1-6step-lora-r256.safetensors",
        "Qwen-Image-2.1-viggle-turbo-v0.3-6step-lora-r128.safetensors",
        "Qwen-Image-2.1-viggle-turbo-v0.3-6step-lora-r256.safetensors",
        sigmas=VIGGLE_6,
    ),
    "Qwen-Image-2.1-Lightning-4step": qwen21(
        "Qwen-Image-2.1-Lightning.safetensors",
        "Qwen-Image-2.1-Lightning-4steps.safetensors",
        sigmas=VIGGLE_4,
    ),
    "p_qwen_image_2.1_8step": qwen21(
        "p_qwen_image_2.1_8step_v0.1.safetensors",
        "p_qwen_image_2.1_8step_v0.1-comfyui-T8.safetensors",
        "p_q_image_2.1_8step_v0.1.safetensors",
        sigmas=PRUNA_8,
    ),
    "p_qwen_image_2.1_5step": qwen21(
        "p_qwen_image_2.1_5step_v0.1.safetensors", sigmas=(1, 0.94, 0.85714, 0.66667, 0.4, 0)
    ),
    "Qwen-Image-2.1-DMD2-2steps": qwen21(
        "Qwen-Image-2.1-DMD2-2steps.safetensors", sigmas=(1, 0.5, 0)
    ),
    "turbo8_lora": qwen21(
        "turbo8_lora.safetensors", "turbo8_lora_step2500.safetensors", sigmas=TURBO8
    ),
    "Z-Image-Fun-Lora-Distill-2-Steps": Published(
        ("Z-Image-Fun-Lora-Distill-2-Steps-2603.safetensors",),
        (1, 0.75, 0),
        "Tongyi-MAI/Z-Image",
        "z-image",
    ),
    "Z-Image-Fun-Lora-Distill-4-Steps": Published(
        ("Z-Image-Fun-Lora-Distill-4-Steps-2602-ComfyUI.safetensors",),
        LIGHTNING_4,
        "Tongyi-MAI/Z-Image",
        "z-image",
    ),
    "Z-Image-Fun-Lora-Distill-8-Steps": Published(
        (
            "Z-Image-Fun-Lora-Distill-8-Steps-2603.safetensors",
            "Z-Image-Fun-Lora-Distill-8-Steps-2602_UDCAI_ComfyUI.safetensors",
            "Z-Image-Fun-Lora-Distill-8-Steps_ComfyUI_v1.safetensors",
        ),
        LIGHTNING_8,
        "Tongyi-MAI/Z-Image",
        "z-image",
        strength=0.8,
    ),
    "FLUX.1-Turbo-Alpha": Published(
        ("FLUX.1-Turbo-Alpha.safetensors",),
        FLUX_8,
        "black-forest-labs/FLUX.1-dev",
        "flux",
        guidance=3.5,
    ),
    "Hyper-FLUX.1-dev-8steps-lora": Published(
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors",),
        FLUX_8,
        "black-forest-labs/FLUX.1-dev",
        "flux",
        guidance=3.5,
        strength=0.125,
    ),
    "flux.2-turbo-lora": Published(
        (
            "flux.2-turbo-lora.safetensors",
            "Flux_2-Turbo-LoRA_comfyui.safetensors",
            "Flux2TurboComfyv2.safetensors",
        ),
        FLUX2_8,
        "black-forest-labs/FLUX.2-dev",
        "flux2",
        guidance=2.5,
    ),
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step": wan(
        "wan2.1",
        "Wan2.1-T2V-14B",
        "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
        "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank256_bf16.safetensors",
        "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
    ),
    "wan2.1_i2v_lora_rank64_lightx2v_4step": wan(
        "wan2.1",
        "Wan2.1-I2V-14B-480P",
        "wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors",
        "lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors",
        "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",
    ),
    "wan2.2_t2v_lightx2v_4steps_lora": wan(
        "wan2.2",
        "Wan2.2-T2V-A14B",
        "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
        "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors",
        "Wan2_2-T2V-A14B-4steps-lora-rank64-Seko-V2.0_High.safetensors",
        boundary=2,
    ),
    "wan2.2_i2v_lightx2v_4steps_lora": wan(
        "wan2.2",
        "Wan2.2-I2V-A14B",
        "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors",
        "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors",
        "Wan2_2-I2V-A14B-4steps-lora-rank64-Seko-V1_Low.safetensors",
        boundary=2,
    ),
}
NAMES = [(name, row) for row, published in PUBLISHED.items() for name in published.names]

NOT_RUN = {  # name of the row -> files that people try
    "Qwen-Image-2.1-Fun-Acc-4Step": (
        "Qwen-Image-2.1-Fun-Acc-4Step.safetensors",
        "Qwen-Image-2.1-Fun-Acc-4Step-PDD-T8.safetensors",
    ),
    "Qwen-Image-2.1-Turbo": (
        "qwen_image_2.1_turbo_bf16.safetensors",
        "Qwen-Image-2.1-Turbo-fp8_scaled.safetensors",
    ),
    "Qwen-Image-2.1-viggle-turbo-6step, merged": (
        "Qwen-Image-2.1-viggle-turbo-v0.3-6step-bf16.safetensors",
        "Qwen-Image-2.1-viggle-turbo-v0.2.1-6step-int8_convrot.safetensors",
    ),
    "Qwen-Image-Flash": ("qwen_image_flash_fp8_e4m3fn.safetensors",),
    "Z-Image-Turbo": ("z_image_turbo_bf16.safetensors", "z_image_turbo_nvfp4.safetensors"),
    "FLUX.2-klein": ("flux-2-klein-4b-fp8.safetensors", "FLUX.2-klein-9B.safetensors"),
    "IBFlow-Qwen-2NFE": ("IBFlow-Qwen-2NFE.safetensors",),
}


@pytest.mark.parametrize(("name", "row_name"), NAMES)
def test_published_names(name: str, row_name: str) -> None:
    expected = PUBLISHED[row_name]
    assert [row.name for row in KNOWN if row.matches(name)] == [row_name]
    assert refused(name) is None
    row = find(name)
    assert row is not None
    for i, size in enumerate(SIZES):
        assert sigmas_at(row.spec, size) == pytest.approx(expected.at(i), abs=6e-6)
    assert (row.spec.base, row.spec.family) == (expected.base, expected.family)
    assert family_of(expected.base) == expected.family
    settings = (row.spec.guidance, row.spec.strength, row.spec.boundary)
    assert settings == (expected.guidance, expected.strength, expected.boundary)
    assert (row.spec.sampler, row.spec.cfg) == ("euler", 1)


def test_every_row_is_exercised_and_has_a_source_and_its_own_hashes() -> None:
    assert [row.name for row in KNOWN] == list(PUBLISHED)
    assert [row.name for row in REFUSED] == list(NOT_RUN)
    assert all(re.search("Hugging Face|ModelScope", row.source) for row in KNOWN)
    assert {row.certainty for row in KNOWN} == CERTAINTY.keys()
    assert all((row.certainty == "inferred") == ("inferred" in row.source) for row in KNOWN)
    hashes = [sha256 for row in (*KNOWN, *REFUSED) for sha256 in row.sha256]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)
    assert len(set(hashes)) == len(hashes)


def of_diffusers(spec: dict[str, Any], size: tuple[int, int]) -> list[float]:
    """What diffusers makes of a row as it stands in the file; 16 pixels are a token everywhere."""
    tokens, nodes = size[0] // 16 * (size[1] // 16), spec["nodes"]
    shift = dict(spec.get("shift") or {})
    config, mu = {"shift_terminal": spec.get("terminal")}, None
    match shift.get("rule"):
        case "static":
            config["shift"] = float(shift["shift"])
        case "exponential":
            mu = shift["mu"]
        case "linear":
            mu = calculate_shift(tokens, *shift["tokens"], *shift["mu"])
        case "empirical":
            mu = compute_empirical_mu(tokens, len(nodes) - 1)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=mu is not None, **config)
    scheduler.set_timesteps(sigmas=nodes[:-1], mu=mu)
    return list(scheduler.sigmas.tolist())


@pytest.mark.parametrize("values", json.loads(TABLE.read_text())["rows"], ids=lambda v: v["name"])
def test_diffusers_gives_the_golden_numbers(values: dict[str, Any]) -> None:
    for i, size in enumerate(SIZES):
        golden = PUBLISHED[values["name"]].at(i)
        assert of_diffusers(values["spec"], size) == pytest.approx(golden, abs=6e-6)


@pytest.mark.parametrize(
    ("name", "row_name"), [(name, row) for row, names in NOT_RUN.items() for name in names]
)
def test_what_is_no_lora_is_refused_with_its_reason(name: str, row_name: str) -> None:
    row = refused(name)
    assert row is not None
    assert row.name == row_name
    assert find(name) is None
    with pytest.raises(SpecError) as error:
        resolve_spec(f"folder/{name}", {})
    assert str(error.value).endswith(f"this is {row.name}, {row.reason}")
    for sha256 in row.sha256:
        assert refused("renamed.safetensors", sha256.upper()) is row


def test_the_page_names_every_row_as_it_is_and_no_other() -> None:
    text = DOCS.read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    found = {name: rest.split(" | ") for name, rest in lines}
    assert len(found) == len(lines)
    assert list(found) == [row.name for row in (*KNOWN, *REFUSED)]
    for row in KNOWN:
        steps, levels, certainty, source = found[row.name]
        assert steps == steps_of(row)
        assert (certainty, source) == (row.certainty, f"{row.source}.")
        nodes = re.split(r"[:;]", levels)[0].split(", ")
        assert [float(node) for node in nodes] == pytest.approx(row.spec.nodes, abs=5e-5)
        assert ("shifted by size" in levels) == row.spec.by_size
        said = re.findall(r"(guidance|strength|expert for) ([\d.]+)", levels)
        settings = {
            "guidance": row.spec.guidance,
            "strength": None if row.spec.strength == 1 else row.spec.strength,
            "expert for": row.spec.boundary,
        }
        assert {key: float(value) for key, value in said} == {
            key: value for key, value in settings.items() if value is not None
        }
    for other in REFUSED:
        assert found[other.name] == [f"{other.reason}."]


def steps_of(row: KnownFile) -> str:
    """ "6; also 4, 5" """
    others = ", ".join(str(n) for n in row.spec.step_counts if n != row.spec.steps)
    return f"{row.spec.steps}; also {others}" if others else str(row.spec.steps)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/wuli_qwen_image_2512_turbo_lora_2steps_v1.0_bf16.safetensors",
        r"turbo\WULI-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16 (1).safetensors",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-2-steps.safetensors",
    ],
)
def test_folders_case_separators_and_copies_do_not_matter(name: str) -> None:
    row = find(name)
    assert row is not None
    assert row.spec.sigmas() == TWO


@pytest.mark.parametrize(
    "name",
    [
        "my_style.safetensors",
        "Qwen-Image-Lightning.safetensors",
        "Qwen-Image-Lightning-2steps-V1.0.safetensors",
        "Qwen-Image-Lightning-4steps-V9.0.safetensors",
        "Qwen-Image-2.1-Lightning-4steps-V1.0.safetensors",
        "svdq-int4_r32-qwen-image-lightningv1.0-4steps.safetensors",
        "anime-merged-with-Qwen-Image-Lightning-4steps-V1.0.safetensors",
        "Qwen-Image-Lightning-4steps-V1.0-merged-anime.safetensors",
        "Qwen-Image-Lightning-4steps-V1.0.safetensors/other.safetensors",
        "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V4.0-bf16.safetensors",
        "qwen_image_edit_2511_fp8_e4m3fn_scaled_lightning.safetensors",
        "",
    ],
)
def test_other_files_are_not_claimed(name: str) -> None:
    assert find(name) is None


def test_hash_finds_a_renamed_file_and_wins_over_the_name() -> None:
    row = next(row for row in KNOWN if row.sha256)
    assert find("renamed.safetensors", row.sha256[0].upper()) is row
    assert (
        find("Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors", row.sha256[0]) is row
    )
    assert find("Qwen-Image-Lightning-4steps-V1.0.safetensors", "0" * 64) is not None


def test_normalised_name() -> None:
    assert normalised_name(r"a/b\C__d - E (2).SafeTensors") == "c-d-e"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen_image_lightning_4step_mine", "Qwen-Image-Lightning-4steps"),
        ("wuli_turbo_2steps", "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps"),
        ("Qwen-Image-2512-Turbo-LoRA-2-Steps", "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps"),
        ("anime-with-Qwen-Image-Lightning-8steps-V1.0", "Qwen-Image-Lightning-8steps"),
        ("my_style", None),
        ("Qwen-Image-Lightning-2steps-V1.0", None),  # no such row: 4 and 8 would be wrong
        ("flux-turbo-lora-16steps", None),
        ("qwen-image-2512-anime-lora", None),
    ],
)
def test_a_changed_name_is_told_the_row_of_as_many_steps(name: str, expected: str | None) -> None:
    row = nearest(f"{name}.safetensors")
    assert (row and row.name) == expected
    assert find(name) is None


def test_a_rows_own_name_is_its_own() -> None:
    """`nearest` goes by the number of steps, so it has an answer where the name tells one."""
    assert all(find(row.name) is row for row in KNOWN)
    for row in KNOWN:
        told = re.search(r"\d-?steps?(?![a-z])", normalised_name(row.name))
        assert nearest(row.name) is (row if told else None)
    assert sum(nearest(row.name) is None for row in KNOWN) == 4
