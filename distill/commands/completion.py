"""`turbo-distill completion SHELL`: the script with which a shell completes this command."""

from __future__ import annotations

import argparse

from .result import Result

ABOUT = """\
Writes a script for bash, zsh or fish that completes commands, options, choices and
files (recipes for train and prepare, LoRA files and run folders elsewhere). Making it
takes some seconds, so write it to a file once rather than at every start of a shell,
and again after an update."""
EXAMPLES = """\
turbo-distill completion bash > ~/.local/share/bash-completion/completions/turbo-distill
turbo-distill completion zsh > ~/.zfunc/_turbo-distill   # ~/.zfunc in fpath, before compinit
turbo-distill completion fish > ~/.config/fish/completions/turbo-distill.fish"""

SHELLS = ("bash", "zsh", "fish")
RECIPES, LORAS = ("*.yaml", "*.yml"), ("*.safetensors",)
PROMPTS = ("*.txt", "*.jsonl", "*.parquet")
FILES = {  # what an argument takes, by command and name; folders always, for runs are folders
    ("train", "config"): RECIPES,
    ("prepare", "arguments"): RECIPES,
    ("inspect", "file"): LORAS,
    ("stamp", "file"): LORAS,
    ("stamp", "out"): LORAS,
    ("export", "source"): LORAS,
    ("export", "out"): LORAS,
    ("bake", "base"): (*LORAS, "*.json"),
    ("bake", "lora"): LORAS,
    ("bake", "out"): LORAS,
    ("sample", "loras"): LORAS,
    ("sample", "prompts"): PROMPTS,
    ("eval", "lora"): LORAS,
    ("eval", "prompts"): PROMPTS,
    ("eval", "out"): ("*.json",),
    ("eval", "sheet"): ("*.png",),
    ("report", "out"): ("*.html",),
}
FOLDERS = {
    ("demo", "out"),
    ("report", "run"),
    ("sample", "out"),
    ("sample", "model"),
    ("eval", "model"),
    ("eval", "reference"),
    ("eval", "clip"),
    ("eval", "dino"),
    ("tiny", "out"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that the script is for")


def run(args: argparse.Namespace) -> Result:
    text = script(args.shell)
    return Result(
        text=f"{text}\n",
        values={"shell": args.shell, "script": text},
        done=f"wrote the script for {args.shell}",
        next="a new shell, then turbo-distill <Tab>",
    )


def script(shell: str) -> str:
    """Completes every command; made from the parsers themselves."""
    import shtab

    from .parser import COMMANDS, build_parser, subparsers

    parser = build_parser(COMMANDS)
    for command, its in subparsers(parser).items():
        for action in its._actions:
            if (command, action.dest) in FILES:
                action.complete = shtab.glob(*FILES[command, action.dest])  # type: ignore[attr-defined]
            elif (command, action.dest) in FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))
