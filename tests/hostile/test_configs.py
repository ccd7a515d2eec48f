"""A recipe from a stranger, and what is typed after it."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import yaml
from hostile import Failed, Refused, Surface, check, command, few, row
from hypothesis import strategies as st
from mutations import TEXTS, damaged, json_like

from distill.config import ConfigError, load_config

DEMO = Path(__file__).parents[2] / "configs" / "tiny_demo.yaml"
CONFIG = Surface("load_config", load_config, (ConfigError,))
OVERRIDE = Surface("an override", lambda word: load_config(DEMO, [word]), (ConfigError,))
COMMAND = Surface("turbo-distill", lambda words: command(*words), (Refused, Failed))


def text(content: str | bytes) -> Callable[[Path], Path]:
    """A row's recipe."""

    def make(folder: Path) -> Path:
        path = folder / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def demo(addition: str) -> Callable[[Path], Path]:
    """A good recipe with lines added."""
    return text(DEMO.read_text(encoding="utf-8") + "\n" + addition)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "recipe.yaml")
    return folder / "recipe.yaml"


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
NAME = r"recipe\.yaml"

FILES = [
    row("plain", demo("")),
    row("with a byte order mark", text(b"\xef\xbb\xbf" + DEMO.read_bytes())),
    row("with CRLF", text(DEMO.read_bytes().replace(b"\n", b"\r\n"))),
    row("empty", text(""), f"{NAME}.*mapping"),
    row("a list", text("[1]"), f"{NAME}.*mapping"),
    row("not UTF-8", text(b"name: \xff\n"), NAME),
    row("UTF-16", text(DEMO.read_text(encoding="utf-8").encode("utf-16")), NAME),
    row("zeros", text(b"\0" * 4096), NAME),
    row("a pipe", fifo, NAME),
    row("a folder", lambda folder: folder, "cannot be read"),
    row("two documents", demo("---\nname: x"), NAME),
    row("a tag of Python's", demo("x: !!python/object/apply:os.system [exit 1]"), NAME),
    row("a key that is no text", demo("1: 2"), NAME),
    row("a key that is a list", demo("? [1, 2]\n: 3"), NAME),
    row("a key of none", demo("? \n: 3"), NAME),
    row("a merge with a number", demo("<<: 5"), NAME),
    row("the same key twice", demo("seed: 1\nseed: 2"), f"{NAME}.*seed"),
    row("aliases of aliases", text(ALIASES), NAME),
    row("an alias of itself", demo("x: &x [*x]"), NAME),
    row("a mapping of itself", demo("spec: &x {a: *x}"), NAME),
    row("deeply nested", demo("x: " + "[" * 20_000), NAME),
    row("deep mappings", demo("x: " + "{a: " * 20_000), NAME),
    row("escapes in a key", demo('"\\e[31m": 1'), NAME),
    row("half a pair of surrogates", demo('name: "\\ud800"'), NAME),
    # what YAML 1.1 makes of a plain word
    row("a month of 13", demo("x: 2024-13-45"), NAME),
    row("a number of 5000 digits", demo("seed: " + "1" * 5000), f"{NAME}.*seed"),
    row("no number at all", demo("seed: !!int x"), f"{NAME}"),
    row("no fraction at all", demo("seed: !!float x"), f"{NAME}"),
    row("no date at all", demo("seed: !!timestamp x"), f"{NAME}"),
    row("neither true nor false", demo("seed: !!bool x"), f"{NAME}"),
    row("a key of a megabyte", demo("x" * 1_000_000 + ": 1"), NAME),
    row("a list of three thousand", demo(f"seed: {list(range(3_000))}"), "seed"),
    row(
        "a thousand unknown keys",
        demo("".join(f"a{n}: 1\n" for n in range(1000))),
        NAME,
    ),
]


@pytest.mark.parametrize(("make", "refused"), few(FILES))
def test_a_recipe(make: Callable[[Path], Path], refused: str | None, tmp_path: Path) -> None:
    check(CONFIG, make(tmp_path), refused)


