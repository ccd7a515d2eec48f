"""The scripts for shells, in the shells that there are."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from distill.cli import main
from distill.commands.completion import FILES, FOLDERS, SHELLS, script
from distill.commands.parser import COMMANDS, build_parser, subparsers


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script of every shell, named after it."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell), encoding="utf-8")
    return folder


def completed(scripts: Path, folder: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    line = ["turbo-distill", *words]
    code = f"""
        source {shlex.quote(str(scripts / "bash"))}
        cd {shlex.quote(str(folder))}
        COMP_WORDS=({" ".join(map(shlex.quote, line))}); COMP_CWORD={len(line) - 1}
        COMP_LINE="${{COMP_WORDS[*]}}"; COMP_POINT=${{#COMP_LINE}}
        how=$(complete -p turbo-distill); how=${{how##*-F }}; ${{how%% *}} turbo-distill
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    command = ["bash", "--norc", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return {line.rstrip() for line in done.stdout.splitlines()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_choices_and_files(scripts: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "turbo.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    assert completed(scripts, tmp_path, "") >= COMMANDS.keys()
    assert completed(scripts, tmp_path, "sam") == {"sample"}
    assert completed(scripts, tmp_path, "train", "--dr") == {"--dry-run"}
    assert completed(scripts, tmp_path, "export", "--dtype", "") == {"fp32", "bf16", "fp16"}
    assert completed(scripts, tmp_path, "train", "") >= {"recipe.yaml", "runs"}
    assert "turbo.safetensors" not in completed(scripts, tmp_path, "train", "")
    loras = completed(scripts, tmp_path, "inspect", "")
    assert "turbo.safetensors" in loras
    assert not loras & {"recipe.yaml", "notes.txt"}
    assert completed(scripts, tmp_path, "report", "ru") == {"runs"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_others_read_their_script(shell: str, scripts: Path) -> None:
    text = (scripts / shell).read_text(encoding="utf-8")
    for name in COMMANDS:
        assert name in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell}; only the text was looked at")
    subprocess.run([program, "-n", scripts / shell], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes(scripts: Path) -> None:
    def offered(line: str) -> set[str]:
        code = f"source {shlex.quote(str(scripts / 'fish'))}; complete -C {shlex.quote(line)}"
        command = ["fish", "--no-config", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return {line.partition("\t")[0] for line in done.stdout.splitlines()}

    assert offered("turbo-distill sam") == {"sample"}
    assert offered("turbo-distill train --dr") == {"--dry-run"}
    assert offered("turbo-distill export --dtype ") >= {"fp32", "bf16", "fp16"}


def test_what_takes_files_is_an_argument() -> None:
    parsers = subparsers(build_parser(COMMANDS))
    for command, name in (*FILES, *FOLDERS):
        assert name in {action.dest for action in parsers[command]._actions}, (command, name)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.strip() == script("bash").strip()
