"""Every example, run as a person would run it."""

import json
import os
import subprocess
import sys

import pytest

from tests.readme import ROOT, command

EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*words):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What each script leaves when it is given its output folder (and two steps, to be quick)."""
    made = {}
    shown = command("python examples/run_mrpc.py")[1:]
    scripts = {"run_mrpc": shown} | {n: [f"examples/{n}.py"] for n in ("run_mrpc_manual", "run_mrpc_accelerate")}
    for script, words in scripts.items():
        folder = tmp_path_factory.mktemp(script)
        done = run(*words, "--output_dir", folder, "--max_steps", 2, "--use_cpu")
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
    _, script, _, *sentences = command("python examples/use_model.py")
    done = run(script, folder, *sentences)
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
