"""A LoRA from a stranger: its header, its spec, its tensors, and PEFT's file beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile import Failed, Limits, Refused, Surface, check, command, few, row
from hypothesis import strategies as st
from mutations import damaged, json_like, safetensors_bytes, safetensors_parts
from safetensors.torch import save_file
from torch import Tensor

from distill.config import load_config, save_config
from distill.contract.describe import describe
from distill.contract.lora_keys import LoraFormatError, normalise
from distill.contract.metadata import read_header, read_lora
from distill.contract.resolve import resolve
from distill.contract.spec import HEADER_KEY, SpecError, TurboSpec

SPEC = TurboSpec((1.0, 0.7155, 0.0), method="pcm, dmd2")
STEMS = [f"transformer_blocks.{n}.attn.{part}" for n in range(2) for part in ("to_q", "to_k")]
FILE = "lora.safetensors"
DEMO = Path(__file__).parents[2] / "configs" / "tiny_demo.yaml"


def read_whole(path: Path) -> None:
    """As loader, sample and bake begin."""
    tensors, metadata = read_lora(path)
    normalise(tensors, metadata, source=path.name)
    resolve(path, metadata)


QUICK = Limits(cpu_s=2, wall_s=10)
HEADER = Surface("read_header", read_header, (OSError, LoraFormatError))
DESCRIBED = Surface("describe", describe, (OSError, LoraFormatError))
WHOLE = Surface("read_lora to resolve", read_whole, (OSError, LoraFormatError, SpecError))
SPEC_TEXT = Surface("TurboSpec.from_json", TurboSpec.from_json, (SpecError,))
INSPECT = Surface(
    "inspect FILE --json", lambda p: command("inspect", p, "--json"), (Refused, Failed), QUICK
)
INSPECT_TEXT = Surface(
    "inspect FILE", lambda path: command("inspect", path), (Refused, Failed), QUICK
)
EXPORT = Surface(
    "export FILE",
    lambda path: command("export", path, "--out", path.with_name("out.safetensors")),
    (Refused,),
)


def tensors(prefix: str = "diffusion_model.", rank: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (rank, 6), "lora_B": (5, rank)}
    return {
        f"{prefix}{stem}.{half}.weight": torch.randn(shape, generator=generator)
        for stem in STEMS
        for half, shape in shapes.items()
    }


def saved(
    state: dict[str, Tensor] | None = None, spec: str | None = None, **metadata: str
) -> Callable[[Path], Path]:
    """A row's file with these tensors and header entries."""

    def make(folder: Path) -> Path:
        header = {HEADER_KEY: SPEC.to_json() if spec is None else spec, **metadata}
        save_file(tensors() if state is None else state, folder / FILE, header)
        return folder / FILE

    return make


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A row's file with the parsed header changed; tensor bytes and length fit."""

    def make(folder: Path) -> Path:
        header, data = safetensors_parts(saved()(folder))
        header = change(header) or header
        (folder / FILE).write_bytes(safetensors_bytes(header, data))
        return folder / FILE

    return make


def with_tensor(suffix: str, value: Tensor, stem: str = STEMS[0]) -> dict[str, Tensor]:
    return tensors() | {f"diffusion_model.{stem}{suffix}": value}


KEY = f"diffusion_model.{STEMS[0]}.lora_A.weight"


def of_key(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[KEY].update(values)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / FILE)
    return folder / FILE


def loop(folder: Path) -> Path:
    (folder / FILE).symlink_to(folder / FILE)
    return folder / FILE


