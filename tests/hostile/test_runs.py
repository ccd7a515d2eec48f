"""A run folder and a cache from somebody else: checkpoints, log, recipe, index."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile import Failed, Refused, Surface, check, command, few, row
from mutations import damaged, json_like

from distill.config import ConfigError, load_config, save_config
from distill.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    save_checkpoint,
    saved_steps,
)
from distill.training.engine import Engine
from distill.training.run_dir import RunDir
from distill.training.run_reader import read_run, summary
from distill.training.tensor_files import SUMS

DEMO = Path(__file__).parents[2] / "configs" / "tiny_demo.yaml"
NAME, BEFORE = "step-000010", "step-000008"
WHOLE = (NAME, 10, [8, 10])
MODULE = "transformer_blocks.0.attn.to_q"
LOG = [
    {"step": 10, "seconds_per_step": 0.5, "loss": 1.0},
    {"step": 10, "preview/score": 0.4, "preview/failed": [], "preview/sharpness_ratio": 1.1},
]
BEST = {"best": 10, "candidates": [{"step": 10, "ratios": {"sharpness": 1.1}}]}


def resume(folder: Path) -> tuple[str, int, list[int]]:
    """As --resume and export begin: the newest intact checkpoint, its step, and those of all."""
    found = newest_checkpoint(folder)
    assert found is not None
    return found[0].name, found[1].step, saved_steps(folder)


CHECKPOINT = Surface("newest_checkpoint", resume, (CheckpointError,))
RUN = Surface("read_run", lambda folder: summary(read_run(folder)), (ConfigError,))
EXPORT = Surface(
    "export RUN",
    lambda run: command("export", run, "--out", run.with_name("out.safetensors"), "--json"),
    (Refused,),
)
REPORT = Surface("report RUN", lambda run: command("report", run), (Refused, Failed))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, a log and a choice, as training leaves them."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = load_config(DEMO, [f"run_dir={folder}", "adapter.rank=4"])
    save_config(config, RunDir(folder).config)
    generator = torch.Generator().manual_seed(0)
    names = {f"{MODULE}.lora_A.weight": (4, 64), f"{MODULE}.lora_B.weight": (64, 4)}
    weights = {n: torch.randn(shape, generator=generator) for n, shape in names.items()}
    average = [weight + 1 for weight in weights.values()]
    method = {"student": {"average": average, "optimizer": {0: {"step": torch.tensor(3.0)}}}}
    for step in (8, 10):
        checkpoint = Checkpoint(step, 0, 0, {"student": weights}, method)
        save_checkpoint(folder, checkpoint, Engine(0, 1, torch.device("cpu")))
    RunDir(folder).log.write_text("".join(json.dumps(line) + "\n" for line in LOG))
    RunDir(folder).best.write_text(json.dumps(BEST))
    RunDir(folder).machine.write_text(json.dumps({"torch": "2"}))
    for surface in (EXPORT, REPORT):  # libraries are loaded before the attempts fork off
        surface.read(folder)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def test_the_whole_run_is_read(run: Path) -> None:
    assert check(CHECKPOINT, run, None) == WHOLE
    assert check(RUN, run, None)["step"] == 10
    check(EXPORT, run, None)
    check(REPORT, run, None)


# ------------------------------------------------------------------------------------ checkpoints


def seal(folder: Path) -> None:
    """New checksums: what was changed in a checkpoint counts as written."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    lines = (f"{sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    (folder / SUMS).write_text("".join(lines))


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The parsed state.json of the newest checkpoint changed, and sealed."""

    def make(run: Path) -> None:
        value = json.loads((RunDir(run).checkpoint(10) / "state.json").read_text())
        state_text(json.dumps(change(value) or value))(run)

    return make


def state_text(content: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        text(content, f"checkpoints/{NAME}/state.json")(run)
        seal(RunDir(run).checkpoint(10))

    return make


def text(content: str | bytes, name: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (run / name).write_bytes(data)

    return make


def largest(run: Path) -> Path:
    """The file that holds the tensors."""
    files = RunDir(run).checkpoint(10).iterdir()
    return max(files, key=lambda file: file.stat().st_size)


def cut(run: Path) -> None:
    os.truncate(largest(run), largest(run).stat().st_size // 2)


def flip(run: Path) -> None:
    data = bytearray(largest(run).read_bytes())
    data[len(data) // 2] ^= 1
    largest(run).write_bytes(data)


def beside(name: str, source: str = "step-000010") -> Callable[[Path], None]:
    return lambda run: shutil.copytree(
        RunDir(run).checkpoints / source, RunDir(run).checkpoints / name
    )


CHECKPOINTS = [
    row("a list", state_text("[]"), NAME),
    row("null", state_text("null"), NAME),
    row("deeply nested", state_text("[" * 200_000), NAME),
    row("zeros", state_text("\0" * 4096), NAME),
    row("no content", state(lambda v: v.pop("checkpoint") and None), NAME),
    row("a key too many", state(lambda v: v["checkpoint"].update(x=1)), NAME),
    row("a key too few", state(lambda v: v["checkpoint"].pop("stage") and None), NAME),
    row(
        "a tensor that is not there",
        state(lambda v: v["checkpoint"].update(adapters={"$tensor": "/nowhere"})),
        NAME,
    ),
    row(
        "a tensor whose name is a list",
        state(lambda v: v["checkpoint"].update(adapters={"$tensor": []})),
        NAME,
    ),
    row(
        "a mapping that is a number",
        state(lambda v: v["checkpoint"].update(method={"$mapping": 5})),
        NAME,
    ),
    row(
        "a mapping with a list for a key",
        state(lambda v: v["checkpoint"].update(method={"$mapping": [[[], 1]]})),
        NAME,
    ),
    row("a step that is text", state(lambda v: v["checkpoint"].update(step="10")), NAME),
    row("tensors cut in two", cut, NAME),
    row("a flipped bit", flip, NAME),
    row("no checksums", lambda run: (RunDir(run).checkpoint(10) / SUMS).unlink(), NAME),
    row("checksums of nothing", text("", f"checkpoints/{NAME}/{SUMS}"), NAME),
    row("checksums that are zeros", text(bytes(99), f"checkpoints/{NAME}/{SUMS}"), NAME),
    row(
        "checksums of files elsewhere",
        text("0" * 64 + "  ../../config.yaml\n", f"checkpoints/{NAME}/{SUMS}"),
        NAME,
    ),
    row(
        "checksums of a pipe",
        lambda run: os.mkfifo(RunDir(run).checkpoint(10) / "x.safetensors")
        or text("0" * 64 + "  x.safetensors\n", f"checkpoints/{NAME}/{SUMS}")(run),
        NAME,
    ),
    row("another one beside it", beside("step-000010.old"), None),
    row("a copy", beside("step-000008.bak"), None),
    row("a name that is no number", beside("step-last"), None),
    row("a negative step", beside("step--00001"), None),
    row(
        "a link to itself",
        lambda run: (RunDir(run).checkpoints / "step-000011").symlink_to("step-000011"),
        None,
    ),
    row("a file", lambda run: (RunDir(run).checkpoints / "step-000011").touch(), None),
]


@pytest.mark.parametrize(("change", "refused"), few(CHECKPOINTS))
def test_a_checkpoint(change: Callable[[Path], Any], refused: str | None, run: Path) -> None:
    change(run)
    found = check(CHECKPOINT, run, None)
    assert found == ((BEFORE, 8, [8, 10]) if refused else WHOLE)
    if refused:  # nothing to fall back to
        shutil.rmtree(RunDir(run).checkpoint(8))
        check(CHECKPOINT, run, refused)


def test_a_checkpoint_of_another_release(run: Path) -> None:
    state(lambda value: value.update(version=99))(run)
    check(CHECKPOINT, run, "99")


def test_a_checkpoint_of_seven_digits_is_the_newest(run: Path) -> None:
    for step in (999_999, 1_000_000):
        beside(f"step-{step}")(run)
    assert check(CHECKPOINT, run, None) == ("step-1000000", 10, [8, 10, 999_999, 1_000_000])


@pytest.mark.parametrize(
    "content",
    [
        {"adapters": 5},
        {"adapters": {}},
        {"method": {}},
        {"method": 5},
        {"method": {"student": {"average": 5}}},
        {"method": {"student": {"average": [5, 5]}}},
        {"adapters": {"student": {"a": 5}}},
    ],
    ids=str,
)
def test_a_checkpoint_without_a_student(content: dict[str, Any], run: Path) -> None:
    state(lambda value: value["checkpoint"].update(content))(run)
    check(EXPORT, run, NAME)


class Payload:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name",
    [".metadata", "state.json", "model.pt", "__0_0.distcp"],
)
@pytest.mark.parametrize("surface", [CHECKPOINT, EXPORT], ids=lambda surface: surface.name)
def test_a_pickle_is_not_opened(surface: Surface, name: str, run: Path) -> None:
    planted = run / "planted"
    (RunDir(run).checkpoint(10) / name).write_bytes(pickle.dumps(Payload(planted)))
    seal(RunDir(run).checkpoint(10))
    outcome = hostile.attempt(lambda: surface.read(run), surface.limits)
    assert not planted.exists()
    assert not outcome.killed
    assert {hostile.name_of(kind) for kind in surface.documented} & {*outcome.kinds} or (
        not outcome.kinds
    ), outcome.trace


# --------------------------------------------------------------------------------- what is written


FILES = [
    row("a log that is cut", text('{"step": 1, "seco', "log.jsonl")),
    row("a log that is not UTF-8", text(b"\xff\xfe\n", "log.jsonl")),
    row("a log of a deep line", text("[" * 200_000 + "\n", "log.jsonl"), None),
    row(
        "a log with a number of 5000 digits",
        text('{"step": ' + "1" * 5000 + "}\n", "log.jsonl"),
        None,
    ),
    row("a log of other things", text('5\n[]\n{"step": "x"}\n{"step": null}\n', "log.jsonl")),
    row(
        "a log whose time is text",
        text('{"step": 1, "seconds_per_step": "x"}\n', "log.jsonl"),
        r"log\.jsonl",
    ),
    row(
        "a log whose figures are text",
        text(
            '{"step": 1, "preview/score": "x", "preview/failed": [], "preview/a_ratio": "x"}\n',
            "log.jsonl",
        ),
        r"log\.jsonl",
    ),
    row(
        "a preview without figures",
        text('{"step": 1, "preview/score": null}\n', "log.jsonl"),
        r"log\.jsonl",
    ),
    row("a choice that is no JSON", text("{", "best.json"), r"best\.json"),
    row("a choice that is a list", text("[5]", "best.json"), r"best\.json"),
    row("a choice that is text", text('{"best": "x"}', "best.json")),
    row("a choice that leads elsewhere", text('{"best": "../../x"}', "best.json")),
    row("a machine that is a list", text("[5]", "machine.json"), r"machine\.json"),
    row(
        "a machine of many words",
        text(json.dumps(["\x1b[31m"] * 10**5), "machine.json"),
        "found .'\\\\x1b",
    ),
    row("a machine that is no JSON", text("{", "machine.json"), r"machine\.json"),
    row("a recipe that is no YAML", text("[", "config.yaml"), r"config\.yaml"),
    row("a recipe of another program", text("a: 1", "config.yaml"), r"config\.yaml"),
]


@pytest.mark.parametrize(("change", "refused"), few(FILES))
@pytest.mark.parametrize("surface", [RUN, REPORT], ids=lambda surface: surface.name)
def test_a_file_of_a_run(
    surface: Surface, change: Callable[[Path], Any], refused: str | None, run: Path
) -> None:
    change(run)
    check(surface, run, refused)


def test_previews_that_are_no_pictures(run: Path) -> None:
    RunDir(run).previews.mkdir()
    RunDir(run).preview(10).write_bytes(b"no picture")
    RunDir(run).prompts.write_bytes(b"\xff")
    check(REPORT, run, r"step-000010\.png")


# --------------------------------------------------------------------------------- any damage

COUNTS = [15, pytest.param(300, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_another_state(count: int, run: Path) -> None:
    path = RunDir(run).checkpoint(10) / "state.json"

    def put(example: Any) -> Path:
        state_text(json.dumps(example))(run)
        return run

    hostile.survive(CHECKPOINT, json_like(json.loads(path.read_text())), put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_tensors(count: int, run: Path) -> None:
    path = largest(run)

    def put(example: bytes) -> Path:
        path.write_bytes(example)
        seal(path.parent)
        return run

    hostile.survive(CHECKPOINT, damaged(path.read_bytes()), put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", few(["log.jsonl", "best.json"]))
def test_other_files(name: str, count: int, run: Path) -> None:
    lines = (run / name).read_text().splitlines()

    def put(example: Any) -> Path:
        (run / name).write_text("\n".join(map(json.dumps, [*map(json.loads, lines), example])))
        return run

    hostile.survive(RUN, json_like(json.loads(lines[-1])), put, count, count < 1000)