WORDS = [
    row("plain", "seed=5"),
    row("nothing", "", "key=value"),
    row("no key", "=5", "key=value"),
    row("no value", "seed=", "seed"),
    row("only dots", "...=5", "no such key"),
    row("a dot too many", "model..path=x", "model"),
    row("an unknown section", "a.b.c.d=1", r"a\b"),
    row("below a value", "seed.x=5", "no keys of its own"),
    row("below a path", "model.path.x=1", "no keys of its own"),
    row("a stage that is not there", "stages.9.steps=1", "0 to 0"),
    row("a stage below zero", "stages.-1.steps=1", "number from 0"),
    row("a stage in superscript", "stages.².steps=1", "number from 0"),
    row("stages are a number", "stages=5", "stages"),
    row("stages are empty", "stages=[]", "stages"),
    row("a stage is a number", "stages=[5]", "stages"),
    row("a stage without a method", "stages=[{steps: 5}]", "method"),
    row("a stage whose method is a list", "stages=[{method: [dmd2]}]", "stages"),
    row("a section is a list", "model=[]", "model"),
    row("a section is null", "adapter=null", "adapter"),
    row("data is a number", "data=5", "data"),
    row("data is null", "data=null", "data"),
    row("not YAML", "seed=[", "seed"),
    row("deeply nested", "seed=" + "[" * 20_000, "seed"),
    row("a tag of Python's", "seed=!!python/name:os.system", "seed"),
    row("zeros in a number", "seed=\0", "seed"),
    row("a seed of 30 digits", f"seed={10**30}", "seed"),
    row("a seed below zero", "seed=-1", "seed"),
    row("a seed that is true", "seed=true", "seed"),
    row("a rate that is not finite", "stages.0.lr=.inf", "lr"),
    row("a rate that is no number", "stages.0.lr=.nan", "lr"),
    row("a scale that is not finite", "guidance.scale=.inf", "scale"),
    row("sigmas that are no number", "spec.sigmas=[.nan, 0]", "sigmas"),
    row("a thousand sigmas", f"spec.sigmas={[1 - n / 1000 for n in range(1001)]}", "256"),
    row("a rank of a trillion", f"adapter.rank={10**12}"),
    row("an empty name", "name=", "name"),
    row("a name that leads elsewhere", "name=../x", "name"),
    row("an absolute name", "name=/tmp/x", "name"),
    row("a name of dots", "name=..", "name"),
    row("a name with a backslash", "name=a\\b", "name"),
    row("a name with a zero byte", 'name="a\\0b"', "name"),
    row("a name of two lines", 'name="a\\nb"', "name"),
    row("a name of 300 letters", "name=" + "x" * 300, "name"),
    row("a name of 100 wide letters", "name=" + "狐" * 100, "name"),
    row("a name with a hash", "name=exp #2"),
    row("a folder with a zero byte", 'run_dir="a\\0b"', "run_dir"),
    row(
        "a folder of 5000 letters",
        "run_dir=" + "x" * 5000,
        "run_dir",
    ),
]


@pytest.mark.parametrize(("word", "refused"), few(WORDS))
def test_a_word_on_the_command_line(word: str, refused: str | None) -> None:
    check(OVERRIDE, word, refused)


TYPED = ("exp #2", "2024_11", "2024-11-26", "007", "on", "null", "~", "@home", "a: b", "[a]")


@pytest.mark.parametrize("value", few([*TYPED, "1e3", "é", "a b"]))
def test_a_path_is_what_was_typed(value: str) -> None:
    config = check(OVERRIDE, f"run_dir=x/{value}", None)
    assert config.run_dir == Path("x") / value
    typed = check(OVERRIDE, f"run_dir={value}", None)
    assert typed.run_dir == Path(value).expanduser()


COMMANDS = [
    row("nothing that exists", ["inspect", "nowhere"], "nowhere"),
    row("a file with a zero byte", ["inspect", "a\0b"], "NUL"),
    row("a name of 5000 letters", ["inspect", "x" * 300], "name too long"),
    row("not UTF-8", ["inspect", os.fsdecode(b"\xff")], "UTF-8"),
    row("not UTF-8, as JSON", ["inspect", os.fsdecode(b"\xff"), "--json"], "UTF-8"),
    row("a command that is no word", ["\x1b[31m"], "no command"),
    row("sigmas that are no numbers", ["sample", "x", "--sigmas", "a,b"], "sigmas"),
    row("sigmas that are not finite", ["sample", "x", "--sigmas", "nan,0", "--out", "x"], ""),
    row("a rank of none", ["export", "x", "--out", "y", "--rank", "0"], "1 or more"),
    row(
        "a throughput that is no number", ["train", DEMO, "--dry-run", "--tflops", "nan"], "tflops"
    ),
    row("a throughput below zero", ["train", DEMO, "--dry-run", "--tflops", "-1"], "tflops"),
]


@pytest.fixture(scope="module")
def _imported() -> None:
    """What commands import is not counted."""
    for module in ("sample", "export", "train"):
        importlib.import_module(f"distill.commands.{module}")
    importlib.import_module("distill.training.estimate")


@pytest.mark.usefixtures("_imported")
@pytest.mark.parametrize(("words", "refused"), few(COMMANDS))
def test_a_command(
    words: list[str], refused: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check(COMMAND, words, refused)


# --------------------------------------------------------------------------------- any damage

COUNTS = [15, pytest.param(300, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_bytes(count: int, tmp_path: Path) -> None:
    def put(example: bytes) -> Path:
        return text(example)(tmp_path)

    hostile.survive(CONFIG, damaged(DEMO.read_bytes()), put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
def test_other_values(count: int, tmp_path: Path) -> None:
    def put(example: Any) -> Path:
        return text(json.dumps(example))(tmp_path)

    examples = json_like(yaml.safe_load(DEMO.read_text(encoding="utf-8")))
    hostile.survive(CONFIG, examples, put, count, count < 1000)


@pytest.mark.parametrize("count", COUNTS)
def test_other_words(count: int) -> None:
    keys = ("seed", "name", "run_dir", "stages", "stages.0", "stages.0.lr", "spec.sigmas", "x", "")
    values = st.sampled_from(TEXTS) | st.text(
        "0123456789-:.eE_+ []{}&*!|>'\"%@`#,?x\n", max_size=12
    )
    words = st.builds("{}={}".format, st.sampled_from(keys), values)
    hostile.survive(OVERRIDE, words, lambda word: word, count, count < 1000)
