"""Fifty pairs of clean runs are found equal; how far they lie apart goes to `docs/proof/clean_pairs.md`."""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.parity.ddp_faults import on_two_ranks
from tests.soak.clean_pairs import KINDS, by_hand, by_trainer, pairs
from trainer_ext.parity import Trajectory, compare, diagnose
from trainer_ext.parity.comparison import weight_share

pytestmark = pytest.mark.soak

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "clean_pairs.md"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate")
PAIRS = {str(pair): pair for pair in pairs()}
FOUND = {}  # by pair: steps, and how far losses, gradient norms, eval losses and weights lie apart


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Where two ranks left the record of each of their runs."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.soak.clean_pairs", folder)
    return folder


def both(pair, folder, two_ranks):
    """The reference and the candidate of a pair; `two_ranks()` is the folder of the latter's records."""
    if pair.kind == "resumed":
        reference = by_trainer(pair, folder / "reference")
        return reference, by_trainer(pair, folder / "candidate", stopped_at=pair.stopped_at)
    if pair.kind == "two ranks":
        return by_hand(pair, folder), Trajectory.load(two_ranks() / str(pair) / "record")
    return by_hand(pair, folder), by_trainer(pair, folder)


@pytest.mark.parametrize("name", PAIRS)
def test_a_clean_pair_is_equal(name, tmp_path, request):
    pair = PAIRS[name]
    reference, candidate = both(pair, tmp_path, lambda: request.getfixturevalue("two_ranks"))
    tolerance = KINDS[pair.kind][1]
    found = compare(reference, candidate, tolerance, same_split=tolerance.bitwise)
    first = found.first_difference
    assert first is None, (first, str(diagnose(reference, candidate, first)))
    assert reference.finished
    assert candidate.finished
    assert len(reference.steps) == len(candidate.steps) >= 4
    assert reference.evaluations
    assert candidate.resumed_at == ([] if pair.stopped_at is None else [pair.stopped_at])
    assert candidate.world_size == pair.world_size
    assert all(
        (a.sizes == b.sizes) is tolerance.bitwise for a, b in zip(reference.steps[:1], candidate.steps, strict=False)
    )
    apart = (
        found.max_relative_loss_difference,
        found.max_relative_gradient_difference,
        found.max_relative_metric_difference,
        weight_share(reference, candidate),
    )
    FOUND[name] = len(reference.steps), apart


def test_write_the_table():
    assert len(PAIRS) == 50
    assert FOUND.keys() == PAIRS.keys(), "some were not run, or not equal"
    head = ("runs", "dtype", "pairs", "steps", "Δloss", "Δgradient norm", "Δeval_loss", "Δweight", "held to")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cells(kind))} |" for kind in KINDS]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    PROOF.write_text(
        "# Clean runs raise no alarm\n\n"
        f"Generated on {date.today().isoformat()} by `make soak`: {len(PAIRS)} pairs of runs that are the same training, "
        "each found equal. Tiny BERT, RoBERTa and GPT-2 classifiers with random weights, "
        f"{len({pair.seed for pair in PAIRS.values()})} seeds, padded rows, class weights in "
        f"{sum(pair.weighted for pair in PAIRS.values())} of the pairs, micro-batches of 1 to 8 rows, 1 to 8 of them a "
        "step, shorter windows at the end of an epoch, runs of whole epochs and of a number of steps, and an evaluation "
        "with metrics after each epoch.\n\n"
        + "\n".join(lines)
        + "\n\nSteps: of all references of the row. Each Δ is the largest of all steps of all pairs: relative to the "
        "reference's loss, gradient norm and eval_loss; of the final weights, the largest element as a share of the sum "
        "of all learning rates, without the parameters whose gradient is 0 but for rounding. The same bits: of the "
        "batches, losses, norms and metrics, of the optimizer's state and of the weights.\n\n"
        f"{versions}; a CPU, two ranks over gloo.\n"
    )


def cells(kind):
    """One kind's row."""
    about, tolerance = KINDS[kind]
    names = [name for name, pair in PAIRS.items() if pair.kind == kind]
    steps = sum(FOUND[name][0] for name in names)
    apart = [f"{max(values):.2g}" for values in zip(*(FOUND[name][1] for name in names), strict=True)]
    held = "the same bits" if tolerance.bitwise else f"{tolerance.relative:.0e}; weights {tolerance.weights:g}"
    dtype = str(PAIRS[names[0]].dtype).removeprefix("torch.")
    return [about, dtype, str(len(names)), str(steps), *apart, held]
