"""Averages of the weights: their arithmetic, who sees them, and what a checkpoint keeps. Ranks: test_ema_on_ranks.py."""

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from tests.conftest import SIZES, logged, rows, tiny_model
from trainer_ext.callbacks import ema
from trainer_ext.callbacks.ema import EMACallback
from trainer_ext.checkpoints.manifest import write_manifest

STOCK = {"cls": Trainer, "arguments_class": TrainingArguments}


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def largest_gap(found, expected):
    """Over all elements; NaN where one is NaN."""
    assert found.keys() == expected.keys()
    return torch.stack([(found[name].double() - expected[name].double()).abs().max() for name in found]).max().item()


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


class Watch(TrainerCallback):
    """The weights before training, after each step, and inside and after each evaluation."""

    def __init__(self):
        self.steps, self.evaluated, self.after = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.evaluated.append(weights(model))

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if "eval_loss" not in logs:
            self.after.append(weights(model))


def by_hand(recorded, decay, *, warmup=False, every=1):
    """The closed form in float64: each recorded weight times its share, summed once."""
    taken = [recorded[0], *recorded[every::every]]
    decays = [min(decay, (1 + t) / (10 + t)) if warmup else decay for t in range(1, len(taken))]
    shares = [torch.tensor(decays, dtype=torch.float64).prod()]
    for t in range(1, len(taken)):
        shares.append((1 - decays[t - 1]) * torch.tensor(decays[t:], dtype=torch.float64).prod())
    assert abs(sum(shares).item() - 1) < 1e-12
    return {name: sum(s * w[name].double() for s, w in zip(shares, taken, strict=True)) for name in recorded[0]}


def run(trainer, *, callback=None, before=(), after=(), **options):
    """A training with dropout; the trainer, and what was watched."""
    watch = Watch()
    callback = callback or EMACallback(decay=0.5, warmup=False)
    made = trainer(callbacks=[*before, callback, *after, watch], **{"max_steps": 6, "learning_rate": 1e-2, **options})
    return made, watch


ALL_ALIKE = {"decay": 0.75, "warmup": False}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (ALL_ALIKE, {}),
        (ALL_ALIKE, STOCK),
        ({"decay": 0.3}, {}),
        ({"decay": 0.999}, {}),
        ({"decay": 0.5, "warmup": False, "every": 2}, {}),
    ],
)
def test_the_closed_form(trainer, options, kind):
    """0.3: the warm-up reaches it within the run."""
    made, watch = run(trainer, callback=EMACallback(**options), model=tiny_model(dtype=torch.float64), **kind)
    made.train()
    assert len(watch.steps) == 7
    expected = by_hand(watch.steps, **{"warmup": True, **options})
    assert largest_gap(weights(made.model), expected) < 1e-14
    assert largest_gap(weights(made.model), watch.steps[-1]) > 1e-4


def test_what_the_closed_form_catches(trainer, monkeypatch):
    """Averaging before the step, and a warm-up that counts from 0."""
    options = {"decay": 0.999}

    def gap():
        made, watch = run(trainer, callback=EMACallback(**options), model=tiny_model(dtype=torch.float64))
        made.train()
        return largest_gap(weights(made.model), by_hand(watch.steps, warmup=True, **options))

    assert gap() < 1e-14
    with monkeypatch.context() as patch:
        patch.setattr(EMACallback, "on_pre_optimizer_step", EMACallback.on_optimizer_step)
        patch.setattr(EMACallback, "on_optimizer_step", TrainerCallback.on_optimizer_step)
        assert gap() > 1e-4
    with monkeypatch.context() as patch:
        patch.setattr(ema, "decay_of", lambda update, decay, warmup: min(decay, update / (9 + update)))
        assert gap() > 1e-4


