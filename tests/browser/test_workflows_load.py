"""The shipped workflows in the front end: dropped, opened as templates, started with Run."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from workflow_files import FILES, FOLDER, read, shipped

RUNNABLE = [file for file in FILES if file.stem.startswith("tiny_")]


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_it_loads_without_complaint_and_unchanged(front_end: Any, file: Path) -> None:
    workflow = read(file)
    front_end.load(workflow)
    assert front_end.problems() == []
    saved = {node["id"]: node for node in front_end.saved()["nodes"]}
    assert set(saved) == {node["id"] for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        for field in ("pos", "size", "widgets_values", "properties"):
            assert saved[node["id"]].get(field, []) == node[field], f"{node['type']}: {field}"
    assert len(front_end.saved()["links"]) == len(workflow["links"])


def test_a_broken_workflow_is_noticed(front_end: Any) -> None:
    workflow = shipped("tiny_demo")
    broken = copy.deepcopy(workflow)
    sampler = next(node for node in broken["nodes"] if node["type"] == "TurboDistillSampler")
    sampler["type"] = "TurboDistillRenamed"
    note = next(node for node in broken["nodes"] if node["type"] == "MarkdownNote")
    note["size"] = [300, 120]
    front_end.load(broken)
    problems = "\n".join(front_end.problems())
    assert "TurboDistillRenamed 4: unknown type" in problems
    assert "text cut" in problems


DROP = """text => {
  const data = new DataTransfer()
  data.items.add(new File([text], 'dropped.json', { type: 'application/json' }))
  const at = { dataTransfer: data, bubbles: true, cancelable: true, clientX: 800, clientY: 500 }
  document.dispatchEvent(new DragEvent('drop', at))
}"""


def test_a_dropped_file_opens(front_end: Any) -> None:
    file = FOLDER / "tiny_demo.json"
    front_end.page.evaluate(DROP, file.read_text(encoding="utf-8"))
    front_end.page.wait_for_function(
        "app.graph.nodes.some(node => node.type === 'TurboDistillSampler')", timeout=10_000
    )
    front_end.settle()
    assert front_end.problems() == []
    assert len(front_end.saved()["nodes"]) == len(read(file)["nodes"])


def test_the_template_browser_opens_it(front_end: Any, file: Path) -> None:
    front_end.open(f"/?template={file.stem}&source=turbo-distill")
    front_end.page.wait_for_function(
        "count => app.graph.nodes.length === count", arg=len(read(file)["nodes"]), timeout=20_000
    )
    front_end.settle()
    assert front_end.problems() == []


def test_file_names_are_filled_in_as_for_core(front_end: Any) -> None:
    front_end.load(shipped("tiny_fast_save"))
    sent = front_end.page.evaluate(
        """async () => {
          for (const node of app.graph.nodes)
            for (const widget of node.widgets ?? [])
              if (widget.name === 'filename_prefix')
                widget.value = '%date:yyyy%/%TurboDistillTinyText.text%_%batch_num%'
          return Object.values((await app.graphToPrompt()).output)
            .map(node => node.inputs.filename_prefix).filter(Boolean)
        }"""
    )
    assert len(sent) == 2
    for prefix in sent:
        assert re.fullmatch(r"20\d\d/a red letter K_%batch_num%", prefix)


@pytest.mark.parametrize("runnable", RUNNABLE, ids=lambda file: file.stem)
def test_run_shows_a_picture(front_end: Any, runnable: Path) -> None:
    front_end.load(read(runnable))
    front_end.run()
    types = {node["type"] for node in read(runnable)["nodes"]}
    pictures = front_end.images("SaveImage" if "SaveImage" in types else "TurboDistillSaveImage")
    assert pictures
    for picture in pictures:
        ranges = [high - low for low, high in picture.convert("RGB").getextrema()]
        assert max(ranges) > 100, "the picture is flat"
    assert front_end.problems() == []
