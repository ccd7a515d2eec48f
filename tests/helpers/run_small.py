"""`turbo-distill train ...` on random data, for tests that need processes of their own.

    python run_small.py CONFIG [key=value ...] [--resume] [-- CONFIG ...]

Several runs, with -- between them, share their processes.
Prints how many of the base's numbers a rank holds.

The environment variable RUN_SMALL holds JSON that says what goes wrong while step "step" is drawn,
on "rank" alone or on all: {"signal": 9} sends this process a signal, {"file_limit": N} lets no file
grow beyond N bytes, as on a full disk, {"nan": 1} spoils the data. With "once" it goes well after a
restart by torchrun.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from itertools import groupby
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from toy_training import RandomData

from distill import cli, trainer
from distill.data.batch import Batch
from distill.training.engine import Engine
from distill.utils.rng import Rng


class TroubledData(RandomData):
    def batch(self, rng: Rng, batch_size: int) -> Batch:
        batch = super().batch(rng, batch_size)
        trouble = json.loads(os.environ.get("RUN_SMALL", "{}"))
        if "once" in trouble and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            return batch
        if rng.step == trouble.get("step") and rng.rank == trouble.get("rank", rng.rank):
            if "signal" in trouble:
                os.kill(os.getpid(), trouble["signal"])
            if "file_limit" in trouble:
                limits = (trouble["file_limit"], resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if "nan" in trouble:
                return Batch(batch.x0 * math.nan, batch.text)
        return batch


def shard(engine: Engine, model: torch.nn.Module, *rest: Any) -> None:
    SHARD(engine, model, *rest)
    base = [p for name, p in model.named_parameters() if ".lora_" not in name]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in base]
    here, whole = (sum(p.numel() for p in held) for held in (local, base))
    sys.stdout.write(f"rank {engine.rank} holds {here} of {whole}\n")


SHARD = Engine.shard


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)

    def load_data(config: Any) -> RandomData:
        return TroubledData()

    trainer.load_data, Engine.shard = load_data, shard
    runs = [list(words) for dashes, words in groupby(argv, "--".__eq__) if not dashes]
    group = Engine.start() if len(runs) > 1 else None  # else every run makes its own
    codes = [cli.main(["train", *run]) for run in runs]
    if group:
        group.stop()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
