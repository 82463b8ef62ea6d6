"""What two other packages say of a candidate run beside a reference run: guardtower 0.1.0 and pytest-torch 1.1.1.

Neither compares two runs by itself. Each is given what its own documentation asks for, taken from both runs, and where a
check wants an expectation, the reference's numbers are that.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from trainer_ext.parity import Trajectory
from trainer_ext.parity.differences import evaluations
from trainer_ext.parity.trajectory import Evaluation

SLACK = 1.05  # how far beyond the reference's largest gradient norm the bound on norms is put
SHARES = (0.9, 0.5, 0.25, 0.1)  # of the loss: the most that the reference loses is what a candidate has to


@dataclass(frozen=True)
class Run:
    """What the packages are shown of a run.

    Attributes:
        trajectory: Of it.
        initial: The model before the first step.
        model: The model after the last.
        batch: Of its inputs, with labels; a model's output has the loss of it.
        optimizer: Of `model`, where there is one to show.
    """

    trajectory: Trajectory
    initial: torch.nn.Module
    model: torch.nn.Module
    batch: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer | None = None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.trajectory.steps]

    @property
    def grad_norms(self) -> list[float]:
        return [step.grad_norm for step in self.trajectory.steps]

    @property
    def rates(self) -> list[list[float]]:
        return [step.learning_rates for step in self.trajectory.steps]


def said_beyond(flags: Callable[[Run, Run], Mapping[str, str]], reference: Run, candidate: Run) -> dict[str, str]:
    """What is flagged of the candidate and is not of the reference held against itself."""
    usual = flags(reference, reference)
    return {name: text for name, text in flags(reference, candidate).items() if name not in usual}


def guardtower_flags(_: Run, candidate: Run) -> dict[str, str]:
    """Its `audit` of a step and its `monitor`, with the weights before and after the run; it takes no reference."""
    import guardtower

    flags = {}
    for when, model, optimizer in (
        ("before", candidate.initial, None),
        ("after", candidate.model, candidate.optimizer),
    ):
        model, optimizer = copy.deepcopy((model.train(), optimizer))
        step = partial(loss_of, model, candidate.batch)
        report = guardtower.Report()
        audit = partial(guardtower.audit, model, step, optimizer=optimizer)
        flags[f"audit {when}"] = raised(lambda report=report, audit=audit: report.findings.extend(audit().findings))
        flags |= {f"audit {when}: {one.check}": one.message for one in report.errors + report.warnings}
        with guardtower.monitor(model):
            flags[f"monitor {when}"] = raised(step)
    return {name: text for name, text in flags.items() if text}


def pytest_torch_flags(reference: Run, candidate: Run) -> dict[str, str]:
    """Its checks of a training run, of a model, of one model beside another, of metrics, and of two nested values."""
    checks = {
        **of_the_run(reference, candidate),
        **of_the_model(reference, candidate),
        **of_values(reference, candidate),
    }
    return {name: text for name, check in checks.items() if (text := raised(check))}


def of_the_run(reference: Run, candidate: Run) -> dict[str, Callable[[], Any]]:
    """`TrainingRun`, and what `metric_baseline` calls."""
    import pytest_torch as pt
    from pytest_torch import evaluation

    run, expected = pt.TrainingRun(candidate.losses), pt.TrainingRun(reference.losses)
    numbers = zip(candidate.losses, candidate.grad_norms, candidate.rates, strict=True)
    for step, (loss, norm, rates) in enumerate(numbers):
        bad = [] if math.isfinite(norm) else ["the whole gradient"]
        run.records.append(pt.StepRecord(step, {"loss": loss}, {"it": 1}, {"it": norm}, {}, {"it": rates}, bad))
    share = next((share for share in SHARES if not raised(partial(expected.assert_loss_decreases, share))), -math.inf)
    bound = SLACK * max(reference.grad_norms)
    checks = {
        "assert_finite": run.assert_finite,
        "assert_loss_decreases": partial(run.assert_loss_decreases, share),
        "assert_grad_norm_below": partial(run.assert_grad_norm_below, bound),
    }
    for group, rates in enumerate(zip(*reference.rates, strict=True)):
        checks[f"assert_lr({group})"] = partial(run.assert_lr, rates, group=group)
    evaluated = zip(*evaluations(reference.trajectory, candidate.trajectory), strict=False)
    for place, (was, now) in enumerate(evaluated, start=1):
        baseline = SimpleNamespace(get=lambda _, was=was: {"metrics": was.metrics})
        better = {name: name != "loss" for name in now.metrics}
        check = partial(evaluation.check_metrics, baseline, "run", now.metrics, higher_is_better=better)
        checks[f"metric_baseline({place})"] = check
    return checks


def of_the_model(reference: Run, candidate: Run) -> dict[str, Callable[[], Any]]:
    """The trained model, by itself and beside the reference's."""
    import pytest_torch as pt

    model, optimizer = copy.deepcopy((candidate.model, candidate.optimizer))
    ours, theirs = (copy.deepcopy(run.model).eval() for run in (reference, candidate))
    loss = lambda output: output.loss  # noqa: E731
    checks = {
        "assert_gradients_finite": partial(pt.assert_gradients_finite, model, candidate.batch, loss),
        "assert_all_params_receive_grad": partial(pt.assert_all_params_receive_grad, model, candidate.batch, loss),
        "check_inference_contract": partial(
            pt.check_inference_contract, theirs, candidate.batch, skip=("batch_invariance",)
        ),
        "assert_checkpoint_loads": partial(pt.assert_checkpoint_loads, lambda: ours, theirs.state_dict()),
        "assert_models_agree": partial(pt.assert_models_agree, ours, theirs, reference.batch, min_cosine=0.99),
        "localize_divergence": lambda: pt.localize_divergence(ours, theirs, reference.batch).raise_if_diverged(),
    }
    if optimizer is not None:
        checks["assert_optimizer_coverage"] = partial(pt.assert_optimizer_coverage, model, optimizer)
    return checks


def of_values(reference: Run, candidate: Run) -> dict[str, Callable[[], Any]]:
    """`assert_outputs_close` of the steps, the evaluations and the weights of both, with its own tolerances."""
    import pytest_torch as pt

    def values(run: Run, evaluated: list[Evaluation]) -> dict[str, Any]:
        rows = zip(run.losses, run.grad_norms, run.rates, strict=True)
        return {
            "steps": [{"loss": loss, "grad_norm": norm, "rates": rates} for loss, norm, rates in rows],
            "evaluations": [evaluation.metrics for evaluation in evaluated],
            "initial weights": run.initial.state_dict(),
            "final weights": run.model.state_dict(),
        }

    runs = reference, candidate
    ours, theirs = map(values, runs, evaluations(*(run.trajectory for run in runs)))
    return {
        f"assert_outputs_close({name})": partial(pt.assert_outputs_close, theirs[name], ours[name]) for name in ours
    }


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def raised(check: Callable[[], Any]) -> str:
    """What a check raises, on fixed random numbers; nothing where it holds."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ours are errors
        torch.manual_seed(0)
        try:
            check()
        except Exception as error:
            return str(error) or type(error).__name__
    return ""
