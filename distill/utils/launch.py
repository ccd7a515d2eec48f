"""Which process this is, by the environment that torchrun sets; nothing is joined."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine
    started: bool = False  # by torchrun
    id: str = ""  # that processes of one launch have in common, also when it starts them again

    @staticmethod
    def of_this_process() -> Launch:
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # --rdzv-id
        started, known = "RANK" in os.environ, name != "none"
        return Launch(rank, world_size, local_rank, started, name if started and known else "")
