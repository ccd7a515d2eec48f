"""Processes and devices. The only file that knows torch.distributed.

One process by default; under `torchrun` every rank holds the base and the gradients of the adapters
are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .draws import Draws


@dataclass(frozen=True)
class Engine:
    rank: int
    world: int
    device: torch.device

    @staticmethod
    def start() -> Engine:
        """Joins the process group that torchrun describes in the environment, if there is one."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        if dist.is_initialized():
            return Engine(dist.get_rank(), dist.get_world_size(), device)
        return Engine(0, 1, device)

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def draws(self, seed: int, step: int) -> Draws:
        return Draws(seed, step, self.rank, self.world)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks, in one flat message."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the ranks."""
        if self.world == 1:
            return values
        numbers = torch.tensor(list(values.values()), device=self.device, dtype=torch.float64)
        dist.all_reduce(numbers)
        return dict(zip(values, (numbers / self.world).tolist(), strict=True))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
