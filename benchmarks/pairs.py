"""Arms that take turns: what one costs as a ratio to another, beside how far two runs of the same arm are apart.

Arms go in; a table and a JSON file in `benchmarks/results` come out. An arm is a function that runs once and returns its
seconds,

    write(measure({"loop": run_loop, "trainer": run_trainer}, base="loop"), "overhead")

or a program that is begun once, and goes on for a segment whenever it is its turn (`take_turns`, and `Segments` inside of
it): segments of some ten milliseconds are so near each other in time that a machine whose speed wanders shows in none of
their ratios.

Every round runs each arm once, in an order that turns from round to round, and the base a second time: the control. The
first round is dropped. A ratio is of two runs of one round. Where the control's median is more than `CONTROL` from 1 the
machine was not quiet enough for the figures to be quoted, and the table says so.
"""

import gc
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from trainer_ext.parity.environment import environment

ROUNDS = 8  # the first of them dropped
RESULTS = Path(__file__).parent / "results"
CONTROL = 0.02
AGAIN = ", again"

MEGABYTES = "MB"  # the one kind that is no time
Seconds = dict[str, float]  # by kind, such as {"cpu": 0.011, "wall": 0.012}


def measure(
    arms: Mapping[str, Callable[[], Seconds]],
    base: str,
    *,
    rounds: int = ROUNDS,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the arms in turns.

    Args:
        arms: Each runs once and returns seconds by kind, all arms the same kinds.
        base: The arm that the others are divided by.
        rounds: How often each runs; the first time does not count.
        about: What else the record should say, such as the model's sizes.

    Returns:
        The record: `seconds` and `ratios` by arm and kind, each with minimum, median and maximum, and every run.
    """
    named = {**arms, base + AGAIN: arms[base]}

    def run(name: str) -> Seconds:
        gc.collect()
        return named[name]()

    return record(_rounds(list(named), run, rounds), base, about)


def take_turns(
    programs: Mapping[str, Sequence[str]],
    base: str,
    *,
    rounds: int,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run programs that go on in turns, all on one core; arguments and record as of `measure`.

    Args:
        programs: The command of each arm, which calls `Segments.next` at the end of each segment.
        base: As for `measure`.
        rounds: Segments of each arm; the first does not count.
        about: As for `measure`.
    """
    with ExitStack() as running:
        named = {name: running.enter_context(_Program(words)) for name, words in programs.items()}
        named[base + AGAIN] = running.enter_context(_Program(programs[base]))
        return record(_rounds(list(named), lambda name: named[name].go_on(), rounds), base, about)


class Segments:
    """In a program that takes turns: its clock, which stands still while others have theirs.

    Args:
        memory: Whether to say, besides, the most that the process has held.
    """

    def __init__(self, *, memory: bool = False) -> None:
        self._memory = memory
        self._heard, self._say = (
            os.fdopen(int(os.environ[name]), mode) for name, mode in (("TURN", "r"), ("TOOK", "w"))
        )
        self._began: tuple[float, float] | None = None

    def next(self) -> None:
        """Say what the segment that ends here took, and wait for the next turn; the process ends where there is none."""
        if self._began is not None:
            took = {"cpu": time.process_time() - self._began[0], "wall": time.perf_counter() - self._began[1]}
            if self._memory:
                took[MEGABYTES] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps(took), file=self._say, flush=True)
        if not self._heard.readline():
            os._exit(0)
        self._began = time.process_time(), time.perf_counter()


class _Program:
    """A process that goes on for a segment at a time."""

    def __init__(self, words: Sequence[str]) -> None:
        (hears, self._tell), (self._hear, says) = os.pipe(), os.pipe()
        environment = {**os.environ, "TURN": str(hears), "TOOK": str(says)}
        self._process = subprocess.Popen(words, env=environment, pass_fds=(hears, says), stdout=subprocess.DEVNULL)
        os.close(hears)
        os.close(says)
        self._answers = os.fdopen(self._hear)

    def go_on(self) -> Seconds:
        os.write(self._tell, b"go\n")
        if not (answer := self._answers.readline()):
            raise RuntimeError(f"{self._process.args} has ended, with exit code {self._process.wait()}.")
        return json.loads(answer)

    def __enter__(self) -> "_Program":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._tell)
        self._answers.close()
        self._process.wait()


