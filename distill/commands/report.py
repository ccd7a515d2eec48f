"""`turbo-distill report RUN`: RUN/report.html, made anew."""

from __future__ import annotations

import argparse
import shlex
import webbrowser

from .options import path_argument
from .result import Result

ABOUT = """\
Writes one HTML page about a run, finished or not: recipe and stages, curves of
losses and gradients, previews over time beside the teacher, gates and the chosen
step, speed and memory, machine and versions, the files and how to use them.
Training writes the same page after previews and checkpoints. It needs no network
and no other file, so it can be sent to somebody."""
EXAMPLES = """\
turbo-distill report runs/mine                  # runs/mine/report.html
turbo-distill report runs/mine --open           # and shows it in the browser
turbo-distill report runs/mine --out mine.html"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the run_dir of a training")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="file to write (default: RUN/report.html)"
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def run(args: argparse.Namespace) -> Result:
    from ..training.report import write_report
    from ..training.run_reader import read_run, summary

    path = write_report(args.run, args.out)
    if args.open:
        webbrowser.open(path.resolve().as_uri())
    return Result(
        text=f"{path}\n",
        values={"report": str(path), **summary(read_run(args.run))},
        done="read the run",
        wrote=(path,),
        next="" if args.open else f"turbo-distill report {shlex.quote(str(args.run))} --open",
    )
