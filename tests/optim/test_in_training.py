"""The knobs of the parameter groups where they are used: arguments, a running trainer, the command."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from tests.conftest import SIZES, logged, tiny_model
from trainer_ext.loop_settings import loop_settings
from trainer_ext.optim.groups import assign
from trainer_ext.optim.muon import MuonWithAdamW
from trainer_ext.trainer import CustomTrainer

RATE = 1024.0  # no default comes near it


class Rates(TrainerCallback):
    """The running optimizer's rates by parameter, before each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, model=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.steps.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})


def test_the_running_rates(trainer):
    rates = Rates()
    model = BertForSequenceClassification(BertConfig(**{**SIZES, "num_hidden_layers": 2}))
    run = trainer(
        model=model,
        callbacks=[rates],
        learning_rate=RATE,
        layerwise_lr_decay=0.5,
        head_lr_multiplier=8.0,
        freeze=["embeddings"],
        param_group_rules=[{"match": "bert.pooler.dense.bias", "lr_multiplier": 3}],
        max_steps=4,
    )
    embeddings = {name: tensor.clone() for name, tensor in model.bert.embeddings.named_parameters()}
    run.train()
    assert len(rates.steps) == 4
    first = rates.steps[0]
    assert set(first) == {name for name, _ in model.named_parameters() if "embeddings" not in name}
    assert first["classifier.weight"] == 8 * RATE
    assert first["bert.pooler.dense.weight"] == RATE
    assert first["bert.pooler.dense.bias"] == 3 * RATE
    assert first["bert.encoder.layer.1.attention.self.query.weight"] == RATE / 2
    assert first["bert.encoder.layer.0.output.LayerNorm.bias"] == RATE / 4
    for step, factor in zip(rates.steps, (1.0, 0.75, 0.5, 0.25), strict=True):  # the linear schedule
        assert step == pytest.approx({name: rate * factor for name, rate in first.items()})
    assert all(torch.equal(embeddings[name], tensor) for name, tensor in model.bert.embeddings.named_parameters())


def test_without_the_knobs_nothing_changes(trainer):
    plain = trainer()
    plain.train()
    neutral = trainer(layerwise_lr_decay=1.0, head_lr_multiplier=1.0, freeze=[], param_group_rules=[])
    neutral.train()
    assert logged(plain) == logged(neutral)
    assert len(neutral.optimizer.param_groups) == 2


def test_a_fresh_model_is_frozen_too(trainer):
    run = trainer(model_init=lambda: tiny_model(), freeze=["layers:1"])
    run.train()
    assert not any(p.requires_grad for p in run.model.bert.encoder.parameters())


def test_muon_through_the_trainer_and_a_checkpoint(trainer, tmp_path):
    options = {"optimizer_cls_and_kwargs": (MuonWithAdamW, {"lr": 0.01}), "layerwise_lr_decay": 0.5, "max_steps": 4}
    whole = trainer(**options)
    whole.train()
    saved = trainer(**options, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "muon"))
    saved.train()
    resumed = trainer(model=tiny_model(seed=5), **options, output_dir=str(tmp_path / "muon"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "muon" / "checkpoint-2"))
    assert logged(whole, "grad_norm") == logged(resumed, "grad_norm")
    assert type(whole.optimizer.optimizer) is MuonWithAdamW


def test_what_would_be_ignored_is_refused(trainer):
    model = tiny_model()
    with pytest.raises(ValueError, match="layerwise_lr_decay would be ignored: an optimizer is passed"):
        trainer(model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), layerwise_lr_decay=0.9)

    class ByName(CustomTrainer):
        def get_decay_parameter_names(self, model):
            return []

    with pytest.raises(
        ValueError, match="head_lr_multiplier cannot be used: .*get_decay_parameter_names is overridden"
    ):
        trainer(ByName, head_lr_multiplier=2.0).train()
    with pytest.raises(ValueError, match="'nowhere' matches no parameter"):
        trainer(freeze=["nowhere"])
    with pytest.raises(ValueError, match="matches no parameter"):
        trainer(param_group_rules=[{"match": "nowhere", "weight_decay": 0}]).train()