def _rounds(names: list[str], run: Callable[[str], Seconds], rounds: int) -> list[dict[str, Seconds]]:
    """What each took in each round but the first."""
    runs = []
    for turn in range(rounds):
        turned = names[turn % len(names) :] + names[: turn % len(names)]
        runs.append({name: run(name) for name in turned})
    return runs[1:]


def record(runs: list[dict[str, Seconds]], base: str, about: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is kept of runs: `seconds` and `ratios` by arm and kind, and all that they were computed from."""
    order, kinds = [base, *sorted(runs[0].keys() - {base}, key=list(runs[0]).index)], list(runs[0][base])
    return {
        "date": date.today().isoformat(),
        "environment": environment(),
        "about": dict(about or {}),
        "base": base,
        "rounds": len(runs),
        "seconds": {name: {kind: spread([run[name][kind] for run in runs]) for kind in kinds} for name in order},
        "ratios": {
            name: {kind: spread([run[name][kind] / run[base][kind] for run in runs]) for kind in kinds}
            for name in order
            if name != base
        },
        "runs": runs,
    }


def spread(values: list[float]) -> dict[str, float]:
    """The smallest, the middle and the largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def added(found: Mapping[str, Any], to: str, kind: str) -> dict[str, float]:
    """What each arm adds to the base's time, as a ratio to what the arm `to` adds: the middle of all rounds."""
    base, runs = found["base"], found["runs"]
    return {
        name: median([run[name][kind] - run[base][kind] for run in runs])
        / median([run[to][kind] - run[base][kind] for run in runs])
        for name in found["seconds"]
        if name != base
    }


def pin_to_one_core() -> None:
    """Keep this process on one core, where the system can: else what moves it between cores shows in the times."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def control_holds(found: Mapping[str, Any], kind: str) -> bool:
    """Whether two runs of the same arm were alike."""
    return abs(found["ratios"][found["base"] + AGAIN][kind]["median"] - 1) <= CONTROL


def table(found: Mapping[str, Any], *, unit: str = "ms", scale: float = 1000.0) -> str:
    """The record in Markdown: a row for each arm, with the ratio to the base, pair by pair."""
    base, kinds = found["base"], list(found["seconds"][found["base"]])
    said = {**found["environment"], **found["about"]}
    lines = [f"{found['date']}; {'; '.join(f'{name} {value}' for name, value in said.items())}", ""]
    lines += [f"{found['rounds']} rounds after one that does not count; ratios are to {base}, run by run.", ""]
    units = {kind: ("", 1.0) if kind == MEGABYTES else (f" {unit}", scale) for kind in kinds}
    heads = [f"{kind}{units[kind][0]}: min | median | max | ratio: min | median | max" for kind in kinds]
    lines += [f"| arm | {' | '.join(heads)} |", f"|---|{'---|' * 6 * len(kinds)}"]
    for name, seconds in found["seconds"].items():
        cells = [name]
        for kind in kinds:
            cells += [f"{units[kind][1] * value:.3f}" for value in seconds[kind].values()]
            cells += [f"{value:.3f}" for value in found["ratios"][name][kind].values()] if name != base else ["1"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    for kind in kinds:
        if not control_holds(found, kind):
            lines += ["", f"The control of {kind} time is more than {CONTROL} from 1: not to be quoted."]
    return "\n".join(lines)


def write(found: Mapping[str, Any], name: str, **shown: Any) -> None:
    """Write the record as JSON into `RESULTS`, and print its table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, **shown))
