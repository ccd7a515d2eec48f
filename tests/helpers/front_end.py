"""ComfyUI's front end in a browser's tab, driven as a person drives it."""

from __future__ import annotations

import io
import json
import urllib.request
from typing import Any

from PIL import Image
from workflow_files import Workflow

START_TIMEOUT_MS = 120_000


class FrontEnd:
    """One tab of the front end, and everything that it complained about since `watch()`."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        page.on("response", self._on_response)

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def _on_response(self, response: Any) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")

    def open(self, query: str = "") -> None:
        """Loads the front end and waits until it works; its own start-up noise is forgotten."""
        self.page.goto(self.url + query)
        self.page.wait_for_function(
            "window.app?.vueAppReady && window.app.canvas?.graph", timeout=START_TIMEOUT_MS
        )
        self.page.wait_for_load_state("networkidle")
        self.complaints.clear()

    def load(self, workflow: Workflow) -> None:
        """Opens a workflow by the front end's own function and waits until it is drawn."""
        self.page.evaluate("async graph => { await app.loadGraphData(graph) }", workflow)
        self.settle()

    def settle(self) -> None:
        """Waits for the requests and the two frames in which widgets find their place."""
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        self.page.wait_for_timeout(200)

    def saved(self) -> Workflow:
        """The graph as the front end would save it."""
        return self.page.evaluate("() => app.graph.serialize()")

    def problems(self) -> list[str]:
        """What a person would see in red: unknown nodes, wrong links, errors; and cut texts."""
        self.look_at(self.boxes(), scale=1)  # what is out of sight has no size
        return [*self.page.evaluate(PROBLEMS), *self.complaints]

    def boxes(self) -> list[list[float]]:
        """[x, y, width, height] of every node and group, with their titles."""
        return self.page.evaluate(BOXES)

    def run(self, free: bool = True) -> None:
        """Presses Run and waits for the end; `free`: with no result kept from before.

        Raises AssertionError with what went wrong.
        """
        if free:
            body = json.dumps({"free_memory": True}).encode()
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/free", body)).close()
        self.page.evaluate(WATCH_RUN)
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function("window.finished !== undefined", timeout=START_TIMEOUT_MS)
        finished = self.page.evaluate("window.finished")
        assert finished == "", finished
        self.settle()

    def images(self, node_type: str) -> list[Image.Image]:
        """The pictures on the first node of that type, as the browser has decoded them."""
        self.page.wait_for_function(IMAGES_SHOWN, arg=node_type, timeout=20_000)
        urls = self.page.evaluate(IMAGE_URLS, node_type)
        return [Image.open(io.BytesIO(self.page.request.get(url).body())) for url in urls]

    def look_at(self, boxes: list[list[float]], scale: float, margin: int = 30) -> None:
        """Makes the window as large as the part of the graph that holds the boxes."""
        left, top = (min(box[i] for box in boxes) - margin for i in (0, 1))
        right, bottom = (max(box[i] + box[i + 2] for box in boxes) + margin for i in (0, 1))
        size = {"width": round((right - left) * scale), "height": round((bottom - top) * scale)}
        self.page.set_viewport_size(size)
        self.page.evaluate(LOOK_AT, [scale, -left, -top])
        self.settle()

    def picture(self, boxes: list[list[float]], scale: float = 1, margin: int = 30) -> bytes:
        """A PNG of the part of the graph that holds the boxes, without menus."""
        hide = self.page.add_style_tag(content=ONLY_THE_GRAPH)
        self.look_at(boxes, scale, margin)
        png = self.page.screenshot()
        hide.evaluate("style => style.remove()")
        return png


BOXES = """() => [
  ...app.canvas.graph.nodes.map(node => [...node.boundingRect]),
  ...app.canvas.graph.groups.map(group => [...group.pos, ...group.size]),
]"""

# A text is cut where it is higher than its frame.
PROBLEMS = """() => {
  const found = []
  for (const node of app.graph.nodes) {
    const name = `${node.type} ${node.id}`
    if (!LiteGraph.registered_node_types[node.type]) found.push(`${name}: unknown type`)
    else if (node.has_errors) found.push(`${name}: has errors`)
  }
  for (const link of app.graph.links.values()) {
    const output = app.graph.getNodeById(link.origin_id)?.outputs[link.origin_slot]
    const input = app.graph.getNodeById(link.target_id)?.inputs[link.target_slot]
    if (!output || !input || !LiteGraph.isValidConnection(output.type, input.type))
      found.push(`link ${link.id} does not fit`)
  }
  for (const box of document.querySelectorAll('[data-testid="error-overlay"]'))
    found.push(`shown: ${box.innerText}`)
  for (const text of document.querySelectorAll('.comfy-markdown .tiptap, .comfy-multiline-input'))
    if (text.scrollHeight > text.clientHeight + 1)
      found.push(`text cut after ${text.clientHeight} of ${text.scrollHeight} pixels: ` +
        (text.value ?? text.innerText).slice(0, 40))
  return found
}"""

WATCH_RUN = """() => {
  window.finished = undefined
  app.api.addEventListener('execution_success', () => { window.finished = '' }, { once: true })
  app.api.addEventListener('execution_error', event => {
    window.finished = event.detail.node_type + ': ' + event.detail.exception_message
  }, { once: true })
}"""

IMAGES_SHOWN = """type => {
  const node = app.graph.nodes.find(node => node.type === type)
  return node?.imgs?.length && node.imgs.every(image => image.complete && image.naturalWidth > 0)
}"""

IMAGE_URLS = """type => {
  const node = app.graph.nodes.find(node => node.type === type)
  return node.imgs.map(image => image.src.replace(/&preview=[^&]*/, ''))
}"""

LOOK_AT = """([scale, x, y]) => {
  app.canvas.resize()
  app.canvas.ds.scale = scale
  app.canvas.ds.offset[0] = x
  app.canvas.ds.offset[1] = y
  app.canvas.setDirty(true, true)
}"""

ONLY_THE_GRAPH = """
  body * { visibility: hidden !important }
  #graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important }
"""
