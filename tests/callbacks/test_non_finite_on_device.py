"""A poisoned batch at each of 20 steps, with logs and saves in between: the fused kernel leaves out it and all after it."""

import pytest

from tests.callbacks.guard_run import data, train
from tests.conftest import rows, tiny_model
from trainer_ext.callbacks.non_finite_guard import NonFiniteGuard
from trainer_ext.checkpoints.manifest import verify
from trainer_ext.checkpoints.resume import checkpoints_in, step_of
from trainer_ext.trainer import CustomTrainer

STEPS, LOGS, SAVES = 20, 7, 9
OPTIONS = {"steps": STEPS, "logging_steps": LOGS, "trainer_class": CustomTrainer, "optim": "adamw_torch_fused"}


@pytest.fixture(scope="module")
def clean():
    return train(None, table=data(bad_steps=(), steps=STEPS), **OPTIONS)


@pytest.mark.parametrize("bad", range(1, STEPS + 1))
def test_the_weights_are_those_before_it(tmp_path, clean, bad):
    table = data(bad_steps=(bad,), steps=STEPS)
    ended = train(NonFiniteGuard(), table=table, out=tmp_path, save_strategy="steps", save_steps=SAVES, **OPTIONS)
    looked = min(step for step in range(bad, STEPS + 1) if step % LOGS == 0 or step % SAVES == 0 or step == STEPS)
    assert f"of step {bad} is not finite" in ended["error"]
    assert (f"nor of the {looked - bad} after it" in ended["error"]) == (looked > bad)
    assert "rank 0: micro-batch 2 of 2" in ended["error"]
    assert "First parameter: bert.embeddings.position_embeddings.weight." in ended["error"]
    assert ended["weights"][-1] == clean["weights"][bad - 1] != clean["weights"][bad]
    if bad > 1:  # before the first step the optimizer keeps nothing
        assert ended["states"][-1] == clean["states"][bad - 1]
    saved = {step_of(path.name): verify(path) for path in checkpoints_in(tmp_path)}
    assert saved == {step: [] for step in range(SAVES, bad, SAVES)}


def test_without_found_inf_the_weights_are_lost(monkeypatch):
    """The mutation: the flag never reaches the kernel."""
    monkeypatch.setattr("torch.maximum", lambda before, bad: before)
    ended = train(NonFiniteGuard(), table=data(bad_steps=(3,), steps=STEPS), **OPTIONS)
    assert "of step 3 is not finite" in ended["error"]
    assert not ended["finite"]


def test_an_optimizer_without_it_is_looked_after_by_the_host():
    ended = train(NonFiniteGuard(), table=data(bad_steps=(3,)), **{**OPTIONS, "steps": 6, "optim": "adamw_torch"})
    assert "of step 3 is not finite. Nothing of it was applied: " in ended["error"]
    assert "position_embeddings.weight, 128 of 256 elements" in ended["error"]
    assert ended["finite"]


def test_a_guarded_run_is_the_run(clean):
    assert train(NonFiniteGuard(), table=data(bad_steps=(), steps=STEPS), **OPTIONS) == {**clean, "skipped": 0}


def test_custom_trainer_has_it_by_itself(clean):
    ended = train(None, table=data(bad_steps=(3,), steps=STEPS), **OPTIONS)
    assert "NonFiniteGuard: the loss or gradient of step 3 is not finite" in ended["error"]
    assert ended["weights"][-1] == clean["weights"][2]


def guards_of(trainer):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, NonFiniteGuard)]


@pytest.mark.parametrize(("asked", "actions"), [("raise", ["raise"]), ("skip", ["skip"]), ("ignore", [])])
def test_on_non_finite(trainer, asked, actions):
    assert [guard.action for guard in guards_of(trainer(on_non_finite=asked))] == actions


def test_one_that_is_passed_takes_its_place(trainer):
    passed, added = NonFiniteGuard("skip"), NonFiniteGuard("skip", max_consecutive=3)
    run = trainer(callbacks=[passed])
    assert guards_of(run) == [passed]
    run.add_callback(added)
    assert guards_of(run) == [added]
    run.add_callback(NonFiniteGuard)
    assert [guard.action for guard in guards_of(run)] == ["raise"]


def test_a_mistake_in_it(trainer):
    with pytest.raises(ValueError, match="on_non_finite='halt' must be 'raise', 'skip' or 'ignore'"):
        trainer(on_non_finite="halt")


def test_a_micro_batch_without_labels_is_no_fault(trainer):
    """The head's own loss of it is the mean over none, NaN, and no part of the step's."""
    labels = [[-100] * 8 if number == 2 else row for number, row in enumerate(rows(8, tokens=True)["labels"])]
    table = rows(8, tokens=True).remove_columns("labels").add_column("labels", labels)
    run = trainer(
        model=tiny_model(tokens=True), train=table, loss="model", max_steps=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    run.train()
    assert run.state.global_step == 2
    assert all(weight.isfinite().all() for weight in run.model.parameters())
