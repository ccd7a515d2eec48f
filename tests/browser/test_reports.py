"""What the nodes report, as a person finds it after the run: in both renderers, in the front end
that ComfyUI pins and in a newer one.
"""

from __future__ import annotations

import json
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import browser_server
import pytest
from front_end import FrontEnd
from front_end_package import front_end_root
from workflow_files import Workflow, shipped

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parents[2]
PINNED, NEWER = "pinned", "1.58.1"
RENDERERS = {"canvas": False, "vue": True}
LOADER, SAMPLER = "TurboDistillTinyLoader", "TurboDistillSampler"

# Of the first node of a type, in the open graph: its report as it is drawn.
REPORT = """type => {
  const node = app.canvas.graph.nodes.find(node => node.type === type)
  const element = node?.widgets?.find(widget => widget.name === 'turbo_report')?.element
  if (!element) return null
  const { width, height } = element.getBoundingClientRect()
  return {
    visible: element.checkVisibility({ visibilityProperty: true }) && width > 200 && height > 20,
    cut: element.scrollHeight > element.clientHeight + 1,
    text: element.innerText,
    warnings: [...element.querySelectorAll('.warning')].map(line => line.innerText),
  }
}"""

NOTE = """type => {
  const node = app.graph.nodes.find(node => node.type === type)
  const detail = { node: String(node.id), note: 'Warning: a kernel was dropped.' }
  app.api.dispatchEvent(new CustomEvent('turbo_distill.report', { detail }))
}"""

CONVERT = """() => {
  const types = ['TurboDistillTinyLoader', 'TurboDistillSampler']
  app.graph.convertToSubgraph(new Set(app.graph.nodes.filter(node => types.includes(node.type))))
}"""

OPEN_SUBGRAPH = """() => {
  const node = app.rootGraph.nodes.find(node => node.subgraph)
  app.canvas.openSubgraph(node.subgraph, node)
}"""


def set_renderer(url: str, vue: bool) -> None:
    """As in the settings dialog; a page has to be opened anew."""
    body = json.dumps(vue).encode()
    request = urllib.request.Request(f"{url}/api/settings/Comfy.VueNodes.Enabled", body)
    urllib.request.urlopen(request).close()


@pytest.fixture(scope="module", params=[PINNED, NEWER])
def url(request: pytest.FixtureRequest, server: ComfyServer, comfyui_path: Path) -> Iterator[str]:
    """Of a ComfyUI with this front end."""
    with ExitStack() as stack:
        if request.param != PINNED:
            arguments = ("--cpu", "--front-end-root", str(front_end_root(request.param)))
            server = stack.enter_context(ComfyServer(comfyui_path, ROOT, arguments=arguments))
            browser_server.fill(server)
        yield server.url


@pytest.fixture(scope="module", params=list(RENDERERS))
def page(request: pytest.FixtureRequest, url: str, chromium: Any) -> Iterator[FrontEnd]:
    """A tab of its own with this renderer."""
    set_renderer(url, RENDERERS[request.param])
    page = chromium.new_page(viewport={"width": 1600, "height": 1000})
    front_end = FrontEnd(page, url)
    front_end.open()
    page.wait_for_function("app.graph.nodes.length")  # the one of the first visit
    yield front_end
    page.close()
    set_renderer(url, False)


def demo(start_step: int = 0) -> Workflow:
    """tiny_demo as a workflow that never ran; start_step 1 of it is worth a warning."""
    workflow = shipped("tiny_demo")
    workflow["id"] = str(uuid.uuid4())
    sampler = next(node for node in workflow["nodes"] if node["type"] == SAMPLER)
    sampler["widgets_values"][:3] = [7, "fixed", start_step]
    return workflow


def report_of(page: FrontEnd, node_type: str) -> dict[str, Any]:
    """Raises where there is none, or where it is not to be read."""
    page.page.wait_for_function(f"type => ({REPORT})(type)", arg=node_type, timeout=10_000)
    page.look_at(page.boxes(), scale=1)
    report = page.page.evaluate(REPORT, node_type)
    assert report["visible"], report
    assert not report["cut"], report
    return report


def reload(page: FrontEnd) -> None:
    """Opens the page anew and waits until the workflow is back."""
    workflow = page.page.evaluate("app.graph.id")
    page.open()
    page.page.wait_for_function(
        "id => app.graph.id === id && app.graph.nodes.length", arg=workflow, timeout=30_000
    )
    page.settle()


def heights(workflow: Workflow) -> dict[int, float]:
    return {node["id"]: node["size"][1] for node in workflow["nodes"] if "Turbo" in node["type"]}


def test_a_report_is_there_after_the_run_and_after_a_reload(page: FrontEnd) -> None:
    page.load(demo(start_step=1))
    assert page.page.evaluate(REPORT, LOADER) is None, "a box without content"
    before = page.saved()
    page.run()
    check_demo(page, before)
    reload(page)
    check_demo(page, before)


def check_demo(page: FrontEnd, before: Workflow) -> None:
    """The reports of a run of `demo(start_step=1)`."""
    loader, sampler = report_of(page, LOADER), report_of(page, SAMPLER)
    assert "2 steps at sigmas 1, 0.7155, 0" in loader["text"]
    assert "matched: 48 of 48 modules" in loader["text"]
    assert loader["warnings"] == []
    assert sampler["text"].startswith("1 step(s) at 0.7155, 0; euler")
    (warning,) = sampler["warnings"]
    assert "from an empty latent" in warning
    assert heights(page.saved()) == heights(before), "the report is saved as empty space"
    assert "turbo_report" not in json.dumps(page.saved())
    assert page.complaints == []


def test_a_cached_node_reports_again(page: FrontEnd) -> None:
    page.load(demo())
    page.run()
    assert "CFG 1" in report_of(page, SAMPLER)["text"]
    page.load(demo())  # another workflow, of which the history knows nothing, with the same values
    assert page.page.evaluate(REPORT, SAMPLER) is None
    page.run(free=False)
    assert "CFG 1" in report_of(page, SAMPLER)["text"]
    assert "matched: 48 of 48 modules" in report_of(page, LOADER)["text"]
    page.page.evaluate(NOTE, LOADER)  # what is told in the middle of sampling
    page.run(free=False)
    loader = report_of(page, LOADER)
    assert "matched: 48 of 48 modules" in loader["text"]
    assert loader["warnings"] == ["Warning: a kernel was dropped."]
    page.load(page.saved())  # as undo does; the nodes are new
    assert "CFG 1" in report_of(page, SAMPLER)["text"]


def test_it_is_in_a_sub_graph(page: FrontEnd) -> None:
    page.load(demo(start_step=1))
    page.page.evaluate(CONVERT)
    page.settle()
    page.run()
    page.page.evaluate(OPEN_SUBGRAPH)
    page.settle()
    assert "matched: 48 of 48 modules" in report_of(page, LOADER)["text"]
    (warning,) = report_of(page, SAMPLER)["warnings"]
    assert "from an empty latent" in warning
