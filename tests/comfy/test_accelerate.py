"""Turbo Accelerate: kernels that are right are used everywhere, wrong ones never reach an image."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = 2  # of the toy model
OVERRIDE = "optimized_attention_override"
LATENT = {"samples": torch.zeros(2, 16, 8, 6)}


@pytest.fixture(scope="module")
def attention(pack: Any) -> Any:
    return pack("nodes.attention")


@pytest.fixture(scope="module")
def accelerate(pack: Any) -> Any:
    return pack("nodes.accelerate").accelerate


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The formula, in no library's words."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return scores.softmax(-1) @ v


@pytest.fixture
def kernel(attention: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Registers a kernel for float32 on the CPU: (run, name, **fields) -> calls by name."""
    calls: Counter[str] = Counter()

    def add(
        run: Callable[..., Tensor] = softmax_attention, name: str = "mine", **fields: Any
    ) -> Any:
        def counted(*arguments: Any) -> Tensor:
            calls[name] += 1
            return run(*arguments)

        usual = {"devices": ("cpu",), "dtypes": (torch.float32,), "masks": True, "rounding": 1e-5}
        made = attention.Kernel(name, counted, **{**usual, **fields})
        monkeypatch.setitem(attention.KERNELS, name, made)
        return calls

    return add


@pytest.fixture
def turbo(turbo_model: Callable[..., Any]) -> Any:
    """The toy model with a LoRA in its weights."""
    return turbo_model()


def override_of(model: Any) -> Any:
    return model.model_options["transformer_options"].get(OVERRIDE)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------- choosing

GPU = "cuda"
ABSENT = {"flash3": "FA3", "sage": "SageAttention: pip install sageattention"}


@pytest.mark.parametrize(
    ("wanted", "kind", "capability", "missing", "core", "expected"),
    [
        ("auto", GPU, (9, 0), ABSENT, "pytorch", "cudnn"),
        ("auto", GPU, (9, 0), {}, "pytorch", "cudnn"),  # flash3 is not worth losing masks
        ("auto", GPU, (9, 0), {"cudnn": "PyTorch 2.7"}, "pytorch", None),
        ("auto", GPU, (9, 0), {}, "sage", None),  # --use-sage-attention
        ("auto", GPU, (8, 0), {}, "pytorch", None),  # A100: cuDNN is 0.82x
        ("auto", GPU, (8, 9), {}, "pytorch", None),
        ("auto", GPU, (12, 0), {}, "pytorch", None),  # RTX PRO 6000: 0.88x
        ("auto", "rocm", (9, 4), {}, "pytorch", None),  # MI300 counts 9.4
        ("auto", "cpu", (0, 0), {}, "sub_quad", None),
        ("auto", "mps", (0, 0), {}, "pytorch", None),
        ("core", GPU, (9, 0), {}, "pytorch", None),
        ("cudnn", GPU, (8, 0), {}, "pytorch", "cudnn"),
        ("sage", GPU, (8, 9), {}, "pytorch", "sage"),
        ("flash", GPU, (12, 0), {}, "pytorch", "flash"),
        ("flash3", GPU, (9, 0), {}, "pytorch", "flash3"),
    ],
)
def test_choice(
    attention: Any,
    wanted: str,
    kind: str,
    capability: tuple[int, int],
    missing: dict[str, str],
    core: str,
    expected: str | None,
) -> None:
    device = attention.Device(kind, capability)
    assert attention.choose(wanted, device, missing, core).kernel == expected


