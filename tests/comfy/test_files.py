"""File names that come by a wire, as loops, lists and selectors of ComfyUI give them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.contract.bake.merge import bake
from distill.contract.bake.plan import plan_bake
from distill.utils.comfyui import ComfyServer, ComfyUIError

TINY_DIR = Path(__file__).parents[2] / "distill" / "tiny" / "model"
TEACHER = "teacher (no LoRA)"
LORAS = ("lora_1", "lora_2", "lora_3", "lora_4")  # of Turbo Compare
WIDGETS = {  # every node with a file widget: where it is, its name widgets, and their folders
    "lora.TurboLoraLoader": {"lora_name": "loras"},
    "inspect.TurboInspect": {"lora_name": "loras"},
    "compare.TurboCompare": dict.fromkeys(LORAS, "loras"),
    "bake.TurboBake": {"base_model": "diffusion_models", "lora_name": "loras"},
    "bake.TurboBakedLoader": {"model_name": "diffusion_models"},
    "prompt.TurboPrompt": {"text_encoder": "text_encoders"},
}


@pytest.fixture
def folders(comfyui: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The models folders of these widgets, with two files each."""
    import folder_paths

    folders = {}
    for kind in ("loras", "diffusion_models", "text_encoders"):
        folders[kind] = tmp_path / kind
        folders[kind].mkdir()
        for name in ("a.safetensors", "b.safetensors"):
            (folders[kind] / name).write_bytes(b"1")
        listed = ([str(folders[kind])], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, listed)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folders


def node_of(pack: Any, where: str) -> Any:
    module, name = where.split(".")
    return getattr(pack(f"nodes.{module}"), name)


def test_the_table_has_every_node_with_files(pack: Any, folders: Any) -> None:
    """A new node with a list of files must be here."""
    import folder_paths

    lists = {tuple(folder_paths.get_filename_list(kind)) for kind in folders}
    found = set()
    for where in WIDGETS:
        module = pack(f"nodes.{where.split('.')[0]}")
        found |= {
            name
            for name, node in vars(module).items()
            if name.startswith("Turbo")
            and any(
                set(files) <= set(getattr(given, "options", None) or [])
                for given in node.define_schema().inputs
                for files in lists
            )
        }
    assert found == {where.split(".")[1] for where in WIDGETS}


@pytest.mark.parametrize("value", ["typed", "wired"])
@pytest.mark.parametrize("where", WIDGETS)
def test_fingerprints(where: str, value: str, pack: Any, folders: dict[str, Path]) -> None:
    """Equal until a file changes on disk; JSON; and of a file that is gone, still a text."""
    node, widgets = node_of(pack, where), WIDGETS[where]
    names = dict.fromkeys(widgets, None if value == "wired" else "a.safetensors")
    unknown = {given.id: None for given in node.define_schema().inputs}  # core asks for all inputs

    def state() -> str:
        found = node.fingerprint_inputs(**{**unknown, **names})
        assert isinstance(found, str)
        assert len(found) < 200
        return found

    seen = [state()]
    assert state() == seen[0]
    for kind in set(widgets.values()):
        file = folders[kind] / "a.safetensors"
        os.utime(file, ns=(1, len(seen)))
        seen.append(state())
        file.unlink()
        seen.append(state())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("where", WIDGETS)
def test_a_link_to_nowhere(where: str, pack: Any, folders: dict[str, Path]) -> None:
    node, widgets = node_of(pack, where), WIDGETS[where]
    for kind in set(widgets.values()):
        (folders[kind] / "a.safetensors").unlink()
        (folders[kind] / "a.safetensors").symlink_to("nowhere")
    assert isinstance(node.fingerprint_inputs(**dict.fromkeys(widgets, "a.safetensors")), str)
    assert isinstance(node.fingerprint_inputs(**dict.fromkeys(widgets)), str)


@pytest.mark.parametrize("value", [None, 3, "", ["a.safetensors"]])
def test_what_is_no_name(value: Any, pack: Any, folders: Any) -> None:
    files = pack("nodes.files")
    with pytest.raises(ValueError, match=r"name of a file in models/loras; a wire brought"):
        files.lora_path(value)
    with pytest.raises(FileNotFoundError):
        files.lora_path("no.safetensors")


