"""What the ComfyUI registry gets: `comfy node publish` packs what .comfyignore lets through."""

from __future__ import annotations

from pathlib import Path

import pytest
from pathspec import PathSpec  # installed with mypy

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
        "nodes/lora.py",
        "distill/contract/spec.py",
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
    "path", ["tests/conftest.py", "docs/images/demo.png", ".github/workflows/ci.yml", ".ci/run"]
)
def test_stays_out(ignored: PathSpec, path: str) -> None:
    assert ignored.match_file(path)
