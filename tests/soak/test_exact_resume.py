"""Which trainings go on exactly, from each of their steps, with the stock trainer and ours: `docs/proof/resume.md`."""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.checkpoints.resumes import VARIANTS, Ours, Stock, differences, resumed, whole

pytestmark = pytest.mark.soak

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "resume.md"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "datasets", "numpy")
SAID = {"weights": "weights", "seen": "data", "log": "log"}
FOUND = {}  # by variant: of ours and stock, what differs by step, or the error


def measure(cls, variant, out):
    expected = whole(cls, variant, out)
    steps = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    return {step: differences(expected, resumed(cls, variant, out, step), step) for step in steps}


@pytest.mark.parametrize("name", VARIANTS)
def test_ours_goes_on_exactly_from_every_step(tmp_path, name):
    ours = measure(Ours, VARIANTS[name], tmp_path / "ours")
    FOUND[name] = ours, measure(Stock, VARIANTS[name], tmp_path / "stock") if VARIANTS[name].stock else {}
    assert ours
    assert not any(ours.values()), ours


def test_write_the_table():
    assert list(FOUND) == list(VARIANTS), "some were not measured"
    exact = [
        sum(bool(found[which]) and not any(found[which].values()) for found in FOUND.values()) for which in (0, 1)
    ]
    lines = [f"| {name} | {len(ours)} | {equal(ours)} | {equal(stock)} |" for name, (ours, stock) in FOUND.items()]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    PROOF.write_text(
        "# A run that goes on is the run that was not interrupted\n\n"
        f"Generated on {date.today().isoformat()} by `make soak`: {len(FOUND)} trainings of a tiny BERT in one process, "
        "each of three epochs of 20 rows in micro-batches of 3 with accumulation 2, so that an epoch has four steps and "
        "the last is of one micro-batch with two rows; dropout 0.1 unless said. Each is trained once with a checkpoint "
        "after every step, and then once more from every one of these to the end. Compared to the bit are the final "
        "weights, the rows and the whole input of every step (data), and every logged number but times (log). Where they "
        "differ, how many of the resumed runs do is said.\n\n"
        f"Equal from every step: {exact[0]} of {len(FOUND)} with `CustomTrainer`, {exact[1]} with the stock `Trainer`. "
        "The stock class draws by `WeightedRandomSampler` where ours has a sampler of its own, is given "
        "`TokenBudgetBatches`, and groups by its own `LengthGroupedSampler`.\n\n"
        "| training | resumed steps | `CustomTrainer` | stock `Trainer` |\n|---|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\n{versions}; a CPU.\n"
    )


def equal(found):
    if not found:
        return "has none"
    wrong = {SAID[name]: sum(name in one for one in found.values()) for name in SAID}
    said = ", ".join(f"{name} {count}" for name, count in wrong.items() if count)
    return f"all equal, {len(found)}" if not said else f"differ: {said}"
