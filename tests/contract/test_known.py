"""The table of public files: real names get the right schedule, other files are not claimed."""

from __future__ import annotations

import re

import pytest

from distill.contract.known import KNOWN, find, nearest, normalised_name

TWO = (1, 0.7155, 0)
LIGHTNING_4 = (1, 0.9, 0.75, 0.5, 0)
LIGHTNING_8 = tuple(3 * i / (8 + 2 * i) for i in range(8, -1, -1))
WULI_4 = (1, 15 / 17, 5 / 7, 5 / 11, 0)

REAL_NAMES = [  # as the authors publish them
    ("Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors", TWO, "Qwen-Image-2512"),
    ("Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V1.0-bf16.safetensors", WULI_4, "Qwen-Image-2512"),
    (
        "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V1.0-bf16_ComfyUi.safetensors",
        WULI_4,
        "Qwen-Image-2512",
    ),
    ("Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V2.0-bf16.safetensors", WULI_4, "Qwen-Image-2512"),
    ("Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V3.0-bf16.safetensors", WULI_4, "Qwen-Image-2512"),
    ("Qwen-Image-Lightning-4steps-V1.0.safetensors", LIGHTNING_4, "Qwen-Image"),
    ("Qwen-Image-Lightning-4steps-V1.0-bf16.safetensors", LIGHTNING_4, "Qwen-Image"),
    ("Qwen-Image-Lightning-4steps-V2.0.safetensors", LIGHTNING_4, "Qwen-Image"),
    ("Qwen-Image-Lightning-4steps-V2.0-bf16.safetensors", LIGHTNING_4, "Qwen-Image"),
    ("Qwen-Image-Lightning-8steps-V1.0.safetensors", LIGHTNING_8, "Qwen-Image"),
    ("Qwen-Image-Lightning-8steps-V1.1-bf16.safetensors", LIGHTNING_8, "Qwen-Image"),
    ("Qwen-Image-Lightning-8steps-V2.0.safetensors", LIGHTNING_8, "Qwen-Image"),
    ("Qwen-Image-fp8-e4m3fn-Lightning-4steps-V1.0-fp32.safetensors", LIGHTNING_4, "Qwen-Image"),
    ("Qwen-Image-Edit-Lightning-4steps-V1.0-bf16.safetensors", LIGHTNING_4, "Qwen-Image-Edit"),
    ("Qwen-Image-Edit-Lightning-8steps-V1.0.safetensors", LIGHTNING_8, "Qwen-Image-Edit"),
    (
        "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors",
        LIGHTNING_4,
        "Qwen-Image-Edit-2509",
    ),
    (
        "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-8steps-V1.0-fp32.safetensors",
        LIGHTNING_8,
        "Qwen-Image-Edit-2509",
    ),
    (
        "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors",
        LIGHTNING_4,
        "Qwen-Image-Edit-2511",
    ),
    (
        "Qwen-Image-Edit-2511-Lightning-8steps-V1.0-bf16.safetensors",
        LIGHTNING_8,
        "Qwen-Image-Edit-2511",
    ),
    ("Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors", LIGHTNING_4, "Qwen-Image-2512"),
    ("Qwen-Image-2512-Lightning-8steps-V1.0-bf16.safetensors", LIGHTNING_8, "Qwen-Image-2512"),
]


@pytest.mark.parametrize(("name", "sigmas", "base"), REAL_NAMES)
def test_published_names(name: str, sigmas: tuple[float, ...], base: str) -> None:
    assert sum(row.matches(name) for row in KNOWN) == 1
    row = find(name)
    assert row is not None
    assert row.spec.sigmas() == pytest.approx(sigmas)
    assert row.spec.base == f"Qwen/{base}"
    assert (row.spec.sampler, row.spec.cfg, row.spec.strength) == ("euler", 1, 1)


def test_every_row_is_exercised_has_a_source_and_says_if_it_is_inferred() -> None:
    hit = {find(name) for name, _, _ in REAL_NAMES}
    assert hit == set(KNOWN)
    assert all("Hugging Face" in row.source for row in KNOWN)
    inferred = {row.spec.base for row in KNOWN if "inferred" in row.source}
    assert "Qwen/Qwen-Image-Edit-2511" in inferred
    hashes = [sha256 for row in KNOWN for sha256 in row.sha256]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)
    assert len(set(hashes)) == len(hashes)


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
    assert all(find(row.name) is row and nearest(row.name) is row for row in KNOWN)
