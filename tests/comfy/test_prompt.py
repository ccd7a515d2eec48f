"""Turbo Prompt: as core encodes, from disk the second time, and never from the wrong entry.

The encoder is core's own Qwen2.5-VL with other numbers, through core's own loader.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDTH, INNER, LAYERS, HEADS, HEAD_DIM, VOCABULARY = 64, 96, 2, 4, 128, 152064
CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
MODEL_OPTIONS = {"qwen25_7b_model_config": CONFIG}  # how core lets its config be changed
FILE = "qwen_2.5_vl_7b_tiny.safetensors"
LAYOUT = "turbo.conditioning"
TEXT = "a red fox, (very:1.3) {quick} 狐狸.\nSecond line"


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL text encoder of toy width with random weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        name = f"layers.{layer}."
        for projection in "qkv":
            shapes[f"{name}self_attn.{projection}_proj"] = (HEADS * HEAD_DIM, WIDTH)
        shapes[f"{name}self_attn.o_proj"] = (WIDTH, HEADS * HEAD_DIM)
        shapes[f"{name}mlp.gate_proj"] = shapes[f"{name}mlp.up_proj"] = (INNER, WIDTH)
        shapes[f"{name}mlp.down_proj"] = (WIDTH, INNER)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"model.{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"model.{name}.bias"] = torch.randn(shape[0], generator=generator)
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(WIDTH)
    tensors["model.norm.weight"] = torch.ones(WIDTH)
    path = tmp_path_factory.mktemp("encoder") / FILE
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    return path


# ----------------------------------------------------------------------- core's own execution


@dataclass
class Bench:
    """Core's executor with a loader for `clip` and a node that collects conditioning."""

    folder: Path  # models/text_encoders
    user: Path
    execute: Callable[[dict[str, Any]], Any] = None  # type: ignore[assignment]
    loads: list[str] = field(default_factory=list)
    encodes: list[str] = field(default_factory=list)
    collected: list[Any] = field(default_factory=list)
    new_executor: Callable[[], None] = None  # type: ignore[assignment]
    cached: Callable[[], set[str]] = None  # type: ignore[assignment]

    def run(
        self,
        text: str = TEXT,
        clip: dict[str, Any] | None = None,
        nodes: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """The node's conditioning. clip: inputs of the wired loader, if any; nodes: others."""
        prompt: dict[str, Any] = {
            "p": {
                "class_type": "TurboDistillPrompt",
                "inputs": {"text": text, "text_encoder": FILE, "device": "default", **inputs},
            },
            "out": {"class_type": "Collect", "inputs": {"conditioning": ["p", 0]}},
            **(nodes or {}),
        }
        if clip is not None:
            prompt["clip"] = {"class_type": "TinyLoader", "inputs": clip}
            prompt["p"]["inputs"]["clip"] = ["clip", 0]
        self.execute(prompt)
        return self.collected.pop()

    def counts(self) -> tuple[int, int]:
        """(loads, encodes) since the last call."""
        counts = len(self.loads), len(self.encodes)
        self.loads.clear()
        self.encodes.clear()
        return counts

    @property
    def entries(self) -> list[Path]:
        return sorted((self.user / "__turbo_distill" / "prompts").glob("*"))


@pytest.fixture
def bench(
    pack: Any, encoder_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    import comfy.sd
    import execution
    import folder_paths

    import nodes

    bench = Bench(tmp_path / "text_encoders", tmp_path / "user")
    bench.folder.mkdir()
    shutil.copy2(encoder_file, bench.folder / FILE)
    kinds = folder_paths.folder_names_and_paths
    known = ([str(bench.folder)], {".safetensors"})
    monkeypatch.setitem(kinds, "text_encoders", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "user_directory", str(bench.user))
    load_clip = comfy.sd.load_clip

    def load_reduced(ckpt_paths: list[str], **options: Any) -> Any:
        bench.loads.append(Path(ckpt_paths[0]).name)
        return load_clip(ckpt_paths, **{**options, "model_options": MODEL_OPTIONS})

    monkeypatch.setattr(comfy.sd, "load_clip", load_reduced)
    encode = comfy.sd.CLIP.encode_from_tokens

    def encode_counted(self: Any, tokens: Any, *args: Any, **options: Any) -> Any:
        bench.encodes.append("")
        return encode(self, tokens, *args, **options)

    monkeypatch.setattr(comfy.sd.CLIP, "encode_from_tokens", encode_counted)

    class TinyLoader:
        RETURN_TYPES = ("CLIP",)
        FUNCTION = "load"

        @classmethod
        def INPUT_TYPES(cls) -> Any:
            return {"required": {"clip_name": ("STRING", {}), "layer": ("INT", {})}}

        def load(self, clip_name: str, layer: int) -> Any:
            path = str(bench.folder / clip_name)
            clip = comfy.sd.load_clip([path], clip_type=comfy.sd.CLIPType.QWEN_IMAGE)
            clip.clip_layer(layer)
            return (clip,)

    class Name:
        RETURN_TYPES = ("*",)
        FUNCTION = "name"

        @classmethod
        def INPUT_TYPES(cls) -> Any:
            return {"required": {"text": ("STRING", {})}}

        def name(self, text: str) -> tuple[str]:
            return (text,)

    class Collect:
        RETURN_TYPES = ()
        FUNCTION = "collect"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> Any:
            return {"required": {"conditioning": ("CONDITIONING", {})}}

        @classmethod
        def IS_CHANGED(cls, **inputs: Any) -> float:
            return float("nan")  # always runs

        def collect(self, conditioning: Any) -> tuple[()]:
            bench.collected.append(conditioning)
            return ()

    node = pack("nodes.prompt").TurboPrompt
    node.GET_SCHEMA()
    for name, each in (
        ("TurboDistillPrompt", node),
        ("TinyLoader", TinyLoader),
        ("Name", Name),
        ("Collect", Collect),
    ):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, each)
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_, **__: None)

    def new_executor() -> None:
        cache_args = {"lru": 0, "ram": 0, "ram_inactive": 0}
        executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, cache_args)

        def execute(prompt: dict[str, Any]) -> None:
            executor.execute(prompt, "id", {}, ["out"])
            if not executor.success:
                raise RuntimeError(executor.status_messages[-1][1]["exception_message"])

        def cached() -> set[str]:
            """Nodes that the last run took from core's cache."""
            messages = [
                data for kind, data in executor.status_messages if kind == "execution_cached"
            ]
            return set().union(*(data["nodes"] for data in messages))

        bench.execute, bench.cached = execute, cached

    bench.new_executor = new_executor
    new_executor()
    return bench


