"""The dry run's figures of Qwen-Image-2512's presets beside a second method: a real step of every
stage on meta tensors, at full width, its FLOP by PyTorch's counter and its memory by the storages
that live.

What no meta tensor shows: workspaces of kernels (convolutions, attention's backward pass), CUDA's
context, fragmentation, FSDP's gathered blocks, Adam in 8 bits, whose step is compiled.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.dry_run.__main__ import Found, compare, rows
from distill.config import load_config
from distill.training.estimate.memory import memory_bytes
from distill.training.estimate.shape import model_shape

CONFIGS = Path(__file__).parent.parent.parent / "configs"
# The others are the same steps again
STAGES = [
    *[("2step", stage) for stage in (0, 1, 2)],
    *[("2step_24gb", stage) for stage in (0, 2)],  # fp8, modulation in main memory
    *[("2step_8gpu", stage) for stage in (0, 2)],  # two samples at a time, 8 ranks
    ("4step", 1),  # four sampler steps
]
SMALL = 0.002  # share of the whole below which an item may differ


def assert_near(found: Found, whole: float) -> None:
    wrong = [
        row
        for row, (estimated, counted) in zip(rows(found, 1), found.values(), strict=True)
        if abs(estimated - counted) > max(0.1 * counted, SMALL * whole)
    ]
    assert not wrong


def test_every_gpu_preset_of_that_base_is_counted() -> None:
    names = {path.stem for path in CONFIGS.glob("qwen_image_2512_*.yaml")}
    assert names == {f"qwen_image_2512_{name}" for name, _ in STAGES}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_the_dry_run_is_what_a_step_does(name: str, stage: int) -> None:
    """Every item of FLOP and of memory within 10 %, the sum of every moment within 3 %."""
    config = load_config(CONFIGS / f"qwen_image_2512_{name}.yaml")
    flop, memory = compare(config, stage)
    assert_near(flop, sum(estimated for estimated, _ in flop.values()))
    assert_near(memory, sum(memory_bytes(config, model_shape(config))[1].values()))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for key, pair in memory.items():
        moment = key.rpartition(", ")[0]
        sums[moment] = [a + b for a, b in zip(sums[moment], pair, strict=True)]
    for moment, (estimated, counted) in sums.items():
        if not moment.startswith("discriminator"):
            assert estimated == pytest.approx(counted, rel=0.03), moment


def test_the_count_sees_what_lives_at_a_time() -> None:
    """And not what was freed before."""
    import torch

    from benchmarks.live import META, Live

    with Live() as live:
        x = torch.empty(1000, dtype=torch.uint8, device=META)
        y = x + 1
        assert (live.now, live.peak) == (2000, 2000)
        view = y[:10]
        del y
        assert live.now == 2000
        del view
        x.add_(1)
        assert (live.now, live.peak) == (1000, 2000)
