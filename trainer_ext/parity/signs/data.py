"""What the rows and labels of a run show: order, shards, repeats, resumes."""

from collections import Counter
from typing import Any

from trainer_ext.parity.digests import each_row
from trainer_ext.parity.evidence import Evidence
from trainer_ext.parity.trajectory import Step, Trajectory


def first_after_resume(e: Evidence) -> str | None:
    return f"It differs from step {e.at} on, the first after a resume" if e.at - 1 in e.b.resumed_at else None


def second_after_resume(e: Evidence) -> str | None:
    if e.at - 2 in e.b.resumed_at:
        return f"The first step after a resume was equal, and its update was not: step {e.at} is the second"
    return None


def data_begun_anew(e: Evidence) -> str | None:
    if e.at - 1 in e.b.resumed_at and e.step_b.rows == e.b.steps[0].rows:
        return f"Step {e.at}, the first after a resume, has the rows of step {e.b.steps[0].step}"
    return None


def epoch_repeated(e: Evidence) -> str | None:
    for step in e.b.steps:
        if step.step >= e.at:
            return None
        if step.rows == e.step_b.rows:
            return f"Step {e.at} has the rows of step {step.step}, in the same order"
    return None


def ranks_alike(e: Evidence) -> str | None:
    ranks = _by_rank(e.b, e.step_b)
    if len(ranks) > 1 and all(rank == ranks[0] for rank in ranks):
        return f"All {len(ranks)} ranks have the same rows in step {e.at}"
    return None


def one_rank_differs(e: Evidence) -> str | None:
    ours, theirs = _by_rank(e.b, e.step_a, e.step_b.sizes), _by_rank(e.b, e.step_b)
    other = [rank for rank, (x, y) in enumerate(zip(ours, theirs, strict=True)) if x != y]
    if len(theirs) > 1 and len(other) == 1:
        return f"In step {e.at} rank {other[0]} of {len(theirs)} alone has other rows"
    return None


def rows_missing(e: Evidence) -> str | None:
    ours, theirs = (Counter(each_row(step.rows)) for step in (e.step_a, e.step_b))
    if theirs < ours:
        return f"Step {e.at} has {theirs.total()} of the reference's {ours.total()} rows"
    ours, theirs = _all_rows(e.a), _all_rows(e.b)
    return f"The run has {theirs.total()} of the reference's {ours.total()} rows" if theirs < ours else None


def rows_twice(e: Evidence) -> str | None:
    ours, theirs = (Counter(each_row(step.rows)) for step in (e.step_a, e.step_b))
    if ours < theirs and theirs.keys() <= _all_rows(e.a).keys():
        return f"Step {e.at} has {theirs.total()} rows where the reference has {ours.total()}"
    return None


def same_rows_of_step(e: Evidence) -> str | None:
    same = sorted(each_row(e.step_a.rows)) == sorted(each_row(e.step_b.rows))
    return f"Step {e.at} has the same {sum(e.step_a.sizes)} rows in both" if same else None


def other_order(e: Evidence) -> str | None:
    seeds = [run.header.get("seeds") or {} for run in (e.a, e.b)]
    ours, theirs = _all_rows(e.a), _all_rows(e.b)
    shared = (ours & theirs).total()
    if ours == theirs:
        return f"Over the whole run both train the same {ours.total()} rows, in another order from step {e.at} on"
    if shared and ((all(seeds) and seeds[0] != seeds[1]) or shared > 0.5 * min(ours.total(), theirs.total())):
        return (
            f"{shared} of {ours.total()} rows of the run are in both, in another order from step {e.at} on (seeds "
            f"{_seed(seeds[0])} and {_seed(seeds[1])})"
        )
    return None


def no_common_rows(e: Evidence) -> str | None:
    shared, total = (_all_rows(e.a) & _all_rows(e.b)).total(), _all_rows(e.a).total()
    fingerprints = [((run.header.get("dataset") or {}).get("train") or {}).get("fingerprint") for run in (e.a, e.b)]
    about = (
        "" if None in fingerprints or fingerprints[0] == fingerprints[1] else ", and the datasets' fingerprints differ"
    )
    return f"{shared} of {total} rows of the run are in both{about}"


def labels_permuted(e: Evidence) -> str | None:
    ours, theirs = each_row(e.step_a.labels), each_row(e.step_b.labels)
    if len(set(ours)) < 2 or len(ours) != len(theirs):
        return None
    for by in range(1, len(ours)):
        if ours[-by:] + ours[:-by] == theirs:
            return f"The labels of step {e.at} are the reference's, moved by {by} row{'s' if by > 1 else ''}"
    return (
        f"The labels of step {e.at} are the reference's in another order" if sorted(ours) == sorted(theirs) else None
    )


def labels_differ(e: Evidence) -> str | None:
    ours, theirs = each_row(e.step_a.labels), each_row(e.step_b.labels)
    wrong = sum(x != y for x, y in zip(ours, theirs, strict=False))
    return f"{wrong} of {len(ours)} rows of step {e.at} have other labels for the same inputs"


def split_differs(e: Evidence) -> str | None:
    return f"Step {e.at} came in {len(e.step_b.sizes)} micro-batches instead of {len(e.step_a.sizes)}"


def _by_rank(run: Trajectory, step: Step, sizes: list[int] | None = None) -> list[list[str]]:
    """The rows of each rank, where the micro-batches of the step stand in turn."""
    rows, ranks, start = each_row(step.rows), run.world_size, 0
    found: list[list[str]] = [[] for _ in range(ranks)]
    for place, size in enumerate(sizes or step.sizes):
        found[place % ranks] += rows[start : start + size]
        start += size
    return found


def _all_rows(run: Trajectory) -> Counter[str]:
    return Counter(row for step in run.steps for row in each_row(step.rows))


def _seed(seeds: dict[str, Any]) -> str:
    return str(seeds.get("data_seed") or seeds.get("seed", "unknown"))