@pytest.fixture
def by_core(bench: Bench) -> Callable[..., Any]:
    """Core's CLIPLoader and CLIPTextEncode: text -> conditioning; uncounted."""
    from nodes import CLIPLoader, CLIPTextEncode

    def encode(text: str = TEXT) -> Any:
        (clip,) = CLIPLoader().load_clip(FILE, "qwen_image")
        (conditioning,) = CLIPTextEncode().encode(clip, text)
        bench.counts()
        return conditioning

    return encode


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for (cond, options), (cond2, options2) in zip(found, expected, strict=True):
        assert cond.dtype == cond2.dtype
        assert torch.equal(cond, cond2)
        assert list(options) == list(options2)
        for name, value in options2.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(options[name], value)
                assert options[name].dtype == value.dtype
            else:
                assert options[name] == value


# ---------------------------------------------------------------------------------- the second time


def test_as_core_encodes_first_and_again_and_after_a_restart(bench: Bench, by_core: Any) -> None:
    expected = by_core()
    assert expected[0][0].std() > 0.01
    assert_same(bench.run(), expected)
    assert bench.counts() == (1, 1)
    bench.run("another text")  # the encoder stays loaded, as a CLIPLoader's would
    assert bench.counts() == (0, 1)
    assert_same(bench.run(), expected)
    assert bench.counts() == (0, 0)
    bench.new_executor()  # restart: core's caches are empty
    assert_same(bench.run(), expected)
    assert bench.counts() == (0, 0)


def test_a_wired_loader_runs_only_for_a_new_prompt(bench: Bench, by_core: Any) -> None:
    loader = {"clip_name": FILE, "layer": -1}
    first = bench.run(clip=loader)
    assert bench.counts() == (1, 1)
    assert not torch.equal(first[0][0], by_core()[0][0]), "the wired CLIP counts, not the file"
    bench.new_executor()
    assert_same(bench.run(clip=loader), first)
    assert bench.counts() == (0, 0), "neither loaded nor run"
    bench.run(clip={**loader, "layer": -2})
    assert bench.counts() == (1, 1), "another value on the loader is another encoder"
    bench.run("new", clip=loader)
    assert bench.counts() == (1, 1)