def test_the_average_of_half_precision_is_in_float32(trainer):
    made, watch = run(
        trainer, callback=EMACallback(decay=0.9, warmup=False), model=tiny_model(dtype=torch.bfloat16),
        save_strategy="steps", save_steps=6, learning_rate=1e-1,
    )  # fmt: skip
    made.train()
    saved = load_file(f"{made.args.output_dir}/checkpoint-6/ema.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert largest_gap(saved, by_hand(watch.steps, 0.9)) < 1e-6
    assert all(torch.equal(p, saved[name].bfloat16()) for name, p in made.model.named_parameters())


def test_accumulation_counts_optimizer_steps(trainer):
    made, watch = run(
        trainer, model=tiny_model(dtype=torch.float64), gradient_accumulation_steps=3, per_device_train_batch_size=2,
    )  # fmt: skip
    made.train()
    assert len(watch.steps) == 7
    assert largest_gap(weights(made.model), by_hand(watch.steps, 0.5)) < 1e-14


def test_frozen_and_tied_parameters_and_buffers(trainer):
    """A frozen one stays, a tied one is averaged once, a buffer is taken as it is."""

    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES))
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    model.register_buffer("steps", torch.zeros(()))
    model.bert.register_forward_pre_hook(lambda *_: setattr(model, "steps", model.steps + 1))
    made, watch = run(trainer, **STOCK, model=model, train=rows(tokens=True), save_strategy="steps", save_steps=6)
    made.train()
    saved = load_file(f"{made.args.output_dir}/checkpoint-6/ema.safetensors")
    assert saved.keys() == {name for name, _ in model.named_parameters() if "position" not in name}
    assert "cls.predictions.decoder.weight" not in saved
    expected = by_hand(watch.steps, 0.5)
    assert largest_gap(saved, {name: expected[name] for name in saved}) < 1e-6
    found = weights(model)
    assert same({name: found[name] for name in saved}, saved)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    fixed = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(found[fixed], watch.steps[0][fixed])
    assert model.steps == 6


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}


def test_an_evaluation_sees_the_averages_and_training_does_not(trainer):
    options = {"evaluation": rows(10, seed=2), **EVALUATED}
    plain = trainer(max_steps=6, learning_rate=1e-2, **options)
    plain.train()
    made, watch = run(trainer, **options)
    made.train()
    assert logged(made) == logged(plain)  # with dropout: the run is the same, bit for bit
    assert same(watch.steps[-1], weights(plain.model))
    assert len(watch.evaluated) == 3 * 3
    for evaluation in (0, 1, 2):
        steps = 2 * evaluation + 2
        averages = watch.evaluated[3 * evaluation]
        assert largest_gap(averages, by_hand(watch.steps[: steps + 1], 0.5)) < 1e-6
        loaded = tiny_model(seed=7)
        loaded.load_state_dict(averages)
        other = trainer(model=loaded, evaluation=rows(10, seed=2), per_device_eval_batch_size=4)
        assert other.evaluate()["eval_loss"] == logged(made, "eval_loss")[evaluation]
    assert same(weights(made.model), watch.evaluated[-1])
    assert made.evaluate()["eval_loss"] == logged(made, "eval_loss")[2]


def test_an_evaluation_with_the_weights_is_seen(trainer, monkeypatch):
    monkeypatch.setattr(EMACallback, "_mode_changes", lambda self, training: None)
    with pytest.raises(AssertionError):
        test_an_evaluation_sees_the_averages_and_training_does_not(trainer)


def test_weights_that_an_evaluation_leaves_changed_are_seen(trainer, monkeypatch):
    own = EMACallback._put_weights

    def nearly(self):
        if self._trained is not None:
            next(iter(self._trained.values())).mul_(1 + 1e-6)
        own(self)

    monkeypatch.setattr(EMACallback, "_put_weights", nearly)
    with pytest.raises(AssertionError):
        test_an_evaluation_sees_the_averages_and_training_does_not(trainer)


class Asks(TrainerCallback):
    """Evaluates by hand in the middle of a step, and asks for an evaluation behind every other callback."""

    def __init__(self):
        self.losses, self.trainer = [], None

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.losses.append(self.trainer.evaluate(rows(10, seed=2))["eval_loss"])
            self.losses.append(self.trainer.predict(rows(10, seed=2)).metrics["test_loss"])

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = state.global_step == 4


