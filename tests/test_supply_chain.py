"""What SECURITY.md says of where code and weights come from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Where the package may fetch something, or name something that a library fetches
FETCHING = {
    "distill/evaluation/features.py",  # CLIP and DINO of `eval` and of the gates
    "distill/models/dino.py",  # of the GAN
    "distill/models/hub.py",  # base models
    "distill/models/load.py",  # of the folder that hub.py found
    "distill/models/text_encoder.py",
    "distill/tiny/pretrain.py",  # its own folder
    "distill/tiny/quality.py",
    "distill/utils/comfyui.py",  # the pinned ComfyUI of the tests, and the server that it starts
}
FETCHES = {"from_pretrained", "snapshot_download", "hf_hub_download", "urlopen", "urlretrieve"}
NETWORK = {"requests", "httpx", "urllib3", "socket", "urllib.request", "http.client", "aiohttp"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    for top in ("distill", "nodes"):
        for file in sorted((ROOT / top).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else function.id, node


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_may_only_read(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    used = re.findall(r"^ *(?:- )?uses: *(.+)$", text, re.MULTILINE)
    assert used
    for line in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+\b.*", line), line
    assert re.findall(r"^ *(\w[\w-]*): *write", text, re.MULTILINE) == []
    assert "\npermissions:\n  contents: read\n" in text
    for package in re.findall(r"pip install (\S*(?:comfy-cli|pip-audit|bandit)\S*)", text):
        assert "==" in package


def test_one_version_of_an_action_everywhere() -> None:
    pins: dict[str, set[str]] = {}
    for workflow in WORKFLOWS:
        for name, commit in re.findall(r"uses: *(\S+)@(\S+)", workflow.read_text("utf-8")):
            pins.setdefault(name, set()).add(commit)
    assert {name: commits for name, commits in pins.items() if len(commits) > 1} == {}


def test_what_fetches_is_known() -> None:
    found = {
        name
        for name, tree in sources()
        if FETCHES & {function for function, _ in called(tree)}
        or NETWORK & imported(tree) - ({"aiohttp"} if name.startswith("nodes/") else set())
    }
    assert found <= FETCHING
    assert not any(name.startswith("nodes/") for name in found)


def test_presets_name_the_hub_ids_that_security_lists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for preset in (ROOT / "configs").glob("*.yaml"):
        values = re.findall(r"^[^#]*?\b(?:path|features|clip): *([^,}\s]+/[^,}\s]+)",
                            preset.read_text(encoding="utf-8"), re.MULTILINE)  # fmt: skip
        for value in values:
            assert f"`{value}`" in text, (preset.name, value)
