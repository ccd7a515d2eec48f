"""log.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.config import Config
from distill.data.batch import Data
from distill.trainer import train
from distill.training.engine import Engine
from distill.training.run_log import RunLog, Window, drop_lines_after

ALONE = Engine(0, 1, torch.device("cpu"))


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_a_line_is_an_object_of_valid_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, ALONE) as run_log:
        run_log.write(10, {"stage": "pcm", "loss/pcm": 0.5, "grad_norm/student": math.nan})
        assert lines(tmp_path) == [  # already on disk, the log still being open
            {"step": 10, "stage": "pcm", "loss/pcm": 0.5, "grad_norm/student": None}
        ]


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, ALONE) as run_log:
        for step in (10, 20):
            run_log.write(step, {"stage": "pcm", "loss/pcm": step / 100})
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert events.Tags()["scalars"] == ["loss/pcm"]
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss/pcm")] == [
        (10, 0.1),
        (20, 0.2),
    ]


def test_tensorboard_shows_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture = Image.new("RGB", (6, 4), (255, 0, 0))
    with RunLog(tmp_path, ALONE) as run_log:
        run_log.image(10, "preview", picture)
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    (event,) = events.Images("preview")
    assert (event.step, event.width, event.height) == (10, 6, 4)
    with Image.open(BytesIO(event.encoded_image_string)) as shown:
        assert shown.convert("RGB").getpixel((5, 3)) == (255, 0, 0)


WATCHED = {
    *("loss/dmd", "loss/fake", "loss/discriminator", "loss/generator"),
    *("grad_norm/student", "grad_norm/fake", "grad_norm/discriminator"),
    *("gan/weight", "gan/gradient_ratio", "gan/edge"),
    *("gan/accuracy_fake", "gan/accuracy_real", "gan/accuracy_teacher"),
    *("student/std", "student/spread"),
    *("seconds_per_step", "samples_per_second", "memory_gib"),
}
PREVIEWED = {
    *(
        f"preview/{name}{kind}"
        for name in ("saturation", "chroma", "contrast", "sharpness", "diversity")
        for kind in ("", "_ratio")
    ),
    *("preview/psnr", "preview/score", "preview/gates_failed"),
}


def test_what_there_is_to_watch(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    """All of it for DMD2 with a GAN, in log.jsonl and in TensorBoard."""
    gan = {
        "features": "latent",
        "width": 8,
        "ramp": 1,
        "ratio": 0.4,
        "real_ratio": 0.5,
        "draw_teacher": True,
        "teacher_steps": 2,
    }
    stage = {"method": "dmd2", "steps": 2, "batch": 2, "gradient_step": "last", "gan": gan}
    config = small_config(
        stages=[{**stage, "fake_warmup": 0, "fake_updates": 2}],
        preview={"every": 2, "prompts": 2, "images": 2, "teacher_steps": 2},
        log_every=1,
    )
    train(config, data=data)
    first, second, preview = lines(config.run_dir)
    for line, keys in ((first, WATCHED), (second, WATCHED), (preview, PREVIEWED)):
        assert keys <= line.keys()
        assert all(isinstance(line[key], int | float) for key in keys), line
    assert first["gan/gradient_ratio"] == 0  # before it was ever right
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tags = accumulator.EventAccumulator(str(config.run_dir / "tb")).Reload().Tags()
    assert set(tags["scalars"]) >= WATCHED | PREVIEWED
    assert tags["images"] == ["preview"]


def test_without_tensorboard_the_log_is_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, ALONE) as run_log:
        run_log.write(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    assert not (tmp_path / "tb").exists()


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    with RunLog(tmp_path, Engine(1, 2, torch.device("cpu"))) as run_log:
        run_log.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_continuing_drops_the_steps_that_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 4')
    drop_lines_after(path, 20)
    assert lines(tmp_path) == [{"step": 10}, {"step": 20}]


def test_a_window_averages_what_was_finite() -> None:
    window = Window()
    window.add({"loss/a": 1.0}, 0.5, 8)
    window.add({"loss/a": math.nan, "loss/b": 4.0}, 0.5, 8)
    window.add({"loss/a": 2.0}, 1.0, 8)
    values = window.take(ALONE)
    assert values["loss/a"] == 1.5
    assert values["loss/b"] == 4.0
    assert values["seconds_per_step"] == pytest.approx(2 / 3)
    assert values["samples_per_second"] == 12
    assert values["memory_gib"] > 0
    window.add({"loss/a": math.inf}, 1.0, 8)
    assert math.isnan(window.take(ALONE)["loss/a"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunLog(tmp_path / "run", ALONE) as run_log:
        run_log.path = Path("/dev/full")
        with pytest.raises(OSError, match=r"/dev/full: step 3 .*No space left.* --resume"):
            run_log.write(3, {"loss": 1.0})
