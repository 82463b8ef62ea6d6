"""The losses through real trainers: exact in every split, on every kind of head, in every subclass."""

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset, Value
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from tests.conftest import SIZES, logged, rows, tiny_model
from tests.test_exactness import WEIGHTS, assert_same, first_step, oracle
from trainer_ext import LOSSES, CustomTrainer, ExactLossMixin
from trainer_ext.checkpoints.manifest import write_manifest
from trainer_ext.losses import WeightedSum

NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def both_ways(trainer, cls=CustomTrainer, *, model, data, **options):
    """A step of 16 rows as four micro-batches, and as one."""
    whole = first_step(trainer, cls, model=model, data=data, batch=16, accumulation=1, **options)
    return first_step(trainer, cls, model=model, data=data, batch=4, accumulation=4, **options), whole


def tokens_of(data):
    return data.remove_columns("labels").add_column("labels", data["input_ids"])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_one_number_for_every_split(trainer, name):
    data, options = rows(), {}
    if name in ("bce", "asymmetric"):
        generator = torch.Generator().manual_seed(3)
        labels = (torch.rand(len(data), 3, generator=generator) < 0.3).double().tolist()
        data = data.remove_columns("labels").add_column("labels", labels)
        model = tiny_model(dropout=0.0, num_labels=3, dtype=torch.float64, problem_type="multi_label_classification")
    elif name in ("mse", "huber"):
        data = data.cast_column("labels", Value("float64"))
        model = tiny_model(dropout=0.0, num_labels=1, dtype=torch.float64)
    else:
        model, options = tiny_model(dropout=0.0, dtype=torch.float64), {"class_weights": WEIGHTS}
    split, whole = both_ways(trainer, model=model, data=data, loss=name, **options)
    assert_same(split, whole, 1e-12)
    assert whole[0] > 0


def causal():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    config.update(NO_DROPOUT)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_a_causal_model_predicts_the_next_token_under_our_losses(trainer, loss):
    data = rows(16)
    labels = [[-100 if j > i % 7 else t for j, t in enumerate(row["input_ids"])] for i, row in enumerate(data)]
    data = data.remove_columns("labels").add_column("labels", labels)
    split, whole = both_ways(trainer, model=causal(), data=data, loss=loss)
    assert_same(split, whole, 1e-5)
    own = both_ways(trainer, model=causal(), data=data, loss="model")[1]
    if loss == "cross_entropy":
        assert_same(whole, own, 1e-5)
    else:
        assert whole[0] < own[0]


def test_a_causal_head_whose_labels_are_shifted_already(trainer):
    """BART's: our loss over the logits takes them as the head does."""
    torch.manual_seed(0)
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "d_model": 8}
    config = BartConfig(vocab_size=40, max_position_embeddings=16, dropout=0.0, is_encoder_decoder=False, **sizes)
    config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    model, data = BartForCausalLM(config), tokens_of(rows(16))
    ours, own = (both_ways(trainer, model=model, data=data, loss=loss) for loss in ("cross_entropy", "model"))
    assert_same(*ours, 1e-5)
    assert_same(*own, 1e-5)
    assert_same(ours[1], own[1], 1e-5)


def seq2seq():
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder")
             for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
    config = BartConfig(vocab_size=40, d_model=8, max_position_embeddings=16, dropout=0.0, **sizes)
    config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2})
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("cls", ["CustomTrainer", "Seq2SeqTrainer"])
def test_an_encoder_decoder(trainer, cls):
    """Under its own loss and under ours, in CustomTrainer and in the mixin before Seq2SeqTrainer."""

    class Exact(ExactLossMixin, Seq2SeqTrainer):
        pass

    trainers = {"CustomTrainer": (CustomTrainer, {}),
                "Seq2SeqTrainer": (Exact, {"arguments_class": Seq2SeqTrainingArguments})}  # fmt: skip
    cls, options = trainers[cls]
    data = tokens_of(rows(16))
    labels = [[-100 if j > 2 + i % 6 else t for j, t in enumerate(row["labels"])] for i, row in enumerate(data)]
    data = data.remove_columns("labels").add_column("labels", labels)
    own = both_ways(trainer, cls, model=seq2seq(), data=data, **options)
    assert_same(*own, 1e-5)
    if cls is CustomTrainer:
        ours = both_ways(trainer, model=seq2seq(), data=data, loss="cross_entropy")
        assert_same(*ours, 1e-5)
        assert_same(ours[1], own[1], 1e-5)


