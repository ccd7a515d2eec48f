"""Processes and devices. The only file that knows torch.distributed.

One process by default. Under torchrun the ranks share the batch; each holds the base, or
`engine.shard` of them hold one copy together: FSDP2, and HSDP where there are several such groups.
LoRA weights are whole and equal on every rank; their gradients are averaged.

    torchrun --nproc-per-node 8 -m distill train CONFIG engine.shard=8
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..config import ConfigError, EngineSection
from ..utils.launch import Launch
from ..utils.rng import Rng

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # over which the base is sharded; None = every rank holds it
    owner: bool = False  # of the process group: leaves it in `stop`

    @staticmethod
    def start(section: EngineSection | None = None) -> Engine:
        """Joins the process group that torchrun describes in the environment, if there is one.

        Raises ConfigError where the number of processes does not fit `section`.
        """
        section = section or EngineSection()
        launch = Launch.of_this_process()
        world_size = dist.get_world_size() if dist.is_initialized() else launch.world_size
        check_world(section, world_size)
        device = local_device()
        owner = launch.started and not dist.is_initialized()
        if owner:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=section.timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        if not dist.is_initialized():
            return Engine(0, 1, device)
        mesh = sharding_mesh(section.shard, world_size, device)
        return Engine(dist.get_rank(), world_size, device, mesh, owner)

    def stop(self) -> None:
        if self.owner:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Every forward pass of the base is then a collective: all ranks run it or none."""
        return self.mesh is not None

    def rng(self, seed: int, step: int) -> Rng:
        return Rng(seed, step, self.rank, self.world_size)

    def shard(
        self,
        model: torch.nn.Module,
        blocks: Iterable[torch.nn.Module],
        whole: Iterable[torch.nn.Parameter],
    ) -> None:
        """Moves a model to this rank's device. Where the engine shards, a rank keeps its part of
        every block, and of the rest, and gathers one block at a time; `whole` stays undivided.
        """
        if self.mesh is None:
            model.to(self.device)
            return
        whole = set(whole)
        for parameter in whole:  # FSDP leaves ignored parameters where they are
            parameter.data = parameter.data.to(self.device)
        for block in blocks:
            fully_shard(block, mesh=self.mesh, ignored_params=whole)
        fully_shard(model, mesh=self.mesh, ignored_params=whole)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the ranks, in one flat message. One non-finite
        value on one rank is then seen by all of them.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world_size
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the ranks."""
        return {key: value / self.world_size for key, value in self.sum(values).items()}

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over the ranks; all of them name the same keys in the same order."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce({"": value}, dist.ReduceOp.MAX)[""]

    def _reduce(self, values: dict[str, float], how: dist.ReduceOp) -> dict[str, float]:
        if self.world_size == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), device=self.device, dtype=torch.float64)
        dist.all_reduce(numbers, how)
        return dict(zip(values, numbers.tolist(), strict=True))

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on the main rank and hands its result to all; where it raises, all raise."""
        if self.world_size == 1:
            return work()
        result: list[object] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                result[0] = work()
            except Exception as raised:  # told to the other ranks, then raised again
                error, result[1] = raised, f"{type(raised).__name__}: {raised}"
        dist.broadcast_object_list(result)
        if error is not None:
            raise error
        if result[1] is not None:
            raise RuntimeError(f"rank {self.rank} stops because rank 0 did: {result[1]}")
        return result[0]  # type: ignore[return-value]

    def on_all(self, work: Callable[[], T]) -> list[T]:
        """Runs `work` on every rank and hands all results to all; where one raises, all raise.

        The other ranks' error is an OSError: what they share is the disk.
        """
        if self.world_size == 1:
            return [work()]
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:  # told to the other ranks, then raised again
            error = raised
        told = None if error is None else f"{type(error).__name__} on rank {self.rank}: {error}"
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, (result, told))
        if error is not None:
            raise error
        if failed := next((text for _, text in outcomes if text), None):
            raise OSError(failed)
        return [outcome for outcome, _ in outcomes]

    def shared_out(self, work: Sequence[Callable[[], T]]) -> list[T] | None:
        """Has every rank do its share of `work`; the main rank gets all results in their order, the
        others None. Where the base is sharded, all ranks run the same number of them, and what is
        done for company is dropped: a forward pass of one needs all.
        """
        rounds = -(-len(work) // self.world_size)
        turns = [self.rank + i * self.world_size for i in range(rounds)]
        mine = [work[turn % len(work)]() for turn in turns if self.sharded or turn < len(work)]
        if self.world_size == 1:
            return mine
        parts: list[list[T]] | None = [[] for _ in range(self.world_size)] if self.is_main else None
        dist.gather_object(mine, parts)
        if parts is None:
            return None
        return [parts[i % self.world_size][i // self.world_size] for i in range(len(work))]

    def peak_memory_gib(self) -> float:
        """The most that this process has held: on the GPU, else in main memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        try:
            import resource
        except ImportError:  # Windows
            return 0.0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_world(section: EngineSection, world_size: int) -> None:
    """Raises ConfigError."""
    start = "Start with torchrun --nproc-per-node {} -m distill train CONFIG."
    if section.world not in (None, world_size):
        raise ConfigError(
            f"engine.world: expected {section.world} processes, found {world_size}. "
            f"{start.format(section.world)} Or set engine.world=null and each stage's batch so "
            "that batch x processes stays what it was."
        )
    if world_size % section.shard:
        raise ConfigError(
            f"engine.shard: {world_size} process{'es' * (world_size > 1)} cannot be divided into "
            f"groups of {section.shard}. {start.format(section.shard)}"
        )


def local_device() -> torch.device:
    """One GPU per process of this machine, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = Launch.of_this_process().local_rank, torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"process {local} of this machine finds {count} GPUs; one process per GPU is expected: "
            f"torchrun --nproc-per-node {count}."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def sharding_mesh(shard: int, world_size: int, device: torch.device) -> DeviceMesh | None:
    """[shard] for FSDP, [replicate, shard] for HSDP."""
    if shard == 1:
        return None
    if shard == world_size:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard")
    )
