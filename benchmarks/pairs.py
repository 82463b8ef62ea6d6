"""Arms that take turns: what one costs as a ratio to another, beside how far two runs of the same arm are apart.

Arms go in, each a function that runs once and returns its seconds; a table and a JSON file come out.

    found = measure({"loop": run_loop, "trainer": run_trainer}, base="loop")
    write(found, Path("runs/bench/overhead.json"))

Every round runs each arm once, in an order that turns from round to round, and the base a second time: the control. The
first round is dropped. A ratio is of two runs of one round, so that a machine that slows down slows both. Where the
control's median is more than `CONTROL` from 1 the machine was not quiet enough for the figures to be quoted, and the table
says so.
"""

import gc
import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from trainer_ext.parity.environment import environment

ROUNDS = 8  # the first of them dropped
CONTROL = 0.02
AGAIN = ", again"

Seconds = dict[str, float]  # such as {"cpu": 0.011, "wall": 0.012}


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
    order, runs = list(named), []
    for turn in range(rounds):
        turned = order[turn % len(order) :] + order[: turn % len(order)]
        found = {}
        for name in turned:
            gc.collect()
            found[name] = named[name]()
        runs.append(found)
    kept, kinds = runs[1:], list(runs[0][base])
    return {
        "date": date.today().isoformat(),
        "environment": environment(),
        "about": dict(about or {}),
        "base": base,
        "rounds": len(kept),
        "seconds": {name: {kind: spread([run[name][kind] for run in kept]) for kind in kinds} for name in order},
        "ratios": {
            name: {kind: spread([run[name][kind] / run[base][kind] for run in kept]) for kind in kinds}
            for name in order
            if name != base
        },
        "runs": kept,
    }


def spread(values: list[float]) -> dict[str, float]:
    """The smallest, the middle and the largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def control_holds(found: Mapping[str, Any], kind: str) -> bool:
    """Whether two runs of the same arm were alike."""
    return abs(found["ratios"][found["base"] + AGAIN][kind]["median"] - 1) <= CONTROL


def table(found: Mapping[str, Any], *, unit: str = "ms", scale: float = 1000.0) -> str:
    """The record in Markdown: a row for each arm, with the ratio to the base, pair by pair."""
    base, kinds = found["base"], list(found["seconds"][found["base"]])
    said = {**found["environment"], **found["about"]}
    lines = [f"{found['date']}; {'; '.join(f'{name} {value}' for name, value in said.items())}", ""]
    lines += [f"{found['rounds']} rounds after one that does not count; ratios are to {base}, run by run.", ""]
    heads = [f"{kind} {unit}: min | median | max | ratio: min | median | max" for kind in kinds]
    lines += [f"| arm | {' | '.join(heads)} |", f"|---|{'---|' * 6 * len(kinds)}"]
    for name, seconds in found["seconds"].items():
        cells = [name]
        for kind in kinds:
            cells += [f"{scale * value:.3f}" for value in seconds[kind].values()]
            cells += [f"{value:.3f}" for value in found["ratios"][name][kind].values()] if name != base else ["1"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    for kind in kinds:
        if not control_holds(found, kind):
            lines += ["", f"The control of {kind} time is more than {CONTROL} from 1: not to be quoted."]
    return "\n".join(lines)


def write(found: Mapping[str, Any], path: Path, **shown: Any) -> None:
    """Write the record as JSON, and print its table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found, **shown))