@pytest.mark.parametrize("loss", ["model", "cross_entropy"])
def test_multiple_choice(trainer, loss):
    data = rows(16)
    ids = [[row["input_ids"], row["input_ids"][::-1], [5] * 8] for row in data]
    data = Dataset.from_dict({"input_ids": ids, "labels": [i % 3 for i in range(16)]})
    torch.manual_seed(0)
    model = BertForMultipleChoice(tiny_model(dropout=0.0).config)
    assert_same(*both_ways(trainer, model=model, data=data, loss=loss), 1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "model"])
def test_an_image_classifier(trainer, loss):
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = ViTConfig(
        image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0, intermediate_size=16, **sizes
    )
    pixels, labels = torch.randn(16, 3, 8, 8), [i**2 % 3 for i in range(16)]
    data = Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels})
    weights = {} if loss == "model" else {"class_weights": [0.5, 1.0, 4.0]}
    model = ViTForImageClassification(config)
    assert_same(*both_ways(trainer, model=model, data=data, loss=loss, **weights), 1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_around_the_model(trainer):
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_model(dropout=0.0, dtype=torch.float64), lora)
    with torch.no_grad():  # an adapter begins as 0, and its first gradient is half 0 too
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    for loss in ("cross_entropy", "model"):
        found = both_ways(trainer, model=model, data=rows(), loss=loss)
        assert_same(*found, 1e-12)
        assert any("lora_A" in name for name in found[0][1])


def test_a_compiled_model(trainer):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    model, data = tiny_model(dropout=0.0), rows()
    for loss in ("cross_entropy", "model"):
        split, whole = both_ways(trainer, model=model, data=data, loss=loss, **options)
        assert_same(split, whole, 1e-5)


