"""The help page of every node, opened as a person does it: select the node, press Info."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
NODES = sorted(page.parent.name for page in (ROOT / "web" / "docs").glob("*/en.md"))

SELECT = """type => {
  const node = LiteGraph.createNode(type)
  app.graph.add(node)
  app.canvas.centerOnNode(node)
  app.canvas.selectNode(node)
}"""

# The pictures of the page in the info panel, once they have loaded or failed.
PICTURES = """title => {
  const heading = [...document.querySelectorAll('h1')].find(h => h.innerText === title)
  const pictures = [...(heading?.parentElement.querySelectorAll('img') ?? [])]
  if (!pictures.length || !pictures.every(picture => picture.complete)) return null
  return pictures.map(picture => picture.naturalWidth)
}"""


@pytest.mark.parametrize("node", NODES)
def test_it_opens_with_its_pictures(front_end: Any, node: str) -> None:
    page = (ROOT / "web" / "docs" / node / "en.md").read_text(encoding="utf-8")
    title = page.splitlines()[0].removeprefix("# ")
    front_end.page.evaluate(SELECT, node)
    front_end.page.get_by_test_id("info-button").click()
    shown = front_end.page.wait_for_function(PICTURES, arg=title, timeout=20_000).json_value()
    assert len(shown) == page.count("](" + node + "/")
    assert all(width > 100 for width in shown), "a picture is missing"
    assert front_end.complaints == []
