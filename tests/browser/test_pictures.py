"""The pictures that the repository keeps: thumbnails of the workflows, nodes for the help pages.

UPDATE_PICTURES=1 pytest tests/browser/test_pictures.py -m browser   writes them anew
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from workflow_files import FILES, Workflow, read, shipped

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(page.parent for page in (ROOT / "web" / "docs").glob("*/en.md"))
THUMBNAIL, NODE = 640, 760  # pixels

# Left out of a thumbnail: what every graph has, and what says nothing at this size.
EDGES = {
    *("UNETLoader", "CLIPLoader", "VAELoader"),
    *("SaveImage", "TurboDistillSaveImage", "MarkdownNote"),
}

SAVERS = ("SaveImage", "TurboDistillSaveImage")

CUSTOM = "tiny_sampler_custom_advanced"

# Where a node is shown for its help page, and which others are shown with it.
EXAMPLES = {
    "TurboDistillLoraLoader": ("tiny_your_own_lora", ()),
    "TurboDistillInspect": ("tiny_your_own_lora", ()),
    "TurboDistillSampler": ("tiny_demo", ("TurboDistillTinyText", "EmptySD3LatentImage")),
    "TurboDistillSigmas": (CUSTOM, ("SamplerCustomAdvanced",)),
    "TurboDistillSamplerSelect": (CUSTOM, ("TurboDistillSigmas", "SamplerCustomAdvanced")),
    "TurboDistillTinyLoader": ("tiny_demo", ()),
    "TurboDistillTinyText": ("tiny_demo", ("EmptySD3LatentImage",)),
    "TurboDistillCompare": ("tiny_compare", ()),
    "TurboDistillDecode": ("tiny_fast_save", ("TurboDistillSaveImage",)),
    "TurboDistillSaveImage": ("tiny_fast_save", ()),
    "TurboDistillImages": ("tiny_fast_save", ()),
}

CARD = """<!doctype html><meta charset="utf-8"><style>
  body { margin: 0; width: 640px; height: 640px; overflow: hidden; background: #14151a;
    color: #f4f4f5; font-family: Inter, "DejaVu Sans", sans-serif; border-top: 10px solid #ffb13b;
    display: flex; flex-direction: column; box-sizing: border-box; padding: 32px }
  small { font-size: 22px; color: #a1a1aa }
  h1 { font-size: SIZEpx; line-height: 1.12; margin: 8px 0 24px }
  div { flex: 1; min-height: 0; background: url(PICTURE) center / contain no-repeat }
</style><small>Turbo Distill</small><h1>TITLE</h1><div></div>"""

# The others are shown alone, with these values: they work on files of many gigabytes.
ALONE = {
    "TurboDistillAccelerate": {},
    "TurboDistillBake": {
        "base_model": "qwen_image_2512_bf16.safetensors",
        "lora_name": "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors",
    },
    "TurboDistillBakedLoader": {"model_name": "qwen_image_turbo_baked.safetensors"},
    "TurboDistillPrompt": {
        "text": "A small shop at dusk, the sign above its door reads FRESH BREAD",
        "text_encoder": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    },
}

ADD = """([type, values]) => {
  const node = LiteGraph.createNode(type)
  app.graph.add(node)
  for (const widget of node.widgets) widget.value = values[widget.name] ?? widget.value
  node.setSize([420, node.size[1]])
}"""


def runs_here(workflow: Workflow) -> bool:
    """Whether it needs no model that is not in the repository."""
    return not any(node["properties"].get("models") for node in workflow["nodes"])


def saver_of(workflow: Workflow) -> str:
    """The type of the node that shows its pictures."""
    return next(node["type"] for node in workflow["nodes"] if node["type"] in SAVERS)


def title_of(workflow: Workflow) -> str:
    """The heading of its first note."""
    texts = [n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "MarkdownNote"]
    return next(text for text in texts if text.startswith("# ")).splitlines()[0][2:]


def montage(pictures: list[Image.Image]) -> bytes:
    """Two rows at most, pixels kept sharp: the models work at 64 x 64."""
    columns = -(-len(pictures) // (2 if len(pictures) > 2 else 1))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    scale = max(1, 560 // max(sheet.size))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def card(front_end: Any, title: str, png: bytes) -> bytes:
    """A square PNG with a heading over a picture, laid out in a tab of its own."""
    page = front_end.page.context.browser.new_page(
        viewport={"width": THUMBNAIL, "height": THUMBNAIL}
    )
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    text = CARD.replace("SIZE", "56" if len(title) < 30 else "46")
    page.set_content(text.replace("TITLE", html.escape(title)).replace("PICTURE", url))
    page.evaluate("document.fonts.ready")
    drawn = page.screenshot()
    page.close()
    return drawn


def boxes_of(front_end: Any, types: Collection[str]) -> list[list[float]]:
    """The frames of the nodes of these types."""
    return front_end.page.evaluate(
        """types => app.graph.nodes.filter(node => types.includes(node.type))
          .map(node => [...node.boundingRect])""",
        list(types),
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_thumbnail(front_end: Any, keep: Any, file: Path) -> None:
    workflow = read(file)
    front_end.load(workflow)
    if runs_here(workflow):
        front_end.run()
        png = montage(front_end.images(saver_of(workflow)))
    else:
        middle = {node["type"] for node in workflow["nodes"]} - EDGES
        png = front_end.picture(boxes_of(front_end, middle), margin=60)
    drawn = card(front_end, title_of(workflow), png)
    with Image.open(io.BytesIO(drawn)) as image:
        assert image.size == (THUMBNAIL, THUMBNAIL)
        assert image.convert("L").crop((32, 320, 608, 608)).getextrema()[1] > 60, "no picture"
    keep(drawn, file.with_suffix(".jpg"), THUMBNAIL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_node_in_its_help_page(front_end: Any, keep: Any, page: Path) -> None:
    name, companions = EXAMPLES.get(page.name, (None, ()))
    if name is None:
        front_end.page.evaluate(ADD, [page.name, ALONE[page.name]])
    else:
        workflow = shipped(name)
        front_end.load(workflow)
        if runs_here(workflow):
            front_end.run()
    assert front_end.problems() == []
    png = front_end.picture(boxes_of(front_end, (page.name, *companions)))
    with Image.open(io.BytesIO(png)) as image:
        assert min(image.size) > 100
    keep(png, page / "node.jpg", NODE)


def test_comparison_in_its_help_page(front_end: Any, keep: Any) -> None:
    workflow = shipped("tiny_compare")
    front_end.load(workflow)
    front_end.run()
    (grid,) = front_end.images("SaveImage")
    file = io.BytesIO()
    grid.save(file, "PNG")
    assert grid.width > 2 * 256
    keep(file.getvalue(), ROOT / "web" / "docs" / "TurboDistillCompare" / "grid.jpg", NODE)
