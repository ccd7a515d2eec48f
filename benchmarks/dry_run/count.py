"""A real step of a recipe's stage on meta tensors: its operations and what is in memory.

Nothing is stood in for but weights: the methods, roles, optimisers and the engine are those of
training, the base has its full width and few blocks, which the caller extrapolates. Random draws of
a sampler step are chosen, so that their mean is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.live import META, Answers, Live, aten, fused_attention, tensors_in
from distill.config import Config
from distill.data.batch import Batch
from distill.methods import Method, build_method
from distill.models.family import Family, family_of, spec_of
from distill.models.quantise import HostModule, keep_modulation_on_host, quantise
from distill.models.roles import Roles
from distill.models.text import Text
from distill.stages import AnyStage
from distill.trainer import adapters_of
from distill.training.checkpoint import take_checkpoint
from distill.training.engine import Engine
from distill.training.estimate.shape import rank_of
from distill.training.optim import Optimizer
from distill.utils.rng import Rng

ELSEWHERE = "other networks"  # VAE, DINO, heads


class Flops(FlopCounterMode):
    """FLOP by role and kind; matrix products with a side of the role's rank are low-rank."""

    def __init__(self, ranks: dict[str, int]) -> None:
        super().__init__(display=False)
        self.flop_registry[aten.addmm_] = flop_registry[aten.addmm]  # theirs leave it out
        self.role, self.ranks = ELSEWHERE, ranks
        self.found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if func_packet in self.flop_registry:
            count = self.flop_registry[func_packet](*args, **kwargs, out_val=out)
            self.found[self.role][self._kind(args)] += count
        return out

    def _kind(self, args: Any) -> str:
        factors = [x for x in tensors_in(args) if x.ndim == 2]
        rank = self.ranks.get(self.role)
        low = len(factors) >= 2 and any(rank in x.shape for x in factors[-2:])
        return "low-rank" if low else str(tensors_in(args)[0].dtype).removeprefix("torch.")


@dataclass
class Rig:
    """A stage, ready to step."""

    config: Config
    stage: AnyStage
    roles: Roles
    method: Method
    live: Live

    def step(self, stage: AnyStage, sampler_step: int) -> None:
        """One real step of `stage`, whose random sampler steps are all `sampler_step`."""
        self.method.stage = stage  # type: ignore[attr-defined]
        family, samples = self.roles.family, stage.samples
        size = (self.config.data.resolution,) * 2  # type: ignore[union-attr]
        text = _text(samples, family, self.roles.transformer, self.roles.dtype)
        x0 = _empty((samples, *self.roles.latent_shape(size)), torch.float32)
        with _chosen(sampler_step):
            self.method.step(Batch(x0, text), Rng(0, 0))

    def held(self) -> dict[str, float]:
        """Bytes between steps by what they are; `host`: of the modulation in main memory."""
        named = dict(self.roles.transformer.named_parameters())
        base = {n: _bytes(p) for n, p in named.items() if ".lora_" not in n}
        offloaded = self.config.model.offload_modulation
        host = sum(size for n, size in base.items() if offloaded and "_mod." in n)
        optimizers = self.method.optimizers.values()
        own = [p for o in optimizers if o.own for p in o.parameters]
        gan = getattr(self.method, "gan", None)
        networks: list[torch.Tensor] = list(gan.vae.parameters()) if gan and gan.vae else []
        networks += [p for m in self.backbones for p in m.parameters()]
        return {
            "frozen base": sum(base.values()) - host,
            "host": host,
            **{
                f"LoRA {r}": sum(map(_bytes, self.roles.parameters(r))) for r in self.roles.adapters
            },
            "Adam's moments": sum(map(_bytes, moments_of(optimizers))),
            "moving average": sum(_bytes(w) for o in optimizers for w in o.ema.weights),
            "GAN's networks": sum(map(_bytes, own + networks)),
        }

    backbones: list[torch.nn.Module] = field(default_factory=list)

    def checkpoint(self) -> float:
        """Bytes of the tensors that a checkpoint would hold."""
        saved = take_checkpoint(0, 0, 0, self.roles, self.method)
        return sum(map(_bytes, tensors_in(vars(saved))))