def test_a_text_encoder_that_comes_by_a_wire(bench: Bench, by_core: Any) -> None:
    """Its name is not there when core asks for the fingerprint."""
    expected = by_core()
    name = {"class_type": "Name", "inputs": {"text": FILE}}
    for counts in ((1, 1), (0, 0)):
        found = bench.run(nodes={"name": name}, text_encoder=["name", 0])
        assert_same(found, expected)
        assert bench.counts() == counts
    assert "p" in bench.cached()
    bench.new_executor()
    with pytest.raises(RuntimeError, match=r"models/text_encoders; a wire brought ''"):
        bench.run(nodes={"name": {**name, "inputs": {"text": ""}}}, text_encoder=["name", 0])


# ------------------------------------------------------------------------------- what it depends on


def test_another_encoder_of_the_same_name_is_noticed(bench: Bench) -> None:
    first = bench.run()
    file = bench.folder / FILE
    status = file.stat()
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(tensors, file)
    assert file.stat().st_size == status.st_size
    assert not torch.equal(bench.run()[0][0], first[0][0])
    assert bench.counts() == (2, 2)


def test_an_encoder_that_core_still_holds_is_not_taken_for_the_new_file(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    loader = {"clip_name": FILE, "layer": -1}
    bench.run("one", clip=loader)
    os.utime(bench.folder / FILE, ns=(1, 1))
    bench.run("two", clip=loader)
    assert bench.counts() == (1, 2)
    assert "was replaced after it was loaded" in caplog.text
    assert len(bench.entries) == 1
    bench.new_executor()  # loads it anew
    bench.run("two", clip=loader)
    assert bench.counts() == (1, 1)
    assert len(bench.entries) == 2


def test_sampled_bytes_tell_apart_what_size_and_time_do_not(pack: Any, bench: Bench) -> None:
    identity = pack("nodes.prompt_cache").file_identity
    file = bench.folder / FILE
    status, before = file.stat(), identity(file)
    assert identity(file) == before
    data = bytearray(file.read_bytes())
    for at in (100, len(data) - 1):  # in the header; in the last tensor
        changed = data.copy()
        changed[at] ^= 1
        file.write_bytes(changed)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file.stat().st_mtime_ns == status.st_mtime_ns
        assert identity(file) != before


@pytest.mark.parametrize(
    "change",
    ["comfyui_version.__version__", "torch.__version__", "model_management.text_encoder_dtype"],
)
def test_what_changes_the_bits_changes_the_key(
    pack: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    import comfy.model_management
    import comfyui_version

    key = pack("nodes.prompt").prompt_key
    before = key("text", ["recipe"])
    assert key("text", ["recipe"]) == before
    assert key("text ", ["recipe"]) != before
    assert key("text", ["recipe 2"]) != before
    owner, name = change.split(".", 1)
    modules = {"torch": torch, "comfyui_version": comfyui_version}
    value = (lambda device: torch.float32) if owner == "model_management" else "9.9.9"
    monkeypatch.setattr(modules.get(owner, comfy.model_management), name, value)
    assert key("text", ["recipe"]) != before


def test_a_textual_inversion_is_never_kept(pack: Any, bench: Bench) -> None:
    text = "a fox embedding:style"
    assert pack("nodes.prompt").prompt_key(text, ["recipe"]) is None
    bench.run(text)
    assert bench.counts() == (1, 1)
    assert bench.entries == []


# ------------------------------------------------------------------------------------- trouble


@pytest.mark.parametrize("wired", [False, True])
def test_a_damaged_entry_is_encoded_anew(
    bench: Bench, caplog: pytest.LogCaptureFixture, wired: bool
) -> None:
    clip = {"clip_name": FILE, "layer": -1} if wired else None
    first = bench.run(clip=clip)
    (entry,) = bench.entries
    entry.write_bytes(entry.read_bytes()[:200])
    bench.new_executor()
    bench.counts()
    assert_same(bench.run(clip=clip), first)
    assert bench.counts() == (1, 1)
    assert f"{entry.name} is damaged" in caplog.text
    assert [each.suffix for each in bench.entries] == [".damaged", ".safetensors"]
    bench.new_executor()
    assert_same(bench.run(clip=clip), first)
    assert bench.counts() == (0, 0)


def test_a_folder_that_cannot_be_written(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.user.touch()  # a file where the folder should be
    assert bench.run()[0][0].shape[-1] == WIDTH
    assert "was not kept" in caplog.text


def test_no_encoder_at_all(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match=r"no text encoder.*models/text_encoders"):
        bench.run(text_encoder="none")


# --------------------------------------------------------------------------------- the cache alone


def conditioning(seed: int = 0, tokens: int = 5) -> list[list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, tokens, 8, generator=generator)
    options = {
        "pooled_output": None,
        "attention_mask": torch.ones(1, 3 * tokens, dtype=torch.int64)[:, ::3],  # a view
        "t5xxl.weights": torch.randn(3, generator=generator).bfloat16(),
        "guidance": 3.5,
        "start_percent": 0,
        "kind": "prompt",
        "flag": True,
    }
    return [[cond, options], [cond[:, :2], {}]]


@pytest.fixture
def cache(pack: Any, tmp_path: Path) -> Any:
    return pack("nodes.prompt_cache").PromptCache(tmp_path / "prompts")


def test_every_entry_survives(cache: Any) -> None:
    assert cache.load("k") is None
    assert cache.store("k", conditioning())
    expected = conditioning()
    for found, (_, options) in zip(cache.load("k"), expected, strict=True):
        assert {name: type(value) for name, value in found[1].items()} == {
            name: type(value) for name, value in options.items()
        }
        found[1].update({name: found[1].pop(name) for name in options})  # their order is no matter
    loaded = cache.load("k")
    for entry, (_, options) in zip(loaded, expected, strict=True):
        entry[1] = {name: entry[1][name] for name in options}
    assert_same(loaded, expected)
    assert cache.path("k").stat().st_size < 2000, "views are stored without what they look at"


def test_hooks_are_not_written(cache: Any) -> None:
    assert not cache.store("k", [[torch.zeros(1), {"hooks": object()}]])
    assert not cache.folder.exists()


@pytest.mark.parametrize(
    "value", [(1, 2), [torch.zeros(1)], {"a": 1}, b"x", float("nan"), torch.zeros(2).to("meta")]
)
def test_what_no_encoder_produces_is_not_written(cache: Any, value: Any) -> None:
    assert not cache.store("k", [[torch.zeros(1, 2, 3), {"odd": value}]])
    assert not cache.folder.exists()


DEEP = "[" * 100_000 + "]" * 100_000
COND = {"0.": torch.zeros(1, 2, 3)}
DAMAGED: dict[str, tuple[dict[str, Tensor], dict[str, str] | None]] = {
    "no header": (COND, None),
    "no layout": (COND, {"other": "[{}]"}),
    "not JSON": (COND, {LAYOUT: "[{"}),
    "deep JSON": (COND, {LAYOUT: DEEP}),
    "deep inside": (COND, {LAYOUT: f'[{{"a": {DEEP}}}]'}),
    "null": (COND, {LAYOUT: "null"}),
    "a mapping": (COND, {LAYOUT: '{"0": {}}'}),
    "prompts that are numbers": (COND, {LAYOUT: "[1]"}),
    "no prompt": (COND, {LAYOUT: "[]"}),
    "a nested value": (COND, {LAYOUT: '[{"a": [1]}]'}),
    "not a number": (COND, {LAYOUT: '[{"a": NaN}]'}),
    "a prompt too few": (COND | {"1.": torch.zeros(1, 2, 3)}, {LAYOUT: "[{}]"}),
    "a negative prompt": ({"0.": COND["0."], "-1.a": COND["0."]}, {LAYOUT: "[{}]"}),
    "no index": ({"0.": COND["0."], "x.a": COND["0."]}, {LAYOUT: "[{}]"}),
    "no dot": ({"0.": COND["0."], "x": COND["0."]}, {LAYOUT: "[{}]"}),
    "no embedding": ({"0.a": COND["0."]}, {LAYOUT: "[{}]"}),
    "a text as embedding": ({"0.a": COND["0."]}, {LAYOUT: '[{"": "x"}]'}),
    "whole numbers as embedding": ({"0.": torch.zeros(1, 2, 3).int()}, {LAYOUT: "[{}]"}),
    "a number as embedding": ({"0.": torch.zeros(())}, {LAYOUT: "[{}]"}),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_whatever_is_in_an_entry(what: str, cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is told and set aside, and the prompt is stored again in its place."""
    tensors, metadata = DAMAGED[what]
    cache.folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, cache.path("k"), metadata)
    content = cache.path("k").read_bytes()
    assert cache.load("k") is None
    assert "k.safetensors is damaged" in caplog.text
    assert "set aside as k.damaged" in caplog.text
    assert (cache.folder / "k.damaged").read_bytes() == content
    assert not cache.has("k")
    assert cache.store("k", conditioning())
    assert cache.load("k") is not None


@pytest.mark.parametrize("error", [IndexError, AttributeError, RecursionError, MemoryError])
def test_whatever_a_reader_raises(
    error: type[Exception], pack: Any, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("inside of a library")

    assert cache.store("k", conditioning())
    monkeypatch.setattr(pack("nodes.prompt_cache"), "safe_open", fail)
    assert cache.load("k") is None
    assert [path.name for path in cache.folder.iterdir()] == ["k.damaged"]


def test_damaged_entries_count_and_go(pack: Any, tmp_path: Path) -> None:
    cache = pack("nodes.prompt_cache").PromptCache(tmp_path / "prompts", limit_bytes=5000)
    cache.folder.mkdir()
    for number in range(20):
        (cache.folder / f"{number}.damaged").write_bytes(bytes(1000))
    cache.store("k", conditioning())
    assert cache.has("k")
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 5000


def test_a_folder_that_may_only_be_read(
    pack: Any, cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole entry is used; a damaged one stays where it is; neither is an error."""
    assert cache.store("k", conditioning())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(30, "Read-only file system")

    module = pack("nodes.prompt_cache")
    for name in ("utime", "replace", "unlink", "rename"):
        monkeypatch.setattr(module.os, name, refuse)
    (found, *_), (expected, *_) = cache.load("k"), conditioning()
    assert torch.equal(found[0], expected[0])
    assert caplog.text == ""
    assert not cache.store("other", conditioning())
    cache.path("k").write_bytes(b"damaged")
    assert cache.load("k") is None
    assert "could not be set aside" in caplog.text
    assert cache.has("k")


def test_an_entry_that_may_not_be_read_is_left_alone(
    pack: Any, cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    assert cache.store("k", conditioning())
    with monkeypatch.context() as patched:
        patched.setattr(pack("nodes.prompt_cache"), "safe_open", refuse)
        assert cache.load("k") is None
    assert "cannot be read" in caplog.text
    assert cache.load("k") is not None


def test_what_is_loaded_does_not_hang_on_the_file(cache: Any) -> None:
    """No mapping: a file cut in place would end the process at the next look at the tensor."""
    assert cache.store("k", conditioning(tokens=5000))
    (found, *_), (expected, *_) = cache.load("k"), conditioning(tokens=5000)
    with cache.path("k").open("r+b") as file:
        file.truncate(10)
    assert torch.equal(found[0], expected[0])


def test_the_longest_unused_go_first(pack: Any, tmp_path: Path) -> None:
    module = pack("nodes.prompt_cache")
    size = module.PromptCache(tmp_path / "one")
    size.store("k", conditioning())
    entry = size.path("k").stat().st_size
    cache = module.PromptCache(tmp_path / "prompts", limit_bytes=3 * entry)
    for number, key in enumerate("abc"):
        cache.store(key, conditioning(number))
        os.utime(cache.path(key), ns=(number, number))
    cache.load("a")  # used: now the newest
    cache.store("d", conditioning(3))
    assert [key for key in "abcd" if cache.has(key)] == ["a", "c", "d"]
    tiny = module.PromptCache(tmp_path / "tiny", limit_bytes=1)
    tiny.store("k", conditioning())
    assert tiny.has("k"), "what was just made is kept, however large"


def test_a_stopped_write_leaves_nothing(
    cache: Any, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pack("nodes.prompt_cache").os, "replace", fail)
    assert not cache.store("k", conditioning())
    assert list(cache.folder.iterdir()) == []
