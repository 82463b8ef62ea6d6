"""`parity record` on scripts that know nothing of this package, and `parity compare` of what it recorded."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer_ext.cli import app
from trainer_ext.parity import Trajectory

SCRIPTS = Path(__file__).parent / "scripts"


def record(folder, *command, code=0, options=()):
    """The record's folder; what the command says is in `log`, and the script's own output in pytest's."""
    words = ["parity", "record", "--output", folder / "record", *options, "--", *command]
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == code, found.output
    (folder / "log").write_text(found.output)
    return folder / "record"


def compare(a, b, *options):
    found = CliRunner().invoke(app, ["parity", "compare", str(a), str(b), *map(str, options)])
    return found.exit_code, " ".join(found.output.split())


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The stock Trainer on the same 16 rows a step, whole and in four micro-batches."""
    folders = {}
    for micro, parts in ((16, 1), (4, 4)):
        home = tmp_path_factory.mktemp(f"stock{parts}")
        folders[parts] = record(home, "python", SCRIPTS / "stock_trainer.py", home / "out", micro, parts)
    return folders


def test_the_stock_scaling_fault_is_named(stock, tmp_path):
    code, output = compare(stock[1], stock[4], "--output-dir", tmp_path)
    assert code == 1
    assert "First difference at step 1, loss" in output
    assert "Likely cause: the loss is not divided by the whole step's items" in output
    assert "4.000 times the reference's = accumulation steps" in output
    assert "transformers/issues/47688" in output
    found = json.loads((tmp_path / "parity.json").read_text())["modes"][0]
    assert found["loss_ratio"] == pytest.approx(4, rel=1e-4)
    assert found["diagnosis"]["arguments"] == [
        "gradient_accumulation_steps: 1 / 4",
        "per_device_train_batch_size: 16 / 4",
    ]


def test_a_script_that_resumes_goes_on_in_its_record(stock, tmp_path):
    home = tmp_path / "stopped"
    shutil.copytree(stock[1].parent, home)
    shutil.rmtree(home / "out" / "checkpoint-4")
    folder = record(home, "python", SCRIPTS / "stock_trainer.py", home / "out", 16, 1, options=["--resumed"])
    found = Trajectory.load(folder)
    assert (found.resumed_at, [step.step for step in found.steps], found.finished) == ([2], [1, 2, 3, 4], True)
    kinds = [json.loads(line)["kind"] for line in (folder / "trajectory.jsonl").read_text().splitlines()]
    assert (kinds.count("header"), kinds.count("resume"), kinds.count("step")) == (1, 1, 4 + 2)
    code, output = compare(stock[1], folder, "--tolerance", "bitwise")
    assert code == 0, output


def test_a_record_equals_itself_and_a_tolerance_can_be_given(stock, tmp_path):
    assert compare(stock[1], stock[1], "--tolerance", "bitwise")[0] == 0
    assert compare(stock[1], stock[4], "--tolerance", "10")[0] == 1  # the weights still lie apart
    calibration = tmp_path / "calibration.json"
    calibration.write_text(json.dumps({"multiple": 10, "tolerance": {"relative": 10, "weights": 2}}))
    assert compare(stock[1], stock[4], "--tolerance", calibration)[0] == 0


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "says"),
    [
        ("nowhere", "nowhere", "bitwise", "has no trajectory.jsonl"),
        (None, None, "close", "--tolerance close: give bitwise, a number from 0, or a calibration.json"),
        (None, None, "-1", "--tolerance -1"),
        (None, None, "nan", "--tolerance nan"),
        (None, None, "nowhere.json", "calibration nowhere.json: No such file"),
        (None, None, "{file}", "it is not what `trainer-ext parity calibrate` writes"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(stock, tmp_path, a, b, tolerance, says):
    (tmp_path / "empty.json").write_text("{}")
    tolerance = tolerance.format(file=tmp_path / "empty.json")
    code, output = compare(a or stock[1], b or stock[1], "--tolerance", tolerance)
    assert code == 2
    assert says in output
    assert "Traceback" not in output


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """A loop over accelerate: whole, in four micro-batches, on two ranks, and scaled wrongly."""
    script = SCRIPTS / "accelerate_loop.py"
    one = ["accelerate", "launch", "--cpu", "--num_processes", "1", script]
    two = ["torchrun", "--standalone", "--nproc_per_node", "2", script]
    commands = {
        "whole": [*one, 16, 1],
        "split": [*one, 4, 4],
        "ranks": [*two, 4, 2],
        "fault": [*one, 4, 4, "unscaled"],
    }
    return {name: record(tmp_path_factory.mktemp(name), *words) for name, words in commands.items()}


def test_a_loop_over_accelerate_is_recorded(loops):
    found = Trajectory.load(loops["ranks"])
    assert found.path == "accelerate loop"
    assert (found.runs_on["engine"], found.world_size) == ("DistributedDataParallel", 2)
    assert [len(step.sizes) for step in found.steps] == [4] * 6
    assert found.finished
    for name in ("split", "ranks"):
        code, output = compare(loops["whole"], loops[name])
        assert code == 0, output


def test_a_fault_of_a_loop_is_named(loops):
    code, output = compare(loops["whole"], loops["fault"])
    assert code == 1
    assert "the loss is not divided by the whole step's items" in output


def test_trl(tmp_path):
    found = Trajectory.load(record(tmp_path, "python", SCRIPTS / "sft_trainer.py", tmp_path / "out"))
    assert found.path == "SFTTrainer"
    assert [sum(step.sizes) for step in found.steps] == [8, 8, 8]
    assert found.finished
    assert found.final_weights != found.initial_weights


def test_a_script_that_trains_nothing(tmp_path):
    (tmp_path / "script.py").write_text("print('done')")
    record(tmp_path, "python", tmp_path / "script.py", code=2)
    assert "trained nothing that could be recorded" in (tmp_path / "log").read_text()


def test_a_script_that_fails(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit(7)")
    record(tmp_path, "python", tmp_path / "script.py", code=7)
    assert (tmp_path / "log").read_text() == ""


def test_nothing_on_disk_is_lost(call, stock, tmp_path):
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "thesis.tex").write_text("x")
    before = (stock[1] / "trajectory.jsonl").read_bytes()
    for folder, options, says in (
        (tmp_path / "record", [], "is taken: name a new folder, or pass --resumed"),
        (tmp_path / "record" / "thesis.tex", [], "is taken"),
        (stock[1], [], "is taken"),
        (tmp_path / "record", ["--resumed"], "has no trajectory.jsonl to go on with"),
    ):
        found = call("parity", "record", "--output", folder, *options, "--", "python", "examples/run_mrpc.py")
        assert found.exit_code == 2
        assert says in " ".join(found.output.split())
    assert (tmp_path / "record" / "thesis.tex").read_text() == "x"
    assert (stock[1] / "trajectory.jsonl").read_bytes() == before
