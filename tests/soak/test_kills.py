"""`kill -9` at 202 points, most of them inside saves: what is there can always be gone on from, no more than one save
interval is lost, and every run ends as it would have. Goes to `docs/proof/kills.md`.

A run is killed, resumed, killed again, until it comes to its end; then the next begins. Real processes die of a SIGKILL:

    in a save       before its n-th operation on files, by itself; the other ranks a moment later, by the parent
    seen saving     all ranks at once, when so many files lie in the folder beside
    at any time     all ranks at once, at a moment while it starts, resumes, trains or saves
"""

import json
import random
import signal
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import Trainer

from tests.soak.killed_runs import (
    ANY_TIME,
    IN_A_SAVE,
    OUTSIDE,
    RUNS,
    SAVE_STEPS,
    SEEN_SAVING,
    STEPS,
    STOCK,
    Life,
    kill_once,
    told,
)
from trainer_ext.checkpoints.resume import Choice, checkpoints_in, newest_good, step_of
from trainer_ext.checkpoints.write import SAVING

pytestmark = pytest.mark.soak

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "kills.md"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "deepspeed")
RECORDS = (
    Path(__file__).parents[2] / "runs" / "kills"
)  # one JSON a run: the points, and whether each end is as it would be


def chains(run, home, seed):
    """Kill as often as is asked for, run after run; the points, and what each run came to."""
    *_, kills, _ = RUNS[run]
    drawn, points, ends = random.Random(seed), [], []
    while len(points) < kills:
        found, came_to = chain(run, home / f"{len(ends)}", drawn, kills - len(points))
        points += found
        ends.append(came_to)
    return points, ends


def chain(run, out, drawn, kills):
    """One run, killed and gone on from until it comes to its end: the points, and what is in its file then."""
    stock, points = RUNS[run][0] is Trainer, []
    while True:
        way = IN_A_SAVE if stock else (IN_A_SAVE, SEEN_SAVING, IN_A_SAVE, ANY_TIME, ANY_TIME)[drawn.randrange(5)]
        codes, phase = kill_once(out, run, way, drawn) if len(points) < kills else (Life(out, run).codes(), "")
        if not any(codes):
            return points, json.loads(Path(f"{out}.end").read_text())
        if -signal.SIGKILL not in codes:
            assert stock, f"it cannot be gone on from: {codes}"
            return points, None
        points.append({"way": way, "phase": phase, **found_after(out, stock)})
        assert stock or points[-1]["step"] >= max([0, *(point["step"] for point in points)])


def found_after(out, stock):
    """The last step that was trained, and the one that the run goes on from."""
    done = int((told(out) or [0])[-1])
    if stock:
        return {"done": done, "step": next((step_of(path.name) for path in checkpoints_in(out)), 0)}
    choice = newest_good(out)
    assert choice is None or not choice.passed_over, choice
    return {"done": done, "step": step_of(choice.folder.name) if choice else 0}


@pytest.mark.parametrize("run", RUNS)
def test_kills(tmp_path, run):
    cls, ranks, _, config, kills, _ = RUNS[run]
    whole = tmp_path / "whole"
    assert not any(Life(whole, run).codes())
    expected = json.loads(Path(f"{whole}.end").read_text())
    assert expected[2] == ranks
    assert (expected[1] == "DeepSpeedEngine") == bool(config)
    points, came_to = chains(run, tmp_path, seed=ranks)
    ends = [found == expected for found in came_to]
    assert len(points) == kills
    keep(run, points, ends)
    if cls is Trainer:
        assert ends.count(False) >= 3, "the control: a class that writes in place does not survive the same kills"
        return
    assert all(ends)
    assert all(0 <= point["done"] - point["step"] <= SAVE_STEPS for point in points)
    assert sum(point["phase"] not in OUTSIDE for point in points) >= kills // 2
    for out in [path for path in tmp_path.iterdir() if path.is_dir()]:
        assert newest_good(out) == Choice(out / f"checkpoint-{STEPS}")
        assert not (out / SAVING).exists()


def keep(run, *found):
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{run}.json").write_text(json.dumps(found))


def test_write_the_table():
    """Of what is recorded; what is not stands there as not run."""
    paths = {run: RECORDS / f"{run}.json" for run in RUNS}
    found = {run: json.loads(path.read_text()) for run, path in paths.items() if path.exists()}
    ours = [run for run in found if run != STOCK]
    points = [point for run in ours for point in found[run][0]]
    saving = sum(point["phase"] not in OUTSIDE for point in points)
    head = ("", "kills", "in a save", "runs", "to the bit as if never killed", "steps lost: 0", "1", "2", "more")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(totals(run, *found[run]) for run in found)]
    lines += [f"| {run} | not run |" + " |" * (len(head) - 2) for run in RUNS if run not in found]
    phases = Counter(point["phase"] for point in points)
    lines += ["", "| what the run was at | kills |", "|---|---|"]
    lines += [f"| {phase} | {count} |" for phase, count in phases.most_common()]
    lines += ["", "| | killed | what it was at | last step trained | goes on from |", "|---|---|---|---|---|"]
    lines += [
        f"| {run} | {point['way']} | {point['phase']} | {point['done']} | {point['step']} |"
        for run in ours
        for point in found[run][0]
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    PROOF.write_text(
        "# Killed runs\n\n"
        f"Generated on {date.today().isoformat()} by `make soak` ({versions}): {len(points)} times `kill -9`, {saving} of "
        f"them inside a save. A run of {STEPS} steps saves after every {SAVE_STEPS}, is killed, resumed, killed again, "
        "until it comes to its end; its weights and losses are then those of a run that was never killed, to the bit. "
        "After every kill the newest checkpoint verifies. *In a save*: a process dies before a drawn operation on files "
        "(as Python's audit events count them), the others up to 50 ms later. *Seen saving*: all die at once, when a drawn "
        "number of files lies in `_saving`. *At any time*: all at once, after a drawn number of steps. The last step "
        "trained is the last that was told before the kill.\n\n"
        "The stock class is killed in saves alone: a run of it that cannot be gone on from, or ends with other weights or "
        "losses, is not to the bit.\n\n" + "\n".join(lines) + "\n"
    )


def totals(run, points, ends):
    """One row."""
    lost = Counter(point["done"] - point["step"] for point in points)
    more = sum(count for steps, count in lost.items() if steps > 2)
    saving = sum(point["phase"] not in OUTSIDE for point in points)
    cells = [run, len(points), saving, len(ends), ends.count(True), lost[0], lost[1], lost[2], more]
    return f"| {' | '.join(map(str, cells))} |"
