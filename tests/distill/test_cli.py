"""The command line from outside: help, exit codes, messages."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill.cli import main
from distill.commands import demo, inspect
from distill.commands.completion import FILES, FOLDERS
from distill.commands.options import NOISE_SEED_MAX, check_seeds
from distill.commands.parser import COMMANDS, build_parser, subparsers
from distill.commands.prepare import is_override
from distill.commands.result import Result
from distill.contract.tiny import TINY_DIR
from distill.training.signals import Stopped

LORA = str(TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors")
TINY_CPU = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")


def test_help_lists_every_command_without_loading_torch() -> None:
    code = (
        "import sys, distill.cli\n"
        "try: distill.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in done.stdout


def test_files_are_read_without_the_training_packages(tmp_path: Path) -> None:
    """The pack's own requirements do for what opens no model."""
    code = (
        "import sys\n"
        "for name in ('diffusers', 'peft', 'transformers'): sys.modules[name] = None\n"
        "import distill.cli, distill.commands.report\n"
        "sys.exit(distill.cli.main(sys.argv[1:]))"
    )
    exported = str(tmp_path / "lora.safetensors")
    for words in (["inspect", LORA], ["export", LORA, "--out", exported]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert Path(exported).with_suffix(".md").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"turbo-distill {command}" in capsys.readouterr().out


def test_bad_input_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("turbo-distill train: nowhere.yaml: cannot be read")
    assert "Traceback" not in error


def test_an_unfit_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.safetensors"
    file.write_text("<html>Not found</html>")
    assert main(["inspect", str(file)]) == 2
    assert "page.safetensors" in capsys.readouterr().err


def test_keys_may_stand_on_either_side_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    config = TINY_CPU
    words = ["stages.0.steps=11", "--dry-run", "stages.1.steps=13", "--tflops", "1"]
    assert main(["train", config, *words, "stages.2.steps=17"]) == 0
    assert "total 41 steps" in capsys.readouterr().out
    for wrong in (["--dry"], ["--dry-run", "twice"], ["--dry-run", "--resum=1"]):
        with pytest.raises(SystemExit) as exit_:
            main(["train", config, "run_dir=x", *wrong, "--no-such-option"])
        assert exit_.value.code == 2
    with pytest.raises(SystemExit):
        main(["inspect", "file", "a=b"])


ACTIONS = [
    (command, action)
    for command, parser in subparsers(build_parser(COMMANDS)).items()
    for action in parser._actions
]


def test_home_is_expanded_in_every_argument_that_is_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {*FILES, *FOLDERS, ("demo", "lora")} - {("prepare", "arguments")}  # words, see below
    assert paths <= {(command, action.dest) for command, action in ACTIONS}
    for command, action in ACTIONS:
        assert action.type is not Path, (command, action.dest)
        if (command, action.dest) in paths:
            assert str(action.type("~/x")) == str(tmp_path / "x"), (command, action.dest)  # type: ignore[operator,misc]
            for wrong in ("a\0b", "\udcff"):
                with pytest.raises(argparse.ArgumentTypeError, match="expected text in UTF-8"):
                    action.type(wrong)  # type: ignore[operator,misc]


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "~/lora.safetensors"],
        ["train", "~/recipe.yaml", "--dry-run"],
        ["report", "~/nothing"],
        ["prepare", "~/recipe.yaml"],
        ["prepare", "data.prompts=~/nothing.txt", "data.cache=~/c", "model.path=~/model"],
    ],
    ids=" ".join,
)
def test_home_is_where_files_are_looked_for(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "~" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "override", ["run_dir=exp #2", "run_dir=2024_11_26", "name=007", "name=on", "run_dir=@home/x"]
)
def test_a_plan_is_repeated_as_it_was_typed(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line can be pasted into a shell."""
    assert main(["train", TINY_CPU, override, "--dry-run"]) == 0
    hint = capsys.readouterr().err.partition("Next: ")[2].strip()
    assert shlex.split(hint) == ["turbo-distill", "train", TINY_CPU, override]


def test_a_folder_with_an_equals_sign_is_no_override() -> None:
    assert is_override("data.images=a/b=c")
    assert not is_override("runs/lr=1/config.yaml")
    assert not is_override("recipe.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "x", "--out", "y", "--seed", "-1"],
        ["sample", "x", "--out", "y", "--seed", str(NOISE_SEED_MAX + 1)],
        ["sample", "x", "--out", "y", "--seed", "9" * 5000],
        ["sample", "x", "--out", ""],
        ["sample", "x", "--out", "y", "--guidance", "nan"],
        ["sample", "x", "--out", "y", "--guidance", "inf"],
        ["sample", "x", "--out", "y", "--teacher-steps", "0"],
        ["sample", "x", "--out", "y", "--prompt", "a \udcff"],
        ["eval", "x", "--seed", "1e3"],
        ["demo", "--seed", str(2**63)],
        ["tiny", "--out", "x", "--seed", "-1"],
        ["tiny", "--out", "x", "--vae-steps", "-5"],
        ["train", "x", "--tflops", "0"],
        ["train", "x", "--tflops", "inf"],
        ["export", "x", "--out", "y", "--rank", "1.5"],
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_absurd_numbers_and_empty_paths_are_refused_before_anything_is_read(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_the_last_seed_counts() -> None:
    check_seeds(NOISE_SEED_MAX - 3, 4)
    with pytest.raises(ValueError, match="--seed: expected at most"):
        check_seeds(NOISE_SEED_MAX - 2, 4)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sampel"], "'sample'"),
        (["exprot", "train"], "'export'"),
        (["train", "recipe.yaml", "--dryrun"], "'--dry-run'"),
    ],
)
def test_a_typo_names_what_is_nearest(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"Did you mean {hint}?" in error
    assert "--help` explains it" in error


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    error = capsys.readouterr().err
    for text in ("exit codes:", "130", "first steps:", "docs/cli.md"):
        assert text in error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad"), 2),
        (FileNotFoundError("bad"), 2),
        (PermissionError("bad"), 2),
        (OSError("disk full: bad"), 1),
        (RuntimeError("diverged: bad"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: argparse.Namespace) -> Result:
        raise error

    monkeypatch.setattr(inspect, "run", fail)
    assert main(["inspect", LORA, "--json"]) == code
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document == {
        "command": "inspect",
        "exit_code": code,
        "error": {"type": type(error).__name__, "message": str(error)},
    }
    assert ("interrupted" if code == 130 else "bad") in printed.err
    assert "Traceback" not in printed.err


def test_a_run_that_was_ended_by_a_signal_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(args: argparse.Namespace) -> Result:
        raise Stopped(signal.SIGTERM, 12)

    monkeypatch.setattr(inspect, "run", stop)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", LORA, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert exit_.value.code == found["exit_code"] == 143
    assert found["error"]["message"] == "SIGTERM: saved step 12; continue with --resume"


def test_tracebacks_are_for_those_who_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["-v", "inspect", str(tmp_path / "x")], ["inspect", str(tmp_path / "x"), "-v"]):
        assert main(words) == 2
        assert "Traceback" in capsys.readouterr().err


def test_json_is_the_only_thing_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a command, or a library below it, prints."""

    def chat(args: argparse.Namespace) -> Result:
        demo.say("chatter")
        return Result(
            text="for people\n",
            values={"value": [1.0, float("nan")]},
            wrote=(Path("a"), Path("b")),
            next="look",
            code=1,
        )

    monkeypatch.setattr(inspect, "run", chat)
    assert main(["inspect", LORA, "--json"]) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document.pop("seconds") >= 0
    assert document == {
        "command": "inspect",
        "exit_code": 1,
        "wrote": ["a", "b"],
        "value": [1.0, None],
    }
    assert "chatter" in printed.err
    assert printed.err.splitlines()[-1].startswith("done in ")
    assert "wrote a, b" in printed.err
    assert "Next: look" in printed.err
    assert main(["inspect", LORA]) == 1
    assert capsys.readouterr().out == "chatter\nfor people\n"


def test_only_the_first_of_several_processes_says_that_training_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "nowhere.yaml", "--json"]) == 2
    assert capsys.readouterr().out == ""


