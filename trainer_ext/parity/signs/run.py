"""What learning rates, parameter groups and evaluations show, and the run as a whole."""

from trainer_ext.parity.comparison import weight_share
from trainer_ext.parity.differences import evaluations, shortened
from trainer_ext.parity.evidence import Evidence, near
from trainer_ext.parity.signs.data import first_after_resume
from trainer_ext.parity.trajectory import Evaluation, Trajectory

ROUNDED = 2e-6  # of a loss in float32
ROUNDED_WEIGHTS = 0.05  # of the way that a weight can have gone


def schedule_begun_anew(e: Evidence) -> str | None:
    if first_after_resume(e) and e.step_b.learning_rates in (e.b.steps[0].learning_rates, e.a.steps[0].learning_rates):
        return f"Step {e.at}, the first after a resume, has the rate of step 1"
    return None


def groups_alike(e: Evidence) -> str | None:
    ours, theirs = e.step_a.learning_rates, e.step_b.learning_rates
    if len(set(ours)) > 1 and len(set(theirs)) == 1:
        return (
            f"The reference's {len(ours)} groups have {len(set(ours))} rates, the candidate's all have {theirs[0]:g}"
        )
    return None


def schedule_multiple(e: Evidence) -> str | None:
    ours, theirs = _rates(e.a), _rates(e.b)
    for times in range(2, 65):
        pairs = [(theirs[s], ours[times * (s - 1) + 1]) for s in theirs if times * (s - 1) + 1 in ours]
        moved = [pair for pair in pairs if pair[1] != ours[1]]
        if moved and all(near(x, y, 1e-6) for x, y in pairs):
            said = next((f" = {name}" for name, count in e.parts.items() if count == times), "")
            return f"The learning rate advances {times} schedule steps a step{said}"
    return None


def schedule_shifted(e: Evidence) -> str | None:
    ours, theirs = _rates(e.a), _rates(e.b)
    for by, said in ((1, "ahead"), (-1, "behind")):
        pairs = [(theirs[s], ours[s + by]) for s in theirs if s + by in ours]
        if len(pairs) > 1 and all(near(x, y, 1e-6) for x, y in pairs) and len({y for _, y in pairs}) > 1:
            return f"The candidate's rate is that of the reference one step {said}"
    return None


def rate_ratio(e: Evidence) -> str | None:
    ours, theirs = e.step_a.learning_rates, e.step_b.learning_rates
    ratios = {f"{y / x:.6g}" for x, y in zip(ours, theirs, strict=False) if x}
    said = f", {ratios.pop()} times" if len(ratios) == 1 else ""
    return f"Step {e.at} has {theirs} instead of {ours}{said}"


def decays_vectors(e: Evidence) -> str | None:
    names = [
        n for n, decay in e.b.weight_decay.items() if decay > 0 and not e.a.weight_decay.get(n) and _ndim(e, n) < 2
    ]
    if names:
        return f"{len(names)} parameters of one dimension are decayed, and shrink: {shortened(', '.join(names), 120)}"
    return None


def matrices_undecayed(e: Evidence) -> str | None:
    names = [n for n, decay in e.b.weight_decay.items() if not decay and e.a.weight_decay.get(n) and _ndim(e, n) > 1]
    return f"{len(names)} matrices are not decayed: {shortened(', '.join(names), 120)}" if names else None


def decay_differs(e: Evidence) -> str | None:
    return f"{e.difference.candidate} instead of {e.difference.reference}"


def setting_differs(e: Evidence) -> str | None:
    return f"{e.difference.quantity} is {e.difference.candidate} instead of {e.difference.reference}"


def evaluated_training(e: Evidence) -> str | None:
    return f"The model was in training mode in evaluation {_place(e)}" if _evaluation(e).training else None


def evaluated_twice(e: Evidence) -> str | None:
    found = _evaluation(e)
    if found.rows is not None and found.expected is not None and found.rows > found.expected:
        return f"{found.rows} rows were evaluated of a split of {found.expected}"
    return None


def evaluated_part(e: Evidence) -> str | None:
    found = _evaluation(e)
    if found.rows is not None and found.expected is not None and found.rows < found.expected:
        return f"{found.rows} rows were evaluated of a split of {found.expected}"
    return None


def first_update_after_resume(e: Evidence) -> str | None:
    if first_after_resume(e) and not _same_weights(e):
        return f"Step {e.at}, the first after a resume, was equal, and its update was not"
    return None


def evaluated_other_weights(e: Evidence) -> str | None:
    return None if _same_weights(e) else f"Step {e.at} was equal up to its rate; the weights after its update are not"


def only_eval_loss(e: Evidence) -> str | None:
    ours, theirs = (made[_place(e) - 1].metrics for made in evaluations(e.a, e.b))
    others = {name for name in ours.keys() & theirs.keys() if name != "loss"}
    if e.difference.quantity.endswith(": loss") and all(near(theirs[n], ours[n], 1e-6) for n in others):
        return (
            f"The weights and the other metrics agree; the loss is {theirs['loss']:.6g} instead of {ours['loss']:.6g}"
        )
    return None


def only_metrics(e: Evidence) -> str | None:
    return f"The weights agree; {e.difference.candidate} instead of {e.difference.reference}"


def last_not_evaluated(e: Evidence) -> str | None:
    ours, theirs = ([one.step for one in made] for made in evaluations(e.a, e.b))
    last = max(step.step for step in e.a.steps)
    if abs(len(ours) - len(theirs)) == 1 and set(ours) ^ set(theirs) == {last}:
        return f"The {'reference' if last in ours else 'candidate'} alone evaluates after step {last}, the last"
    return None


def evaluated_elsewhere(e: Evidence) -> str | None:
    ours, theirs = (shortened(", ".join(str(one.step) for one in made) or "none") for made in evaluations(e.a, e.b))
    return f"Evaluations after steps {ours} and {theirs}"


def steps_differ(e: Evidence) -> str | None:
    return (
        f"It ends after step {e.difference.candidate} instead of {e.difference.reference}; the steps of both are equal"
    )


def nothing_trained(e: Evidence) -> str | None:
    return "The final weights are the initial ones"


def _rates(run: Trajectory) -> dict[int, float]:
    """The highest rate of each step."""
    return {step.step: max(step.learning_rates) for step in run.steps}


def _ndim(e: Evidence, name: str) -> int:
    shape = (e.b.parameters.get(name) or e.a.parameters.get(name) or [None, [0, 0]])[1]
    return len(shape)


def _place(e: Evidence) -> int:
    return int(e.difference.quantity.split()[1].rstrip(":"))


def _same_weights(e: Evidence) -> bool:
    """Whether both had the same weights after the step, but for rounding: the next loss, or the final weights, say so."""
    following = [next((s for s in run.steps if s.step == e.at + 1), None) for run in (e.a, e.b)]
    if following[0] is not None and following[1] is not None:
        return near(following[1].loss, following[0].loss, ROUNDED)
    if e.a.tensors and e.b.tensors:
        return weight_share(e.a, e.b) <= ROUNDED_WEIGHTS
    return e.a.final_weights == e.b.final_weights


def _evaluation(e: Evidence) -> Evaluation:
    return evaluations(e.a, e.b)[1][_place(e) - 1]