def moments_of(optimizers: Iterable[Optimizer]) -> list[torch.Tensor]:
    states = [state for o in optimizers for state in o.adam.state.values()]
    return [tensor for tensor in tensors_in(states) if tensor.is_meta]


class Moments:
    """What comes on top of `between`, by moment of a step and by item, as in memory.in_step."""

    def __init__(self, rig: Rig) -> None:
        self.live, self.between = rig.live, rig.live.now
        self.found: dict[str, dict[str, float]] = {}
        for role, optimizer in rig.method.optimizers.items():
            for part in ("backward", "update"):
                setattr(optimizer, part, self._watched(role, optimizer, part))
        self.live.peak = self.live.now

    def _watched(self, role: str, optimizer: Optimizer, part: str) -> Callable[..., Any]:
        function = getattr(optimizer, part)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            gradients = sum(_bytes(p.grad) for p in optimizer.parameters if p.grad is not None)
            kept = self.live.now - self.between - gradients
            if part == "update":
                self.live.peak = self.live.now
            result = function(*args, **kwargs)
            extra = self.live.peak - self.between - gradients
            found = {"gradients": gradients, "copy of gradients": extra}
            if part == "backward":
                found = {
                    "gradients": gradients,
                    "kept by blocks": kept,
                    "block at work": extra - kept,
                }
            self.found[f"{role}: {part}"] = found  # the last micro-batch's
            self.live.peak = self.live.now
            return result

        return run


def _bytes(tensor: torch.Tensor) -> int:
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in inner()[0])


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _text(rows: int, family: Family, transformer: Any, dtype: torch.dtype) -> Text:
    return Text(_empty((rows, family.text_tokens, family.text_width(transformer)), dtype))


