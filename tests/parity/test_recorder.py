"""Records: what is written while a run trains, what a killed or resumed run leaves, and what the file holds."""

import dataclasses
import json
import math
from importlib.metadata import version

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer
from trainer_ext.metrics import compute_metrics
from trainer_ext.parity import TrainerRecorder, Trajectory, assert_parity, compare, diagnose, recorder
from trainer_ext.parity.recorder import FIRST_STEPS

RUN = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch"}


def recorded(trainer, folder, *, resume=None, fixture_options=None, **options):
    run = trainer(
        evaluation=rows(13), compute_metrics=compute_metrics(), **{**RUN, **options, **(fixture_options or {})}
    )
    recorder = TrainerRecorder(run, folder)
    run.train(resume_from_checkpoint=resume)
    return run, recorder.finish()


def lines(folder):
    return [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()]


def test_what_the_file_holds(trainer, tmp_path):
    run, found = recorded(trainer, tmp_path / "record")
    kinds = [line["kind"] for line in lines(tmp_path / "record")]
    assert kinds == ["header", "begin", "begin", *["step"] * 6, "evaluation", *["step"] * 6, "evaluation", "end"]
    header = lines(tmp_path / "record")[0]
    assert header["schema"] == 3
    assert header["seeds"] == {"seed": 42, "data_seed": None}
    assert header["arguments"]["per_device_train_batch_size"] == 4
    assert header["dataset"]["train"]["rows"] == 22
    assert header["environment"]["torch"] == version("torch")
    assert header["environment"]["threads"] == torch.get_num_threads()
    assert torch.backends.cpu.get_cpu_capability() in header["environment"]["cpu"]
    assert found.parameters["classifier.weight"] == ["float32", [2, 16]]
    assert sorted(name for group in found.groups for name in group) == sorted(found.parameters)
    step = found.steps[0]
    assert (step.sizes, len(step.rows), len(step.group_norms)) == ([4], 32, 2)
    assert math.hypot(*step.group_norms) == pytest.approx(min(step.grad_norm, 1.0), rel=1e-5)
    assert found.evaluations[0].rows == found.evaluations[0].expected == 13
    assert found.evaluations[0].training is False
    weights = run.model.state_dict()
    assert all(torch.equal(found.tensors[name], weights[name]) for name in found.tensors)


def test_norms_of_groups_and_random_states_are_taken_at_first_and_now_and_then(trainer, tmp_path):
    run = {"per_device_train_batch_size": 1, "num_train_epochs": 4, "output_dir": str(tmp_path / "out")}  # 88 steps
    _, found = recorded(trainer, tmp_path / "record", save_strategy="steps", save_steps=50, **run)
    assert [step.step for step in found.steps if step.group_norms] == [*range(1, 17), 64]
    assert [step.step for step in found.steps if step.rng] == [*range(1, 17), 64]
    assert all(step.grad_norm > 0 for step in found.steps)
    _, resumed = recorded(trainer, tmp_path / "record", resume=str(tmp_path / "out" / "checkpoint-50"), **run)
    assert [step.step for step in resumed.steps if step.rng] == [*range(1, 17), *range(51, 67)]


@pytest.mark.parametrize(("seconds", "written"), [(0.0, [16, 17, 18, 19]), (1e9, [16])])
def test_lines_are_written_as_often_as_the_time_of_a_step_allows(monkeypatch, trainer, tmp_path, seconds, written):
    monkeypatch.setattr(recorder, "SECONDS_BETWEEN_WRITES", seconds)
    seen = []

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([line["kind"] for line in lines(tmp_path / "record")].count("step"))

    run = trainer(per_device_train_batch_size=1, max_steps=19)
    TrainerRecorder(run, tmp_path / "record")
    run.add_callback(Looks())
    run.train()
    assert sorted(set(seen)) == [0, *written]


def test_memory_and_disk_tell_the_same(trainer, tmp_path):
    _, on_disk = recorded(trainer, tmp_path / "record")
    _, in_memory = recorded(trainer, None)
    assert_parity(on_disk, in_memory, tolerance=0)
    assert on_disk.steps == in_memory.steps
    assert on_disk.evaluations == in_memory.evaluations
    assert on_disk.optimizer == in_memory.optimizer


