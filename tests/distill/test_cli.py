"""The command line from outside: help, exit codes, messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.cli import COMMANDS, main


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
    config = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")
    words = ["stages.0.steps=11", "--dry-run", "stages.1.steps=13", "--tflops", "1"]
    assert main(["train", config, *words, "stages.2.steps=17"]) == 0
    assert "total 41 steps" in capsys.readouterr().out
    for wrong in (["--dry"], ["--dry-run", "twice"], ["--dry-run", "--resum=1"]):
        with pytest.raises(SystemExit) as exit_:
            main(["train", config, "run_dir=x", *wrong, "--no-such-option"])
        assert exit_.value.code == 2
    with pytest.raises(SystemExit):
        main(["inspect", "file", "a=b"])
