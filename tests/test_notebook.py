"""The example notebook, run from its first cell to its last in a kernel of its own."""

import json
import math
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def written():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_kept_without_outputs(written):
    assert [(cell.outputs, cell.execution_count) for cell in code_cells(written)] == [([], None)] * 4


def test_two_processes_from_a_notebook_are_one_run(written, tmp_path):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    environment.pop("OMP_NUM_THREADS", None)  # as a person has it: with torch's threads, which no fork survives
    client = NotebookClient(written, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)

    several, one = (
        json.loads((tmp_path / "runs" / "notebook" / name / "record.json").read_text()) for name in ("several", "one")
    )
    assert (several["engine"], several["world_size"]) == ("DistributedDataParallel", 2)
    assert (one["engine"], one["world_size"]) == ("BertForSequenceClassification", 1)
    assert len(several["losses"]) == len(one["losses"]) == 10
    assert all(map(math.isfinite, several["losses"] + one["losses"]))
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert several["losses"][0] - several["losses"][-1] > 0.1

    said = "".join(output.get("text", "") for output in code_cells(written)[-1].outputs)
    assert "DistributedDataParallel on 2 processes, BertForSequenceClassification on 1" in said
    assert float(re.search(r"10 losses, at most (\S+) apart", said)[1]) < 1e-6
    for name in ("several", "one"):
        assert (tmp_path / "runs" / "notebook" / name / "model.safetensors").is_file()
