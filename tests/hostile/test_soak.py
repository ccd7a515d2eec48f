"""300 prompts to a real server: neither its memory nor its time per prompt grows.

Memory is compared with what it was before. Time is compared with a fresh server's, which gets the
last hundred prompts too, each as soon as the old one has answered it: so whatever else the machine
does slows both. 45 s on two quiet cores, 112 s beside two processes that never rest; in four runs
the ratios were at most 1.003 (memory), 1.000 (CPU) and 1.054 (latency). `-m soak` starts it alone.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import server_prompts
from safetensors.torch import load_file, save_file
from server_prompts import Prompt

from distill.contract.metadata import read_header
from distill.contract.tiny import TINY_DIR
from distill.utils.comfyui import ComfyServer

pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.soak]

ROOT = Path(__file__).parents[2]
LORA = TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors"
THIRD = 100  # prompts; the three thirds hold the same ones with other seeds
MEMORY = 1.02  # limit of the last third to the second
CPU, LATENCY = 1.15, 1.2  # limits of the old server to the fresh one


@contextmanager
def serving(comfyui: Path) -> Iterator[ComfyServer]:
    with ComfyServer(comfyui, pack=ROOT) as server:
        tensors, header = load_file(LORA), read_header(LORA)
        for number in range(3):  # more than the loader keeps
            other = {k: v if v.ndim < 2 else v * (1 + number / 10) for k, v in tensors.items()}
            save_file(other, server.folder("loras") / f"{number}.safetensors", header)
        yield server


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": f"TurboDistill{kind}", "inputs": inputs}


def prompt(mix: random.Random) -> Prompt:
    """One way through the pack: one or two loaders, any mode and strength, any way to the file."""
    nodes = {"1": node("TinyLoader", lora="teacher (no LoRA)")}
    model = "1"
    for stacked in range(mix.choice([1, 1, 2])):
        nodes[f"l{stacked}"] = node(
            "LoraLoader",
            model=[model, 0],
            lora_name=f"{mix.randrange(3)}.safetensors",
            strength=mix.choice([0.0, 0.3, 0.5, 1.0, 1.2, -0.5]),
            mode=mix.choice(["auto", "merge", "bypass"]),
            sigmas_override=mix.choice(["", "", "1, 0.6, 0", "1, 0.8, 0.4, 0"]),
            sampler_override=mix.choice(["auto", "euler", "renoise"]),
        )
        model = f"l{stacked}"
    if mix.random() < 0.2:
        nodes["a"] = node("Accelerate", model=[model, 0], attention="core")
        model = "a"
    if mix.random() < 0.2:  # refused in the middle of the graph
        nodes["l0"]["inputs"]["sigmas_override"] = "1, 2, 0"
    made = server_prompts.tiny_prompt(nodes, model=model, count=1)
    ways = mix.randrange(4)
    if ways == 0:
        made["5"] = node("Decode", samples=["4", 0], vae=["1", 1])
    if ways == 1:
        made["6"] = node("SaveImage", images=["5", 0], filename_prefix="soak")
    if ways == 2:
        inputs = {"width": 64, "height": 64, "batch_size": 1, "noise_seed": 1}
        links = {"model": [model, 0], "positive": ["2", 0], "vae": ["1", 1]}
        made = {k: v for k, v in made.items() if k not in "3456"}
        made["6"] = node("Images", **links, **inputs, filename_prefix="soak")
    return made


def seeded(prompt: Prompt, seed: int) -> Prompt:
    """The same prompt with another seed, so that nothing but models is cached."""
    text = json.dumps(prompt)
    return json.loads(
        text, object_hook=lambda d: d | {"noise_seed": seed} if "noise_seed" in d else d
    )


@dataclass
class Work:
    """What a server's prompts took, one by one."""

    rss_mib: list[float] = field(default_factory=list)  # held afterwards
    cpu_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)

    def do(self, server: ComfyServer, prompt: Prompt) -> None:
        pid = server._process.pid
        before = cpu_seconds(pid)
        status = run(server, prompt)
        times = [message["timestamp"] for _, message in status["messages"]]
        self.cpu_s.append(cpu_seconds(pid) - before)
        self.latency_s.append((max(times) - min(times)) / 1000)
        self.rss_mib.append(rss_mib(pid))
        self.done.append(status["status_str"] == "success")


def run(server: ComfyServer, prompt: Prompt) -> dict[str, Any]:
    """The status in the history, also of a prompt that fails."""
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(
        server.url + "/prompt", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        prompt_id = json.load(answer)["prompt_id"]
    for _ in range(3000):
        history = server.get(f"/history/{prompt_id}")
        if prompt_id in history:
            return history[prompt_id]["status"]
        time.sleep(0.02)
    raise TimeoutError(server.log[-2000:])


def rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_nothing_grows(comfyui_path: Path, record_property: Any) -> None:
    mix, seeds = random.Random(0), itertools.count(1)
    prompts = [prompt(mix) for _ in range(THIRD)]
    thirds, fresh = [Work(), Work(), Work()], Work()
    with serving(comfyui_path) as old:
        for third in thirds[:2]:
            for one in prompts:
                third.do(old, seeded(one, next(seeds)))
        with serving(comfyui_path) as new:
            for one in prompts:
                again = seeded(one, next(seeds))
                thirds[2].do(old, again)
                fresh.do(new, again)
    second, last = thirds[1:]
    assert second.done == last.done == fresh.done
    assert THIRD / 2 < sum(last.done) < THIRD, "most are painted, some refused"
    ratios = {
        "memory": median(last.rss_mib) / median(second.rss_mib),
        "cpu": typical(last.cpu_s, fresh.cpu_s),
        "latency": typical(last.latency_s, fresh.latency_s),
    }
    record_property("ratios", str(ratios))
    sys.stdout.write(f"{ratios}\n")
    assert ratios["memory"] < MEMORY, ratios
    assert ratios["cpu"] < CPU, ratios
    assert ratios["latency"] < LATENCY, ratios


def typical(old: list[float], fresh: list[float]) -> float:
    """The median of the ratios, prompt by prompt."""
    return median([a / b for a, b in zip(old, fresh, strict=True) if b > 0])
