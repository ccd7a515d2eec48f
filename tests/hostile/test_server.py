"""What a stranger's workflow sends to a real server: refused with words, and the server lives."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import server_prompts
import torch
from hostile import check_message, pending
from safetensors.torch import load_file, save_file
from server_prompts import Prompt

from distill.contract.tiny import TINY_DIR
from distill.utils.comfyui import ComfyServer, ComfyUIError

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
LORA = TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors"
GOOD = "turbo.safetensors"
# What a node may raise: the pack's own words. A KeyError or an IndexError is nobody's answer.
DOCUMENTED = {"ValueError", "LoraFormatError", "SpecError", "FileNotFoundError", "FileExistsError"}
DOCUMENTED |= {"Exception", "OSError"}  # core's own, of a prefix that leads out or is too long
REFUSED = "refused the prompt"  # by core, before a node runs


def lora_with(**changes: Any) -> dict[str, torch.Tensor]:
    return {**load_file(LORA), **changes}


@pytest.fixture(scope="module")
def server(comfyui_path: Path) -> Iterator[ComfyServer]:
    """A server with hostile files among its LoRAs."""
    with ComfyServer(comfyui_path, pack=ROOT) as server:
        folder = server.folder("loras")
        whole = LORA.read_bytes()
        (folder / GOOD).write_bytes(whole)
        (folder / "cut.safetensors").write_bytes(whole[:5000])
        (folder / "empty.safetensors").touch()
        (folder / "page.safetensors").write_text("<!doctype html>")
        key = next(key for key in load_file(LORA) if key.endswith("lora_A.weight"))
        spoilt = torch.full_like(load_file(LORA)[key], math.nan)
        spec = {"turbo.spec": '{"sigmas": [1, 0.7155, 0]}'}
        save_file(lora_with(**{key: spoilt}), folder / "nan.safetensors", spec)
        save_file(lora_with(), folder / "bad_spec.safetensors", {"turbo.spec": "[" * 200_000})
        (folder / "a\nb.safetensors").write_bytes(whole)
        yield server


def tiny(**inputs: Any) -> Prompt:
    """The teacher with a LoRA by Turbo LoRA Loader, sampled; inputs of the loader."""
    loader = {
        "model": ["1", 0],
        "lora_name": GOOD,
        "strength": 1.0,
        "mode": "auto",
        "sigmas_override": "",
        "sampler_override": "auto",
        **inputs,
    }
    nodes = {
        "1": {"class_type": "TurboDistillTinyLoader", "inputs": {"lora": "teacher (no LoRA)"}},
        "7": {"class_type": "TurboDistillLoraLoader", "inputs": loader},
    }
    return server_prompts.tiny_prompt(nodes, model="7", count=1)


def changed(node: str, **inputs: Any) -> Prompt:
    """The tiny demo with inputs of one of its nodes replaced."""
    prompt = server_prompts.tiny_prompt(count=1)
    prompt[node]["inputs"] |= inputs
    return prompt


def saved(**inputs: Any) -> Prompt:
    """The tiny demo saved by Turbo Save Image."""
    inputs = {"images": ["5", 0], "filename_prefix": "x", "background": False, **inputs}
    node = {"class_type": "TurboDistillSaveImage", "inputs": inputs}
    return server_prompts.tiny_prompt({"6": node}, count=1)


def baked(**inputs: Any) -> Prompt:
    inputs = {"base_model": "none", "lora_name": GOOD, "dtype": "bf16", "file_name": "x", **inputs}
    return {"1": {"class_type": "TurboDistillBake", "inputs": inputs}}


def compared(**inputs: Any) -> Prompt:
    prompt = server_prompts.tiny_prompt(count=1)
    prompt["1"]["inputs"]["lora"] = "teacher (no LoRA)"
    inputs = {
        "model": ["1", 0],
        "positive": ["2", 0],
        "vae": ["1", 1],
        "latent_image": ["3", 0],
        "noise_seed": 1,
        **{f"lora_{n}": "none" for n in range(1, 5)},
        "teacher_steps": 0,
        "teacher_cfg": 1.0,
        "teacher_shift": 0.0,
        "cell_size": 64,
        **inputs,
    }
    prompt["4"] = {"class_type": "TurboDistillCompare", "inputs": inputs}
    del prompt["5"]
    prompt["6"]["inputs"]["images"] = ["4", 0]
    return prompt


def wired(prompt: Prompt, node: str, name: str, value: str) -> Prompt:
    """An input that comes from core's String node."""
    prompt[node]["inputs"][name] = ["w", 0]
    return {**prompt, "w": {"class_type": "PrimitiveString", "inputs": {"value": value}}}


def row(name: str, prompt: Prompt, refused: str | None = None, *marks: Any) -> Any:
    return pytest.param(prompt, refused, id=name, marks=marks)


