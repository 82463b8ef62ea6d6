"""Every fault of the core tests once more: what is found of it, and what two other packages say of the same runs, goes to
`docs/proof/faults.md`."""

import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import default_data_collator

from tests.conftest import rows, tiny_model
from tests.parity import ddp_faults
from tests.parity.faults import FAULTS, model_of, run_both
from tests.soak.peers import Run, guardtower_flags, pytest_torch_flags, said_beyond
from trainer_ext.engine import base_optimizer
from trainer_ext.loop_settings import LoopSettings
from trainer_ext.parity import compare, diagnose
from trainer_ext.parity.tolerance import BITWISE, ROUNDING
from trainer_ext.reference_optimizer import build_optimizer

PEERS = {"guardtower": guardtower_flags, "pytest-torch": pytest_torch_flags}
pytestmark = [
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),  # a fault is just that
]

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "faults.md"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", *PEERS)
TWO_RANKS = {f"two ranks: {name}": name for name in ddp_faults.RUNS}
VALUES = "assert_outputs_close"
FOUND = {}  # by fault: step, quantity, diagnosis, and what each peer flags


@pytest.fixture(scope="module", autouse=True)
def _peers_are_installed():
    for name in PEERS:
        how = "pip install --no-deps guardtower==0.1.0 pytest-torch==1.1.1"
        pytest.importorskip(name.replace("-", "_"), reason=f"{name} is not here: {how}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return ddp_faults.launched(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault(trainer, tmp_path, name):
    fault = FAULTS[name]
    reference, candidate, run = run_both(trainer, fault, tmp_path)
    clean = tiny_model(tokens=fault.tokens)
    data = rows(8, tokens=fault.tokens)
    ours = shown(reference, clean, default_data_collator(list(data)))
    initial, batch = model_of(fault.model, fault.tokens), run.data_collator(list(data))
    theirs = Run(candidate, initial, run.model, batch, base_optimizer(run.optimizer))
    assert found(name, ours, theirs, BITWISE) == fault.expected


@pytest.mark.parametrize("name", TWO_RANKS)
def test_a_fault_of_two_ranks(ranks, name):
    batch = default_data_collator(list(rows(8)))
    ours, theirs = (shown(ranks[which], tiny_model(dropout=0.0), batch) for which in ("reference", TWO_RANKS[name]))
    expected = ddp_faults.RUNS[TWO_RANKS[name]][1]
    assert found(name, ours, theirs, ROUNDING["float32"]) == expected


def shown(trajectory, initial, batch):
    """A run of which there is the record alone: the trained model is made of its weights."""
    model = tiny_model(tokens=batch["labels"].ndim > 1)
    model.load_state_dict(trajectory.tensors, strict=False)
    assert not {name for name, _ in model.named_parameters()} - trajectory.tensors.keys()
    return Run(trajectory, initial, model, batch, build_optimizer(model, LoopSettings()))


def found(name, reference, candidate, tolerance):
    """Step, quantity and cause of the first difference, noted with what the peers say."""
    a, b = reference.trajectory, candidate.trajectory
    first = compare(a, b, tolerance, same_split=tolerance.bitwise).first_difference
    diagnosis = diagnose(a, b, first) if first else None
    said = {peer: said_beyond(flags, reference, candidate) for peer, flags in PEERS.items()}
    FOUND[name] = first, diagnosis, said
    return first and (first.step, first.quantity, diagnosis.cause)


def test_the_peers_find_no_fault_in_the_same_run_and_some_in_a_broken_one(trainer, tmp_path):
    """They work here, so that a `-` in the table is theirs."""
    batch = default_data_collator(list(rows(8)))
    reference, _, _ = run_both(trainer, FAULTS["a NaN at step 2"], tmp_path)
    ours, broken = (shown(reference, tiny_model(), batch) for _ in range(2))
    assert not any(said_beyond(flags, ours, broken) for flags in PEERS.values())
    with torch.no_grad():
        broken.model.classifier.weight.fill_(torch.nan)
    assert all(said_beyond(flags, ours, broken) for flags in PEERS.values())


def test_write_the_table():
    everything = [*FAULTS, *TWO_RANKS]
    assert FOUND.keys() == set(everything), "some were not run"
    head = ("fault", "step", "quantity", "cause named", "known as", *PEERS)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cells(name))} |" for name in everything]
    faults = [name for name in everything if FOUND[name][0] is not None]
    said = {peer: [FOUND[name][2][peer] for name in faults] for peer in PEERS}
    flagged = {peer: sum(map(bool, found)) for peer, found in said.items()}
    stricter = sum(any(not check.startswith(VALUES) for check in found) for found in said["pytest-torch"])
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    PROOF.write_text(
        "# Faults injected into real runs\n\n"
        f"Generated on {date.today().isoformat()} by `make soak`: {len(faults)} faults and a clean run on two ranks. Each "
        "run trains a tiny BERT with one fault in it and is held against a run without: to the bit in one process, to "
        "float32 rounding on two. Step, quantity and cause are of the first difference, as `compare` and `diagnose` name "
        "it, and are asserted; step 0 is what stands before the first.\n\n"
        "guardtower and pytest-torch are the nearest packages on PyPI. Neither records a run and holds another against it, "
        "so they were given what their documentation asks for. guardtower: `audit`, with the optimizer, and `monitor`, on "
        "a batch of the run's, with the weights before and after it. pytest-torch: a `TrainingRun` of the recorded steps, "
        "with the reference's rates, largest norm (and 5% more) and decrease of the loss as expectations; "
        "`metric_baseline` with the reference's metrics; its checks of a model and of one beside another; and "
        "`assert_outputs_close`, with its own tolerances, on both records' steps (loss, gradient norm, rates), evaluations "
        "and weights. A cell has what is flagged of the faulty run and not of the reference beside itself, and where "
        "`assert_outputs_close` sees the first difference. Their checks of a training step that is a user's own function "
        "(`assert_accumulation_equivalent`, `assert_resume_equivalent`) cannot be given a `Trainer`'s loop and are left "
        "out.\n\n"
        f"Something is flagged in {flagged['guardtower']} of {len(faults)} by guardtower and in {flagged['pytest-torch']} "
        f"by pytest-torch, in {stricter} of them by more than `{VALUES}`. Neither names a cause.\n\n"
        + "\n".join(lines)
        + f"\n\n{versions}.\n"
    )


def cells(name):
    """One fault's row."""
    first, diagnosis, said = FOUND[name]
    if first is None:
        return [name, "-", "none: equal", "-", "-", *(flagged(said[peer]) for peer in PEERS)]
    known = f"[{'/'.join(diagnosis.known.split('/')[-4:])}]({diagnosis.known})" if diagnosis.known else "-"
    row = [name, str(first.step), f"`{first.quantity}`", diagnosis.cause, known]
    return [*row, *(flagged(said[peer]) for peer in PEERS)]


def flagged(said):
    """The names of the checks, each once, with what they were asked of."""
    names = {}
    for name, text in said.items():
        check, _, of = name.rstrip(")").partition("(")
        names.setdefault(check, []).append(first_place(of, text) if check == VALUES else of)
    return "; ".join(f"`{check}`" + (f" ({', '.join(of)})" if any(of) else "") for check, of in names.items()) or "-"


def first_place(of, text):
    """Of `steps`, where `output[1]['loss']` differs first: `step 2: loss`."""
    place = re.search(r"output\[(\d+)\]\['(\w+)'\](\[\d+\])?: ", text)
    return of if place is None else f"{of.removesuffix('s')} {int(place[1]) + 1}: {place[2]}"
