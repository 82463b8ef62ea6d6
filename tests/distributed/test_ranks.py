"""Several processes over gloo and DDP give the numbers of one, however unevenly the rows fall on them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.worker import CASES, RESUMED

ROOT = Path(__file__).parents[2]


def launch(out, *launcher):
    words = [sys.executable, *launcher, "-m", "tests.distributed.worker", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-30_000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What 1, 2 and 3 processes saw in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    return {1: launch(folder / "1.json")} | {n: launch(folder / f"{n}.json", *torchrun, str(n)) for n in (2, 3)}


def gap(a, b):
    """The largest difference, relative to the largest number; infinite where the lengths differ or one is NaN."""
    if len(a) != len(b) or not all(map(math.isfinite, [*a, *b])):
        return math.inf
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, a))


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_really_ran_in_parallel(found, ranks):
    for case in CASES:
        assert found[ranks][case]["engine"] == "DistributedDataParallel"
        assert found[ranks][case]["world_size"] == ranks
        assert found[1][case]["world_size"] == 1


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_one_process(found, case, ranks):
    one, many = found[1][case], found[ranks][case]
    for quantity in ("losses", "grad_norms", "weights"):
        assert gap(one[quantity], many[quantity]) < 1e-11, quantity
    assert gap([one["eval_loss"]], [many["eval_loss"]]) < 1e-11


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", [*CASES, "grouped by length, dropout"])
def test_the_rows_of_a_step_are_those_of_one_process(found, case, ranks):
    one, many = found[1][case]["rows"], found[ranks][case]["rows"]
    if case.startswith("rebalanced"):  # deals the rows of a step out by cost, so that their order is the split's
        one, many = [sorted(step) for step in one], [sorted(step) for step in many]
    assert one == many


def rows_of_epochs(seen, rows):
    """The rows trained in each whole epoch, in order."""
    flat = [row for step in seen["rows"] for row in step]
    return [flat[start : start + rows] for start in range(0, len(flat) - rows + 1, rows)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", [*CASES, "grouped by length, dropout", "synchronised generators, dropout"])
def test_an_epoch_trains_every_row_once(found, case, ranks):
    rows = CASES[case]["rows"] if case in CASES else 32
    epochs = rows_of_epochs(found[ranks][case], rows)
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))


@pytest.mark.parametrize("ranks", [2, 3])
def test_stock_grouping_trains_rows_twice(found, ranks):
    first, second = rows_of_epochs(found[ranks]["stock grouping, dropout"], 32)
    assert len(set(first)) == 32
    assert len(set(second)) < 32


@pytest.mark.parametrize("ranks", [2, 3])
def test_groups_of_each_ranks_own_step_would_be_seen(found, ranks):
    one, many = (found[n]["grouped by each rank's own step"] for n in (1, ranks))
    assert gap(one["losses"], many["losses"]) > 1e-4
    assert gap(one["weights"], many["weights"]) > 1e-4


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_accumulation_takes_the_same_steps(found, ranks):
    for case in ("grouped by length", "rebalanced"):
        whole, split = found[1][case], found[ranks][f"{case}, accumulation"]
        assert [sorted(step) for step in whole["rows"]] == [sorted(step) for step in split["rows"]]
        assert gap(whole["losses"], split["losses"]) < 1e-11
        assert gap(whole["weights"], split["weights"]) < 1e-11


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_stream_is_trained_like_the_same_rows_in_order(found, ranks):
    stream, table = found[ranks]["stream, accumulation"], found[1]["in order, accumulation"]
    assert stream["rows"] == table["rows"]
    for quantity in ("losses", "grad_norms", "weights"):
        assert gap(table[quantity], stream[quantity]) < 1e-11, quantity


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_epoch_goes_on_with_its_own_order(found, case, ranks):
    whole, resumed = found[ranks][case], found[ranks]["resumed"][case]
    assert resumed["rows"] == whole["rows"][5:]
    assert gap(whole["weights"], resumed["weights"]) < 1e-11
    untold = found[ranks]["resumed, epoch untold"][case]
    assert (untold["rows"] == resumed["rows"]) == (ranks == 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_cases_are_what_they_say(found, ranks):
    for step in found[ranks]["one class a rank"]["classes"]:
        assert (step[0], step[-1]) == ([0], [1])
    for case in ("a rank all ignored", "a rank all ignored, the head's own loss"):
        first, second = found[ranks][case]["classes"][:2]
        assert len(first[0]) > 1
        assert first[-1] == [-100]
        assert second == [[-100]] * ranks
        assert found[ranks][case]["losses"][1] == 0


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["ranks without rows", "stream, ranks without rows"])
def test_repeated_rows_would_be_seen(found, case, ranks):
    one, many = (found[n][f"{case}: left in"] for n in (1, ranks))
    assert gap(one["losses"], many["losses"]) > 1e-4
    assert gap(one["weights"], many["weights"]) > 1e-4


def test_a_stream_that_every_rank_reads_is_refused(found):
    assert found[1]["refusal"] is None
    for ranks in (2, 3):
        assert f"dispatch_batches=False has each of the {ranks} ranks read" in found[ranks]["refusal"]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["accelerate loop", "accelerate loop, accumulation"])
def test_the_accelerate_loop_is_exact_too(found, case, ranks):
    one, many = found[1][case], found[ranks][case]
    assert gap(one["losses"], many["losses"]) < 1e-11
    assert gap([one["eval_loss"]], [many["eval_loss"]]) < 1e-11
    assert gap(one["losses"], found[1]["ranks without rows"]["losses"]) < 1e-11


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_stock_trainer_is_off_by_the_number_of_ranks(found, ranks):
    one, many = found[1]["stock"], found[ranks]["stock"]
    assert many["losses"][0] / one["losses"][0] == pytest.approx(ranks, rel=0.05)
