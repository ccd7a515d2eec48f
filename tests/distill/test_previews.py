"""What previews draw and write; that they do not disturb a run; that the best student is found
again after any interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill import trainer
from distill.config import Config, ConfigError
from distill.contract.metadata import read_lora
from distill.contract.schedule import schedule
from distill.data.batch import Batch, Data, Examples
from distill.models.family import spec_of
from distill.models.load import load_transformer, load_vae
from distill.models.roles import STUDENT, Roles
from distill.models.sample import sample_student, sample_teacher
from distill.models.text import Text
from distill.models.vae import decode
from distill.trainer import train
from distill.training import previews
from distill.training.engine import Engine
from distill.training.previews import Previewer, shortened
from distill.utils.rng import Rng

ALONE = Engine(0, 1, torch.device("cpu"))
PREVIEW = {"every": 1, "prompts": 2, "images": 2, "teacher_steps": 3}
PCM = {"method": "pcm", "batch": 4, "points": 4}
# Rates so high that the student staggers: in the last stage it gets better, then worse
WILD = {
    "seed": 0,
    "stages": [
        {**PCM, "steps": 2, "lr": 0.2, "ema": 0},
        {**PCM, "steps": 6, "lr": 0.02, "ema": 0},
    ],
    "log_every": 1,
    "select": "best",
}

Make = Callable[..., Config]


def lines(config: Config, key: str) -> list[dict[str, Any]]:
    values = map(json.loads, (config.run_dir / "log.jsonl").read_text().splitlines())
    return [line for line in values if key in line]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return read_lora(path)[0]


def equal(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def best_of(config: Config) -> dict[str, Any]:
    return json.loads((config.run_dir / "best.json").read_text())


def make_roles(config: Config, data: Data, student: float = 0.0) -> Roles:
    """`student`: size of the LoRA's random weights."""
    base = load_transformer(config.model.path, torch.float32)
    roles = Roles(base, config.adapter, config.guidance, data.negative, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in roles.parameters(STUDENT):
        parameter.data += student * torch.randn(parameter.shape, generator=generator)
    return roles


# Drawing


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_the_student_is_drawn_as_the_node_does(
    sampler: str, small_config: Make, data: Data
) -> None:
    """Image by image: ComfyUI's noise of the seed, the spec's sigmas, the sampler's own stream."""
    spec = {"sigmas": [1, 0.6, 0], "sampler": sampler}
    config = small_config(preview={**PREVIEW, "seed": 5}, spec=spec)
    roles = make_roles(config, data, 0.1)
    drawn = Previewer(config, ALONE, data.examples(2)).draw(roles)
    assert drawn.shape == (4, 16, 4, 4)
    text = data.examples(2).texts[1]
    for row, seed in ((2, 5), (3, 6)):
        torch.manual_seed(seed)
        noise = torch.randn(1, 16, 4, 4)
        expected = sample_student(roles, spec_of(config), noise, text, seed)
        torch.testing.assert_close(drawn[row : row + 1], expected)


def test_the_teacher_is_drawn_once(
    small_config: Make, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(preview=PREVIEW)
    roles = make_roles(config, data)
    first = Previewer(config, ALONE, data.examples(2))
    first.draw_teacher(roles)
    noise = torch.stack([torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0))])
    text = data.examples(1).texts[0]
    expected = sample_teacher(roles, first.sigmas, noise, text)
    torch.testing.assert_close(first._teacher[:1], expected)
    assert len(first.sigmas) == PREVIEW["teacher_steps"] + 1

    monkeypatch.setattr(previews, "sample_teacher", None)
    second = Previewer(config, ALONE, data.examples(2))
    second.draw_teacher(roles)
    assert torch.equal(first._teacher, second._teacher)
    other = Previewer(small_config(preview={**PREVIEW, "seed": 1}), ALONE, data.examples(2))
    with pytest.raises(TypeError):  # would have drawn it anew
        other.draw_teacher(roles)


