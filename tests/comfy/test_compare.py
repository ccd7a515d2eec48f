"""Turbo Compare: every cell is what the ordinary nodes give, and the figures are counted."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SIZE = 64
TEACHER = {"teacher_steps": 4, "teacher_cfg": 3.0, "teacher_shift": 0.0}
NO_TEACHER = {**TEACHER, "teacher_steps": 0}


@pytest.fixture
def loras(
    comfyui: Path,
    tmp_path: Path,
    make_updates: Callable[..., Any],
    write_lora: Callable[..., Path],
) -> Iterator[Path]:
    """A folder in ComfyUI's list with "one.safetensors" (2 steps) and "two.safetensors" (3)."""
    import folder_paths

    known = folder_paths.folder_names_and_paths["loras"]
    write_lora(make_updates(seed=1), "one.safetensors")
    write_lora(make_updates(seed=2), "two.safetensors", nodes=(1.0, 0.9, 0.5, 0.0))
    folder_paths.folder_names_and_paths["loras"] = ([str(tmp_path)], known[1])
    yield tmp_path
    folder_paths.folder_names_and_paths["loras"] = known


@pytest.fixture
def vae(pack: Any, tiny_folder: Path) -> Any:
    return pack("nodes.tiny").load_vae(tiny_folder / "vae")


@pytest.fixture
def negative(prompt: list[list[Any]]) -> list[list[Any]]:
    return [[-prompt[0][0], {}]]