@pytest.mark.parametrize(
    ("wanted", "kind", "capability", "missing", "message"),
    [
        ("sage", GPU, (9, 0), ABSENT, r"sage cannot run here.*pip install sageattention"),
        ("flash3", GPU, (12, 0), {}, r"flash3 needs .* 9\.x; found compute capability 12\.0"),
        ("cudnn", GPU, (7, 5), {}, r"cudnn needs .* 8\.0 or newer; found compute capability 7\.5"),
        ("cudnn", "cpu", (0, 0), {}, r"cudnn runs on cuda; this MODEL is on cpu"),
        ("sage", "rocm", (9, 4), {}, r"sage runs on cuda; this MODEL is on rocm"),
    ],
)
def test_a_kernel_that_cannot_run_says_what_to_do(
    attention: Any,
    wanted: str,
    kind: str,
    capability: tuple[int, int],
    missing: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        attention.choose(wanted, attention.Device(kind, capability), missing, "pytorch")
    assert "auto or core" in str(error.value)


def test_a_package_that_is_not_there(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = attention._needs("no_such_package", "Nothing: pip install nothing")()
    assert needed.startswith("Nothing: pip install nothing")
    assert attention._needs("torch", "torch")() is None


def test_on_the_cpu_everything_stays(accelerate: Any, model: Any) -> None:
    patched, report = accelerate(model)
    assert override_of(patched) is None
    assert patched.wrappers == model.wrappers
    assert report.to_text() == (
        "attention: core's own, sub_quad (on cpu nothing that needs no installing is known to be "
        "faster)\ncompile: off"
    )


# ------------------------------------------------------------------------------------ right kernels


def test_a_right_kernel_computes_every_block(
    accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any
) -> None:
    expected, _ = sample(turbo, prompt, LATENT, 3)
    calls = kernel()
    patched, report = accelerate(turbo, "mine")
    found, _ = sample(patched, prompt, LATENT, 3)
    assert calls["mine"] == BLOCKS * 2  # two steps
    close(found["samples"], expected["samples"])
    assert report.attention.startswith("mine (asked for)")
    assert override_of(turbo) is None  # the MODEL that came in is as it was


def test_the_guard_looks_once_per_layer_and_kind_of_input(
    accelerate: Any,
    attention: Any,
    kernel: Any,
    turbo: Any,
    sample: Any,
    prompt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = []
    fault_of = attention.fault_of

    def counted(*arguments: Any) -> str | None:
        looks.append(arguments)
        return fault_of(*arguments)

    monkeypatch.setattr(attention, "fault_of", counted)
    kernel()
    patched, _ = accelerate(turbo, "mine")
    sample(patched, prompt, LATENT, 3)
    assert len(looks) == BLOCKS  # the first of two steps
    longer = [[torch.cat([prompt[0][0]] * 2, 1)[:, :6], {}]]  # 6 tokens instead of 5: the same kind
    sample(patched, longer, LATENT, 4)
    assert len(looks) == BLOCKS
    sample(patched, prompt, {"samples": torch.zeros(2, 16, 32, 32)}, 4)
    assert len(looks) == 2 * BLOCKS


@pytest.mark.parametrize("order", ["accelerate first", "accelerate last"])
@pytest.mark.parametrize("mode", ["merge", "bypass"])
def test_order_of_nodes(
    order: str,
    mode: str,
    pack: Any,
    accelerate: Any,
    kernel: Any,
    model: Any,
    make_updates: Any,
    write_lora: Any,
    sample: Any,
    prompt: Any,
) -> None:
    path, apply_lora = write_lora(make_updates()), pack("nodes.apply_lora").apply_lora
    expected, _ = sample(apply_lora(model, path, mode=mode)[0], prompt, LATENT, 3)
    calls = kernel()
    if order == "accelerate first":
        patched, _ = apply_lora(accelerate(model, "mine")[0], path, mode=mode)
    else:
        patched, _ = accelerate(apply_lora(model, path, mode=mode)[0], "mine")
    found, warnings = sample(patched, prompt, LATENT, 3)
    assert calls["mine"] == BLOCKS * 2
    assert warnings == []
    close(found["samples"], expected["samples"])


def test_in_turbo_compare(pack: Any, accelerate: Any, kernel: Any, turbo: Any, prompt: Any) -> None:
    """Its meter counts the forwards of an accelerated MODEL like any other's."""
    compare = pack("nodes.compare")
    calls = kernel()
    contender = compare.turbo_contender(accelerate(turbo, "mine")[0], prompt, LATENT, 0)
    meter = compare.Meter(len(LATENT["samples"]))
    contender.run(meter.on(contender.model))
    assert meter.forwards == 2
    assert calls["mine"] == BLOCKS * 2


# ------------------------------------------------------------------------------------ wrong kernels


def black(q: Tensor, *_: Any) -> Tensor:
    return torch.zeros_like(q)


def not_a_number(q: Tensor, *rest: Any) -> Tensor:
    out = softmax_attention(q, *rest)
    out[-1, -1, 3, 0] = torch.nan  # one value, in a row that the sample may not hold
    return out


def constant(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.mean(2, keepdim=True).expand_as(q).contiguous()  # the right mean, no spread


def last_token_lost(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    out = softmax_attention(q, k, v, *rest)
    out[:, :, -1] = 0  # as a kernel that forgets the ragged end of a block
    return out


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any) -> Tensor:
    return softmax_attention(q, k, v, mask, 1.0)


def keys_of_other_item(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return softmax_attention(q, k.flip(0), v, *rest)


def second_item_lost(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    out = softmax_attention(q, k, v, *rest)
    out[1] = 0  # the first layer's sample is of the first item: it comes out in the second layer
    return out


def raises(*_: Any) -> Tensor:
    raise AssertionError("unsupported architecture")


def wrong_layout(q: Tensor, *rest: Any) -> Tensor:
    return softmax_attention(q, *rest).transpose(1, 2)


WRONG = [
    (black, "differs from exact attention"),
    (not_a_number, "not finite"),
    (constant, "differs from exact attention"),
    (last_token_lost, "differs from exact attention"),
    (wrong_scale, "differs from exact attention"),
    (keys_of_other_item, "differs from exact attention"),
    (second_item_lost, "differs from exact attention"),
    (raises, "stopped with AssertionError: unsupported architecture"),
    (wrong_layout, r"gave \["),
]


@pytest.mark.parametrize(("run", "why"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_kernel_never_reaches_the_image(
    run: Any, why: str, accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any
) -> None:
    expected, _ = sample(turbo, prompt, LATENT, 3)
    calls = kernel(run)
    told: list[str] = []
    patched, _ = accelerate(turbo, "mine", on_failure=told.append)
    for _ in range(2):
        found, _ = sample(patched, prompt, LATENT, 3)
        assert torch.equal(found["samples"], expected["samples"])
    assert len(told) == 1  # once, not at every step and run
    assert "mine" in told[0]
    assert re.search(why, told[0])
    assert calls["mine"] <= BLOCKS


def test_rounding_is_no_failure(
    accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any
) -> None:
    def rounded(*arguments: Any) -> Tensor:
        return softmax_attention(*arguments).bfloat16().float()

    calls = kernel(rounded, rounding=2**-7)
    told: list[str] = []
    sample(accelerate(turbo, "mine", on_failure=told.append)[0], prompt, LATENT, 3)
    assert told == []
    assert calls["mine"] == BLOCKS * 2


def test_a_kernel_that_breaks_later(
    accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any, caplog: Any
) -> None:
    """After its check: the run is made again without it, as if it had never been there."""
    expected, _ = sample(turbo, prompt, LATENT, 3)
    first = iter(range(BLOCKS + 1))  # right in the first step and in one block of the second

    def run(q: Tensor, *rest: Any) -> Tensor:
        out = softmax_attention(q, *rest)
        return out if next(first, None) is not None else out * torch.inf

    calls = kernel(run)
    with caplog.at_level(logging.WARNING):
        found, _ = sample(accelerate(turbo, "mine")[0], prompt, LATENT, 3)
    assert torch.equal(found["samples"], expected["samples"])
    assert calls["mine"] == 2 * BLOCKS
    assert caplog.text.count("not finite into the sampled latent") == 1


def test_a_model_that_is_not_finite_by_itself_is_not_sampled_twice_over(
    accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any, count_forwards: Any
) -> None:
    """Nothing can help: one repetition shows that, and later runs do not repeat."""
    kernel()
    told: list[str] = []
    patched, _ = accelerate(turbo, "mine", on_failure=told.append)
    broken = [[prompt[0][0] * torch.nan, {}]]
    forwards = count_forwards(patched)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sampled latent"):
            sample(patched, broken, LATENT, 3)
    assert len(forwards) == 3 * 2
    assert len(told) == 1
    assert "sampled latent" in told[0]  # the guard does not judge what came in broken


# ------------------------------------------------------------------------------ overrides in chain


@pytest.fixture
def foreign(turbo: Any) -> tuple[Any, list[str]]:
    """A clone of the MODEL with an override of some other node, and what it was called for."""
    seen: list[str] = []

    def their_override(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(func.__name__)
        return func(*args, **kwargs)

    model = turbo.clone()
    model.model_options["transformer_options"][OVERRIDE] = their_override
    return model, seen


@pytest.mark.parametrize("wanted", ["auto", "core"])
def test_the_override_of_another_node_stays(
    wanted: str, accelerate: Any, foreign: Any, sample: Any, prompt: Any
) -> None:
    model, seen = foreign
    patched, report = accelerate(model, wanted)
    assert override_of(patched) is override_of(model)
    assert "left as a node upstream set it" in report.attention
    assert "their_override" in report.attention
    sample(patched, prompt, LATENT, 3)
    assert len(seen) == BLOCKS * 2


@pytest.mark.parametrize(("run", "expected"), [(softmax_attention, 0), (black, BLOCKS * 2)])
def test_a_kernel_goes_before_the_override_of_another_node(
    run: Any, expected: int, accelerate: Any, kernel: Any, foreign: Any, sample: Any, prompt: Any
) -> None:
    model, seen = foreign
    kernel(run)
    patched, report = accelerate(model, "mine", on_failure=lambda why: None)
    assert "goes before" in report.attention
    sample(patched, prompt, LATENT, 3)
    assert len(seen) == expected


def test_the_later_of_two_accelerate_nodes_counts(
    accelerate: Any, kernel: Any, turbo: Any, foreign: Any, sample: Any, prompt: Any
) -> None:
    calls = kernel()
    kernel(name="other")
    twice, _ = accelerate(accelerate(turbo, "other")[0], "mine")
    sample(twice, prompt, LATENT, 3)
    assert calls == {"mine": BLOCKS * 2}
    assert override_of(accelerate(twice, "core")[0]) is None
    back, _ = accelerate(accelerate(foreign[0], "mine")[0], "core")
    assert override_of(back) is override_of(foreign[0])
    assert back.wrappers == {"sampler_sample": {}}


# --------------------------------------------------------------------------- core's own conventions


def attention_of_core(*args: Any, **kwargs: Any) -> Tensor:
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch(*args, **kwargs)


def qkv(heads: int = 3, tokens: int = 21, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, tokens, width, generator=generator) for _ in range(3)]


def as_tokens(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)  # [B, N, H * D]


MASKS = {
    "none": None,
    "Qwen-Image's": torch.tensor([[[0.0] * 20 + [-1e9]], [[0.0] * 17 + [-1e9] * 4]]),  # [B, 1, N]
    "per query": torch.linspace(-4, 4, 21 * 21).reshape(21, 21),
    "bool": (torch.arange(21) < 18).expand(2, 1, 21, 21),
}


@pytest.mark.parametrize("keep_heads", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_shapes_and_masks_as_core_reads_them(
    mask: str, split: bool, keep_heads: bool, attention: Any, kernel: Any
) -> None:
    calls = kernel()
    guarded = attention.GuardedAttention(attention.KERNELS["mine"])
    tensors = qkv() if split else [as_tokens(tensor) for tensor in qkv()]
    arguments = {"skip_reshape": split, "skip_output_reshape": keep_heads, "mask": MASKS[mask]}
    expected = attention_of_core(*tensors, 3, **arguments)
    found = attention_of_core(*tensors, 3, **arguments, transformer_options={OVERRIDE: guarded})
    assert calls["mine"] == 1
    assert guarded.failed is None
    close(found, expected)


def test_a_scale_is_handed_on(attention: Any, kernel: Any) -> None:
    calls = kernel()
    guarded = attention.GuardedAttention(attention.KERNELS["mine"])
    options = {"skip_reshape": True, "scale": 0.7}
    expected = attention_of_core(*qkv(), 3, **options)
    found = attention_of_core(*qkv(), 3, **options, transformer_options={OVERRIDE: guarded})
    assert calls["mine"] == 1
    close(found, expected)


def grouped() -> list[Tensor]:
    q, k, v = qkv(heads=4)
    return [q, k[:, :2], v[:, :2]]


@pytest.mark.parametrize(
    ("tensors", "options", "fields"),
    [
        (grouped, {"enable_gqa": True}, {}),
        (qkv, {"mask": torch.zeros(21, 21)}, {"masks": False}),
        (qkv, {"low_precision_attention": False}, {"low_precision": True}),
        (qkv, {"attn_precision": torch.float64}, {}),
        (qkv, {"something_new": True}, {}),
        (qkv, {}, {"dtypes": (torch.bfloat16,)}),
        (qkv, {}, {"devices": ("cuda",)}),
    ],
    ids=["GQA", "mask", "8 bits", "precision", "unknown", "dtype", "device"],
)
def test_what_a_kernel_cannot_take_goes_to_core(
    tensors: Any, options: Any, fields: Any, attention: Any, kernel: Any
) -> None:
    calls = kernel(**fields)
    guarded = attention.GuardedAttention(attention.KERNELS["mine"])
    q, k, v = tensors()
    options = {"skip_reshape": True, **options}
    expected = attention_of_core(q, k, v, q.shape[1], **options)
    found = attention_of_core(
        q, k, v, q.shape[1], **options, transformer_options={OVERRIDE: guarded}
    )
    assert not calls
    assert guarded.failed is None  # not its fault: the next call may suit
    assert torch.equal(found, expected)


def test_masked_prompts_in_the_model(
    accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any
) -> None:
    """Two prompts of different length, as core's text encoder hands them over."""
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    masked = [[prompt[0][0], {"attention_mask": mask}]]
    expected, _ = sample(turbo, masked, LATENT, 3)
    assert not torch.equal(expected["samples"], sample(turbo, prompt, LATENT, 3)[0]["samples"])
    calls = kernel()
    found, _ = sample(accelerate(turbo, "mine")[0], masked, LATENT, 3)
    assert calls["mine"] == BLOCKS * 2
    close(found["samples"], expected["samples"])


def test_memory_that_runs_out_is_for_core_to_handle(attention: Any, kernel: Any) -> None:
    def out_of_memory(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    kernel(out_of_memory)
    guarded = attention.GuardedAttention(attention.KERNELS["mine"])
    with pytest.raises(torch.OutOfMemoryError):
        attention_of_core(*qkv(), 3, skip_reshape=True, transformer_options={OVERRIDE: guarded})
    assert guarded.failed is None


# ----------------------------------------------------------------------------------- real kernels


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash", "flash3", "sage"])
@pytest.mark.parametrize("tokens", [1000, 4096 + 77])
def test_kernels_on_this_gpu(name: str, tokens: int, attention: Any) -> None:
    kernel = attention.KERNELS[name]
    try:
        device = attention.Device.of(torch.device("cuda"))
        missing = {name: why} if (why := kernel.missing()) else {}
        attention.choose(name, device, missing, "pytorch")
    except ValueError as error:
        pytest.skip(str(error))
    tensors = [torch.randn(1, 24, tokens, 128, device="cuda").bfloat16() for _ in range(3)]
    call = attention.read_call(kernel, *tensors, 24, skip_reshape=True)
    out = kernel.run(*tensors, None, None)
    assert attention.fault_of(out, call, kernel) is None
    exact = F.scaled_dot_product_attention(*(tensor.float() for tensor in tensors))
    assert (out.float() - exact).norm() < 0.1 * exact.norm()


# ---------------------------------------------------------------------------------------- compile


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks(
    accelerate: Any, kernel: Any, turbo: Any, sample: Any, prompt: Any
) -> None:
    """Same latents, one compilation for all blocks, and clones keep their own attention."""
    from torch._dynamo.utils import counters

    expected, _ = sample(turbo, prompt, LATENT, 3)
    compiled, report = accelerate(turbo, "core", compiled=True)
    assert f"{BLOCKS} blocks" in report.compiled
    counters.clear()
    found, _ = sample(compiled, prompt, LATENT, 3)
    close(found["samples"], expected["samples"])
    frames = dict(counters["frames"])
    assert frames["ok"] > 0

    calls = kernel()
    other, _ = accelerate(turbo, "mine", compiled=True)
    for model, count in ((other, BLOCKS * 2), (compiled, BLOCKS * 2), (other, BLOCKS * 4)):
        found, _ = sample(model, prompt, LATENT, 3)
        close(found["samples"], expected["samples"])
        assert calls["mine"] == count
    assert dict(counters["frames"]) == frames  # nothing was compiled again


@pytest.fixture
def working_compiler(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack("nodes.compiled"), "compiler_fault", lambda device: None)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    ("order", "backend"), [("before", "eager"), ("after", "eager"), ("before", "inductor")]
)
def test_compiled_blocks_with_loras_beside_the_weights(
    order: str,
    backend: str,
    pack: Any,
    monkeypatch: pytest.MonkeyPatch,
    accelerate: Any,
    model: Any,
    make_updates: Any,
    write_lora: Any,
    sample: Any,
    prompt: Any,
) -> None:
    """The LoRA's result, whatever was compiled before.

    Backend eager traces the same code in the same way, without C++.
    """
    from torch._dynamo.utils import counters

    if backend == "eager":
        module = pack("nodes.compiled")
        wrap = module.set_torch_compile_wrapper
        monkeypatch.setattr(module, "compiler_fault", lambda device: None)
        monkeypatch.setattr(
            module,
            "set_torch_compile_wrapper",
            lambda model, **options: wrap(model, **{**options, "backend": "eager"}),
        )
    apply_lora = pack("nodes.apply_lora").apply_lora
    sigmas = torch.tensor([1.0, 0.7155, 0.0])
    paths = [write_lora(make_updates(seed), f"{seed}.safetensors") for seed in range(3)]

    def compiled(path: Any) -> Any:
        if path is None:
            return accelerate(model, "core", compiled=True)[0]
        if order == "before":
            return accelerate(apply_lora(model, path, mode="bypass")[0], "core", compiled=True)[0]
        return apply_lora(accelerate(model, "core", compiled=True)[0], path, mode="bypass")[0]

    counters.clear()
    for path in (None, *paths):
        plain = model if path is None else apply_lora(model, path, mode="bypass")[0]
        expected, _ = sample(plain, prompt, LATENT, 3, sigmas=sigmas)
        found, _ = sample(compiled(path), prompt, LATENT, 3, sigmas=sigmas)
        close(found["samples"], expected["samples"])
        assert counters["frames"]["ok"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_no_compiler(pack: Any, accelerate: Any, model: Any) -> None:
    """Found out before sampling, with torch's own reason."""
    from torch._inductor import config

    compiled = pack("nodes.compiled")
    compiled.compiler_fault.cache_clear()
    # by torch's own patch: pytest's would leave an alias behind that no longer exists
    broken = config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    try:
        message = r"does not work on this machine.*Set `compile`"
        with broken, pytest.raises(ValueError, match=message):
            accelerate(model, compiled=True)
    finally:
        compiled.compiler_fault.cache_clear()


@pytest.mark.usefixtures("working_compiler")
def test_a_model_without_blocks(accelerate: Any, model: Any) -> None:
    odd = model.clone()
    odd.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        accelerate(odd, compiled=True)


# ------------------------------------------------------------------------------------------- node


def test_the_node(pack: Any, run_node: Any, turbo: Any) -> None:
    node = pack("nodes.accelerate").TurboAccelerate
    _, report = run_node(node, model=turbo, attention="auto")
    assert "core's own" in report
    with pytest.raises(ValueError, match="sage runs on cuda"):
        run_node(node, model=turbo, attention="sage")
    with pytest.raises(ValueError, match="expected one of auto, core, cudnn"):
        run_node(node, model=turbo, attention="fastest")
