"""T0 and a part of T1 again, with fewer seeds, side by side: under half an hour on two CPU cores.

    python -m benchmarks.recipe --seeds 1 --out runs/evidence

Everything: python -m benchmarks.recipe.t0 --seeds 5; python -m benchmarks.recipe.t1 --seeds 5
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    started, count, out = time.monotonic(), str(args.seeds), str(args.out)
    tables = ["main", "blurred"]
    commands = [
        ["t0", "--jobs", "1", "--seeds", count, "--out", out],
        ["t1", "--tables", *tables, "--seeds", count, "--out", out, "--work", f"{out}/work"],
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-m", f"benchmarks.recipe.{name}", *rest], env=one_thread)
        for name, *rest in commands
    ]
    failed = [process.wait() for process in running]
    sys.stdout.write(f"{args.out}/t0.md, {args.out}/t1.md ({time.monotonic() - started:.0f} s)\n")
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