def test_evaluations_by_hand_and_of_several_sets(trainer):
    sets = {"a": rows(10, seed=2), "b": rows(6, seed=3)}
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "evaluation": sets}
    asks = Asks()
    asks.trainer = plain = trainer(max_steps=6, learning_rate=1e-2, callbacks=[asks], **options)
    plain.train()
    asks = Asks()
    made, watch = run(trainer, after=[asks], **options)
    asks.trainer = made
    made.train()
    assert logged(made) == logged(plain)
    checkpoint = f"{made.args.output_dir}/checkpoint-4"
    assert same(load_file(f"{checkpoint}/model.safetensors"), watch.steps[4])  # after an evaluation of two sets
    loaded = tiny_model(seed=7)
    loaded.load_state_dict(load_file(f"{checkpoint}/ema.safetensors"))
    found = trainer(model=loaded, evaluation=sets).evaluate()
    assert [found["eval_a_loss"]] == logged(made, "eval_a_loss")
    assert [found["eval_b_loss"]] == logged(made, "eval_b_loss")
    loaded.load_state_dict({name: value.float() for name, value in by_hand(watch.steps[:3], 0.5).items()})
    expected = trainer(model=loaded, evaluation=sets).evaluate()["eval_a_loss"]
    assert asks.losses == [pytest.approx(expected, rel=1e-6)] * 2


def test_an_evaluation_that_raises(trainer):
    """Training can go on after it; a second train() without a checkpoint cannot."""

    class Unlucky(Trainer):
        caught = False

        def evaluation_loop(self, *args, **kwargs):
            super().evaluation_loop(*args, **kwargs)
            raise OSError("no space left")

        def _evaluate(self, *args, **kwargs):
            if not self.caught:
                return super()._evaluate(*args, **kwargs)
            with pytest.raises(OSError):
                super()._evaluate(*args, **kwargs)
            return {}

    class Catching(Unlucky):
        caught = True

    options = {"evaluation": rows(10, seed=2), "eval_strategy": "steps", "eval_steps": 2}
    options["arguments_class"] = TrainingArguments
    plain = trainer(Catching, max_steps=6, learning_rate=1e-2, **options)
    plain.train()
    made, watch = run(trainer, cls=Catching, **options)
    made.train()
    assert same(watch.steps[-1], weights(plain.model))
    made, _ = run(trainer, cls=Catching, **options, save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match="saved inside an evaluation, and its model has the averages"):
        made.train()
    made, _ = run(trainer, cls=Unlucky, **options)
    with pytest.raises(OSError, match="no space"):
        made.train()
    with pytest.raises(RuntimeError, match="an earlier train.. ended inside an evaluation"):
        made.train()


def test_a_second_training_begins_anew(trainer):
    made, watch = run(trainer, model=tiny_model(dtype=torch.float64))
    made.train()
    began = len(watch.steps)
    made.train()
    assert largest_gap(weights(made.model), by_hand(watch.steps[began:], 0.5)) < 1e-14


