"""CPU time of what must answer at once: `import trainer_ext` and `trainer-ext --help`, beside Python's own start.

The arms take turns; minimum, median and maximum of 15 runs each, the first dropped. Prints a Markdown table.
"""

import resource
import subprocess
import sys
from statistics import median

ARMS = {
    "python": [sys.executable, "-c", "pass"],
    "import trainer_ext": [sys.executable, "-c", "import trainer_ext"],
    "trainer-ext --help": [sys.executable, "-c", "import sys; sys.argv[1:] = ['--help']; "
                           "from trainer_ext.cli import main; main()"],
}  # fmt: skip
RUNS = 16


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of `command`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(RUNS):
        for name, command in ARMS.items():
            times[name].append(cpu_seconds(command))
    print("| arm | CPU s: min | median | max |\n|---|---|---|---|")
    for name, found in times.items():
        kept = found[1:]
        print(f"| {name} | {min(kept):.3f} | {median(kept):.3f} | {max(kept):.3f} |")


if __name__ == "__main__":
    main()
