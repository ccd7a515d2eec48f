"""A run's report in a real browser: wide and narrow, light and dark, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.config import load_config, save_config
from distill.training.report import write_report

ROOT = Path(__file__).parents[2]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with curves, gates and three previews."""
    folder = tmp_path_factory.mktemp("report") / "run"
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", [f"run_dir={folder}", "select=best"])
    save_config(config, folder / "config.yaml")
    lines: list[dict[str, Any]] = []
    for step in range(10, 901, 10):
        speed = {"seconds_per_step": 0.5, "samples_per_second": 64, "memory_gib": 1.2}
        loss = {"loss/pcm": 1 / step, "grad_norm/student": 1 / step}
        lines.append({"step": step, "stage": "pcm", **loss, **speed})
        if step % 300 == 0:
            ratio = {"preview/diversity_ratio": step / 900, "preview/score": 1 / step}
            lines.append({"step": step, "stage": "pcm", **ratio, "preview/failed": []})
            picture = folder / "previews" / f"step-{step:06d}.png"
            picture.parent.mkdir(exist_ok=True)
            Image.linear_gradient("L").convert("RGB").resize((700, 1000)).save(picture)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "best.json").write_text(json.dumps({"best": 900}))
    return write_report(folder)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_opens(size: str, scheme: str, page_file: Path, chromium: Any) -> None:
    width, height = SIZES[size]
    context = chromium.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.images.length") == 3
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    drawings = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(drawings) == 6
    assert min(drawings) > 100
    background, ink = page.evaluate(
        "[document.body, document.querySelector('svg')].map(e => getComputedStyle(e))"
        ".map((s, i) => s[['backgroundColor', 'color'][i]].match(/\\d+/g).map(Number)[0])"
    )
    assert (background > 200 > ink) if scheme == "light" else (background < 60 < ink)
    page.get_by_alt_text("student and teacher at step 900").click()
    assert page.locator("#step-900").bounding_box()["width"] >= width - 20  # enlarged
    page.locator("#step-900 .close").click()
    assert page.locator("#step-900").bounding_box()["width"] < width
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in requests), requests
    context.close()