def test_all_findings_about_the_knobs_come_at_once(arguments):
    with pytest.raises(ValueError) as error:
        arguments(layerwise_lr_decay=1.5, head_lr_multiplier=0, freeze=[3], param_group_rules='[{"match": "*"}]')
    for part in (
        "layerwise_lr_decay=1.5 must be above 0 and at most 1",
        "head_lr_multiplier=0 must be",
        "freeze=[3] must be a list of patterns",
        "changes nothing",
    ):
        assert part in str(error.value)


def test_the_manual_loop_refuses_what_it_does_not_know(arguments):
    rules = [{"ndim": 1, "weight_decay": 0}]
    args = arguments(freeze=["embeddings"], param_group_rules=rules)
    with pytest.raises(ValueError) as error:
        loop_settings(args)
    for name in ("freeze", "param_group_rules"):
        assert name in str(error.value)


# Mutations: each makes a table of test_depth.py or a check here fail


def test_an_off_by_one_in_depth_is_seen(monkeypatch):
    from tests.optim import test_depth
    from trainer_ext.optim.depth import Depths

    monkeypatch.setattr(Depths, "distance", lambda self, parameter: self.layers - self.of[parameter].depth)
    with pytest.raises(AssertionError):
        test_depth.test_the_table_by_hand("BertForSequenceClassification")
    with pytest.raises(AssertionError):
        test_depth.test_a_vision_transformer_has_timms_rates()


def test_decay_that_reaches_norms_is_seen(monkeypatch):
    from tests.optim.architectures import check_groups

    check_groups(tiny_model())
    monkeypatch.setattr("trainer_ext.optim.groups.decays", lambda module, parameter: True)
    with pytest.raises(AssertionError):
        check_groups(tiny_model())


def test_a_dead_rule_that_is_let_through_is_seen(monkeypatch):
    from tests.optim import test_groups

    monkeypatch.setattr("trainer_ext.optim.groups.dead_rules", lambda *args: [])
    with pytest.raises(pytest.fail.Exception):
        test_groups.test_dead_rules_are_errors_all_at_once()


# The command


def test_the_command_prints_the_groups(call, tmp_path):
    config = tmp_path / "config.json"
    BertConfig(**SIZES, architectures=["BertForSequenceClassification"]).to_json_file(config)
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"match": "classifier.*", "weight_decay": 0, "name": "mine"}]))
    done = call("groups", config, "--layerwise-lr-decay", 0.5, "--head-lr-multiplier", 8, "--freeze", "embeddings")
    assert done.exit_code == 0, done.output
    for part in (
        "head.decay",
        "depth_1.no_decay",
        "frozen",
        "BertForSequenceClassification: 20 parameters are trained",
    ):
        assert part in done.output
    done = call("groups", config, "--rules", rules, "--all")
    assert done.exit_code == 0, done.output
    assert "mine" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tiny", "--freeze", "nowhere"), "'nowhere' matches no parameter"),
        (("tiny", "--rules", '[{"match": "nowhere", "weight_decay": 0}]'), "matches no parameter"),
        (("tiny", "--rules", "none.json"), "neither JSON nor a file"),
        (("tiny", "--layerwise-lr-decay", "2"), "layerwise_lr_decay=2.0"),
        (("tiny", "--model-class", "Nothing"), "'Nothing' is no model of transformers"),
        (("./none",), "no such checkpoint folder"),
    ],
)
def test_mistakes_are_one_message(call, words, says):
    done = call("groups", *words)
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())


def test_the_table_leaves_the_model_as_it_is():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assign(model, weight_decay=0.1, layerwise_lr_decay=0.5)
    assert all(p.requires_grad and torch.equal(before[name], p) for name, p in model.named_parameters())
