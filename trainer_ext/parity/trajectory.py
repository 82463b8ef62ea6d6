"""What a training run recorded: enough to say, step by step, whether another run is the same run.

A record is a folder with `trajectory.jsonl`, to which lines are only ever added, and the final weights in
`weights.safetensors`. Each line is a JSON object of one `kind`:

    header      schema, who trained, environment, command, git revision, seeds, arguments, datasets
    begin       what the run stands on, the parameters and their groups, digests of the initial weights
    step        one optimizer step, see `Step`
    evaluation  see `Evaluation`
    weights     digests of the weights after a step: where a checkpoint was saved or loaded, and now and then
    resume      training goes on from this step; lines of later steps that stand above are void
    end         digests of the final weights and of the optimizer's state

Floats are stored as they are (JSON keeps every digit of a double; one that is not finite is a text), rows and tensors
as digests. A line that a killed run left half written is passed over.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SCHEMA = 3
LINES, WEIGHTS = "trajectory.jsonl", "weights.safetensors"


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: Counted from 1.
        rows: The digests of the inputs of all micro-batches' rows on all ranks, in the loader's order; padding does not
            show in them.
        labels: The same of the rows' labels.
        sizes: The rows of each micro-batch, in the same order: each rank's first, then each rank's second.
        rng: Digest of the random generators' states after the step, in the first 16 steps after the start or a resume
            and in every 64th; else None.
        denominator: What the step's summed loss was divided by; None where the path does not say.
        loss: The step's loss, as the path itself reports it.
        grad_norm: The gradient's norm before clipping; None where the path does not say, as DeepSpeed without ZeRO.
        group_norms: The norm of each parameter group's gradient as the optimizer got it, after clipping, in the same
            steps as `rng`; None else, and under DeepSpeed, which keeps its gradients to itself.
        learning_rates: The rate of every parameter group, as the step was taken with it.
    """

    step: int
    rows: str
    labels: str
    sizes: list[int]
    rng: str | None
    denominator: float | None
    loss: float
    grad_norm: float | None
    group_norms: list[float] | None
    learning_rates: list[float]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        step: After which it was made.
        metrics: Its loss and metrics.
        rows: How many rows went through the model, repeated ones too; None where the path does not say.
        expected: How many the split has.
        training: Whether the model was in training mode.
    """

    step: int
    metrics: dict[str, float]
    rows: int | None = None
    expected: int | None = None
    training: bool | None = None


@dataclass
class Trajectory:
    """A whole run, as its record tells it.

    Attributes:
        path: Who trained: `manual loop`, or the trainer's class name.
        header: The record's first line.
        runs_on: `engine` (the class that owned the forward pass), ZeRO `stage`, `world_size`, and `local_fraction`, the
            share of the parameters that a rank holds between two steps, as the run itself saw them.
        parameters: dtype and shape of each trained parameter.
        groups: The names of the parameters of each of the optimizer's groups.
        weight_decay: The decay of each parameter's group.
        optimizer: The optimizer's class, and what its groups are set to (`betas`, `eps`, ..), by `group.name`.
        initial_weights: Digest of each parameter and buffer before the first step.
        steps: Every optimizer step.
        evaluations: Each evaluation, in order.
        weights: Digests as `initial_weights`, after some steps.
        resumed_at: The steps from which training went on in a new process.
        final_weights: As `initial_weights`, after the last step.
        optimizer_state: Digest of each state tensor, as `parameter.key`; of a run in one process.
        gradient_scale: The root of the largest second moment of each parameter, where the optimizer keeps them.
        finished: Whether the run came to its end.
        tensors: The final weights.
    """

    path: str
    header: dict[str, Any] = field(default_factory=dict)
    runs_on: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, list[Any]] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    weight_decay: dict[str, float] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    initial_weights: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    weights: dict[int, dict[str, str]] = field(default_factory=dict)
    resumed_at: list[int] = field(default_factory=list)
    final_weights: dict[str, str] = field(default_factory=dict)
    optimizer_state: dict[str, str] = field(default_factory=dict)
    gradient_scale: dict[str, float] = field(default_factory=dict)
    finished: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def world_size(self) -> int:
        return int(self.runs_on.get("world_size", 1))

    @classmethod
    def load(cls, folder: Path | str) -> "Trajectory":
        """Read a record.

        Raises:
            ValueError: There is none in `folder`, or it is of another schema.
        """
        folder = Path(folder)
        try:
            lines = (folder / LINES).read_text(errors="replace").splitlines()
        except OSError:
            raise ValueError(f"{folder} has no {LINES}: it is not a record of `trainer-ext parity`.") from None
        found = cls.of(_parsed(lines), str(folder))
        if (folder / WEIGHTS).is_file() and found.finished:
            try:
                found.tensors = load_file(folder / WEIGHTS)
            except SafetensorError as error:
                raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}. Record the run again.") from error
        return found

    @classmethod
    def of(cls, lines: Iterable[dict[str, Any]], origin: str = "the record") -> "Trajectory":
        """What the lines of a record tell.

        Raises:
            ValueError: They are of another schema, do not begin with a header, or are not what a recorder writes.
        """
        lines = iter(lines)
        header = next(lines, {})
        schema = header.get("schema") if isinstance(header, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{origin}: its schema is {schema}; this version reads {SCHEMA}. Record the run again.")
        try:
            found = cls(header["path"], header=header, finished=False)
            for line in lines:
                _READERS[line.pop("kind")](found, line)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{origin}: a line is not what a recorder writes ({type(error).__name__}: {error}). Record the run again."
            ) from error
        return found


def _begin(run: Trajectory, line: dict[str, Any]) -> None:
    vars(run).update(line)


def _step(run: Trajectory, line: dict[str, Any]) -> None:
    numbers = {name: _number(line[name]) for name in ("denominator", "loss", "grad_norm")}
    norms = line["group_norms"] and [_number(norm) for norm in line["group_norms"]]
    run.steps.append(Step(**{**line, **numbers, "group_norms": norms}))


def _evaluation(run: Trajectory, line: dict[str, Any]) -> None:
    metrics = {name: _number(value) for name, value in line["metrics"].items()}
    run.evaluations.append(Evaluation(**{**line, "metrics": metrics}))


def _weights(run: Trajectory, line: dict[str, Any]) -> None:
    run.weights[line["step"]] = line["digests"]


def _resume(run: Trajectory, line: dict[str, Any]) -> None:
    at = line["step"]
    run.resumed_at = [step for step in run.resumed_at if step < at] + [at]
    run.steps = [step for step in run.steps if step.step <= at]
    run.evaluations = [evaluation for evaluation in run.evaluations if evaluation.step <= at]
    run.weights = {step: held for step, held in run.weights.items() if step <= at}
    run.finished = False


def _end(run: Trajectory, line: dict[str, Any]) -> None:
    scales = {name: _number(value) for name, value in line.get("gradient_scale", {}).items()}
    vars(run).update(line, gradient_scale=scales, finished=True)


_READERS = {
    "begin": _begin,
    "step": _step,
    "evaluation": _evaluation,
    "weights": _weights,
    "resume": _resume,
    "end": _end,
}


def _parsed(lines: list[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