MANY = ", ".join(str(1 - n / 10_000) for n in range(10_000)) + ", 0"
ROWS = [
    row("plain", tiny()),
    row("sigmas of words", tiny(sigmas_override="one, none"), "expected numbers"),
    row("sigmas that are not finite", tiny(sigmas_override="nan, 0"), "finite"),
    row("sigmas beyond floats", tiny(sigmas_override="1e999, 0"), "finite"),
    row("sigmas with decimal commas", tiny(sigmas_override="1;0,7155;0"), "comma"),
    row("ten thousand sigmas", tiny(sigmas_override=MANY), "256"),
    row(
        "sigmas of a megabyte",
        tiny(sigmas_override="x" * 1_000_000),
        "numbers",
    ),
    row("sigmas with escapes", tiny(sigmas_override="\x1b[31m"), "numbers"),
    row(
        "sigmas that are a list",
        tiny(sigmas_override=[1, 0]),
        None,
        pending("core takes lists for links"),
    ),
    row("sigmas that are a number", tiny(sigmas_override=5), "sigmas"),
    row("strength that is no number", tiny(strength=math.nan), "strength|" + REFUSED),
    row("strength that is infinite", tiny(strength=math.inf), REFUSED),
    row("strength that is text", tiny(strength="much"), REFUSED),
    row("strength beyond its limits", tiny(strength=1e308), REFUSED),
    row("a mode that is not there", tiny(mode="x"), REFUSED),
    row("a sampler that is not there", tiny(sampler_override="x"), REFUSED),
    row("a LoRA that is not there", tiny(lora_name="x"), REFUSED),
    row("a LoRA from elsewhere", tiny(lora_name="../../../etc/passwd"), REFUSED),
    row("a LoRA that is null", tiny(lora_name=None), REFUSED),
    row("a LoRA that is a number", tiny(lora_name=5), REFUSED),
    row("a LoRA that is cut", tiny(lora_name="cut.safetensors"), "cut.safetensors"),
    row("a LoRA that is empty", tiny(lora_name="empty.safetensors"), "an empty file"),
    row("a LoRA that is a page", tiny(lora_name="page.safetensors"), "HTML page"),
    row("a LoRA that is not finite", tiny(lora_name="nan.safetensors"), "finite"),
    row("a spec that is deep", tiny(lora_name="bad_spec.safetensors"), "bad_spec.*JSON"),
    row("a name of two lines", tiny(lora_name="a\nb.safetensors")),
    row("a wired LoRA", wired(tiny(), "7", "lora_name", GOOD), REFUSED),  # core: no text for a list
    row("a wired mode that is not there", wired(tiny(), "7", "mode", "x"), "mode"),
    row(
        "a wired sampler that is not there", wired(tiny(), "7", "sampler_override", "x"), "sampler"
    ),
    row("a seed below zero", changed("4", noise_seed=-1), REFUSED),
    row("a seed of 65 bits", changed("4", noise_seed=2**64), REFUSED),
    row("a seed that is no number", changed("4", noise_seed=math.nan), REFUSED),
    row("a seed that is text", changed("4", noise_seed="x"), REFUSED),
    row("a start beyond the end", changed("4", start_step=63), "start_step"),
    row("a start below zero", changed("4", start_step=-1), REFUSED),
    row("a prompt of unknown words", changed("2", text="x y"), "does not know"),
    row(
        "a prompt of a megabyte",
        changed("2", text="red " * 250_000),
        "at most",
    ),
    row("a prompt of zeros", changed("2", text="\0"), "does not know"),
    row("a prompt of half a pair of surrogates", changed("2", text="\ud800"), "does not know"),
    row("a prompt with escapes", changed("2", text="\x1b[31m"), "does not know"),
    row("a prompt that is a number", changed("2", text=5), "does not know"),
    row("a model that is a prompt", changed("4", model=["2", 0]), REFUSED),
    row("a node that is its own input", changed("4", latent_image=["4", 0]), ""),
    row("a folder above", saved(filename_prefix="../../x"), "outside"),
    row("a folder at the root", saved(filename_prefix="/tmp/x"), "outside"),
    row("a prefix of zeros", saved(filename_prefix="a\0b"), "null|filename_prefix"),
    row("a prefix of 300 letters", saved(filename_prefix="x" * 300), "too long"),
    row("a prefix of nothing", saved(filename_prefix="")),
    row("a prefix of two lines", saved(filename_prefix="a\nb")),
    row("a prefix that is a folder", saved(filename_prefix="a/")),
    row("a prefix of percent signs", saved(filename_prefix="%%batch_num%%width%%x%")),
    row(
        "a prefix of half a pair of surrogates",
        saved(filename_prefix="\ud800"),
        "filename_prefix",
    ),
    row("a level beyond its limits", saved(compress_level=10), REFUSED),
    row("nothing to bake", baked(), REFUSED),
    row("nothing to compare", compared(), "nothing to compare"),
    row("a LoRA to compare that is cut", compared(lora_1="cut.safetensors"), "cut.safetensors"),
    row("a picture of 4096 pixels", compared(lora_1=GOOD, cell_size=4096)),
    row(
        "an inspected page",
        {"1": {"class_type": "TurboDistillInspect", "inputs": {"lora_name": "page.safetensors"}}},
        "HTML page",
    ),
    row(
        "an inspected deep spec",
        {
            "1": {
                "class_type": "TurboDistillInspect",
                "inputs": {"lora_name": "bad_spec.safetensors"},
            }
        },
    ),
]


@pytest.mark.parametrize(("prompt", "refused"), ROWS)
def test_a_prompt(prompt: Prompt, refused: str | None, server: ComfyServer) -> None:
    try:
        server.queue(prompt)
    except ComfyUIError as error:
        message = str(error)
    else:
        assert refused is None, "expected a refusal"
        return
    assert refused is not None, message
    assert re.search(refused, message, re.DOTALL), message
    if REFUSED not in message:
        kind = re.match(r"node \S+ \(\w+\) failed: ([\w.]+): ", message)
        assert kind is not None, message
        assert kind[1].rpartition(".")[2] in DOCUMENTED, message
        check_message(message)


def test_the_server_still_paints(server: ComfyServer) -> None:
    """Runs last: nothing above has harmed it."""
    server.queue(server_prompts.tiny_prompt(seed=5))