def odd_name(folder: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.safetensors"))
    return saved()(folder).rename(path)


def another(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A further, empty tensor at the beginning of the file."""
    return lambda header: {"a": {"data_offsets": [0, 0], **values}, **header}


NO_FILE = "expected a safetensors file"
ROWS = [
    row("plain", saved()),
    row("no metadata", changed(lambda h: {k: v for k, v in h.items() if k != "__metadata__"})),
    row("metadata is a list", changed(lambda h: {**h, "__metadata__": [1]}), NO_FILE),
    row("metadata is text", changed(lambda h: {**h, "__metadata__": "pt"}), NO_FILE),
    row("metadata holds an object", changed(lambda h: {**h, "__metadata__": {"a": {}}})),
    row("metadata with half a pair of surrogates", saved(title="x\\ud800")),
    row("a tensor is a number", changed(lambda h: {**h, "a": 1}), NO_FILE),
    row("no offsets", changed(lambda h: h[KEY].pop("data_offsets") and None), NO_FILE),
    row("offsets of 400 digits", changed(of_key(data_offsets=[0, 10**400])), r"lora\.safetensors"),
    row("offsets that overlap", changed(of_key(data_offsets=[4, 100])), "valid safetensors"),
    row("offsets below zero", changed(of_key(data_offsets=[-8, 96])), FILE),
    row("offsets that are text", changed(of_key(data_offsets=["0", "96"])), NO_FILE),
    row("offsets that are not finite", changed(of_key(data_offsets=[0, float("inf")])), FILE),
    row("a shape too large", changed(of_key(shape=[2**40, 2**40])), "valid safetensors"),
    row("a shape below zero", changed(of_key(shape=[-4, -6])), FILE),
    row("an unknown dtype of any shape", changed(of_key(dtype="F13", shape=[2**64])), "64 bits"),
    row("an unknown dtype too large", changed(of_key(dtype="F13", shape=[2**62] * 2)), "64 bits"),
    row(
        "no numbers in a shape too large",
        changed(another(dtype="F32", shape=[0, 2**64])),
        "64 bits",
    ),
    row("a shape of long numbers", changed(of_key(shape=[10**4000] * 600)), "64 dimensions"),
    row("a shape of 64 long numbers", changed(of_key(shape=[10**4000] * 64)), "64 bits"),
    row("offsets of 4000 digits", changed(of_key(data_offsets=[0, 10**4000])), "64 bits"),
    row(
        "a shape of 20,000 numbers", changed(another(dtype="F32", shape=[0] * 20_000)), "dimensions"
    ),
    row("an unknown dtype", changed(of_key(dtype="F13")), FILE),
    row("a dtype of less than a byte", changed(of_key(dtype="F4")), FILE),
    row("complex weights", changed(of_key(dtype="C64", shape=[2, 6])), FILE),
    row("whole numbers", changed(of_key(dtype="I32")), "floating-point matrix"),
    row("deeply nested", lambda folder: _bytes(folder, b"[" * 200_000), NO_FILE),
    row(
        "a number of 5000 digits",
        lambda folder: _bytes(folder, b'{"a":' + b"1" * 5000 + b"}"),
        NO_FILE,
    ),
    row("a pipe", fifo, "not a regular file"),
    row("a link to itself", loop, "symbolic links"),
    row("a name that is not UTF-8", odd_name, "UTF-8"),
    # tensors
    row("alpha of three numbers", saved(with_tensor(".alpha", torch.ones(3))), "one number"),
    row("alpha in a box", saved(with_tensor(".alpha", torch.ones(1, 1, 1)))),
    row("alpha in fp8", saved(with_tensor(".alpha", torch.tensor(2.0).to(torch.float8_e5m2)))),
    row("a rank of none", saved(with_tensor(".lora_A.weight", torch.ones(0, 6))), "matrix"),
    row(
        "an empty change of a bias",
        saved(with_tensor(".diff_b", torch.zeros(5))),
        None,
    ),
    row("a change of a bias", saved(with_tensor(".diff_b", torch.ones(5))), "diff_b"),
    row("no tensors", lambda folder: _bytes(folder, b"{}"), "no tensors at all"),
    row("escapes in a key", saved(with_tensor("\x1b[31m\n", torch.ones(1)))),
    row(
        "escapes in a key that is refused",
        saved(with_tensor("\x1b[31m\n.dora_scale", torch.ones(1))),
        "DoRA",
    ),
    row(
        "half a pair of surrogates in the spec",
        saved(spec=SPEC.to_json().replace("pcm", "\\ud800")),
        None,
    ),
    row("escapes in a dtype", changed(of_key(dtype="\x1b[31m")), FILE),
    row(
        "a key of 42,000 characters",
        saved(with_tensor(".lora_A" * 6_000 + ".", torch.ones(1))),
        "at most 1,000 characters",
    ),
    row(
        "a refused key of 200,000 characters",
        saved(with_tensor("x" * 200_000 + ".dora_scale", torch.ones(1))),
        "at most 1,000 characters",
    ),
    # alpha in the header
    row("kohya's alpha is no number", saved(ss_network_alpha="nan", ss_network_dim="x")),
    row("PEFT's alpha is deep", saved(lora_adapter_metadata="[" * 200_000), "expected JSON"),
    row("PEFT's alpha is a list", saved(lora_adapter_metadata="[]"), "expected an object"),
    row("PEFT's alpha is infinite", saved(lora_adapter_metadata='{"lora_alpha": 1e999}'), "number"),
    row(
        "PEFT's alpha is long",
        saved(lora_adapter_metadata=json.dumps({"lora_alpha": "8" * 100_000})),
        "number",
    ),
    row(
        "a pattern that never ends",
        saved(lora_adapter_metadata=json.dumps({"lora_alpha": 4, "alpha_pattern": {"(a+)+$": 4}})),
        "regular expression",
    ),
    row(
        "patterns for a hundred thousand",
        saved(
            lora_adapter_metadata=json.dumps(
                {"lora_alpha": 4, "alpha_pattern": {f"to_q{n}": 4 for n in range(100_000)}}
            )
        ),
    ),
]


def _bytes(folder: Path, header: bytes) -> Path:
    (folder / FILE).write_bytes(safetensors_bytes(header))
    return folder / FILE


@pytest.mark.parametrize(("make", "refused"), few(ROWS))
def test_a_file(make: Callable[[Path], Path], refused: str | None, tmp_path: Path) -> None:
    path = make(tmp_path)
    found = check(INSPECT, path, refused)
    assert refused or json.loads(found)["modules"] == len(STEMS)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", few([math.nan, math.inf, -math.inf]))
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16, torch.float8_e5m2]))
@pytest.mark.parametrize("surface", [WHOLE, EXPORT], ids=lambda surface: surface.name)
def test_a_weight_that_is_not_finite(
    surface: Surface, dtype: torch.dtype, value: float, half: str, tmp_path: Path
) -> None:
    weight = tensors()[f"diffusion_model.{STEMS[0]}.{half}.weight"]
    weight[1, 2] = value
    path = saved(with_tensor(f".{half}.weight", weight.to(dtype)))(tmp_path)
    check(surface, path, rf"{half}.*expected finite numbers")


@pytest.mark.parametrize("surface", [WHOLE, EXPORT], ids=lambda surface: surface.name)
def test_an_alpha_that_is_not_finite(surface: Surface, tmp_path: Path) -> None:
    """`inspect` describes such a file, and says so: tests/contract/test_inspect.py."""
    path = saved(with_tensor(".alpha", torch.tensor(torch.inf)))(tmp_path)
    check(surface, path, r"alpha.*finite")


@pytest.mark.parametrize("text", few(["5", "[", "{}", '{"model": 5}', "[" * 200_000]))
def test_a_recipe_in_the_header_that_is_none(text: str, tmp_path: Path) -> None:
    """The recipe in the run folder around the file tells where the base lies, if it is the same."""
    (tmp_path / "lora").mkdir()
    save_config(load_config(DEMO), tmp_path / "config.yaml")
    check(EXPORT, saved(**{"turbo.config": text})(tmp_path / "lora"), None)


ORDERS = {
    "key": saved(with_tensor("\x1b[31m\n", torch.ones(1))),
    "entry": saved(**{"modelspec.title": "\x1b]0;x\x07", "\x1b[2J": "x"}),
    "base": saved(spec=SPEC.to_json().replace("Qwen/", "\\u001b[31m")),
    "surrogate": saved(spec=SPEC.to_json().replace("Qwen/", "\\ud800")),
}


@pytest.mark.parametrize(
    ("surface", "where"),
    [pytest.param(s, w, id=f"{s.name}-{w}") for s in (INSPECT_TEXT, EXPORT) for w in ORDERS],
)
def test_a_header_gives_the_terminal_no_orders(
    surface: Surface, where: str, tmp_path: Path
) -> None:
    outcome = hostile.attempt(lambda: surface.read(ORDERS[where](tmp_path)), surface.limits)
    text = outcome.value if not outcome.kinds else outcome.message
    assert not {c for c in text if not c.isprintable() and c != "\n"}, text
    assert not outcome.kinds or hostile.name_of(Refused) in outcome.kinds, outcome.trace


SPEC_ROWS = [
    row("plain", {}),
    row(
        "a million steps",
        {"sigmas": [1 - n / 1e6 for n in range(1_000_000)] + [0]},
        "256",
    ),
    row(
        "300 steps",
        {"sigmas": [1 - n / 300 for n in range(301)]},
        "256",
    ),
    row("sigmas that differ by nothing", {"sigmas": [1, 1 - 2**-53, 0]}),
    row("not a number", {"sigmas": [float("nan"), 0]}, "finite"),
    row("a number of 400 digits", {"sigmas": [10**400, 0]}, "number"),
    row("half a pair of surrogates", {"method": "\ud800"}, "method"),
    row("base of a megabyte", {"base": "x" * 1_000_000}, "base"),
    row(
        "sampler of a megabyte",
        {"sampler": "x" * 1_000_000},
        "sampler",
    ),
    row("key of a megabyte", {"x" * 1_000_000: 1}, "unknown key"),
    row(
        "sigmas are long text",
        {"sigmas": "1," * 500_000},
        "list of numbers",
    ),
    row("version is a fraction", {"version": 1.0}, "version"),
    row("version of 400 digits", {"version": 10**400}, "version"),
    row("a size of 30 digits", {"resolutions": [[10**30, 10**30]]}),
    row("a size of none", {"resolutions": [[0, 64]]}, "width, height"),
]


@pytest.mark.parametrize(("values", "refused"), few(SPEC_ROWS))
def test_a_spec(values: dict[str, Any], refused: str | None) -> None:
    text = json.dumps(json.loads(SPEC.to_json()) | values)
    check(SPEC_TEXT, text, refused)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[" * 200_000, '{"sigmas":' * 100_000, "1" * 5000]
)
def test_a_spec_that_is_no_object(text: str) -> None:
    check(SPEC_TEXT, text, "expected a JSON object")


# ------------------------------------------------------------------------------ PEFT's folder


def beside(config: str | bytes | None, **alpha: float) -> Callable[[Path], Path]:
    """A row's folder as PEFT writes it; alpha: also in a tensor."""

    def make(folder: Path) -> Path:
        state = tensors("base_model.model.")
        state |= {f"base_model.model.{STEMS[0]}.{key}": torch.tensor(v) for key, v in alpha.items()}
        save_file(state, folder / "adapter_model.safetensors", {HEADER_KEY: SPEC.to_json()})
        if config is not None:
            data = config if isinstance(config, bytes) else config.encode()
            (folder / "adapter_config.json").write_bytes(data)
        return folder

    return make


def config(**values: Any) -> str:
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **values})


