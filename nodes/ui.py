"""What nodes show: the menu category, reports, and messages to whoever asked for the running
prompt, also from threads and after a node is done.

A report is text; its lines that start with WARNING are warnings. web/turbo_reports.js shows it on
the node. A node gives it back as `ui` output too: core keeps that in the history and sends it again
where the node is cached.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comfy_execution.utils import get_executing_context

CATEGORY = "Turbo Distill"  # of every node, in ComfyUI's menus
WARNING = "Warning: "
EVENT = "turbo_distill.report"


def server() -> Any:
    """ComfyUI's PromptServer; None in tests and scripts."""
    from server import PromptServer  # in the call: ComfyUI's own module, not ready at import time

    return getattr(PromptServer, "instance", None)


@dataclass(frozen=True)
class FrontEnd:
    """A node of a prompt, and the client that queued it."""

    server: Any
    client_id: str
    prompt_id: str
    node_id: str
    display_id: str  # differs inside of expanded nodes
    node_type: str

    @classmethod
    def of(cls, hidden: Any, node_type: str) -> FrontEnd | None:
        """From a node's `hidden` with unique_id and dynprompt, while it runs; None where nobody
        listens.
        """
        running, context = server(), get_executing_context()
        if running is None or context is None or running.client_id is None:
            return None
        ids = (running.client_id, context.prompt_id, hidden.unique_id, display_id_of(hidden))
        return cls(running, *ids, node_type)

    def show_images(self, shown: list[dict[str, str]]) -> None:
        """Shows saved images on the node, in the place of those that are there."""
        output = {"node": self.node_id, "display_node": self.display_id}
        self._send("executed", {**output, "output": {"images": shown}})

    def show_error(self, error: Exception) -> None:
        """Shows an error as if the node had raised it."""
        self._send(
            "execution_error",
            {
                "node_id": self.display_id,
                "node_type": self.node_type,
                "executed": [],
                "exception_message": str(error),
                "exception_type": type(error).__name__,
                "traceback": [],
                "current_inputs": {},
                "current_outputs": [],
            },
        )

    def _send(self, event: str, message: dict[str, Any]) -> None:
        self.server.send_sync(event, {**message, "prompt_id": self.prompt_id}, self.client_id)


def display_id_of(hidden: Any) -> str:
    """Where a node's outputs are shown: in expanded nodes not at the node itself.

    hidden: with unique_id and dynprompt.
    """
    node_id, graph = hidden.unique_id, hidden.dynprompt
    return node_id if graph is None else graph.get_display_node_id(node_id)


def show_on_node(
    text: str, node_id: str | None, warnings: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Shows a report on a node while it still runs, logs the warnings, and returns the `ui` output
    that keeps the report there. An empty text takes the last one away.
    """
    for warning in warnings:
        logging.warning("Turbo Distill: %s", warning)
    _send(node_id, report=text)
    return {"report": [text] if text else []}


def warn_on_node(warning: str, node_id: str | None) -> None:
    """Logs a warning and adds it to the report of a node that is done."""
    logging.warning("Turbo Distill: %s", warning)
    _send(node_id, note=WARNING + warning)


def with_warnings(lines: Sequence[str], warnings: Sequence[str]) -> str:
    """A report: what was done, then a line per warning."""
    return "\n".join([*lines, *(WARNING + warning for warning in warnings)])


def _send(node_id: str | None, **shown: str) -> None:
    instance = server()
    if instance is not None and node_id is not None and instance.client_id is not None:
        instance.send_sync(EVENT, {"node": node_id, **shown}, instance.client_id)
