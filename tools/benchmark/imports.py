"""What it takes to start: importing the package, and --help of the command."""

import statistics
import subprocess
import sys
import time

from tools.benchmark import timing


def measure(rounds: int, steps: int) -> None:
    del steps
    commands = {
        "import t5x_like": [sys.executable, "-c", "import t5x_like"],
        "t5x_like --help": [sys.executable, "-m", "t5x_like", "--help"],
        "import jax": [sys.executable, "-c", "import jax"],
    }
    print(f"\nstart of a process, median of {rounds}")
    print(timing.machine())
    for name, command in commands.items():
        seconds = statistics.median(_wall(command) for _ in range(rounds))
        print(f"  {name:<28}{seconds:6.2f} s")


def _wall(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, cwd=timing.ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin
