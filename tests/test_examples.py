"""Every example, run as a person would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*words, **options):
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What each script leaves when it is given its output folder (and two steps, to be quick)."""
    made = {}
    for script in ("run_mrpc", "run_mrpc_manual", "run_mrpc_accelerate"):
        folder = tmp_path_factory.mktemp(script)
        done = run(EXAMPLES / f"{script}.py", "--output_dir", folder, "--max_steps", 2, "--use_cpu")
        assert done.returncode == 0, done.stderr
        assert "using the built-in sample" in done.stderr + done.stdout
        made[script] = (folder, done)
    return made


def test_the_three_scripts_train_the_same_weights(folders):
    from safetensors.torch import load_file

    weights = [load_file(folder / "model.safetensors") for folder, _ in folders.values()]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        assert all((other[name] == tensor).all() for name, tensor in weights[0].items())


def test_the_trainer_script_leaves_its_metrics(folders):
    folder, _ = folders["run_mrpc"]
    assert {"eval_loss", "eval_accuracy", "eval_f1", "train_loss"} <= json.loads(
        (folder / "all_results.json").read_text()
    ).keys()


def test_the_trained_folder_answers_in_a_pipeline(folders):
    folder, _ = folders["run_mrpc"]
    done = run(EXAMPLES / "use_model.py", folder, "Shares rose on Monday.", "On Monday, shares climbed.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("equivalent", "not_equivalent")


def test_a_mistake_is_one_line(tmp_path):
    done = run(EXAMPLES / "run_mrpc.py", "--output_dir", tmp_path, "--lerning_rate", "1e-3")
    assert done.returncode == 2
    assert "did you mean --learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_examples_are_short():
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text().splitlines()) < 100, file
