"""`trainer-ext verify`: each checkpoint with its verdict, and an exit code that scripts can go by."""

import pytest

from trainer_ext.checkpoints.manifest import verify, write_manifest


@pytest.fixture
def run(tmp_path):
    """An output folder with two checkpoints and the model beside them."""
    for step in (10, 9):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(f"weights of {step}")
        (folder / "trainer_state.json").write_text("{}")
        write_manifest(folder)
    (tmp_path / "run" / "trainer_state.json").write_text("{}")
    return tmp_path / "run"


def test_good_ones(call, run):
    found = call("verify", run)
    assert found.exit_code == 0
    assert found.output.splitlines() == [f"{run}/checkpoint-{step}: as it was saved" for step in (9, 10)]
    assert call("verify", run / "checkpoint-9").exit_code == 0


def test_a_bad_one_is_named(call, run):
    (run / "checkpoint-9" / "model.safetensors").write_text("Weights of 9")
    (run / "checkpoint-9" / "trainer_state.json").unlink()
    found = call("verify", run)
    assert found.exit_code == 1
    assert found.output.splitlines() == [
        f"{run}/checkpoint-9: wrong",
        "  model.safetensors is not as it was saved: its SHA-256 differs",
        "  trainer_state.json is missing",
        f"{run}/checkpoint-10: as it was saved",
    ]
    assert call("verify", run / "checkpoint-10").exit_code == 0


def test_one_without_a_manifest(call, run):
    (run / "checkpoint-9" / "manifest.json").unlink()
    found = call("verify", run / "checkpoint-9")
    assert (found.exit_code, found.output.splitlines()[1]) == (1, "  manifest.json is missing")


@pytest.mark.parametrize("name", ["nothing", "run/checkpoint-9/model.safetensors", "."])
def test_no_checkpoint(call, run, name):
    found = call("verify", run.parent / name)
    assert found.exit_code == 2
    assert "trainer-ext: error:" in found.output
    assert "Traceback" not in found.output


def test_a_change_that_is_meant(call, run):
    checkpoint = run / "checkpoint-9"
    (checkpoint / "model.safetensors").write_text("edited by hand")
    assert call("verify", "--accept", run).exit_code == 2
    found = call("verify", "--accept", checkpoint)
    assert found.exit_code == 0
    assert found.output.splitlines()[0] == f"{checkpoint}: accepted as it is"
    assert verify(checkpoint) == []
