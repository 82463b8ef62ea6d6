"""Checkpoints by path, by name and the built-in one become classifiers, or an error that says why not."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trainer_ext.hub import hub_answers
from trainer_ext.models import checkpoint_folder, default_model, load_model, load_tokenizer, tiny_checkpoint

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three"]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def word_tokenizer(**special):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


@pytest.fixture
def checkpoint(tmp_path):
    """A BERT classifier of two labels with its tokenizer."""
    folder = tmp_path / "bert"
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(folder)
    word_tokenizer(pad_token="[PAD]").save_pretrained(folder)
    return folder


def test_the_default_model():
    assert default_model("sample") == "tiny"
    assert default_model("glue/mrpc") == "bert-base-uncased"
    assert default_model("rows.csv") == "bert-base-uncased"


def test_label_names_reach_the_saved_configuration(checkpoint, tmp_path):
    model = load_model(str(checkpoint), ["no", "yes"], seed=1)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.label2id == {"no": 0, "yes": 1}
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["id2label"] == {"0": "no", "1": "yes"}
    assert saved["problem_type"] == "single_label_classification"


def test_the_checkpoint_s_weights_are_loaded(checkpoint):
    loaded = load_model(str(checkpoint), ["a", "b"], seed=1).state_dict()
    for name, value in BertForSequenceClassification.from_pretrained(checkpoint).state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_a_head_that_is_not_there_is_drawn_from_the_seed(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "body")
    heads = [load_model(str(tmp_path / "body"), list("abc"), seed=seed).classifier.weight for seed in (1, 1, 2)]
    assert heads[0].shape == (3, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_dtype_and_dropout(checkpoint):
    model = load_model(str(checkpoint), ["a", "b"], seed=1, dtype=torch.float64, dropout=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    kept = load_model(str(checkpoint), ["a", "b"], seed=1)
    assert {module.p for module in kept.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}


def test_a_head_for_another_number_of_labels(checkpoint):
    with pytest.raises(ValueError, match="has a head for 2 labels, and the data has 3: a, b, c"):
        load_model(str(checkpoint), list("abc"), seed=1)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match=r"the folder has no config\.json, so it is no checkpoint"):
        load_model(str(tmp_path), ["a", "b"], seed=1)


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "../nowhere"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"model '{name}': there is no such checkpoint folder"):
        load_tokenizer(name)


def test_a_file_and_an_empty_name_are_no_checkpoint(checkpoint):
    with pytest.raises(ValueError, match=r"config\.json': there is no such checkpoint folder"):
        checkpoint_folder(str(checkpoint / "config.json"))
    with pytest.raises(ValueError, match="the name is empty"):
        checkpoint_folder("")


def test_broken_checkpoints(checkpoint, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match="cut' cannot be loaded as AutoModelForSequenceClassification"):
        load_model(str(cut), ["a", "b"], seed=1)
    weights.unlink()
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        load_model(str(cut), ["a", "b"], seed=1)
    (cut / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match="not a valid JSON file"):
        load_model(str(cut), ["a", "b"], seed=1)


def test_a_name_that_no_cache_has_is_in_the_error():
    with pytest.raises(ValueError, match="model 'runs/absent' is no local folder and cannot be loaded"):
        load_model("runs/absent", ["a", "b"], seed=1)


def test_a_name_without_a_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ConnectionError, match=r"model 'bert-base-uncased' is no local path, .*HF_HUB_OFFLINE=1"):
        load_tokenizer("bert-base-uncased")


def test_a_checkpoint_without_its_tokenizer_is_not_given_an_empty_one(tmp_path):
    """`AutoTokenizer` makes up one without any words, so that every text would be unknown."""
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no vocabulary: save its tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tmp_path):
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, bos_token_id=3, eos_token_id=3)
    ).save_pretrained(tmp_path)
    word_tokenizer(eos_token="[SEP]").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "[SEP]"
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no padding token"):
        load_tokenizer(str(tmp_path))


def test_two_at_once_make_one_complete_tiny_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    start = threading.Barrier(2)

    def make():
        start.wait()
        return tiny_checkpoint()

    with ThreadPoolExecutor(2) as pool:
        first, second = [made.result() for made in [pool.submit(make) for _ in range(2)]]
    assert first == second == tiny_checkpoint()
    assert [made.name for made in first.parent.iterdir()] == [first.name]  # no scratch is left
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in first.iterdir()}
    assert load_model("tiny", ["a", "b"], seed=1).config.num_labels == 2
    assert len(set(load_tokenizer("tiny")("officials said")["input_ids"])) > 2
