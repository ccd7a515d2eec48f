"""Two processes (gloo) train like one with a double batch, replicated and sharded."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.config import Config, save_config
from distill.contract.metadata import read_lora
from distill.data.batch import Batch, Data
from distill.lora.student import lora_tensors
from distill.models.load import load_transformer
from distill.models.roles import Roles
from distill.models.text import Text
from distill.stages import STAGE_METHODS
from distill.trainer import adapters_of, train
from distill.training.checkpoint import latest_checkpoint, load_adapters, load_checkpoint
from distill.utils.rng import Rng

RUN_SMALL = Path(__file__).parents[1] / "helpers" / "run_small.py"
DRAW_PREVIEWS = RUN_SMALL.with_name("draw_previews.py")
TINY_CPU = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"

# One stage per registered method and per option that reduces something over the batch. Where a
# gradient is near zero, Adam makes a step of size lr of its rounding error, hence no larger lr.
FAST = {"steps": 3, "lr": 3e-4}
DMD2 = {"method": "dmd2", **FAST, "fake_lr": 3e-4, "fake_updates": 2, "fake_warmup": 0}
STAGES: dict[str, dict[str, Any]] = {
    "progressive": {"method": "progressive", **FAST, "solver_steps": 2},
    "consistency": {"method": "consistency", **FAST, "points": 4},
    "pcm": {"method": "pcm", **FAST, "points": 4},
    "pcm_ema": {"method": "pcm", **FAST, "points": 4, "target": "ema"},
    "pcm_gan": {"method": "pcm", **FAST, "points": 4, "gan": {"width": 8, "ramp": 2}},
    "dmd2": DMD2,
    "dmd2_options": {**DMD2, "diversity": 0.1, "ida": 0.9, "decoupled": True},
    "dmd2_gan": {
        **DMD2,
        "gan": {"features": "latent", "width": 8, "real_ratio": 1.0, "ramp": 2, "updates": 2},
    },
    "dmd2_accumulated": {
        **DMD2,
        "accumulate": 4,
        "fake_accumulate": 2,
        "gan": {"features": "latent", "width": 8, "ramp": 2, "updates": 2, "accumulate": 2},
    },
}
MODES = {"replicate": 1, "shard": 2}
PREVIEW = {"every": 2, "prompts": 2, "images": 2, "teacher_steps": 2}
PREVIEWED = ("pcm", "dmd2_gan")


def test_every_method_is_compared() -> None:
    assert {stage["method"] for stage in STAGES.values()} == set(STAGE_METHODS)


def torchrun(
    *words: str, ranks: int = 2, wait: bool = True, script: Path = RUN_SMALL, **trouble: Any
) -> subprocess.Popen[str]:
    """Starts run_small.py, or another script, under torchrun, on a free port."""
    environment = {**os.environ, "RUN_SMALL": json.dumps(trouble), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    process = subprocess.Popen(
        [*launcher, f"--nproc-per-node={ranks}", str(script), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        process.output, process.errors = process.communicate(timeout=580)
    return process


def make_config(small_config: Callable[..., Config], name: str, ranks: int, **keys: Any) -> Config:
    """Four samples per step however many ranks share them; with `accumulate` one at a time."""
    stage = {**STAGES[name], "batch": 4 // ranks}
    if "accumulate" in stage:
        shares = {key: stage[key] // ranks for key in ("accumulate", "fake_accumulate")}
        gan = {**stage["gan"], "accumulate": stage["gan"]["accumulate"] // ranks}
        stage |= {**shares, "batch": 1, "gan": gan}
    model = {**small_config().model.model_dump(), "gradient_checkpointing": name != "pcm"}
    return small_config(stages=[stage], model=model, log_every=1, **keys)


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, small_config_once: Callable[..., Config]
) -> Path:
    """All recipes in all modes, in one pair of processes."""
    root = tmp_path_factory.mktemp("two_ranks")
    words: list[str] = []
    for name in STAGES:
        for mode, shard in MODES.items():
            config = make_config(
                small_config_once,
                name,
                ranks=2,
                run_dir=root / name / mode,
                engine={"shard": shard, "timeout_s": 60},
                preview=PREVIEW if name in PREVIEWED else {"every": 0},
                select="best",
            )
            file = root / f"{name}_{mode}.yaml"
            save_config(config, file)
            words += [str(file), "--"]
    run = torchrun(*words[:-1])
    assert run.returncode == 0, run.errors
    (root / "output").write_text(run.output)
    return root


def adapters(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    return {
        f"{role}/{name}": tensor
        for role, tensors in load_checkpoint(newest).adapters.items()
        for name, tensor in tensors.items()
    }


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_are_one_with_a_double_batch(
    name: str, two_ranks: Path, small_config: Callable[..., Config], data: Data
) -> None:
    config = make_config(small_config, name, ranks=1)
    train(config, data=data)
    alone = adapters(config.run_dir)
    start = Roles(
        load_transformer(config.model.path, torch.float32),
        config.adapter,
        config.guidance,
        data.negative,
        config.seed,
        adapters_of(config.stages),
    )
    untrained = {
        f"{role}/{key}": p.detach()
        for role in start.adapters
        for key, p in start.named_parameters(role).items()
    }
    assert farthest(alone, untrained) > 3e-4  # it is no comparison of nothing with nothing
    for mode in MODES:
        assert farthest(alone, adapters(two_ranks / name / mode)) < 1e-5, mode


@pytest.mark.parametrize("mode", MODES)
def test_export_of_sharded_runs_is_whole(
    mode: str, two_ranks: Path, small_config: Callable[..., Config], data: Data
) -> None:
    """The file that two ranks wrote is what one process makes of the same weights."""
    run_dir = two_ranks / "dmd2" / mode
    config = make_config(small_config, "dmd2", ranks=1)
    roles = Roles(
        load_transformer(config.model.path, torch.float32),
        config.adapter,
        config.guidance,
        Text(torch.zeros(1, 1, 24)),
        config.seed,
        adapters_of(config.stages),
    )
    newest = latest_checkpoint(run_dir)
    assert newest is not None
    load_adapters(roles, load_checkpoint(newest).ended)
    expected = lora_tensors(roles, torch.bfloat16)
    found = load_file(run_dir / "lora" / "turbo.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_sharding_divides_the_base(two_ranks: Path) -> None:
    found = re.findall(r"holds (\d+) of (\d+)", (two_ranks / "output").read_text())
    shares = sorted(int(here) / int(whole) for here, whole in found)
    half = len(found) // 2
    assert half == len(STAGES) * 2
    assert shares[half:] == [1.0] * half  # replicate
    assert shares[:half] == pytest.approx([0.5] * half, abs=0.01)  # rows that do not divide by two


def test_previews_of_sharded_runs(two_ranks: Path) -> None:
    """Every rank takes part in the forward pass, one writes, and it does not disturb the run."""
    for name in PREVIEWED:
        found = []
        for mode in MODES:
            run_dir = two_ranks / name / mode
            names = sorted(path.name for path in (run_dir / "previews").glob("*.png"))
            assert names == ["step-000002.png", "step-000003.png"]
            lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
            previews = [line for line in lines if "preview/score" in line]
            assert [line["step"] for line in previews] == [2, 3]
            found.append([line["preview/chroma"] for line in previews])
            best = json.loads((run_dir / "best.json").read_text())["best"]
            lora, chosen = (
                read_lora(run_dir / "lora" / f"{stem}.safetensors")[0]
                for stem in ("turbo", f"step-{best:06d}")
            )
            assert all(torch.equal(lora[key], chosen[key]) for key in chosen)
        assert found[0] == pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize(
    ("ranks", "shard"),
    [(2, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((2, 2), (3, 1), (4, 2)))],
)
def test_ranks_share_the_drawing(
    ranks: int,
    shard: int,
    small_config: Callable[..., Config],
    drawn_alone: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    """Bit for bit what one process draws, for its share of the forwards: nine images are no
    multiple of the ranks. Sharded, a rank without an image of its own keeps the others company.
    """
    config = small_config(preview=SHOWN, engine={"shard": shard, "timeout_s": 60})
    save_config(config, tmp_path / "draw.yaml")
    words = (str(tmp_path / "draw.yaml"), str(tmp_path / "drawn"))
    run = torchrun(*words, ranks=ranks, script=DRAW_PREVIEWS)
    assert run.returncode == 0, run.errors
    drawn = load_file(tmp_path / "drawn")
    # gathered weights lie elsewhere in memory, where products may round otherwise
    assert farthest(drawn, drawn_alone) <= (0 if shard == 1 else 1e-5)
    found = re.findall(r"rank (\d): (\d+) and (\d+) forwards", run.output)
    passes = {int(rank): (int(teacher), int(student)) for rank, teacher, student in found}
    units = [len(range(rank, 3, ranks)) for rank in range(ranks)]  # prompts, drawn at once
    images = [len(range(rank, 9, ranks)) for rank in range(ranks)]
    if shard > 1:
        units, images = [max(units)] * ranks, [max(images)] * ranks
    assert passes == {rank: (4 * units[rank], 2 * images[rank]) for rank in range(ranks)}


SHOWN = {"every": 1, "prompts": 3, "images": 3, "teacher_steps": 4}


@pytest.fixture(scope="module")
def drawn_alone(
    small_config_once: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("alone")
    config = small_config_once(preview=SHOWN, run_dir=folder / "run")
    save_config(config, folder / "alone.yaml")
    words = (str(folder / "alone.yaml"), str(folder / "drawn"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(DRAW_PREVIEWS), *words]
    run = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    assert "rank 0: 12 and 18 forwards" in run.stdout
    return load_file(folder / "drawn")


def test_the_log_counts_all_ranks(two_ranks: Path) -> None:
    lines = (two_ranks / "pcm" / "shard" / "log.jsonl").read_text().splitlines()
    values = [line for line in map(json.loads, lines) if "seconds_per_step" in line]
    assert [line["step"] for line in values] == [1, 2, 3]
    rates = [line["samples_per_second"] * line["seconds_per_step"] for line in values]
    assert rates == pytest.approx([4, 4, 4])


@pytest.mark.slow
def test_bad_data_on_one_rank_skips_the_step_on_both(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    """The checkpoint of the main rank is the other's too, else the third step would differ."""
    config = small_config(
        stages=[{**STAGES["pcm"], "batch": 2}],
        log_every=1,
        engine={"shard": 2, "timeout_s": 60},
    )
    save_config(config, tmp_path / "two.yaml")
    run = torchrun(str(tmp_path / "two.yaml"), nan=1, step=1, rank=1)
    assert run.returncode == 0, run.errors
    lines = [json.loads(s) for s in (config.run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert [line["grad_norm/student"] is None for line in lines] == [False, True, False]
    alone = make_config(small_config, "pcm", 1, run_dir=tmp_path / "alone")
    train(alone, data=SpoiltRow(data))
    assert farthest(adapters(alone.run_dir), adapters(config.run_dir)) < 1e-5


@dataclass(frozen=True)
class SpoiltRow:
    """Data with one nan in the second step."""

    good: Data

    @property
    def negative(self) -> Text:
        return self.good.negative

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        batch = self.good.batch(rng, batch_size)
        if rng.step == 1:
            batch.x0[-1, 0, 0, 0] = torch.nan
        return batch


@pytest.mark.slow
def test_cut_off_with_two_ranks_and_continued_with_one(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    """One rank is killed in the fourth step: both end at once, and not as if all were well."""
    stage = {**STAGES["dmd2_gan"], "steps": 4}

    def config(ranks: int, **keys: Any) -> Config:
        stages = [{**stage, "batch": 4 // ranks}]
        return small_config(stages=stages, save_every=2, **keys)

    whole = config(1, run_dir=tmp_path / "whole")
    train(whole, data=data)
    save_config(config(2), tmp_path / "two.yaml")
    begun = time.monotonic()
    cut = torchrun(str(tmp_path / "two.yaml"), signal=signal.SIGKILL, step=3, rank=1)
    assert cut.returncode != 0
    assert time.monotonic() - begun < 300
    train(config(1), data=data, resume=True)
    assert farthest(adapters(whole.run_dir), adapters(tmp_path / "run")) < 1e-5


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_on_all_ranks(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    stages = [{**STAGES["pcm"], "steps": 100_000, "batch": 2}]
    config = small_config(stages=stages, log_every=1, engine={"shard": 2, "timeout_s": 60})
    save_config(config, tmp_path / "two.yaml")
    run = torchrun(str(tmp_path / "two.yaml"), wait=False)
    log = config.run_dir / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0
    assert errors.count("continue with --resume") == 1
    newest = latest_checkpoint(config.run_dir)
    assert newest is not None
    assert load_checkpoint(newest).step > 2


@pytest.mark.slow
def test_bad_input_ends_all_ranks_with_one_message(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    save_config(small_config(), tmp_path / "two.yaml")
    run = torchrun(str(tmp_path / "two.yaml"))
    assert run.returncode != 0
    assert "already holds a run. Continue it with --resume" in run.errors
    assert "rank 1 stops because rank 0 did" in run.errors


@pytest.mark.slow
def test_hybrid_sharding_on_four_ranks(
    small_config: Callable[..., Config], data: Data, tmp_path: Path
) -> None:
    alone = make_config(small_config, "dmd2_gan", 1, run_dir=tmp_path / "alone")
    train(alone, data=data)
    config = make_config(small_config, "dmd2_gan", 4, engine={"shard": 2, "timeout_s": 60})
    save_config(config, tmp_path / "four.yaml")
    run = torchrun(str(tmp_path / "four.yaml"), ranks=4)
    assert run.returncode == 0, run.errors
    assert farthest(adapters(alone.run_dir), adapters(config.run_dir)) < 1e-5


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """The three stages on the embedded model with its own previews, sharded; as users start it."""
    words = ["log_every=1", "preview.every=100", "preview.teacher_steps=4", "stages.2.gan.ramp=2"]
    words += [f"stages.{i}.steps=2" for i in range(3)]

    def run(*launcher: str, batch: int, name: str) -> dict[str, torch.Tensor]:
        batches = [f"stages.{i}.batch={batch}" for i in range(3)]
        command = ["distill", "train", str(TINY_CPU), f"run_dir={tmp_path / name}"]
        subprocess.run(
            [sys.executable, "-m", *launcher, *command, *words, *batches, f"name={name}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        assert (tmp_path / name / "lora" / f"{name}.safetensors").is_file()
        return adapters(tmp_path / name)

    words.append("engine.shard=2")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    two = run(*launcher, batch=2, name="two")
    assert (tmp_path / "two" / "previews" / "step-000006.png").is_file()
    words[-1] = "engine.shard=1"
    assert farthest(two, run(batch=4, name="one")) < 1e-4  # PCM's lr is 1e-3 there
