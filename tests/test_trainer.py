"""CustomTrainer where people override, pass or ask for something of their own."""

import warnings

import pytest
import torch
from datasets import IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tests.conftest import logged, rows, tiny_model
from trainer_ext import CustomTrainer, ExactLossMixin
from trainer_ext.loss_setup import shifts_labels


class MicroBatchMean(CustomTrainer):
    """As tutorials do it: `compute_loss` alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def test_an_undeclared_override_is_a_mean_of_means_and_says_so_once(trainer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(MicroBatchMean, gradient_accumulation_steps=4, per_device_train_batch_size=4)
        run.train()
    about = [w for w in caught if "without saying how its loss is scaled" in str(w.message)]
    assert len(about) == 1
    assert run.loss_is_scaled_for_ga is False
    assert 0.5 < logged(run)[0] < 1.0  # divided by the four micro-batches: not four times ln 2


def test_a_subclass_of_an_undeclared_override_is_one_too(trainer):
    class Further(MicroBatchMean):
        pass

    with pytest.warns(UserWarning, match="Further overrides compute_loss"):
        run = trainer(Further)
    assert run.loss_is_scaled_for_ga is False


def test_an_undeclared_override_may_not_call_super(trainer):
    class Doubled(CustomTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    with pytest.warns(UserWarning, match="mean of means"):
        run = trainer(Doubled)
    with pytest.raises(RuntimeError, match="loss_is_scaled_for_ga is not True"):
        run.train()


def test_a_declared_override_may_call_super_and_stays_exact(trainer):
    class Doubled(CustomTrainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def first_loss(cls):
        run = trainer(cls, model=tiny_model(dropout=0.0), gradient_accumulation_steps=4, max_steps=1)
        run.train()
        return logged(run)[0]

    assert first_loss(Doubled) == pytest.approx(2 * first_loss(CustomTrainer), rel=1e-6)


def test_the_wrong_order_of_bases_is_refused():
    with pytest.raises(TypeError, match="ExactLossMixin must stand before the Trainer"):
        type("Wrong", (Trainer, ExactLossMixin), {})


def test_the_mixin_serves_any_trainer_class(trainer):
    class Other(Trainer):
        pass

    class Exact(ExactLossMixin, Other):
        pass

    run = trainer(Exact, model=tiny_model(dropout=0.0), gradient_accumulation_steps=4, max_steps=1)
    run.train()
    assert logged(run)[0] < 1.0


def test_a_loss_that_the_mixin_replaces_is_named():
    class Mine(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 7.0

    with pytest.warns(UserWarning, match="ExactLossMixin replaces compute_loss of Mine"):
        type("Both", (ExactLossMixin, Mine), {})


def test_a_model_that_stays_in_eval_mode_is_exact(trainer):
    class Stays(type(tiny_model())):
        def train(self, mode=True):
            return super().train(False)

    def losses(**options):
        model = tiny_model()
        model.__class__ = Stays
        run = trainer(model=model, max_steps=1, **options)
        run.train()
        return logged(run)

    whole = losses(per_device_train_batch_size=8)
    assert losses(per_device_train_batch_size=2, gradient_accumulation_steps=4) == pytest.approx(whole, rel=1e-6)


def multi_label_rows():
    data = rows(12)
    return data.remove_columns("labels").add_column("labels", [[1.0, 0.0, float(i % 2)] for i in range(12)])


@pytest.mark.parametrize("options", [{}, {"compute_loss_func": lambda o, labels, **k: o.logits.sum() * 0}])
def test_multi_label_data_is_the_heads_own(trainer, options):
    run = trainer(model=tiny_model(num_labels=3), train=multi_label_rows(), **options)
    assert run.configured_loss is None
    run.train()
    assert len(logged(run)) == 3


def test_labels_made_on_the_way_are_not_checked_too_early(trainer):
    raw = rows(12).map(lambda row: {"labels": row["labels"] + 1})

    def shift(batch):
        return {**default_data_collator(batch), "labels": torch.tensor([row["labels"] - 1 for row in batch])}

    run = trainer(train=raw, data_collator=shift)
    run.train()
    assert len(logged(run)) == 3
    lazy = raw.with_transform(lambda batch: {**batch, "labels": [label - 1 for label in batch["labels"]]})
    run = trainer(train=lazy, remove_unused_columns=False)
    run.train()
    assert len(logged(run)) == 3


def test_a_prediction_inside_an_evaluation(trainer):
    depth = []

    def inner(prediction):
        depth.append(1)
        return {"inner": run.predict(rows(6)).metrics["test_loss"]} if len(depth) == 1 else {}

    run = trainer(evaluation=rows(10), compute_metrics=inner, class_weights=[1.0, 3.0])
    plain = trainer(model=run.model, evaluation=rows(10), class_weights=[1.0, 3.0])
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_search_over_the_losss_arguments_is_used(trainer):
    run = trainer()
    run.hp_search_backend = "ray"
    run._hp_search_setup({"class_weights": [1.0, 50.0], "loss_reduction": "mean"})
    assert run.configured_loss.class_weights.tolist() == [1.0, 50.0]
    assert run.configured_loss.reduction == "mean"


@pytest.mark.parametrize(
    ("loss_type", "shifts"), [("ForCausalLM", True), ("ForConditionalGeneration", True), ("ForMaskedLM", False)]
)
def test_which_heads_shift_their_labels(loss_type, shifts):
    model = tiny_model()
    model.loss_type = loss_type
    assert shifts_labels(model) is shifts


def test_plain_training_arguments(trainer):
    run = trainer(arguments_class=TrainingArguments, gradient_accumulation_steps=4, evaluation=rows())
    run.train()
    assert logged(run)[0] < 1.0
    assert run.evaluate()["eval_loss"] < 1.0


def test_a_loss_object_wins_over_the_arguments(trainer, arguments):
    from trainer_ext.losses import cross_entropy

    run = CustomTrainer(
        model=tiny_model(),
        args=arguments(loss="model"),
        train_dataset=rows(),
        data_collator=default_data_collator,
        loss=cross_entropy,
    )
    assert run.configured_loss.loss is cross_entropy


def test_compute_loss_func_is_the_stock_path(trainer):
    def summed(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    def losses(**options):
        run = trainer(model=tiny_model(dropout=0.0), gradient_accumulation_steps=4, **options)
        run.train()
        return logged(run)

    assert losses(compute_loss_func=summed) == pytest.approx(losses(), rel=1e-6)
    with pytest.raises(ValueError, match="choose one"):
        losses(compute_loss_func=summed, class_weights=[1.0, 2.0])


# The optimizer and the schedule


class Combined(CustomTrainer):
    """Overrides the method that `Trainer.train` no longer calls."""

    calls = ()

    def create_optimizer_and_scheduler(self, num_training_steps):
        self.calls = (*self.calls, num_training_steps)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=0.1, total_iters=100)


def test_the_combined_override_is_used(trainer):
    run = trainer(Combined)
    run.train()
    assert run.calls == (3,)
    assert type(run.optimizer.optimizer) is torch.optim.SGD
    assert logged(run, "learning_rate") == [0.05] * 3


def test_the_combined_override_is_called_again_by_the_next_train(trainer):
    run = trainer(Combined)
    run.train()
    run.train()
    assert run.calls == (3, 3)


def test_a_combined_override_may_call_super(trainer):
    class Extended(CustomTrainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            super().create_optimizer_and_scheduler(num_training_steps)
            self.optimizer.param_groups[0]["lr"] *= 1.0
            self.was_here = True

    run = trainer(Extended)
    run.train()
    assert run.was_here
    assert type(run.optimizer.optimizer) is torch.optim.AdamW


def test_a_combined_override_beside_an_override_of_create_optimizer(trainer):
    class Both(CustomTrainer):
        def create_optimizer(self):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
            return self.optimizer

        def create_optimizer_and_scheduler(self, num_training_steps):
            self.create_optimizer()
            self.create_scheduler(num_training_steps)
            self.was_here = True

    run = trainer(Both)
    run.train()
    assert run.was_here
    assert logged(run, "learning_rate")[0] == 0.5


def test_a_combined_override_without_an_optimizer_is_an_error(trainer):
    class Forgetful(CustomTrainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            pass

    with pytest.raises(RuntimeError, match="without setting self.optimizer"):
        trainer(Forgetful).train()


def test_the_two_single_overrides_are_used(trainer):
    class Both(CustomTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
            return self.optimizer

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=0.1, total_iters=100)
            return self.lr_scheduler

    run = trainer(Both)
    run.train()
    assert logged(run, "learning_rate") == [0.05] * 3


def test_the_default_is_fused_adamw_with_a_linear_schedule(trainer):
    run = trainer(weight_decay=0.1, warmup_steps=1, max_steps=4)
    run.train()
    optimizer = run.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in optimizer.param_groups[0]["params"])
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    assert logged(run, "learning_rate") == pytest.approx([0.0, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


def test_optimizers_that_are_passed_win(trainer):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    run = trainer(model=model, optimizers=(optimizer, schedule))
    run.train()
    assert run.optimizer.optimizer is optimizer
    assert logged(run, "learning_rate") == [0.25] * 3


def test_optimizer_cls_and_kwargs_win_and_go_through_our_groups(trainer):
    run = trainer(optimizer_cls_and_kwargs=(torch.optim.NAdam, {"lr": 0.125}), weight_decay=0.1)
    run.train()
    assert type(run.optimizer.optimizer) is torch.optim.NAdam
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]
    assert logged(run, "learning_rate")[0] == 0.125


def test_both_ways_to_pass_an_optimizer_are_refused(trainer):
    model = tiny_model()
    with pytest.raises(RuntimeError, match="incompatible"):
        trainer(
            model=model,
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
            optimizer_cls_and_kwargs=(torch.optim.NAdam, {}),
        )


@pytest.mark.parametrize(
    ("name", "expected"), [("sgd", "SGD"), ("adagrad", "Adagrad"), ("rmsprop", "RMSprop"), ("adafactor", "Adafactor")]
)
def test_optim_is_honoured(trainer, name, expected):
    run = trainer(optim=name, weight_decay=0.1)
    run.train()
    assert type(run.optimizer.optimizer).__name__ == expected
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]


def test_optim_that_brings_its_own_groups_is_left_to_the_stock_builder(trainer):
    with pytest.raises(ImportError, match="galore"):
        trainer(optim="galore_adamw", optim_target_modules=["attn"]).train()


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup", "polynomial"])
def test_other_schedules(trainer, name):
    run = trainer(lr_scheduler_type=name, warmup_steps=1)
    run.train()
    rates = logged(run, "learning_rate")
    assert rates[0] == 0.0
    assert rates[1] == pytest.approx(1e-3)


def test_an_override_of_the_decay_names_is_used(trainer):
    class ByName(CustomTrainer):
        def get_decay_parameter_names(self, model):
            return ["classifier.weight"]

    run = trainer(ByName, weight_decay=0.1)
    run.train()
    assert [len(group["params"]) for group in run.optimizer.param_groups if group["weight_decay"]] == [1]


# Everything else that a Trainer does


def test_callbacks_are_taken_as_classes_and_objects(trainer):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            type(self).steps += 1

    trainer(callbacks=[Count()]).train()
    trainer(callbacks=[Count]).train()
    assert Count.steps == 6


def test_model_init_starts_anew_each_time(trainer):
    run = trainer(model_init=lambda: tiny_model(), class_weights="balanced")
    run.train()
    first = logged(run)
    run.train()
    assert logged(run)[: len(first)] == first


def test_predict_without_labels(trainer):
    run = trainer()
    found = run.predict(rows(10).remove_columns("labels"))
    assert found.predictions.shape == (10, 2)
    assert "test_loss" not in found.metrics


def test_predict_with_labels_has_the_loss_of_the_whole_split(trainer):
    run = trainer(class_weights=[1.0, 3.0], per_device_eval_batch_size=4, evaluation=rows(10))
    assert run.predict(rows(10)).metrics["test_loss"] == run.evaluate()["eval_loss"]


def test_a_streamed_dataset(trainer):
    data = rows(16)
    streamed = IterableDataset.from_generator(lambda: iter(data))
    run = trainer(train=streamed, model=tiny_model(dropout=0.0), gradient_accumulation_steps=2)
    run.train()
    assert len(logged(run)) == 3
    with pytest.raises(ValueError, match="streamed"):
        trainer(train=streamed, class_weights="balanced")


def test_a_dataset_of_torch(trainer):
    data = [default_data_collator([row]) for row in rows(16)]
    items = [{name: value[0] for name, value in row.items()} for row in data]
    run = trainer(train=items, class_weights="balanced")
    run.train()
    assert len(logged(run)) == 3


def test_gradient_checkpointing_changes_no_number(trainer):
    def losses(**options):
        run = trainer(model=tiny_model(dropout=0.0), gradient_accumulation_steps=2, **options)
        run.train()
        return logged(run)

    assert losses(activation_checkpointing=True) == losses()


def test_report_to_reaches_the_integration(trainer, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.on_log", lambda *a, **k: seen.append(k["logs"]))
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.__init__", lambda self: None)
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.on_train_begin", lambda *a, **k: None)
    monkeypatch.setattr("transformers.integrations.TensorBoardCallback.on_train_end", lambda *a, **k: None)
    trainer(report_to="tensorboard").train()
    assert [log["loss"] for log in seen if "loss" in log]


def test_the_stock_override_points_are_called(trainer):
    called = set()

    class Everything(CustomTrainer):
        def get_train_dataloader(self):
            called.add("get_train_dataloader")
            return DataLoader(self.train_dataset.with_format("torch"), batch_size=4)

        def get_eval_dataloader(self, eval_dataset=None):
            called.add("get_eval_dataloader")
            return DataLoader(self.eval_dataset.with_format("torch"), batch_size=3)

        def log(self, logs, *args, **kwargs):
            called.add("log")
            super().log(logs, *args, **kwargs)

        def training_step(self, model, inputs, num_items_in_batch=None):
            called.add("training_step")
            return super().training_step(model, inputs, num_items_in_batch)

        def prediction_step(self, *args, **kwargs):
            called.add("prediction_step")
            return super().prediction_step(*args, **kwargs)

        def get_batch_samples(self, *args):
            called.add("get_batch_samples")
            return super().get_batch_samples(*args)

        def evaluate(self, *args, **kwargs):
            called.add("evaluate")
            return super().evaluate(*args, **kwargs)

        def _save_checkpoint(self, *args):
            called.add("_save_checkpoint")
            return super()._save_checkpoint(*args)

    run = trainer(Everything, evaluation=rows(10), eval_strategy="steps", eval_steps=2, save_strategy="steps")
    run.train()
    assert called == {
        "get_train_dataloader",
        "get_eval_dataloader",
        "log",
        "training_step",
        "prediction_step",
        "get_batch_samples",
        "evaluate",
        "_save_checkpoint",
    }


def test_a_prediction_step_of_ones_own_keeps_its_loss(trainer):
    class Own(CustomTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            return torch.tensor(7.0), None, None

    assert trainer(Own, evaluation=rows(10)).evaluate()["eval_loss"] == 7.0


def test_a_second_forward_in_a_training_step_is_no_error(trainer):
    """Sharpness-aware or R-Drop style: the loss of a micro-batch is asked for twice."""

    class Twice(CustomTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, dict(inputs), num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    run = trainer(Twice, gradient_accumulation_steps=2)
    run.train()
    assert len(logged(run)) == 3


def test_resuming_continues_the_run(trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "class_weights": "balanced"}
    whole = trainer(model=tiny_model(), **options)
    whole.train()
    resumed = trainer(model=tiny_model(seed=1), **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert logged(resumed) == logged(whole)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


# What cannot work is refused before anything is trained


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "dise"}, "loss 'dise' is not known. Choices: asymmetric, bce, cross_entropy"),
        ({"loss_kwargs": {"label_smothing": 0.1}}, "loss_kwargs=.*label_smothing"),
        ({"loss_reduction": "sum"}, "loss_reduction='sum' must be one of weighted_mean, mean"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be 1 or more"),
        ({"num_train_epochs": -1, "max_steps": -1}, "num_train_epochs=-1 must be 0 or more"),
        ({"class_weights": [1.0]}, "1 weights .* 2 labels"),
        ({"class_weights": [1.0, -1.0]}, r"class_weights\[1\] is -1.0"),
        ({"class_weights": [1.0, float("nan")]}, r"class_weights\[1\] is nan"),
        ({"class_weights": "[1.0, 2.0"}, "is not valid JSON"),
        ({"class_weights": "balanced", "loss": "model"}, "class_weights would be ignored"),
        ({"label_smoothing_factor": 0.1, "loss": "model"}, "label_smoothing would be ignored"),
        ({"label_smoothing_factor": 0.1, "loss_kwargs": {"label_smoothing": 0.1}}, "choose one"),
    ],
)
def test_wrong_arguments(trainer, options, says):
    with pytest.raises(ValueError, match=says):
        trainer(**options)


def test_all_findings_come_at_once(arguments):
    with pytest.raises(ValueError, match="(?s)not valid JSON.*loss_reduction"):
        arguments(class_weights="[1.0", loss_reduction="sum")


@pytest.mark.parametrize("where", ["train", "evaluation"])
def test_a_label_out_of_range(trainer, where):
    wrong = rows(10).map(lambda row, i: {"labels": 7 if i == 3 else row["labels"]}, with_indices=True)
    with pytest.raises(ValueError, match=r"label 7 at row 3 is outside 0..1"):
        trainer(**{"train": rows(10), "evaluation": rows(10), where: wrong})


def test_a_missing_label(trainer):
    data = rows(10)
    gap = data.remove_columns("labels").add_column("labels", [0, None, *data["labels"][2:]])
    with pytest.raises(ValueError, match="row 1 .* no value in its label column 'labels'"):
        trainer(train=gap)


def test_no_label_column(trainer):
    with pytest.raises(ValueError, match="the batch has no labels"):
        trainer(train=rows(10).remove_columns("labels")).train()


def test_an_empty_dataset(trainer):
    with pytest.raises(ValueError):
        trainer(train=rows(10).select([])).train()