def test_training_in_evaluation_mode_is_refused(trainer):
    class Deterministic(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            model.eval()
            return super().compute_loss(model, inputs, *args, **kwargs)

    made, _ = run(trainer, cls=Deterministic, arguments_class=TrainingArguments)
    with pytest.raises(
        RuntimeError, match="the model was put in evaluation, where it has the averages, and trained so"
    ):
        made.train()


SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(("step", "kind"), [(2, {}), (4, STOCK)])
def test_a_resumed_run_has_the_averages_of_the_whole(trainer, tmp_path, step, kind):
    """By the folder's name, and from a copy elsewhere that the arguments name."""
    options = {"callback": EMACallback(decay=0.999), **kind}
    whole, watch = run(trainer, **options, **SAVED)
    whole.train()
    saved = f"{whole.args.output_dir}/checkpoint-{step}"
    assert same(load_file(f"{saved}/model.safetensors"), watch.steps[step])
    with safe_open(f"{saved}/ema.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == str(step)
    elsewhere = shutil.copytree(saved, tmp_path / "elsewhere")
    resumed, _ = run(trainer, model=tiny_model(seed=5), callback=EMACallback(decay=0.999), **kind)
    resumed.train(resume_from_checkpoint=saved)
    assert same(weights(resumed.model), weights(whole.model))
    moved, _ = run(
        trainer, model=tiny_model(seed=5), callback=EMACallback(decay=0.999), **kind,
        output_dir=str(tmp_path / "other"), resume_from_checkpoint=str(elsewhere),
    )  # fmt: skip
    moved.train(resume_from_checkpoint=moved.args.resume_from_checkpoint)
    assert same(weights(moved.model), weights(whole.model))


@pytest.mark.parametrize("lost", ["averages", "updates"])
def test_a_lost_state_on_resume_is_seen(trainer, tmp_path, monkeypatch, lost):
    if lost == "averages":
        monkeypatch.setattr(EMACallback, "_take_up", lambda *args: None)
    else:
        monkeypatch.setattr(EMACallback, "REMEMBERED", ("run",))
    with pytest.raises(AssertionError):
        test_a_resumed_run_has_the_averages_of_the_whole(trainer, tmp_path, 4, {})


def test_averages_that_are_not_found(trainer, tmp_path):
    first, _ = run(trainer, **SAVED, max_steps=4)
    first.train()
    saved = tmp_path / "out" / "checkpoint-2"

    def refused(match, folder=saved, **options):
        resumed, watch = run(trainer, **options)
        with pytest.raises(ValueError, match=match):
            resumed.train(resume_from_checkpoint=str(folder))
        assert all(same(found, watch.steps[0]) for found in watch.steps)  # nothing was trained

    resumed, _ = run(trainer, output_dir=str(tmp_path / "elsewhere"))
    resumed.train(resume_from_checkpoint=str(saved))  # CustomTrainer says which it is; others do not:
    assert resumed.args.resume_from_checkpoint is None
    refused("checkpoint-2 has no ema.safetensors. Set args.resume_from_checkpoint", output_dir=str(tmp_path / "other"),
            **STOCK)  # fmt: skip
    second, _ = run(trainer, **SAVED, max_steps=4, output_dir=str(tmp_path / "other"))
    second.train()
    refused("ema.safetensors is of another run", output_dir=str(tmp_path / "other"), **STOCK)
    refused("is of another run .step 4.", resume_from_checkpoint=str(saved.parent / "checkpoint-4"),
            output_dir=str(tmp_path / "none"), **STOCK)  # fmt: skip
    file = saved / "ema.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    kept = load_file(file)
    save_file({name: kept[name] for name in kept if name != "classifier.bias"}, file, metadata=metadata)
    write_manifest(saved)
    refused("holds averages of other weights: classifier.bias")
    file.rename(saved / "ema-00001-of-00002.safetensors")
    write_manifest(saved)
    refused("checkpoint-2 has ema-00001-of-00002.safetensors of as many ranks, and this run needs ema.safetensors")
    without = trainer(**SAVED, max_steps=4, output_dir=str(tmp_path / "without"))
    without.train()
    refused("step 2 was saved without this EMACallback", tmp_path / "without" / "checkpoint-2")


def test_the_best_checkpoints_averages_are_the_models(trainer):
    """A rate of 0.3 makes it worse later: the best is not the last."""
    options = {**EVALUATED, **SAVED, "load_best_model_at_end": True, "learning_rate": 0.3, "max_steps": 8}
    made, watch = run(trainer, evaluation=rows(10, seed=2), **options)
    made.train()
    losses = logged(made, "eval_loss")
    best = min(range(4), key=losses.__getitem__)
    assert best < 3
    assert made.state.best_global_step == 2 * best + 2
    assert same(weights(made.model), watch.evaluated[3 * best])
    assert same(weights(made.model), load_file(f"{made.state.best_model_checkpoint}/ema.safetensors"))
    assert made.evaluate()["eval_loss"] == losses[best]
    made.save_model()
    assert same(load_file(f"{made.args.output_dir}/model.safetensors"), weights(made.model))


def test_what_is_refused(trainer):
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}, {"every": 0}, {"every": 1.5}):
        with pytest.raises(ValueError, match=f"EMACallback.{next(iter(options))}="):
            EMACallback(**options)
    made, _ = run(trainer, before=[EMACallback()])
    with pytest.raises(ValueError, match="a second EMACallback"):
        made.train()