# ------------------------------------------------------------------------------- in a real server


@pytest.fixture(scope="module")
def wired(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    """The server with a LoRA and a baked model."""
    lora = next((TINY_DIR / "lora").glob("*.safetensors"))
    shutil.copy(lora, server.folder("loras") / "wired.safetensors")
    out = server.folder("diffusion_models") / "wired.safetensors"
    if not out.exists():
        bake(plan_bake(TINY_DIR / "transformer", lora, out))
    return server


def graph(node: str, name: Any) -> dict[str, Any]:
    """The node "n" with a file name out of core's switch, and two nodes that use it."""
    prompt: dict[str, Any] = {
        "text": {"class_type": "PrimitiveString", "inputs": {"value": name}},
        "switch": {
            "class_type": "ComfySwitchNode",
            "inputs": {"switch": True, "on_true": ["text", 0], "on_false": ["text", 0]},
        },
        "tiny": {"class_type": "TurboDistillTinyLoader", "inputs": {"lora": TEACHER}},
        "prompt": {"class_type": "TurboDistillTinyText", "inputs": {"text": "a red letter K"}},
        "empty": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
    }
    link = ["switch", 0]
    if node == "Inspect":
        image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1}}
        prompt["image"] = {**image, "inputs": {**image["inputs"], "color": 0}}
        prompt["n"] = {"class_type": "TurboDistillInspect", "inputs": {"lora_name": link}}
    elif node == "Compare":
        inputs = {"model": ["tiny", 0], "positive": ["prompt", 0], "vae": ["tiny", 1]}
        inputs |= {"latent_image": ["empty", 0], "noise_seed": 1, "lora_1": link}
        inputs |= {"lora_2": "none", "lora_3": "none", "lora_4": "none"}
        inputs |= {"teacher_steps": 0, "teacher_cfg": 1.0, "teacher_shift": 3.0, "cell_size": 64}
        prompt["n"] = {"class_type": "TurboDistillCompare", "inputs": inputs}
        prompt["image"] = {"class_type": "ImageInvert", "inputs": {"image": ["n", 0]}}
    else:
        if node == "LoraLoader":
            inputs = {"model": ["tiny", 0], "lora_name": link, "strength": 1.0, "mode": "auto"}
        else:
            inputs = {"model_name": link}
        prompt["n"] = {"class_type": f"TurboDistill{node}", "inputs": inputs}
        inputs = {"model": ["n", 0], "positive": ["prompt", 0], "latent_image": ["empty", 0]}
        inputs |= {"noise_seed": 1, "start_step": 0}
        prompt["sample"] = {"class_type": "TurboDistillSampler", "inputs": inputs}
        inputs = {"samples": ["sample", 0], "vae": ["tiny", 1]}
        prompt["image"] = {"class_type": "VAEDecode", "inputs": inputs}
    prompt["save"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["image", 0], "filename_prefix": f"wired/{node}"},
    }
    return prompt


@pytest.mark.parametrize("node", ["LoraLoader", "BakedLoader", "Inspect", "Compare"])
def test_a_wired_name_works_as_a_typed_one(
    node: str, wired: ComfyServer, listen: Callable[..., Any]
) -> None:
    """It runs once, a second time it is cached, a changed file is noticed, and PNGs hold JSON."""
    prompt = graph(node, "wired.safetensors")

    def run() -> bool:
        """Whether the node ran."""
        cached = [set(each["nodes"]) for each in listen(wired, prompt)["execution_cached"]]
        return "n" not in set().union(*cached)

    before = len(wired.log)
    assert run()
    assert not run()
    (file, *_) = sorted((wired.base / "output" / "wired").glob(f"{node}_*.png"))
    with Image.open(file) as image:
        text = image.text["prompt"]  # type: ignore[attr-defined]
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the PNG's prompt"))
    assert "WARNING" not in wired.log[before:].replace("UserWarning", "")
    folder = "diffusion_models" if node == "BakedLoader" else "loras"
    os.utime(wired.folder(folder) / "wired.safetensors")
    assert run()
    assert not run()


def test_a_wired_name_without_a_file(wired: ComfyServer) -> None:
    with pytest.raises(ComfyUIError, match=r"gone\.safetensors"):
        wired.queue(graph("LoraLoader", "gone.safetensors"))
