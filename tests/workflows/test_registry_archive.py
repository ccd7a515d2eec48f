"""What the ComfyUI registry gets: `comfy node publish` packs what .comfyignore lets through."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from pathspec import PathSpec  # installed with mypy
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ignored() -> PathSpec:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    # read as comfy-cli reads it: file_utils._load_comfyignore_spec
    return PathSpec.from_lines("gitignore", (line for line in lines if not line.startswith("#")))


@pytest.mark.parametrize(
    "path",
    [
        "__init__.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "SECURITY.md",
        "nodes/lora.py",
        "distill/contract/spec.py",
        "distill/training/templates/report.html",
        "distill/tiny/model/vae/config.json",
        "distill/tiny/model/transformer/diffusion_pytorch_model.safetensors",
        "configs/tiny_demo.yaml",
        "workflows/tiny_demo.json",
        "workflows/tiny_demo.jpg",
        "web/docs/TurboDistillSampler/en.md",
        "web/docs/TurboDistillSampler/node.jpg",
        "locales/zh/nodeDefs.json",
    ],
)
def test_goes_in(ignored: PathSpec, path: str) -> None:
    assert not ignored.match_file(path)


@pytest.mark.parametrize(
    "path",
    [
        "tests/conftest.py",
        "docs/images/demo.png",
        "docs/images/banner.png",
        "benchmarks/recipe/t0.py",
        ".github/workflows/ci.yml",
        ".ci/run",
    ],
)
def test_stays_out(ignored: PathSpec, path: str) -> None:
    assert ignored.match_file(path)


def test_it_is_small(ignored: PathSpec) -> None:
    """Nobody waits for it in ComfyUI-Manager: two thirds of it are the tiny model."""
    words = ["git", "ls-files", "-z"]  # what comfy-cli packs, before .comfyignore
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("no git repository")
    files = [ROOT / name for name in listed.split("\0") if name and not ignored.match_file(name)]
    sizes = {file: file.stat().st_size for file in files if file.is_file()}
    assert len(sizes) > 100
    assert sum(sizes.values()) < 16e6
    assert max(sizes.values()) < 9e6


def test_icon_and_banner() -> None:
    """Named in pyproject.toml by their address in the repository, of the registry's shapes."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    shapes = {"Icon": ("icon.png", 1.0), "Banner": ("banner.png", 21 / 9)}
    for key, (name, ratio) in shapes.items():
        assert re.search(rf'^{key} = "https://.*/main/docs/images/{name}"$', text, re.MULTILINE)
        with Image.open(ROOT / "docs" / "images" / name) as image:
            assert image.width / image.height == pytest.approx(ratio, rel=0.01)
            assert image.width >= 400