def test_recording_changes_nothing(trainer, tmp_path):
    plain = trainer(**RUN, evaluation=rows(13))
    plain.train()
    run, _ = recorded(trainer, tmp_path / "record")
    for ours, theirs in zip(plain.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resumed_run_goes_on_without_a_seam(trainer, tmp_path):
    whole = recorded(trainer, tmp_path / "whole")[1]
    saving = {"save_strategy": "steps", "save_steps": 5}
    recorded(trainer, tmp_path / "record", output_dir=str(tmp_path / "out"), **saving)  # to its end
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    _, found = recorded(trainer, tmp_path / "record", resume=checkpoint, output_dir=str(tmp_path / "out"), **saving)
    assert found.resumed_at == [5]
    assert [step.step for step in found.steps] == list(range(1, 13))
    assert_parity(whole, found, tolerance=0)
    kinds = [line["kind"] for line in lines(tmp_path / "record")]
    assert kinds.count("step") == 12 + 7  # nothing that was written is taken away
    assert kinds.count("header") == 1
    assert set(found.weights) == {5, 10, 12}


def test_a_record_may_begin_with_a_resume(trainer, tmp_path):
    """Only the second half was recorded: it is compared with the steps that it has."""
    whole = recorded(trainer, tmp_path / "whole")[1]
    saving = {"save_strategy": "steps", "save_steps": 5, "output_dir": str(tmp_path / "out")}
    recorded(trainer, None, **saving)
    half = recorded(trainer, tmp_path / "half", resume=str(tmp_path / "out" / "checkpoint-5"), **saving)[1]
    assert ([step.step for step in half.steps], half.resumed_at) == (list(range(6, 13)), [5])
    assert_parity(whole, half, tolerance=0)
    half.steps[1] = dataclasses.replace(half.steps[1], loss=9.0)
    first = compare(whole, half).first_difference
    assert (first.step, first.quantity) == (7, "loss")
    assert diagnose(whole, half, first).cause == "a resume without the optimizer's state"


def test_a_new_run_replaces_the_record(trainer, tmp_path):
    recorded(trainer, tmp_path / "record")
    _, found = recorded(trainer, tmp_path / "record", num_train_epochs=1)
    assert len(found.steps) == 6
    assert [line["kind"] for line in lines(tmp_path / "record")].count("header") == 1


class KilledError(Exception):
    pass


class Dies(CustomTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == FIRST_STEPS + 3:
            raise KilledError
        return super().training_step(*args, **kwargs)


def test_a_killed_run_leaves_what_was_written(trainer, tmp_path):
    run = trainer(Dies, per_device_train_batch_size=2, max_steps=40)
    TrainerRecorder(run, tmp_path / "record")
    with pytest.raises(KilledError):
        run.train()
    found = Trajectory.load(tmp_path / "record")
    assert (len(found.steps), found.finished) == (FIRST_STEPS, False)
    with (tmp_path / "record" / "trajectory.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 17, "ro')  # torn by the kill
    assert Trajectory.load(tmp_path / "record").steps == found.steps
    whole = trainer(per_device_train_batch_size=2, max_steps=40)
    reference = TrainerRecorder(whole)
    whole.train()
    first = compare(reference.finish(), found).first_difference
    assert (first.step, first.quantity) == (17, "steps")


def test_numbers_that_are_not_finite_are_told(trainer, tmp_path):
    class Nan(CustomTrainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    run = trainer(Nan, on_non_finite="ignore")
    recorder = TrainerRecorder(run, tmp_path / "record")
    run.train()
    found = recorder.finish()
    assert all(math.isnan(step.loss) and math.isnan(step.grad_norm) for step in found.steps)
    for line in (tmp_path / "record" / "trajectory.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_frozen_parameters_and_weights_that_are_not_kept(trainer, tmp_path):
    model = tiny_model()
    model.bert.embeddings.requires_grad_(False)
    run = trainer(model=model)
    recorder = TrainerRecorder(run, tmp_path / "record", keep_weights=False)
    run.train()
    found = recorder.finish()
    assert not (tmp_path / "record" / "weights.safetensors").exists()
    assert not any("embeddings" in name for group in found.groups for name in group)
    assert (
        found.final_weights["bert.embeddings.LayerNorm.weight"]
        == found.initial_weights["bert.embeddings.LayerNorm.weight"]
    )
    assert_parity(found, found)


def test_a_folder_that_is_no_record(tmp_path):
    with pytest.raises(ValueError, match="has no trajectory.jsonl"):
        Trajectory.load(tmp_path)
    (tmp_path / "trajectory.jsonl").write_text('{"kind": "header", "schema": 99, "path": "x"}\n')
    with pytest.raises(ValueError, match="its schema is 99; this version reads 3"):
        Trajectory.load(tmp_path)
