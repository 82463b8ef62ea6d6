"""Several processes over gloo and DDP give the numbers of one, however unevenly the rows fall on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.worker import CASES

ROOT = Path(__file__).parents[2]
EXACT = [case for case in CASES if case not in ("stock", "repeated rows left in")]


def launch(out, *launcher):
    words = [sys.executable, *launcher, "-m", "tests.distributed.worker", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What 1, 2 and 3 processes saw in every case."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    return {1: launch(folder / "1.json")} | {n: launch(folder / f"{n}.json", *torchrun, str(n)) for n in (2, 3)}


def gap(a, b):
    """The largest difference, relative to the largest number; infinite where the lengths differ."""
    if len(a) != len(b):
        return float("inf")
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, a))


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_really_ran_in_parallel(found, ranks):
    for case in CASES:
        assert found[ranks][case]["engine"] == "DistributedDataParallel"
        assert found[ranks][case]["world_size"] == ranks
        assert found[1][case]["world_size"] == 1


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", EXACT)
def test_the_numbers_are_those_of_one_process(found, case, ranks):
    one, many = found[1][case], found[ranks][case]
    for quantity in ("losses", "grad_norms", "weights"):
        assert gap(one[quantity], many[quantity]) < 1e-11, quantity
    assert gap([one["eval_loss"]], [many["eval_loss"]]) < 1e-11


@pytest.mark.parametrize("ranks", [2, 3])
def test_repeated_rows_would_be_seen(found, ranks):
    one, many = (found[n]["repeated rows left in"] for n in (1, ranks))
    assert gap(one["losses"], many["losses"]) > 1e-4
    assert gap(one["weights"], many["weights"]) > 1e-4


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_accelerate_loop_is_exact_too(found, ranks):
    one, many = found[1]["accelerate loop"], found[ranks]["accelerate loop"]
    assert gap(one["losses"], many["losses"]) < 1e-11
    assert gap([one["eval_loss"]], [many["eval_loss"]]) < 1e-11
    assert gap(one["losses"], found[1]["ranks without rows"]["losses"]) < 1e-11


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_stock_trainer_is_off_by_the_number_of_ranks(found, ranks):
    one, many = found[1]["stock"], found[ranks]["stock"]
    assert many["losses"][0] / one["losses"][0] == pytest.approx(ranks, rel=0.05)