@pytest.mark.parametrize("position", [3, 20, -1])
def test_a_damaged_teacher_is_drawn_again(
    position: int, small_config: Make, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """In the header's length, in the header, in the latents."""
    config = small_config(preview=PREVIEW)
    roles = make_roles(config, data)
    first, second = (Previewer(config, ALONE, data.examples(2)) for _ in range(2))
    first.draw_teacher(roles)
    path = first.run_dir.previews / "teacher.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    second.draw_teacher(roles)
    assert torch.equal(first._teacher, second._teacher)
    assert "the teacher draws again" in caplog.text
    assert first._read(path) is not None  # the file is whole again


def test_large_images_are_drawn_one_at_a_time(
    small_config: Make, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(preview={**PREVIEW, "images": 3})
    roles = make_roles(config, data)
    together = Previewer(config, ALONE, data.examples(2))
    together.draw_teacher(roles)
    monkeypatch.setattr(previews, "TOKENS", 1)
    (together.run_dir.previews / "teacher.safetensors").unlink()
    alone = Previewer(config, ALONE, data.examples(2))
    alone.draw_teacher(roles)
    torch.testing.assert_close(alone._teacher, together._teacher)


def test_a_student_that_is_the_teacher(small_config: Make, data: Data) -> None:
    """Same sigmas, no guidance, an adapter that does nothing: every ratio is 1."""
    config = small_config(
        preview={**PREVIEW, "teacher_steps": 2, "teacher_shift": 2.0},
        spec={"sigmas": list(schedule(2, shift=2.0))},
        guidance={"scale": 1},
    )
    previewer = Previewer(config, ALONE, data.examples(2))
    assert previewer.sigmas == spec_of(config).sigmas()
    roles = make_roles(config, data)
    previewer.draw_teacher(roles)
    preview = previewer.judged(previewer.draw(roles), 1)
    assert preview.ratios == pytest.approx(dict.fromkeys(preview.ratios, 1), abs=1e-4)
    assert {"saturation", "chroma", "contrast", "sharpness", "diversity"} == set(preview.ratios)
    assert preview.psnr > 60
    assert preview.values(config.gates)["preview/score"] < 1e-4


def test_half_precision(small_config: Make, data: Data) -> None:
    """A bfloat16 base and VAE, as on 20 B, give the pictures of float32."""
    pictures = []
    for dtype in (torch.float32, torch.bfloat16):
        config = small_config(preview=PREVIEW)
        model = config.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        config = config.model_copy(update={"model": model})
        roles = make_roles(config, data, 0.1)
        roles.transformer.to(dtype)
        previewer = Previewer(config, ALONE, data.examples(2))
        (previewer.run_dir.previews / "teacher.safetensors").unlink(missing_ok=True)
        previewer.draw_teacher(roles)
        previewer.judged(previewer.draw(roles), 1)
        assert previewer.vae.dtype == dtype
        pictures.append(previewer._teacher_images)
    assert pictures[1].dtype == torch.float32
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02


# The picture


def test_a_column_per_prompt_student_above_teacher(small_config: Make, data: Data) -> None:
    config = small_config(preview=PREVIEW)
    previewer = Previewer(config, ALONE, data.examples(2))
    roles = make_roles(config, data, 0.2)
    previewer.draw_teacher(roles)
    latents = previewer.draw(roles)
    previewer.judged(latents, 7)
    with torch.no_grad():
        vae = load_vae(config.model.path)
        tiles = {
            (row, column): decode(vae, source[2 * column + image][None])[0]
            for image in (0, 1)
            for column in (0, 1)
            for row, source in ((2 * image, latents), (2 * image + 1, previewer._teacher))
        }
    with Image.open(config.run_dir / "previews" / "step-000007.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3)
    for (row, column), tile in tiles.items():
        top, left = 22 + 4 + row * 132, 190 + column * 132  # 32 pixels, four times enlarged
        shown = pixels[top : top + 128 : 4, left : left + 128 : 4].permute(2, 0, 1)
        assert (shown - (tile + 1) * 127.5).abs().max() < 1.5
    assert (previewer.run_dir.previews / "prompts.txt").read_text() == "a cat\nrain\n"


def test_large_images_are_scaled_down(small_config: Make, data: Data) -> None:
    @dataclass(frozen=True)
    class Wide(type(data)):
        def examples(self, count: int) -> Examples:
            return replace(super().examples(count), size=(256, 128))

    config = small_config(preview={**PREVIEW, "side": 128})
    previewer = Previewer(config, ALONE, Wide().examples(2))
    roles = make_roles(config, data)
    previewer.draw_teacher(roles)
    preview = previewer.judged(previewer.draw(roles), 1)
    assert preview.picture.size == (190 + 2 * 132 + 4, 22 + 4 * (64 + 4) + 4)


def test_captions_fit_their_columns() -> None:
    assert shortened("rain", 4) == "rain"
    assert shortened("雨の夜の猫", 4) == "雨の夜…"


# In a run


@pytest.fixture(scope="module")
def wild(small_config_once: Make, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of WILD, every step previewed and saved."""
    run_dir = tmp_path_factory.mktemp("wild") / "run"
    config = small_config_once(
        run_dir=run_dir,
        **WILD,
        preview=PREVIEW,
        save_every=1,
        keep_checkpoints=0,
    )
    train(config, data=data)
    return config


def test_the_best_student_of_the_last_stage_is_the_lora(wild: Config) -> None:
    scores = {line["step"]: line["preview/score"] for line in lines(wild, "preview/score")}
    assert list(scores) == list(range(1, 9))
    failed = {line["step"]: line["preview/failed"] for line in lines(wild, "preview/score")}
    best = min(range(3, 9), key=lambda step: (bool(failed[step]), scores[step]))
    assert best_of(wild)["best"] == best
    assert best < 8  # else the last step would do
    assert len(best_of(wild)["candidates"]) > 2  # others were the best before
    lora = wild.run_dir / "lora"
    assert equal(lora / "turbo.safetensors", lora / f"step-{best:06d}.safetensors")
    _, header = read_lora(lora / "turbo.safetensors")
    assert header["ss_steps"] == str(best)
    assert header["ss_max_train_steps"] == "8"
    chosen = json.loads(header["turbo.selection"])
    assert (chosen["step"], chosen["score"]) == (best, scores[best])


def test_failed_gates_are_told(
    small_config: Make, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    gates = {"chroma_max": 0.01, "saturation_max": None, "sharpness_max": None}
    config = small_config(
        stages=[{**PCM, "steps": 1}],
        preview={**PREVIEW, "images": 1},
        gates=gates,
        select="best",
    )
    path = train(config, data=data)
    (line,) = lines(config, "preview/score")
    (failure,) = line["preview/failed"]
    assert "chroma is" in failure
    assert "expected at most 0.01 (gates.chroma_max)" in failure
    assert line["preview/gates_failed"] == 1
    assert f"step 1: gate failed: {failure}" in caplog.text
    assert "no preview passed all gates; step 1 comes closest" in caplog.text
    assert json.loads(read_lora(path)[1]["turbo.selection"])["failed"] == [failure]


def test_select_last_and_no_previews_end_alike(
    wild: Config, small_config_once: Make, data: Data, tmp_path: Path
) -> None:
    """Previews change nothing of the training."""
    quiet, last = (
        small_config_once(run_dir=tmp_path / name, **{**WILD, **keys})
        for name, keys in (("quiet", {}), ("last", {"preview": PREVIEW, "select": "last"}))
    )
    paths = [train(config, data=data) for config in (quiet, last)]
    assert equal(*paths)
    assert not equal(paths[0], wild.run_dir / "lora" / "turbo.safetensors")
    for config, path in zip((quiet, last), paths, strict=True):
        assert not list((config.run_dir / "lora").glob("step-*"))
        _, header = read_lora(path)
        assert header["ss_steps"] == "8"
        assert "turbo.selection" not in header
    assert not (quiet.run_dir / "previews").exists()
    assert [line["preview/score"] for line in lines(last, "preview/score")] == [
        line["preview/score"] for line in lines(wild, "preview/score")
    ]


class Crash(BaseException):
    """Like a power cut: nothing catches it."""


@dataclass(frozen=True)
class CrashingData:
    good: Data
    step: int

    @property
    def negative(self) -> Text:
        return self.good.negative

    def examples(self, count: int) -> Examples:
        return self.good.examples(count)

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        if rng.step == self.step:
            raise Crash
        return self.good.batch(rng, batch_size)


def same_selection(config: Config, whole: Config) -> None:
    assert best_of(config)["best"] == best_of(whole)["best"]
    records = [{r["step"]: r for r in best_of(c)["candidates"]} for c in (config, whole)]
    assert records[0][best_of(whole)["best"]] == records[1][best_of(whole)["best"]]
    loras = [c.run_dir / "lora" / "turbo.safetensors" for c in (config, whole)]
    assert equal(*loras)
    headers = [read_lora(path)[1]["turbo.selection"] for path in loras]
    assert headers[0] == headers[1]
    listed = {f"step-{step:06d}.safetensors" for step in records[0]}
    assert {p.name for p in (config.run_dir / "lora").glob("step-*")} == listed
    assert lines(config, "preview/score") == lines(whole, "preview/score")


def some(*steps: int, slow: tuple[int, ...]) -> list[Any]:
    return [*steps, *(pytest.param(step, marks=pytest.mark.slow) for step in slow)]


@pytest.mark.parametrize("step", some(5, slow=(2, 4, 7)))
def test_cut_off_and_continued(step: int, wild: Config, small_config: Make, data: Data) -> None:
    """In step 5 the previews of 4 and 5 are lost with the steps after the checkpoint of 3."""
    config = small_config(**WILD, preview=PREVIEW, save_every=3)
    with pytest.raises(Crash):
        train(config, data=CrashingData(data, step))
    train(config, data=data, resume=True)
    same_selection(config, wild)


@pytest.mark.parametrize("step", some(4, 6, slow=(1, 3, 7)))
def test_continued_from_an_older_checkpoint(
    step: int, wild: Config, data: Data, tmp_path: Path
) -> None:
    """As after a damaged one was deleted: later candidates go, overtaken ones count again."""
    shutil.copytree(wild.run_dir, tmp_path / "run")
    for later in range(step + 1, 9):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{later:06d}")
    (tmp_path / "run" / "lora" / "turbo.safetensors").unlink()
    config = wild.model_copy(update={"run_dir": tmp_path / "run"})
    train(config, data=data, resume=True)
    same_selection(config, wild)


def test_killed_while_the_best_is_written(
    wild: Config, small_config: Make, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is there, the list does not know it yet."""
    config = small_config(**WILD, preview=PREVIEW, save_every=2)
    keep = trainer.Selection._keep

    def cut(self: Any, candidates: list[Any]) -> None:
        if candidates and candidates[-1].step == best_of(wild)["best"]:
            raise Crash
        keep(self, candidates)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Selection, "_keep", cut)
        with pytest.raises(Crash):
            train(config, data=data)
    train(config, data=data, resume=True)
    same_selection(config, wild)


def test_a_missing_vae_is_found_before_the_base_is_read(
    small_config: Make, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    config = small_config(preview=PREVIEW, model={"path": str(model)})
    monkeypatch.setattr(trainer, "load_transformer", None)
    with pytest.raises(ConfigError, match=r"vae.config\.json is missing"):
        train(config, data=data)