@contextmanager
def _chosen(sampler_step: int) -> Iterator[None]:
    """Draws of a sampler step give `sampler_step`, whatever the seed."""
    plain = torch.randint

    def randint(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn = plain(*args, **kwargs)
        return torch.full_like(drawn, sampler_step) if args[2:] == ((),) else drawn

    with patch.object(torch, "randint", randint):
        yield


@contextmanager
def rig(config: Config, index: int, blocks: int) -> Iterator[Rig]:
    """Stage `index` of a recipe on a base of `blocks` blocks; memory counts while it is open."""
    family, stage = family_of(config.model.path), config.stages[index]
    dtype, live, world = getattr(torch, config.model.dtype), Live(), config.engine.world or 1
    backbones: list[torch.nn.Module] = []

    def load_dino(path: str, dtype: torch.dtype) -> torch.nn.Module:
        backbones.append(dino_of(path, dtype))
        return backbones[-1]

    with ExitStack() as stack:
        for context in (fused_attention(), process_group(world), Answers(), live):
            stack.enter_context(context)
        stack.enter_context(patch("distill.methods.load_vae", lambda _, kind: vae_of(family, kind)))
        stack.enter_context(patch("distill.methods.discriminator.load_dino", load_dino))
        transformer = base_of(config, family, blocks, dtype)
        negative = _text(1, family, transformer, dtype)
        adapters = adapters_of(config.stages)
        with META:
            roles = Roles(transformer, config.adapter, config.guidance, negative, 0, adapters)
        engine = Engine(0, world, META)
        method = build_method(stage, roles, spec_of(config), engine, config.model.path)
        for optimizer in method.optimizers.values():
            for group in optimizer.adam.param_groups:
                group["foreach"] = True  # as torch does it on a GPU
        yield Rig(config, stage, roles, method, live, backbones)


@contextmanager
def process_group(world: int) -> Iterator[None]:
    """Of `world` ranks of which this is the only one; its messages go nowhere."""
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def base_of(config: Config, family: Family, blocks: int, dtype: torch.dtype) -> Any:
    """The published transformer with `blocks` blocks, treated as `load_transformer` would."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with META:
            transformer = resolve_name(family.transformer)(num_layers=blocks)
    finally:
        torch.set_default_dtype(before)
    quantise(family, transformer, config.model.quantize, config.model.offload_modulation)
    if config.model.offload_modulation:
        keep_modulation_on_host(family, transformer)
        for module in transformer.modules():
            if isinstance(module, HostModule):
                module.module.to_empty(device="cpu")
    if config.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


def vae_of(family: Family, dtype: torch.dtype) -> Any:
    with META:
        vae = resolve_name(family.vae.kind)()
    return family.vae.prepare(vae.to(dtype).eval().requires_grad_(False))


def dino_of(path: str, dtype: torch.dtype) -> Any:
    """DINOv2 with registers, of base size whatever `path` says."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    with META:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig())
    return model.to(dtype).eval().requires_grad_(False)


@contextmanager
def roles_followed(roles: Roles, flops: Flops) -> Iterator[None]:
    """Tells `flops` which role is at work."""
    plain = roles.use_role

    @contextmanager
    def use_role(role: str) -> Iterator[Any]:
        before, flops.role = flops.role, role
        try:
            with plain(role) as transformer:
                yield transformer
        finally:
            flops.role = before

    with patch.object(roles, "use_role", use_role):
        yield


# ---------------------------------------------------------------------------------- what is counted


def memory_of(config: Config, index: int, blocks: int) -> dict[str, dict[str, float]]:
    """Bytes of a stage between its steps and on top of that by moment; two micro-batches where it
    has more than one, two updates of the fake score.
    """
    stage = config.stages[index]
    update = {"accumulate": min(2, stage.accumulate)}
    if stage.method == "dmd2":
        update |= {"fake_updates": min(2, stage.fake_updates), "fake_warmup": 0}
    small = stage.model_copy(update=update)
    last = spec_of(config).steps - 1
    with rig(config, index, blocks) as ready:
        ready.step(small, last)  # makes the optimisers' states
        held = ready.held() | {"checkpoint": ready.checkpoint()}
        moments = Moments(ready)
        ready.step(small, last)
    return {"between steps": held, **moments.found}


def flop_of(config: Config, index: int, blocks: int) -> dict[str, dict[str, float]]:
    """FLOP of a stage's step by role and kind, per sample: the mean over the sampler steps that are
    drawn, and over the stage's numbers of updates of the fake score, in which it is linear.
    """
    stage, spec = config.stages[index], spec_of(config)
    alone = stage.model_copy(update={"accumulate": 1, "fake_warmup": 0})
    if stage.method != "dmd2":
        return _mean_flop(config, index, blocks, alone, [0])
    drawn = [spec.steps - 1] if stage.gradient_step == "last" else list(range(spec.steps))
    few, more = (
        _mean_flop(config, index, blocks, alone.model_copy(update={"fake_updates": n}), drawn)
        for n in (1, 2)
    )
    warm = min(stage.fake_warmup, stage.steps) / stage.steps
    updates = warm * stage.fake_warmup_updates + (1 - warm) * stage.fake_updates
    return combined(few, more, updates - 1)


def _mean_flop(
    config: Config, index: int, blocks: int, stage: AnyStage, sampler_steps: Sequence[int]
) -> dict[str, dict[str, float]]:
    flops = Flops({role: rank_of(config, role) for role in adapters_of(config.stages)})
    with rig(config, index, blocks) as ready, roles_followed(ready.roles, flops), flops:
        for sampler_step in sampler_steps:
            ready.step(stage, sampler_step)
    count = len(sampler_steps) * stage.samples
    return {
        role: {kind: found / count for kind, found in kinds.items()}
        for role, kinds in flops.found.items()
    }


def combined(
    a: dict[str, dict[str, float]], b: dict[str, dict[str, float]], steps: float
) -> dict[str, dict[str, float]]:
    """a + steps (b - a), number by number."""
    return {
        name: {key: value + steps * (b[name].get(key, 0.0) - value) for key, value in items.items()}
        for name, items in a.items()
    }


def whole(
    count: Callable[[Config, int, int], dict[str, dict[str, float]]],
    config: Config,
    index: int,
    blocks: tuple[int, int],
    all_blocks: int,
) -> dict[str, dict[str, float]]:
    """What `count` gives for the whole base: it is linear in the number of blocks."""
    few, more = (count(config, index, n) for n in blocks)
    return combined(few, more, (all_blocks - blocks[0]) / (blocks[1] - blocks[0]))
