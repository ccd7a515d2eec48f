"""Texts that the front end shows: translations and help pages, complete for every node.

UPDATE_LOCALES=1 pytest tests/workflows/test_locales_and_help.py   writes locales/en anew
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from distill.utils.comfyui import ComfyServer

ROOT = Path(__file__).parent.parent.parent
LANGUAGES = ("en", "zh")
EXAMPLE = {"en": "\n## Example\n", "zh": "\n## 示例\n"}

pytestmark = pytest.mark.comfy


def locale_file(language: str) -> Path:
    return ROOT / "locales" / language / "nodeDefs.json"


def texts(node: dict[str, Any]) -> dict[str, Any]:
    """A node's own texts in the form of nodeDefs.json."""
    inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {
            name: {"name": name, "tooltip": options["tooltip"]}
            for name, (_, options) in inputs.items()
        },
        "outputs": {
            str(i): {"name": name, "tooltip": tip} for i, (name, tip) in enumerate(outputs)
        },
    }


def keys(tree: Any) -> Any:
    """The nested keys of a locale file without its texts."""
    return {key: keys(value) for key, value in tree.items()} if isinstance(tree, dict) else None


def test_english_is_what_the_nodes_say(our_nodes: dict[str, Any]) -> None:
    expected = {name: texts(node) for name, node in sorted(our_nodes.items())}
    if os.environ.get("UPDATE_LOCALES"):
        text = json.dumps(expected, indent=2, ensure_ascii=False) + "\n"
        locale_file("en").write_text(text, encoding="utf-8")
    assert json.loads(locale_file("en").read_text(encoding="utf-8")) == expected


def test_chinese_is_complete(our_nodes: dict[str, Any]) -> None:
    chinese = json.loads(locale_file("zh").read_text(encoding="utf-8"))
    assert keys(chinese) == keys({name: texts(node) for name, node in our_nodes.items()})
    for name, node in chinese.items():
        tips = [entry["tooltip"] for entry in (*node["inputs"].values(), *node["outputs"].values())]
        for text in (node["description"], *tips):
            assert any("\u4e00" <= c <= "\u9fff" for c in text), f"{name}: {text!r} is not Chinese"


def test_the_server_hands_them_out(server: ComfyServer, our_nodes: dict[str, Any]) -> None:
    translations = server.get("/i18n")
    for language in LANGUAGES:
        assert set(our_nodes) <= set(translations[language]["nodeDefs"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page(
    server: ComfyServer, our_nodes: dict[str, Any], language: str
) -> None:
    for name, node in our_nodes.items():
        # the address that the front end asks for
        url = f"{server.url}/extensions/turbo-distill/docs/{name}/{language}.md"
        with urllib.request.urlopen(url, timeout=60) as response:
            page = response.read().decode()
        assert page.startswith(f"# {node['display_name']}\n")
        for field in (*texts(node)["inputs"], *node["output_name"]):
            assert f"`{field}`" in page, f"{name}/{language}.md says nothing about {field}"
        assert EXAMPLE[language] in page
        pictures = re.findall(r"!\[.+\]\((.+)\)", page)
        assert pictures, f"{name}/{language}.md has no picture"
        for picture in pictures:  # relative to docs/, as the front end reads them
            assert picture.startswith(f"{name}/")
            address = f"{server.url}/extensions/turbo-distill/docs/{picture}"
            with urllib.request.urlopen(address, timeout=60) as response:
                assert response.headers["Content-Type"] == "image/jpeg"


def test_pictures_are_small() -> None:
    sizes = [picture.stat().st_size for picture in (ROOT / "web" / "docs").glob("*/*.jpg")]
    assert max(sizes) < 100_000
    assert sum(sizes) < 600_000


def test_no_page_without_a_node(our_nodes: dict[str, Any]) -> None:
    assert {page.name for page in (ROOT / "web" / "docs").iterdir()} == set(our_nodes)