def test_the_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", TINY_CPU, "run_dir=runs/none", "--dry-run", "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["method"] for stage in plan["stages"]] == ["pcm", "dmd2", "dmd2+gan"]
    assert plan["total_steps"] == 900
    assert plan["memory_bytes_total"] == sum(plan["memory_bytes"].values()) > 0
    trained = sum(stage["steps"] * stage["seconds_per_step"] for stage in plan["stages"])
    assert plan["hours_per_rank"] == pytest.approx(trained / 3600 + plan["preview_hours"])


def test_sampling_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", LORA, "--prompt", "a red letter K", "--count", "2", "--out", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [image["seed"] for image in found["images"]] == [0, 1]
    assert {image["arm"] for image in found["images"]} == {"tiny_turbo_2_steps"}
    assert all(Path(image["file"]).is_file() for image in found["images"])
    assert Path(found["sheet"]).is_file()
    assert (found["command"], found["wrote"]) == ("sample", [str(tmp_path)])
    assert printed.err.splitlines()[-1].startswith("drew 2 images in ")


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [("1;0,7155;0", "decimals with a point"), ("1 " * 10_000, "at most 256 steps; found 9,999")],
)
def test_sigmas_that_are_no_schedule(
    sigmas: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", LORA, "--sigmas", sigmas, "--out", "unused.safetensors"])
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 2000
