"""A prompt for a real server, and what the server says while it works on one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from distill.utils.comfyui import ComfyServer

TINY_DEMO = Path(__file__).parents[1] / "data" / "tiny_demo_api.json"
Prompt = dict[str, Any]
Messages = dict[str, list[dict[str, Any]]]


def tiny_prompt(
    nodes: Prompt | None = None, *, model: str = "1", count: int = 2, seed: int = 1
) -> Prompt:
    """The tiny demo's API prompt with nodes added or replaced, and the model that is sampled."""
    prompt = json.loads(TINY_DEMO.read_text(encoding="utf-8")) | (nodes or {})
    prompt["3"]["inputs"]["batch_size"] = count
    prompt["4"]["inputs"] |= {"model": [model, 0], "noise_seed": seed}
    return prompt


def listen(server: ComfyServer, prompt: Prompt, *until: str) -> Messages:
    """Queues a prompt as the front end does, and returns its messages by type.

    until: messages to wait for, in any order; by default the one that the prompt has ended well.
    """
    awaited = set(until or ["execution_success"])
    return asyncio.run(asyncio.wait_for(_messages(server.url, prompt, awaited), 120))


async def _messages(url: str, prompt: Prompt, until: set[str]) -> Messages:
    import aiohttp  # comes with ComfyUI's requirements

    messages: Messages = {}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/ws?clientId=test") as socket,
    ):
        await socket.receive()  # the status: the socket is known to the server
        body = {"prompt": prompt, "client_id": "test"}
        async with session.post(f"{url}/prompt", json=body) as answer:
            assert answer.status == 200, await answer.text()
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                event = message.json()
                messages.setdefault(event["type"], []).append(event["data"])
                if until <= messages.keys():
                    break
    return messages