@pytest.fixture
def latent() -> dict[str, Tensor]:
    return {"samples": torch.zeros(2, 16, SIZE // 8, SIZE // 8)}


@pytest.fixture
def compare(
    pack: Any,
    run_node: Any,
    loras: Path,
    model: Any,
    prompt: Any,
    negative: Any,
    vae: Any,
    latent: Any,
) -> Callable[..., tuple[Tensor, str]]:
    """The node with every input filled in; keywords replace them."""
    defaults = {
        "model": model,
        "positive": prompt,
        "negative": negative,
        "vae": vae,
        "latent_image": latent,
        "noise_seed": 5,
        "cell_size": 0,
        **TEACHER,
    }

    def run(**changes: Any) -> tuple[Tensor, str]:
        return run_node(pack("nodes.compare").TurboCompare, **{**defaults, **changes})

    return run


def cells(grid: Tensor, models: int, batch: int = 2) -> Tensor:
    """The pictures of a grid at full size, cut out by its own geometry.  # [models, batch, ...]"""
    wide = batch > models
    columns, rows = (batch, 1) if wide else (1, batch)
    panels = grid[0].chunk(models, dim=0 if wide else 1)
    label = panels[0].shape[0] - rows * (SIZE + 4)
    assert panels[0].shape[1] == columns * (SIZE + 4)
    places = [
        (2 + x * (SIZE + 4), label + 2 + y * (SIZE + 4))
        for y in range(rows)
        for x in range(columns)
    ]
    return torch.stack(
        [torch.stack([one[y : y + SIZE, x : x + SIZE] for x, y in places]) for one in panels]
    )


def decoded(vae: Any, sampled: dict[str, Tensor]) -> Tensor:
    """[B, H, W, 3] in the 8 bits of the grid."""
    return vae.decode(sampled["samples"]).squeeze(1).mul(255).round().div(255)


def table(report: str) -> list[list[str]]:
    """Name, settings and forwards of each line of the report."""
    return [
        list(row) for row in re.findall(r"^(.+): (.+), ([\d.]+) forwards, [\d.]+ s$", report, re.M)
    ]


# ----------------------------------------------------------------------------------------- pictures


def test_the_teacher_is_what_the_ksampler_paints(
    compare: Any, model: Any, prompt: Any, negative: Any, latent: Any, vae: Any
) -> None:
    import nodes

    (expected,) = nodes.common_ksampler(
        model, 5, 4, 3.0, "euler", "simple", prompt, negative, latent
    )
    grid, report = compare()
    torch.testing.assert_close(cells(grid, 1)[0], decoded(vae, expected), rtol=0, atol=1e-6)
    assert table(report) == [["teacher", "4 steps, CFG 3", "8"]]


def test_shift_is_that_of_model_sampling_aura_flow(
    compare: Any, model: Any, prompt: Any, latent: Any, vae: Any
) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    import nodes

    (shifted,) = ModelSamplingAuraFlow().patch_aura(model, 9.0)
    arguments = (5, 4, 1.0, "euler", "simple", prompt, prompt, latent)
    (expected,) = nodes.common_ksampler(shifted, *arguments)
    (unshifted,) = nodes.common_ksampler(model, *arguments)
    grid, report = compare(teacher_cfg=1.0, teacher_shift=9.0, negative=None)
    torch.testing.assert_close(cells(grid, 1)[0], decoded(vae, expected), rtol=0, atol=1e-6)
    assert not torch.equal(decoded(vae, expected), decoded(vae, unshifted))
    assert table(report) == [["teacher", "4 steps, CFG 1", "4"]]


def test_each_lora_is_what_loader_and_sampler_paint(
    pack: Any,
    compare: Any,
    model: Any,
    prompt: Any,
    latent: Any,
    vae: Any,
    loras: Path,
    sample: Any,
) -> None:
    grid, report = compare(
        **NO_TEACHER, lora_1="none", lora_2="one.safetensors", lora_3="two.safetensors"
    )
    for index, name in enumerate(("one", "two")):
        patched, _ = pack("nodes.apply_lora").apply_lora(model, loras / f"{name}.safetensors")
        sampled, _ = sample(patched, prompt, latent, 5)
        painted = cells(grid, 2)[index]
        torch.testing.assert_close(painted, decoded(vae, sampled), rtol=0, atol=1e-6)
    assert table(report) == [["one", "2 steps", "2"], ["two", "3 steps", "3"]]


def test_order_and_wired_models(
    compare: Any,
    pack: Any,
    model: Any,
    loras: Path,
    prompt: Any,
    latent: Any,
    vae: Any,
    sample: Any,
) -> None:
    half, _ = pack("nodes.apply_lora").apply_lora(model, loras / "one.safetensors", strength=0.5)
    grid, report = compare(lora_1="two.safetensors", turbo_models={"turbo_model_0": half})
    assert [row[0] for row in table(report)] == ["teacher", "two", "one"]
    sampled, _ = sample(half, prompt, latent, 5)
    torch.testing.assert_close(cells(grid, 3)[2], decoded(vae, sampled), rtol=0, atol=1e-6)


def test_the_embedded_tiny_model(pack: Any, compare: Any) -> None:
    tiny, folder = pack("nodes.tiny"), pack("distill.contract.tiny").TINY_DIR
    base, vae, _ = tiny.load_tiny(folder, tiny.TEACHER)
    turbo, _, _ = tiny.load_tiny(folder)
    grid, report = compare(
        model=base,
        vae=vae,
        positive=tiny.conditioning("a red letter K"),
        negative=tiny.conditioning(""),
        turbo_models={"turbo_model_0": turbo},
        cell_size=256,
    )
    assert table(report)[1] == ["tiny_turbo_2_steps", "2 steps", "2"]
    assert grid.shape[2] == 2 * (256 + 4)
    assert grid.std() > 0.1


def test_nothing_stays_on_the_models(compare: Any, model: Any) -> None:
    compare(lora_1="one.safetensors")
    assert not any(model.wrappers.values())
    assert model.patches == {}


# ------------------------------------------------------------------------------- warnings, refusals


def test_warnings_name_their_model(
    compare: Any, model: Any, make_updates: Any, write_lora: Any
) -> None:
    write_lora(make_updates(), "one.safetensors", family="z-image")
    guided = model.clone()
    guided.set_model_sampler_cfg_function(lambda arguments: arguments["cond"])
    _, report = compare(model=guided, **NO_TEACHER, lora_1="one.safetensors")
    assert "Warning: one: the LoRA's spec is for z-image" in report
    assert "Warning: one: a node upstream patched the guidance" in report
    _, report = compare(**NO_TEACHER, lora_1="two.safetensors")
    assert "Warning" not in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negative": None}, r"CFG 3, which needs a negative.*teacher_steps to 0"),
        (NO_TEACHER, r"nothing to compare.*turbo_models"),
    ],
)
def test_refusals(compare: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(**changes)


def test_a_turbo_model_is_no_base(compare: Any, turbo_model: Any) -> None:
    with pytest.raises(ValueError, match=r"carries the Turbo LoRA turbo\.safetensors already"):
        compare(model=turbo_model())


def test_a_model_without_a_spec_is_no_turbo_model(compare: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="carries no Turbo spec"):
        compare(turbo_models={"turbo_model_0": model})


def test_interrupt(compare: Any, count_forwards: Any, model: Any) -> None:
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    forwards = count_forwards(model)
    interrupt_current_processing(True)
    with pytest.raises(InterruptProcessingException):
        compare()
    assert forwards == []


def test_a_changed_lora_runs_again(
    pack: Any, loras: Path, make_updates: Any, write_lora: Any
) -> None:
    node = pack("nodes.compare").TurboCompare
    os.utime(loras / "two.safetensors", (1, 1))  # the file system's clock may not have moved on
    before = node.fingerprint_inputs(lora_1="none", lora_2="one.safetensors", noise_seed=5)
    assert before == node.fingerprint_inputs(lora_2="one.safetensors", noise_seed=6)
    assert before != node.fingerprint_inputs(lora_2="two.safetensors")
    path = write_lora(make_updates(seed=3, ranks=(2,)), "one.safetensors")
    os.utime(path, (0, 0))
    assert before != node.fingerprint_inputs(lora_2="one.safetensors")


# ------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("batch", [1, 3])
def test_pictures_are_scaled_and_stay_in_place(pack: Any, batch: int) -> None:
    grid = pack("nodes.grid")
    images = torch.rand(batch, 8, 16, 3)
    panels = [grid.Panel("a", "", images), grid.Panel("b", "", 1 - images)]
    drawn = grid.draw_grid(panels, cell_size=32)
    assert drawn.shape[2] == max(batch, 2) * (32 + 4), "the longer direction is horizontal"
    last = drawn[0, -2 - 16 : -2, -2 - 32 : -2]  # last picture of the last model
    enlarged = (1 - images)[-1].repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(last, enlarged, rtol=0, atol=1 / 255)
    assert grid.draw_grid(panels, cell_size=8).shape[2] == max(batch, 2) * (8 + 4)


def test_labels_are_written_above_their_pictures(pack: Any) -> None:
    grid = pack("nodes.grid")
    black = torch.zeros(1, 256, 256, 3)
    drawn = grid.draw_grid([grid.Panel("", "", black), grid.Panel("LoRA", "2 steps", black)])[0]
    strip = drawn[: -256 - 4]
    bright = (strip > 0.5).all(-1)
    middle = drawn.shape[1] // 2
    assert not bright[:, :middle].any()
    assert bright[: len(strip) // 2, middle:].any()
    assert bright[len(strip) // 2 :, middle:].any()
    assert (drawn[-2 - 256 : -2, middle + 2 : middle + 2 + 256] == 0).all(), "label in a picture"


def test_long_names_keep_their_ends(pack: Any) -> None:
    from PIL import ImageFont

    shorten = pack("nodes.grid").shorten
    font = ImageFont.load_default(20)
    name = "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16"
    assert shorten(name, font, 10_000) == name
    short = shorten(name, font, 200)
    assert 170 < font.getlength(short) <= 200
    head, tail = short.split("...")
    assert name.startswith(head)
    assert name.endswith(tail)
    assert abs(len(head) - len(tail)) <= 1
