"""The house keeps its shape: wings import one way, no two files import each other in a circle, and
little lies about in the hall.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down. A wing may import what stands below it; those of one line know nothing of each
# other. The command line imports its commands by name.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("trainer",),
    ("lora", "methods"),
    ("training", "tiny"),
    ("evaluation",),
    ("data",),
    ("models",),
    ("config",),
    ("pairs",),
    ("stages",),
    ("utils",),
    ("contract",),
)
FLOOR = {wing: floor for floor, wings in enumerate(FLOORS) for wing in wings}


def modules() -> dict[str, Path]:
    """Every module of distill and nodes by its dotted name."""
    files = [file for top in ("distill", "nodes") for file in (ROOT / top).rglob("*.py")]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in files
    }


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of this repository that a file imports, in functions too."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            target = f"{origin}.{alias.name}"
            yield target if target in known else origin


def packages(file: Path) -> set[str]:
    """Top-level packages that a file imports absolutely, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(name, file, known)) - {name} for name, file in known.items()}


def wing(module: str) -> str:
    return module.split(".")[1]


def test_every_wing_has_its_floor() -> None:
    assert {wing(name) for name in modules() if name.startswith("distill.")} == FLOOR.keys()


def test_wings_import_downwards(arrows: dict[str, set[str]]) -> None:
    wrong = [
        f"{name} -> {target}"
        for name, targets in arrows.items()
        for target in targets
        if name.startswith("distill.")
        and target != "distill"
        and wing(name) != wing(target)
        and FLOOR[wing(name)] >= FLOOR[wing(target)]
    ]
    assert not wrong


def test_nodes_import_the_contract_alone(arrows: dict[str, set[str]]) -> None:
    outside = {
        target
        for name, targets in arrows.items()
        for target in targets
        if name.startswith("nodes") and not target.startswith("nodes")
    }
    assert outside
    assert {wing(target) for target in outside} == {"contract"}


def test_only_commands_know_the_tiny_model(arrows: dict[str, set[str]]) -> None:
    """Everybody else asks models/family.py."""
    knowing = {
        wing(name)
        for name, targets in arrows.items()
        for target in targets
        if target.startswith("distill.tiny") and name.startswith("distill.")
    }
    assert knowing <= {"commands", "tiny"}


def test_own_modules_are_imported_relatively() -> None:
    """A `distill` on the path may be another one, and the tests above would not see it; `nodes` is
    ComfyUI's.
    """
    assert not [name for name, file in modules().items() if "distill" in packages(file)]


def test_the_contract_needs_torch_and_safetensors_alone() -> None:
    files = [file for name, file in modules().items() if name.startswith("distill.contract")]
    needed = set().union(*map(packages, files)) - sys.stdlib_module_names
    assert needed == {"torch", "safetensors"}


def test_nothing_is_unpickled() -> None:
    """A file may come from a stranger, and a pickle is a program. torch.load reads data alone where
    weights_only=True; the one unpickler (training/old_checkpoint.py) resolves no name.
    """
    files = [
        file for top in ("distill", "nodes", "benchmarks") for file in (ROOT / top).rglob("*.py")
    ]
    assert not [f"{file}: {call}" for file in files for call in unsafe_calls(file)]


def unsafe_calls(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            (name == "torch.load" and words.get("weights_only") != "True")
            or name.partition(".")[0]
            in ("pickle", "dill", "cloudpickle", "joblib", "marshal", "dcp")
            or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec")
            or words.keys() & {"allow_pickle", "trust_remote_code"}
        ):
            yield f"{node.lineno}: {name}"


def test_no_circles(arrows: dict[str, set[str]]) -> None:
    reach = {name: set(targets) for name, targets in arrows.items()}
    for middle, name in product(arrows, arrows):  # Warshall's closure
        if middle in reach[name]:
            reach[name] |= reach[middle]
    assert not [name for name, targets in reach.items() if name in targets]


def test_the_hall_is_small() -> None:
    assert len(list((ROOT / "distill").glob("*.py"))) <= 8
    lines = (ROOT / "distill" / "trainer.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 300


@pytest.mark.parametrize(
    "folder",
    ["nodes", *(f"distill/{wing}" for wing in FLOOR if (ROOT / "distill" / wing).is_dir())],
)
def test_every_wing_says_what_it_is(folder: str) -> None:
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for word in ("Imported by", "Read first"):
        assert word in text, folder


@pytest.mark.parametrize("command", ["sample", "export", "eval", "bake", "inspect"])
def test_inference_needs_no_training_loop(command: str, arrows: dict[str, set[str]]) -> None:
    needed, left = set(), [f"distill.commands.{command}"]
    while left:
        needed.add(name := left.pop())
        left += arrows.get(name, set()) - needed
    assert "distill.trainer" not in needed
    assert not any(name.startswith("distill.methods") for name in needed)
