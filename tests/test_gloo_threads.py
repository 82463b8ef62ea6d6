"""A rank that ends while gloo still holds a tensor of its last collective, in processes of their own."""

import signal
import subprocess
import sys

import pytest

from tests.callbacks.processes import run_ranks
from tests.conftest import tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.gloo_threads import outlast_them

# The tensor has an object that takes its time to go, which gloo's thread sits through: as if it had no core meanwhile.
ENDS_AT_ONCE = """
import sys, time
import torch

class SlowToGo:
    def __del__(self):
        time.sleep(0.05)

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
sent = torch.ones(1)
sent.held = SlowToGo()
torch.distributed.all_reduce(sent, async_op=True)
del sent
"""
OUTLASTS = "from trainer_ext.gloo_threads import outlast_them\noutlast_them()\noutlast_them()\n"


def exit_code(script, store):
    return subprocess.run([sys.executable, "-c", script, store], capture_output=True, timeout=120).returncode


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python ends no thread at its own end any more")
def test_by_itself_it_is_aborted(tmp_path):
    assert exit_code(ENDS_AT_ONCE, str(tmp_path / "store")) == -signal.SIGABRT


def test_it_ends_well_when_it_outlasts_gloos_threads(tmp_path):
    assert exit_code(OUTLASTS + ENDS_AT_ONCE, str(tmp_path / "store")) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_of_several_ranks_does(ranks, tmp_path):
    assert run_ranks(waits_at_exit, ranks, str(tmp_path)) == [ranks > 1] * ranks


def waits_at_exit(folder):
    """On a rank: whether it will outlast gloo's threads, once it has a trainer."""
    args = CustomTrainingArguments(folder, use_cpu=True, report_to="none")
    CustomTrainer(tiny_model(dropout=0.0), args)
    return outlast_them.cache_info().currsize == 1
