"""A quantised or partly offloaded base: the same network as one with rounded weights, in the bytes
that the plan says, and frozen like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft.tuners.lora import LoraLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distill import trainer
from distill.config import AdapterSection, Config, ConfigError, GuidanceSection
from distill.contract.metadata import read_lora
from distill.contract.spec import TurboSpec
from distill.data.batch import Batch, Data
from distill.data.teacher import Teacher
from distill.lora.student import load_student
from distill.methods import build_method
from distill.models import quantise, qwen_image
from distill.models.load import load_transformer
from distill.models.quantise import HostModule
from distill.models.roles import FAKE, STUDENT, TEACHER, Roles
from distill.models.text import Text
from distill.stages import DMD2Stage, PCMStage
from distill.trainer import train
from distill.training.engine import Engine
from distill.training.estimate.shape import base_bytes, host_bytes, model_shape
from distill.utils.rng import Rng

KINDS = ("fp8", "int8")
PCM = {"method": "pcm", "steps": 3, "batch": 2, "lr": 1e-3, "points": 4}
DMD2 = {
    "method": "dmd2",
    "steps": 2,
    "batch": 2,
    "lr": 1e-3,
    "fake_lr": 1e-3,
    "fake_updates": 2,
    "fake_warmup": 0,
}


@pytest.fixture
def load(small_model: Path) -> Callable[..., QwenImageTransformer2DModel]:
    def load(*args: Any, dtype: torch.dtype = torch.float32) -> QwenImageTransformer2DModel:
        return load_transformer(str(small_model), dtype, *args).eval()

    return load


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, Text]:
    rng = Rng(0, 0)
    text = Text(rng.normal("text", (2, 3, 24)))
    return rng.normal("x", (2, 16, 4, 4)), torch.tensor([0.3, 0.8]), text


def plain(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter consists of."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def quantised_names(transformer: QwenImageTransformer2DModel) -> set[str]:
    return {n for n, p in transformer.named_parameters() if is_traceable_wrapper_subclass(p.data)}


def roles_of(transformer: QwenImageTransformer2DModel) -> Roles:
    negative = Text(torch.zeros(1, 2, 24))
    return Roles(
        transformer, AdapterSection(rank=4), GuidanceSection(), negative, 0, (STUDENT, FAKE)
    )


def moved_from_zero(roles: Roles) -> Roles:
    """With a student that is not its teacher."""
    for i, parameter in enumerate(roles.parameters(STUDENT)):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data.copy_(0.1 * noise)
    return roles


def student_gradients(roles: Roles, inputs: tuple) -> list[torch.Tensor]:
    """Velocity, and the gradients at x_t and at the student's weights."""
    x_t, t, text = inputs
    x_t = x_t.clone().requires_grad_()
    with roles.use_role(STUDENT):
        v = qwen_image.velocity(roles.transformer, x_t, t, text)
        leaves = [x_t, *roles.parameters(STUDENT)]
        gradients = torch.autograd.grad(v.square().sum(), leaves, allow_unused=True)
    return [v.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


# Quantisation


@pytest.mark.parametrize(("kind", "low", "high"), [("fp8", 1e-3, 5e-3), ("int8", 1e-4, 1e-3)])
@torch.no_grad()
def test_velocities_stay_close(
    kind: str, low: float, high: float, load: Callable, inputs: tuple
) -> None:
    """Measured: 0.28 % and 0.04 % of the velocity's norm, whose blocks are near identity."""
    exact, rounded = (qwen_image.velocity(load(k), *inputs) for k in ("none", kind))
    assert low < ((rounded - exact).norm() / exact.norm()).item() < high


@pytest.mark.parametrize(("kind", "small", "bound"), [("fp8", 1e-5, 0.04), ("int8", 1e-3, 0.01)])
def test_every_row_has_its_scale(
    kind: str, small: float, bound: float, new_transformer: Callable, tmp_path: Path
) -> None:
    """A row that is far smaller than the others is as exact as they are."""
    transformer = new_transformer()
    exact = transformer.transformer_blocks[0].attn.to_q.weight.detach()
    exact[3] *= small
    transformer.save_pretrained(tmp_path / "transformer")
    rounded = load_transformer(str(tmp_path), torch.float32, kind).transformer_blocks[0].attn.to_q
    error = (rounded.weight.dequantize() - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0 < error.max().item() < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", [False, True])
def test_only_the_blocks_linear_layers_are_quantised(
    kind: str, offload: bool, load: Callable
) -> None:
    transformer, exact = load(kind, offload), dict(load().named_parameters())
    expected = {
        f"{name}.weight"
        for name, layer in load().named_modules()
        if isinstance(layer, torch.nn.Linear)
        and name.startswith("transformer_blocks.")
        and not (offload and "_mod." in name)
    }
    assert quantised_names(transformer) == expected
    assert len(expected) == 2 * (12 if offload else 14)
    for name, parameter in transformer.named_parameters():
        if name not in expected:
            assert torch.equal(parameter, exact[name.replace(".module.", ".")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("offload", [False, True])
def test_a_quantised_weight_takes_a_byte(
    kind: str, offload: bool, dtype: str, load: Callable, small_config: Callable[..., Config]
) -> None:
    """What is held is what --dry-run says, on the device and in main memory."""
    transformer = load(kind, offload, dtype=getattr(torch, dtype))
    held = {True: 0, False: 0}
    for name, parameter in transformer.named_parameters():
        held[offload and "_mod." in name] += sum(part.nbytes for part in plain(parameter.data))
    weights = [p for n, p in transformer.named_parameters() if n in quantised_names(transformer)]
    for weight in weights:
        rows, columns = weight.shape
        assert rows * columns <= sum(p.nbytes for p in plain(weight.data)) <= rows * (columns + 5)
    model = {"path": str(small_config().model.path), "dtype": dtype, "quantize": kind}
    config = small_config(model={**model, "offload_modulation": offload})
    shape = model_shape(config)
    assert held[False] == base_bytes(config, shape)
    assert held[True] == host_bytes(config, shape)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_network_with_rounded_weights(
    kind: str, checkpointing: bool, load: Callable, inputs: tuple
) -> None:
    """Velocity and gradients, beside a plain model that is given the rounded weights."""
    quantised, rounded = load(kind), load()
    weights = {
        name: p.dequantize() if is_traceable_wrapper_subclass(p.data) else p
        for name, p in quantised.named_parameters()
    }
    rounded.load_state_dict(weights)
    if checkpointing:
        quantised.enable_gradient_checkpointing()
    a, b = (student_gradients(moved_from_zero(roles_of(m)), inputs) for m in (quantised, rounded))
    assert sum(g.abs().sum() > 0 for g in a) > 40  # the last block's text side has no effect
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_a_bfloat16_base_are_float32(kind: str, load: Callable) -> None:
    roles = roles_of(load(kind, dtype=torch.bfloat16))
    assert roles.dtype == torch.bfloat16
    assert {p.dtype for role in roles.adapters for p in roles.parameters(role)} == {torch.float32}
    assert all(p.requires_grad for p in roles.parameters(STUDENT))
    assert sum(isinstance(m, LoraLayer) for m in roles.transformer.modules()) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_teacher_bit_identical(
    kind: str, load: Callable, inputs: tuple, data: Data
) -> None:
    transformer = load(kind, True, dtype=torch.bfloat16)
    transformer.enable_gradient_checkpointing()
    roles, engine = roles_of(transformer), Engine(0, 1, torch.device("cpu"))

    def frozen() -> list[torch.Tensor]:
        named = roles.transformer.named_parameters()
        return [part.clone() for n, p in named if ".lora_" not in n for part in plain(p.data)]

    weights, velocity = frozen(), roles.teacher(*inputs)
    spec = TurboSpec((1.0, 0.7155, 0.0))
    for stage in (PCMStage(**PCM), DMD2Stage(**DMD2)):
        before = [p.detach().clone() for p in roles.parameters(STUDENT)]
        batch: Batch = data.batch(Rng(0, 0), 2)
        build_method(stage, roles, spec, engine).step(batch, Rng(0, 0))
        moved = zip(before, roles.parameters(STUDENT), strict=True)
        assert sum(not torch.equal(a, b) for a, b in moved) >= 20  # lora_B first
    assert all(torch.equal(a, b) for a, b in zip(weights, frozen(), strict=True))
    assert torch.equal(roles.teacher(*inputs), velocity)
    with torch.no_grad():
        assert not torch.equal(roles.velocity(STUDENT, *inputs), roles.velocity(TEACHER, *inputs))


# Modulation in main memory


@pytest.mark.parametrize("kind", ["none", "fp8"])
def test_offloading_changes_no_number(kind: str, load: Callable, inputs: tuple) -> None:
    """With checkpointing, whose second forward goes through the wrapper again."""
    whole, offloaded = load("none"), load("none", True)
    if kind != "none":  # modulation stays as it is: quantise the rest of both
        offloaded = load(kind, True)
        whole = load(kind)
        for a, b in zip(whole.transformer_blocks, offloaded.transformer_blocks, strict=True):
            a.img_mod, a.txt_mod = b.img_mod.module, b.txt_mod.module
    for model in (whole, offloaded):
        model.enable_gradient_checkpointing()
    assert sum(isinstance(m, HostModule) for m in offloaded.modules()) == 4
    a, b = (student_gradients(moved_from_zero(roles_of(m)), inputs) for m in (whole, offloaded))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_modulation_stays_where_it_is_and_the_rest_goes(load: Callable) -> None:
    """On a CUDA device that only PyTorch's fake tensors see: no memory and no kernel, but an
    operation across devices is an error.
    """
    roles = roles_of(load("none", True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda", 0)
        Engine(0, 1, device).shard(roles.transformer, (), ())
        for name, parameter in roles.transformer.named_parameters():
            assert parameter.device.type == ("cpu" if "_mod." in name else "cuda")
        x_t, t = torch.empty(2, 16, 4, 4, device=device), torch.empty(2, device=device)
        text = Text(torch.empty(2, 3, 24, device=device))
        assert roles.velocity(STUDENT, x_t, t, text).device == device


def test_modulation_is_computed_once_per_time(
    load: Callable, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an update with two updates of the fake score, checkpointed: eight forwards, of which three
    run again for their backward. Only four have a time that is not one of the schedule's. A vector
    per forward is sent, and computed with for each new time; by itself every layer would do both
    eleven times.
    """
    transformer = load("none", True)
    transformer.enable_gradient_checkpointing()
    roles = roles_of(transformer)
    stage = DMD2Stage(**DMD2, gradient_step="last")
    spec, engine = TurboSpec((1.0, 0.7155, 0.0)), Engine(0, 1, torch.device("cpu"))
    method = build_method(stage, roles, spec, engine)
    method.step(data.batch(Rng(0, 0), 2), Rng(0, 0))

    calls = {"forward": 0, "block": 0, "computed": 0, "sent": 0}

    def count(what: str) -> Callable[..., None]:
        return lambda *args: calls.update({what: calls[what] + 1})

    def sent(*args: Any, original: Callable = quantise.HostInput) -> quantise.HostInput:
        count("sent")()
        return original(*args)

    monkeypatch.setattr(quantise, "HostInput", sent)
    transformer.register_forward_pre_hook(count("forward"))
    transformer.transformer_blocks[0].register_forward_pre_hook(count("block"))
    hosts = [m for m in transformer.modules() if isinstance(m, HostModule)]
    hosts[0].module.register_forward_pre_hook(count("computed"))
    method.step(data.batch(Rng(0, 1), 2), Rng(0, 1))
    assert calls == {"forward": 8, "block": 11, "computed": 4, "sent": 8}

    (inputs,) = {host.inputs for host in hosts}
    assert len(inputs._alive) == 0  # nothing outlives its forward and backward
    assert len(inputs._latest) == quantise.KEPT_INPUTS


def test_quantised_weights_move_whole(load: Callable) -> None:
    transformer = load("fp8", True).to("meta")
    weight = transformer.transformer_blocks[0].attn.to_q.weight
    assert {part.device.type for part in plain(weight.data)} == {"meta"}
    assert transformer.transformer_blocks[0].img_mod.module[1].weight.device.type == "cpu"


# Runs


class Crash(BaseException):
    """Like a power cut."""


class CrashingData:
    def __init__(self, good: Data, step: int) -> None:
        self.good, self.step, self.negative = good, step, good.negative

    def batch(self, rng: Rng, batch_size: int) -> Batch:
        if rng.step == self.step:
            raise Crash
        return self.good.batch(rng, batch_size)


@pytest.fixture
def real_recipe(small_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """As configs/qwen_image_2512_2step_24gb.yaml has it, on the small model."""

    def make(run: str, kind: str) -> Config:
        model = {
            "path": small_config().model.path,
            "dtype": "bfloat16",
            "quantize": kind,
            "offload_modulation": True,
        }
        return small_config(run_dir=tmp_path / run, model=model, stages=[PCM, DMD2], save_every=2)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed_exactly_and_its_lora_loads(
    kind: str,
    real_recipe: Callable[..., Config],
    data: Data,
    load: Callable,
    inputs: tuple,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bases = []

    def load_and_keep(*args: Any) -> QwenImageTransformer2DModel:
        bases.append(load_transformer(*args))
        return bases[-1]

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "load_transformer", load_and_keep)
        whole = train(real_recipe("whole", kind), data=data)
    assert len(quantised_names(bases[0])) == 24
    assert sum(isinstance(m, HostModule) for m in bases[0].modules()) == 4

    with pytest.raises(Crash):
        train(real_recipe("cut", kind), data=CrashingData(data, 3))
    cut = train(real_recipe("cut", kind), data=data, resume=True)
    (a, header), (b, _) = read_lora(whole), read_lora(cut)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)

    model = json.loads(header["turbo.config"])["model"]
    assert (model["quantize"], model["offload_modulation"]) == (kind, True)
    roles = roles_of(load())  # a base that is not quantised
    before = roles.velocity(STUDENT, *inputs)
    load_student(roles, whole)
    assert not torch.equal(roles.velocity(STUDENT, *inputs), before)


def test_prepare_draws_with_the_same_base(
    real_recipe: Callable[..., Config], small_model: Path
) -> None:
    config = real_recipe("prepare", "fp8")
    teacher = Teacher(config, small_model, 2, torch.zeros(2, 24), torch.device("cpu"))
    assert len(quantised_names(teacher.roles.transformer)) == 24
    assert teacher.draw(torch.zeros(3, 24), (32, 48), seed=0).isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": {"quantize": "fp8"}, "engine": {"shard": 2}}, r"engine\.shard: expected 1"),
        ({"model": {"offload_modulation": True}, "engine": {"shard": 2}}, r"engine\.shard"),
        (
            {"model": {"offload_modulation": True}, "adapter": {"modulation": True}},
            r"model\.offload_modulation: expected false where adapter\.modulation",
        ),
        ({"model": {"quantize": "fp4"}}, r"model\.quantize.*'none', 'fp8' or 'int8'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    keys: dict[str, Any], message: str, small_config: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**keys)
