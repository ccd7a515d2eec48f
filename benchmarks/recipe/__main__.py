"""T0 and the central tables of T1 again, with fewer seeds: 17 minutes per seed on two CPU cores.

    python -m benchmarks.recipe --seeds 1 --out runs/evidence

Everything: python -m benchmarks.recipe.t0 --seeds 5; python -m benchmarks.recipe.t1 --seeds 5
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def in_turn(commands: list[list[str]]) -> bool:
    """Runs modules of this package, one after another, on one core; says whether all succeeded."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return all(
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.recipe.{name}", *rest], env=one_thread
        ).returncode
        == 0
        for name, *rest in commands
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    started = time.monotonic()
    common = ["--seeds", str(args.seeds), "--out", str(args.out)]
    t1 = ["t1", *common, "--work", str(args.out / "work"), "--tables"]
    cores = [
        [["t0", "--jobs", "1", *common], [*t1, "warm start"]],
        [[*t1, "main"]],
    ]
    with ThreadPoolExecutor(len(cores)) as pool:
        succeeded = all(pool.map(in_turn, cores))
    sys.stdout.write(f"{args.out}/t0.md, {args.out}/t1.md ({time.monotonic() - started:.0f} s)\n")
    return int(not succeeded)


if __name__ == "__main__":
    sys.exit(main())