def config_is_a(put: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        beside(None)(folder)
        put(folder / "adapter_config.json")
        return folder

    return make


SIDECAR = "adapter_config.json"
SIDECAR_ROWS = [
    row("plain", beside(config())),
    row("not there", beside(None)),
    row("empty", beside(""), SIDECAR),
    row("cut short", beside(config()[:-5]), SIDECAR),
    row("a list", beside("[]"), SIDECAR),
    row("deeply nested", beside("[" * 200_000), SIDECAR),
    row("not UTF-8", beside(b"\xff\xfe{}"), SIDECAR),
    row(
        "with a byte order mark",
        beside(b"\xef\xbb\xbf" + config().encode()),
        None,
    ),
    row(
        "a number of 5000 digits",
        beside('{"lora_alpha": ' + "1" * 5000 + "}"),
        SIDECAR,
    ),
    row("alpha is text", beside(config(lora_alpha="many")), "lora_alpha"),
    row("alpha is not finite", beside(config(lora_alpha=float("nan"))), "lora_alpha"),
    row("alpha is true", beside(config(lora_alpha=True)), "lora_alpha"),
    row("alpha is null", beside(config(lora_alpha=None)), "lora_alpha"),
    row("another alpha in a tensor", beside(config(), alpha=2.0), "alpha"),
    row("the same alpha in a tensor", beside(config(), alpha=8.0)),
    row(
        "a pattern that never ends",
        beside(config(alpha_pattern={"(a+)+$": 4})),
        "alpha_pattern",
    ),
    row("a pattern that is a list", beside(config(alpha_pattern=[4])), "alpha_pattern"),
    row("DoRA", beside(config(use_dora=True)), "use_dora"),
    row("a folder", config_is_a(Path.mkdir)),
    row("a pipe", config_is_a(os.mkfifo)),
    row("a link to nowhere", config_is_a(lambda path: path.symlink_to("nowhere"))),
    row("an empty folder", lambda folder: folder, r"adapter_model\.safetensors"),
]


@pytest.mark.parametrize(("make", "refused"), few(SIDECAR_ROWS))
def test_a_folder_by_peft(
    make: Callable[[Path], Path], refused: str | None, tmp_path: Path
) -> None:
    found = check(INSPECT, make(tmp_path), refused)
    assert refused or json.loads(found)["modules"] == len(STEMS)


# ---------------------------------------------------------------------------- while it is in use


def test_a_file_that_is_cut_while_it_is_in_use(tmp_path: Path) -> None:
    path = saved(tensors(rank=4096))(tmp_path)

    def read_then_cut() -> float:
        found, _ = read_lora(path)
        os.truncate(path, 100)
        return sum(float(tensor.sum()) for tensor in found.values())

    outcome = hostile.attempt(read_then_cut, Limits())
    assert not outcome.killed
    assert outcome.value == pytest.approx(sum(float(t.sum()) for t in tensors(rank=4096).values()))


# --------------------------------------------------------------------------------- any damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {
        "lora_adapter_metadata": '{"lora_alpha": 8, "alpha_pattern": {"to_q": 4}}',
        "ss_network_alpha": "8",
    }
    return saved(with_tensor(".alpha", torch.tensor(2.0)), **extra)(
        tmp_path_factory.mktemp("whole")
    )