def test_half_precision_logits_are_raised(trainer):
    """A bfloat16 model gives bfloat16 logits: the same loss computed of them in float64 is the oracle."""
    seen = []

    class Sees(CustomTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            seen.append((loss, outputs.logits, inputs["labels"]))
            return (loss, outputs) if return_outputs else loss

        loss_is_scaled_for_ga = True

    trainer(Sees, model=tiny_model(dtype=torch.bfloat16), max_steps=1, class_weights=WEIGHTS).train()
    loss, logits, labels = seen[0]
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert abs(loss - nn.functional.cross_entropy(logits.double(), labels, weight)) < 1e-6


def test_rows_with_weights_are_rows_repeated(trainer):
    data = rows(16)
    counts = [float(i % 3) for i in range(16)]
    model = tiny_model(dropout=0.0, dtype=torch.float64)
    split, whole = both_ways(
        trainer,
        model=model,
        data=data.add_column("weight", counts),
        sample_weight_column="weight",
        class_weights=WEIGHTS,
    )
    assert_same(split, whole, 1e-12)
    repeated = [i for i, count in enumerate(counts) for _ in range(int(count))]
    assert_same(whole, oracle(model, data, repeated, WEIGHTS), 1e-12)


def test_rows_without_the_weights_that_were_asked_for(trainer):
    with pytest.raises(ValueError, match="sample_weight_column='weight': the batch has no such column"):
        trainer(sample_weight_column="weight").train()
    with pytest.raises(ValueError, match="sample_weight_column would be ignored"):
        trainer(sample_weight_column="weight", loss="model")


def test_class_weights_that_count_late(trainer):
    """Steps before the share of training are unweighted, the later ones weighted; evaluation always is."""
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows(16)
    whole = {"per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 0.0, "lr_scheduler_type": "constant"}
    late = trainer(model=copy.deepcopy(model), train=data, evaluation=data, class_weights=WEIGHTS,
                   loss_kwargs={"reweight_after": 0.5}, eval_strategy="steps", eval_steps=1, **whole)  # fmt: skip
    late.train()
    plain, weighted = oracle(model, data, range(16), None)[0], oracle(model, data, range(16), WEIGHTS)[0]
    expected = [plain, plain, weighted, weighted]
    assert all(abs(a - b) < 1e-6 for a, b in zip(logged(late), expected, strict=True))
    assert all(abs(a - weighted) < 1e-6 for a in logged(late, "eval_loss"))
    assert abs(plain - weighted) > 1e-3


def test_a_sum_of_losses_logs_its_parts(trainer):
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows()
    options = {"class_weights": WEIGHTS, "loss_kwargs": {"focal": {"gamma": 1.0}}, "logging_steps": 2, "max_steps": 2}
    options |= {"learning_rate": 0.0, "lr_scheduler_type": "constant"}
    found = []
    for batch, accumulation in ((16, 1), (4, 4)):
        run = trainer(
            model=copy.deepcopy(model), train=data, loss='{"cross_entropy": 1, "focal": 0.5}',
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **options,
        )  # fmt: skip
        run.train()
        found.append({name: logged(run, name) for name in ("loss", "loss_cross_entropy", "loss_focal")})
    for name, values in found[0].items():
        assert len(values) == 1
        assert abs(values[0] - found[1][name][0]) < 1e-6
    assert abs(found[0]["loss"][0] - found[0]["loss_cross_entropy"][0] - 0.5 * found[0]["loss_focal"][0]) < 1e-6
    assert found[0]["loss_focal"][0] < found[0]["loss_cross_entropy"][0]


def test_a_sum_of_loss_objects(trainer):
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows()
    both = WeightedSum({"a": LOSSES["cross_entropy"], "b": LOSSES["cross_entropy"]}, {"a": 0.25, "b": 0.75})
    run = first_step(trainer, model=model, data=data, batch=4, accumulation=4, loss=None)

    class Summed(CustomTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, loss=both, **kwargs)

    assert_same(first_step(trainer, Summed, model=model, data=data, batch=4, accumulation=4), run, 1e-12)


@pytest.mark.parametrize("spec", ["balanced", "effective_number", "inverse_sqrt"])
def test_weights_from_data_are_shown_kept_and_held_on_resume(trainer, tmp_path, spec):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "output_dir": str(tmp_path / "out")}
    run = trainer(class_weights=spec, **saving)
    run.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = json.loads((checkpoint / "loss.json").read_text())
    labels = rows()["labels"]
    assert saved["class_counts"] == [labels.count(0), labels.count(1)]
    assert saved["class_weights"] == run.configured_loss.class_weights.tolist()
    again = trainer(class_weights=spec, **saving)
    again.train(resume_from_checkpoint=str(checkpoint))
    for ours, theirs in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained with another loss \(class_weights: \["):
        trainer(class_weights=[1.0, 9.0], **saving).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "loss.json").unlink()
    with pytest.raises(ValueError, match=r"loss.json is missing.*trainer-ext verify --accept"):
        trainer(class_weights=[1.0, 9.0], **saving).train(resume_from_checkpoint=str(checkpoint))
    write_manifest(checkpoint)
    trainer(class_weights=[1.0, 9.0], **saving).train(resume_from_checkpoint=str(checkpoint))


def stream():
    return IterableDataset.from_generator(lambda: iter(rows().to_list()))


def test_a_stream_needs_to_be_told_its_classes(trainer):
    with pytest.raises(
        ValueError, match="class_weights counts the labels of train_dataset, which is missing, streamed"
    ):
        trainer(train=stream(), class_weights="balanced")
    with pytest.raises(ValueError, match="the loss counts the labels"):
        trainer(train=stream(), loss="logit_adjusted")
    run = trainer(train=stream(), class_weights="balanced", loss_kwargs={"class_counts": [30, 10]})
    assert run.configured_loss.class_weights.tolist() == [40 / 60, 2.0]
    run.train()


class MyLoss:
    """A loss of a user's own, with what LOSSES has."""

    def __call__(self, logits, labels, **options):
        return LOSSES["cross_entropy"](logits, labels, **options)

    def denominator(self, labels, **options):
        return LOSSES["cross_entropy"].denominator(labels, **options)


def test_a_loss_of_ones_own_gets_the_weights_that_a_name_means(trainer):
    named = trainer(class_weights="balanced").configured_loss
    run = trainer(class_weights="balanced", loss=f"{__name__}:MyLoss")
    assert torch.equal(run.configured_loss.class_weights, named.class_weights)
    run.train()


def test_counts_of_the_training_split_reach_the_loss(trainer):
    run = trainer(loss="logit_adjusted")
    labels = rows()["labels"]
    assert run.configured_loss.class_counts == [labels.count(0), labels.count(1)]
    model, data = tiny_model(dropout=0.0, dtype=torch.float64), rows(16)
    loss, _ = first_step(trainer, model=model, data=data, batch=4, accumulation=4, loss="logit_adjusted")
    batch = default_data_collator(list(data))
    labels = batch.pop("labels")
    prior = torch.bincount(labels).double() / 16
    assert abs(loss - nn.functional.cross_entropy(model(**batch).logits + prior.log(), labels)) < 1e-12


class Contrasts(BertForSequenceClassification):
    """A head whose loss has a part that lies between rows."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None:
            outputs["loss"] = outputs["loss"] + self.extra(outputs.logits)
        return outputs

    def extra(self, logits):
        return (logits - logits.mean(0)).square().sum(-1).mean() + 0.1 * len(logits)


class Sums(Contrasts):
    """A head that sums where others average."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = BertForSequenceClassification.forward(self, input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None:
            outputs["loss"] = outputs["loss"] * len(labels)
        return outputs


@pytest.mark.parametrize("head", [Contrasts, Sums])
def test_a_head_whose_loss_is_no_mean_is_refused(trainer, head):
    model = head(tiny_model().config)
    with pytest.raises(
        ValueError, match=f"{head.__name__}: its own loss is no mean over its labels: rows with 8 labels"
    ):
        trainer(model=model, loss="model").train()
    trainer(model=model, loss="cross_entropy").train()


class Honours(BertForSequenceClassification):
    """A head that does what the Trainer believes of every head."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if labels is not None and num_items_in_batch is not None:
            outputs["loss"] = outputs["loss"] * len(labels) / num_items_in_batch
        return outputs


@pytest.mark.parametrize(("head", "says"), [(Honours, "divides by"), (BertForSequenceClassification, "does not heed")])
def test_what_a_head_does_with_the_number_of_items_is_logged(trainer, head, says, caplog):
    model = head(tiny_model(dropout=0.0).config).double()
    with caplog.at_level("INFO", logger="trainer_ext"):
        split, whole = both_ways(trainer, model=model, data=rows(), loss="model")
    assert_same(split, whole, 1e-12)
    assert f"{says} num_items_in_batch" in caplog.text


def test_the_probe_leaves_no_trace(trainer, monkeypatch):
    """With dropout, the bits of a run are those of a run without the probe; batch norm keeps its statistics."""
    finals = []
    for probed in (True, False):
        if not probed:
            monkeypatch.setattr("trainer_ext.exact_loss.probe_head", lambda *args: None)
        model = tiny_model()
        model.classifier = nn.Sequential(nn.BatchNorm1d(16), model.classifier)
        run = trainer(model=model, loss="model")
        begun = []

        class Looks(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                begun.append((model.training, model.classifier[0].num_batches_tracked.item()))  # noqa: B023

        run.add_callback(Looks())
        run.train()
        finals.append((begun, run.model.state_dict()))
    assert finals[0][0] == finals[1][0]
    assert all(torch.equal(value, finals[1][1][name]) for name, value in finals[0][1].items())


def test_a_function_and_label_smoothing_are_not_both_had(trainer):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 would be ignored: compute_loss_func"):
        trainer(compute_loss_func=lambda *args, **kwargs: None, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "focal", "loss_kwargs": {"gamma": -1}}, "gamma=-1"),
        ({"loss": "focal", "loss_kwargs": {"gama": 1}}, "loss_kwargs=.*gama"),
        ({"loss": "mse", "class_weights": [1.0, 2.0]}, "regression has no classes"),
        ({"loss": {"focal": 1.0, "dise": 1.0}}, "'dise' is not known"),
        ({"loss": '{"focal": 1'}, "is not valid JSON"),
        ({"loss": {"focal": float("nan")}}, "a weight is a finite number"),
        ({"loss_kwargs": {"reweight_after": 0.5}}, "reweight_after=0.5.*class_weights is None"),
        ({"loss_kwargs": {"reweight_after": 1.5}, "class_weights": "balanced"}, "reweight_after=1.5"),
        ({"loss": "ldam", "loss_kwargs": {"class_counts": [1, 0]}}, r"class_counts=\[1.0, 0.0\]"),
    ],
)
def test_mistakes_are_told_before_training(trainer, options, says):
    with pytest.raises(ValueError, match=says):
        trainer(**options)


def test_the_stock_trainer_would_be_off(trainer):
    """The mutation of all of the above: the same comparison on stock's arithmetic fails."""
    with pytest.raises(AssertionError):
        assert_same(*both_ways(trainer, Trainer, model=tiny_model(dropout=0.0), data=rows()), 1e-5)
