"""From a command line to a task that is ready to train, with a mistake in one line and exit code 2."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trainer_ext.hub import hub_answers
from trainer_ext.models import TINY_TRAINING
from trainer_ext.task import TaskArguments, TaskParser, prepare_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three"]
ROWS = [{"text": "one " * (i + 1), "label": name} for i, name in enumerate(("no", "yes", "no", "no"))]
PAIRS = [{"sentence1": "one", "sentence2": "two three", "label": i} for i in (0, 1)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


@pytest.fixture
def save(tmp_path):
    """A checkpoint of one layer with a tokenizer of seven words; returns its path as a string."""

    def make(model, **special):
        folder = tmp_path / "checkpoint"
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(folder)
        return str(folder)

    return make


def bert(positions=16):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), max_position_embeddings=positions, **sizes))


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.fixture
def parse(tmp_path):
    def call(*argv):
        common = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--report_to", "none"]
        return TaskParser(prog="tool").parse([*common, *argv])

    return call


def test_a_task_is_ready_to_train(save, rows_file):
    task = prepare_task(TaskArguments(dataset=rows_file, model=save(bert(), pad_token="[PAD]")))
    assert (task.dataset, task.label_names, task.validation) == (rows_file, ["no", "yes"], None)
    assert task.train["labels"][:] == [0, 1, 0, 0]
    batch = task.collator([task.train[0], task.train[2]])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 4, 4, 4, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    model = task.new_model(seed=3)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert torch.isfinite(model(**batch).loss)


def test_a_pair_and_its_validation_split(save, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    task = prepare_task(TaskArguments(dataset=str(tmp_path), model=save(bert(), pad_token="[PAD]")))
    assert task.validation["input_ids"][0] == [2, 4, 3, 5, 6, 3]
    assert task.validation["labels"][:] == [0, 1]


def test_new_models_are_equal_for_equal_seeds(save, rows_file):
    task = prepare_task(TaskArguments(dataset=rows_file, model=save(bert().bert, pad_token="[PAD]")))
    first, same, other = (task.new_model(seed).classifier.weight for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_class_weights_by_name_of_the_label(save, rows_file):
    task = prepare_task(TaskArguments(dataset=rows_file, model=save(bert(), pad_token="[PAD]")))
    assert task.class_weights(None) is None
    assert task.class_weights("balanced").tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    assert task.class_weights({"yes": 5}).tolist() == [1.0, 5.0]


def test_a_model_without_a_padding_token_takes_batches(save, rows_file):
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, bos_token_id=3, eos_token_id=3)
    task = prepare_task(
        TaskArguments(dataset=rows_file, model=save(GPT2ForSequenceClassification(config), eos_token="[SEP]"))
    )
    model = task.new_model(seed=1)
    assert model.config.pad_token_id == 3
    assert torch.isfinite(model(**task.collator([task.train[0], task.train[3]])).loss)


def test_rows_longer_than_the_model_reads(save, rows_file):
    model = save(bert(positions=5), pad_token="[PAD]")  # the longest row has 4 words and 2 special tokens
    with pytest.raises(ValueError, match=r"reads 5 tokens, and dataset .* has a row of 6. .*--max-length 5"):
        prepare_task(TaskArguments(dataset=rows_file, model=model)).new_model(seed=1)
    assert prepare_task(TaskArguments(dataset=rows_file, model=model, max_length=5)).new_model(seed=1)


def test_the_tiny_model_has_its_own_defaults(parse):
    task, args = parse("--dataset", "sample")
    assert (task.dataset, task.model) == ("sample", "tiny")
    assert args.learning_rate == TINY_TRAINING["learning_rate"] != 5e-5
    assert args.num_train_epochs == TINY_TRAINING["num_train_epochs"] != 3.0


def test_another_model_has_the_usual_defaults(parse):
    task, args = parse("--dataset", "sample", "--model", "bert-base-uncased")
    assert task.model == "bert-base-uncased"
    assert (args.learning_rate, args.num_train_epochs) == (5e-5, 3.0)
    assert parse("--dataset=rows.csv")[0].model == "bert-base-uncased"
    assert parse("--dataset=rows.csv", "--model=tiny")[1].learning_rate == TINY_TRAINING["learning_rate"]


def test_nothing_named_and_no_hub_is_the_sample(parse, caplog):
    assert parse()[0].dataset == "sample"
    assert "No dataset named and no hub within reach: using the built-in sample." in caplog.messages


def test_an_empty_name_is_not_taken_for_none(parse):
    task, _ = parse("--dataset", "")
    assert task.dataset == ""
    with pytest.raises(ValueError, match="dataset '': the name is empty"):
        prepare_task(task)


@pytest.mark.parametrize("option", ["--learning_rate", "--learning-rate"])
def test_an_explicit_value_wins_in_either_spelling(parse, option):
    assert parse("--dataset", "sample", option, "5e-5")[1].learning_rate == 5e-5


def test_other_options_in_either_spelling(parse):
    task, args = parse(
        *("--dataset", "sample", "--text-columns", "a", "b", "--label_column", "y", "--max-length", "7"),
        *("--weight-decay", "0.25", "--class-weights", '{"1": 2.5}', "--loss_kwargs", '{"label_smoothing": 0.1}'),
    )
    assert (task.text_columns, task.label_column, task.max_length) == (["a", "b"], "y", 7)
    assert args.weight_decay == 0.25
    assert args.class_weights == {"1": 2.5}
    assert args.loss_kwargs == {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnin_rate", "1"], "--learnin_rate is not an option; did you mean --learning_rate?"),
        (["--wieght-decay=1"], "--wieght-decay=1 is not an option; did you mean --weight-decay?"),
        (["--data", "x"], "--data is not an option"),
        (["stray"], "stray is not an option"),
        (["--dataset"], "argument --dataset: expected one argument"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--eval_strategy", "sometimes"], "invalid choice: 'sometimes'"),
        (["--max_length", "long"], "invalid int value: 'long'"),
        (["--bf16", "perhaps"], "got perhaps"),
        (["--class_weights", "[1,"], "class_weights='[1,' is not valid JSON"),
        (["--loss_reduction", "sum"], "loss_reduction='sum' must be one of weighted_mean, mean"),
        (["--load_best_model_at_end", "true"], "requires the save and eval strategy to match"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--accelerator_config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(parse, capfd, argv, message):
    with pytest.raises(SystemExit) as raised:
        parse("--dataset", "sample", *argv)
    assert raised.value.code == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tool: error: ")]
    assert len(said) == 1
    assert message in said[0]


def test_a_mistake_brings_no_usage(parse, capfd):
    with pytest.raises(SystemExit):
        parse("--dataset", "sample", "--learning_rate", "fast")
    assert capfd.readouterr().err.count("\n") == 1