COUNTS = [15, pytest.param(300, marks=pytest.mark.slow)]
READERS = [HEADER, DESCRIBED, WHOLE]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("surface", few(READERS), ids=lambda surface: surface.name)
def test_damaged_bytes(surface: Surface, count: int, whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")

    def put(example: bytes) -> Path:
        (tmp_path / FILE).write_bytes(example)
        return tmp_path / FILE

    hostile.survive(surface, damaged(data, head=length), put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("surface", few(READERS), ids=lambda surface: surface.name)
def test_another_header(surface: Surface, count: int, whole: Path, tmp_path: Path) -> None:
    header, data = safetensors_parts(whole)

    def put(example: Any) -> Path:
        (tmp_path / FILE).write_bytes(safetensors_bytes(example, data))
        return tmp_path / FILE

    hostile.survive(surface, json_like(header), put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("key", few(["turbo.spec", "lora_adapter_metadata"]))
def test_another_document_in_the_header(key: str, count: int, whole: Path, tmp_path: Path) -> None:
    header, data = safetensors_parts(whole)

    def put(example: Any) -> Path:
        metadata = header["__metadata__"] | {key: json.dumps(example)}
        content = safetensors_bytes({**header, "__metadata__": metadata}, data)
        (tmp_path / FILE).write_bytes(content)
        return tmp_path / FILE

    examples = json_like(json.loads(header["__metadata__"][key]))
    hostile.survive(INSPECT, examples, put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
def test_another_spec(count: int) -> None:
    examples = json_like(json.loads(SPEC.to_json())) | st.text() | st.just("[" * 200_000)
    hostile.survive(SPEC_TEXT, examples, json.dumps, count, count < 1000)
