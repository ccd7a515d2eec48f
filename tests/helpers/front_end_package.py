"""A front end of a given version, for ComfyUI's --front-end-root: from the package index, kept."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from distill.utils.comfyui import cache_dir

INSIDE_WHEEL = "comfyui_frontend_package/static"


def front_end_root(version: str) -> Path:
    """The folder with its index.html; 30 MB are downloaded where it is not there yet."""
    kept = cache_dir() / f"front-end-{version}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as work:
            wanted = f"comfyui-frontend-package=={version}"
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*download, "--dest", work, wanted], check=True)
            with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
                files = [name for name in wheel.namelist() if not name.endswith(".map")]
                wheel.extractall(work, files)
            (Path(work) / INSIDE_WHEEL).rename(kept)
    return kept
