"""Hub names, files and folders become checked splits; what cannot be trained on is an error that says why."""

import json
import socket

import huggingface_hub
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from trainer_ext.data import SAMPLE, default_dataset, load_splits, tokenize
from trainer_ext.hub import hub_answers, require_hub

PAIRS = [{"sentence1": f"a {i}", "sentence2": "b " * (i + 1), "label": i % 2} for i in range(6)]
TEXTS = [{"text": "one", "label": 0}, {"text": "one two three", "label": 1}]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


@pytest.fixture
def write(tmp_path):
    """A file in tmp_path from rows (JSON lines), text or bytes; returns its path as a string."""

    def make(name, content):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return make


@pytest.fixture
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "a", "b"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=8,
        model_input_names=["input_ids"],
    )


def listening():
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def closed_port():
    with listening() as server:
        return server.getsockname()[1]


CSV = "sentence1,sentence2,label\na 0,b,0\na 1,b b,1\n"
FORMATS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in PAIRS[:2]),
    "rows.json": json.dumps(PAIRS[:2]),
    "rows.csv": CSV,
    "rows.tsv": CSV.replace(",", "\t"),
    "ROWS.CSV": CSV,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(write, name):
    data = load_splits(write(name, FORMATS[name]))
    assert data.text_columns == ("sentence1", "sentence2")
    assert (data.label_column, data.label_names) == ("label", ["0", "1"])
    assert data.splits["train"]["sentence1"][:] == ["a 0", "a 1"]
    assert data.splits["train"]["label"][:] == [0, 1]


def test_parquet_keeps_the_names_of_its_classes(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list(TEXTS, features).to_parquet(tmp_path / "train.parquet")
    data = load_splits(str(tmp_path))
    assert data.text_columns == ("text",)
    assert data.label_names == ["no", "yes"]


def test_a_folder_has_its_splits_in_any_formats(write, tmp_path):
    write("train.jsonl", PAIRS)
    write("validation.csv", CSV)
    write("readme.md", "words")
    data = load_splits(str(tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 6, "validation": 2}
    assert data.name == str(tmp_path)


def test_the_sample_has_two_named_classes():
    data = load_splits(SAMPLE)
    assert set(data.splits) == {"train", "validation"}
    assert data.text_columns == ("sentence1", "sentence2")
    assert data.label_names == ["not_equivalent", "equivalent"]


def test_words_for_nothing_stay_words_in_a_csv(write):
    data = load_splits(write("t.csv", "text,label\nNone,EU\nNA,NA\nnull,EU\n"))
    assert data.splits["train"]["text"][:] == ["None", "NA", "null"]
    assert data.label_names == ["EU", "NA"]


def test_a_quotation_mark_swallows_no_row_of_a_tsv(write):
    data = load_splits(write("t.tsv", 'text\tlabel\n"He said\t0\nso"\t1\nhe "left"\t1\n'))
    assert data.splits["train"]["text"][:] == ['"He said', 'so"', 'he "left"']


def test_columns_by_name(write):
    file = write("t.jsonl", [{"id": "7", "title": "t", "body": "b", "y": kind} for kind in ("spam", "ham")])
    data = load_splits(file, text_columns=["body", "title"], label_column="y")
    assert data.text_columns == ("body", "title")
    assert (data.label_column, data.label_names) == ("y", ["ham", "spam"])


def test_the_label_is_never_read_as_text(write):
    data = load_splits(write("t.jsonl", [{"review": "a", "y": "no"}, {"review": "b", "y": "yes"}]), label_column="y")
    assert data.text_columns == ("review",)


def test_an_unread_label_column_is_dropped(write, tokenizer):
    file = write("t.jsonl", [{"text": "one", "label": i, "labels": 1 - i} for i in (0, 1)])
    encoded = tokenize(load_splits(file, label_column="label"), tokenizer)
    assert encoded["train"]["labels"][:] == [0, 1]
    with pytest.raises(ValueError, match="both labels and label could be the label column.*--label-column"):
        load_splits(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "has no rows"),
        ("t.jsonl", "\n\n", "has no rows"),
        ("t.json", "[]", "has no rows"),
        ("t.csv", "text,label\n", "has no rows"),
        ("t.csv", "\n\n", "has no rows"),
        ("t.csv", bytes([0, 255, 254, 7]) * 300, r"cannot be read as \.csv"),
        ("t.csv", "text,label\na,0\nb,1,2\n", r"cannot be read as \.csv: .*Expected 2 fields in line 3"),
        ("t.csv", "text,label\nä,0\n".encode("latin-1"), r"cannot be read as \.csv: 'utf-8' codec"),
        ("t.jsonl", "hello\nworld\n", r"cannot be read as \.jsonl: JSON parse error"),
        ("t.jsonl", '{"text": "a", "label": 0}\n{oops\n', r"cannot be read as \.jsonl: JSON parse error"),
        ("t.jsonl", "1\n2\n", r"cannot be read as \.jsonl"),
        ("t.parquet", "text,label\na,0\n", r"cannot be read as \.parquet"),
        ("t.txt", "words", r"must end in one of \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
    ],
)
def test_a_file_that_is_not_what_it_says(write, name, content, message):
    file = write(name, content)
    with pytest.raises(ValueError, match=message) as raised:
        load_splits(file)
    assert file in str(raised.value)


def test_a_parquet_without_rows(tmp_path):
    Dataset.from_dict({"text": [], "label": []}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet' has no rows"):
        load_splits(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r"none of labels, label, label_ids .*among \['text'\]. Name it \(--label-column\)"),
        ([{"text": "a", "label": 0}, {"text": None, "label": 1}], "train split has no text in 'text' at row 1"),
        ([{"text": 1, "label": 0}, {"text": 2, "label": 1}], r"which columns are the text\? .*\(--text-columns\)"),
        ([{"a": "x", "b": "y", "label": 0}], r"which columns are the text\? .*text in \['a', 'b'\]"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 7}], "the label 7 at row 1"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": None}], "no label in 'label' at row 1"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": "x"}], "the label column 'label' holds"),
    ],
)
def test_rows_that_cannot_be_trained_on(write, rows, message):
    file = write("t.jsonl", rows)
    with pytest.raises(ValueError, match=message) as raised:
        load_splits(file)
    assert str(raised.value).startswith(f"dataset {file!r}: ")


def test_an_empty_cell_of_a_csv_is_missing(write):
    with pytest.raises(ValueError, match="no text in 'sentence2' at row 1"):
        load_splits(write("t.csv", "sentence1,sentence2,label\na,b,0\nc,,1\n"))
    with pytest.raises(ValueError, match="no label in 'label' at row 1"):
        load_splits(write("l.csv", "sentence1,sentence2,label\na,b,0\nc,d,\ne,f,1\n"))


@pytest.mark.parametrize("asked", [["absent"], ["label"], ["text", "text"], ["text", "text", "text"]])
def test_text_columns_that_are_none(write, asked):
    with pytest.raises(ValueError, match=r"text columns .* must be one or two of its text columns, \['text'\]"):
        load_splits(write("t.jsonl", TEXTS), text_columns=asked)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 2}], "validation split has the label 2 at row 0"),
        ([{"text": None, "label": 1}], "validation split has no text in 'text' at row 0"),
        ([{"text": 5, "label": 1}], "validation split holds no text in 'text', but .*int64"),
        ([{"words": "a", "label": 1}], r"validation split has no text column 'text'; it has \['words', 'label'\]"),
        ([{"text": "a"}], "validation split has no label column 'label'"),
        ([], r"validation\.jsonl' has no rows"),
    ],
)
def test_a_validation_split_that_does_not_fit(write, tmp_path, rows, message):
    write("train.jsonl", TEXTS)
    write("validation.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path))


def test_folders_without_one_train_file(write, tmp_path):
    with pytest.raises(ValueError, match=r"has no train\.\* of \.jsonl"):
        load_splits(str(tmp_path))
    write("validation.jsonl", TEXTS)
    with pytest.raises(ValueError, match="no train split; it has validation"):
        load_splits(str(tmp_path))
    write("train.jsonl", TEXTS)
    write("train.csv", CSV)
    with pytest.raises(ValueError, match=r"train\.csv, .*train\.jsonl are all its train split; keep one"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere.csv", "./nowhere", "../nowhere/x", "/nowhere", "~/nowhere/at/all.jsonl"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_splits(name)


@pytest.mark.parametrize("name", ["owner/name/config/more", "owner//name", "glue/mrpc/more"])
def test_what_no_hub_name_looks_like(name):
    with pytest.raises(ValueError, match="no such file or folder, and it is no hub name"):
        load_splits(name)


def test_an_empty_name_is_no_dataset():
    with pytest.raises(ValueError, match="the name is empty"):
        load_splits("")


def test_glue_mrpc_is_read_by_its_name_and_configuration(write, tmp_path, monkeypatch, caplog):
    """`load_dataset("nyu-mll/glue", "mrpc")` reads this folder as it reads the repository of that name."""
    card = "configs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - {{split: {s}, path: {config}/{s}.jsonl}}\n" for s in found)
        for config, found in {
            "mrpc": ["train", "validation", "test"],
            "mnli": ["train", "validation_matched"],
        }.items()
    )
    write("nyu-mll/glue/README.md", f"---\n{card}---\n")
    for name in ("mrpc/train", "mrpc/validation", "mnli/train", "mnli/validation_matched"):
        write(f"nyu-mll/glue/{name}.jsonl", PAIRS)
    write("nyu-mll/glue/mrpc/test.jsonl", [{**row, "label": -1} for row in PAIRS])
    monkeypatch.chdir(tmp_path)
    data = load_splits("glue/mrpc")
    assert set(data.splits) == {"train", "validation"}  # the labels of the test split are hidden
    assert data.splits["train"].num_rows == 6
    assert set(load_splits("glue/mnli").splits) == {"train"}
    assert "no validation split among train, validation_matched; nothing to evaluate on" in caplog.text


def test_without_a_hub_the_cache_is_asked_and_the_name_is_in_the_error():
    with pytest.raises(ValueError, match="dataset 'glue/mrpc' is neither a local path nor readable from the hub"):
        load_splits("glue/mrpc")


def test_a_hub_that_does_not_answer_is_an_error_with_the_ways_round(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert hub_answers() is False
    with pytest.raises(ConnectionError, match=r"dataset 'glue/mrpc' .*--dataset sample.*HF_HUB_OFFLINE=1"):
        load_splits("glue/mrpc")


def test_a_hub_that_answers_is_asked_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with listening() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers() is True
        require_hub("model 'any'")
        assert default_dataset() == "glue/mrpc"
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):  # no second connection
            server.accept()


def test_a_proxy_stands_for_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    with listening() as server:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers() is True
    hub_answers.cache_clear()
    monkeypatch.setenv("no_proxy", "hub.invalid")
    assert hub_answers() is False


def test_offline_is_never_asked_and_the_sample_is_said_to_be_used(monkeypatch, caplog):
    with listening() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers() is False
    require_hub("model 'any'")  # the cache may have it
    assert default_dataset() == SAMPLE
    assert "No dataset named and no hub within reach: using the built-in sample." in caplog.messages


def test_tokenize_leaves_model_inputs_and_labels_only(write, tokenizer):
    file = write("t.jsonl", [{"idx": i, "input_ids": "x", **row} for i, row in enumerate(TEXTS)])
    encoded = tokenize(load_splits(file), tokenizer)["train"]
    assert sorted(encoded.column_names) == ["input_ids", "labels"]
    assert encoded["input_ids"][:] == [[2, 4, 3], [2, 4, 5, 6, 3]]
    batch = DataCollatorWithPadding(tokenizer)([encoded[0], encoded[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 4, 5, 6, 3]]
    assert batch["labels"].tolist() == [0, 1]


def test_tokenize_reads_a_pair_in_order(write, tokenizer):
    encoded = tokenize(load_splits(write("t.jsonl", PAIRS[:2])), tokenizer)["train"]
    assert encoded["input_ids"][0] == [2, 7, 1, 3, 8, 3]


def test_max_length(write, tokenizer, caplog):
    data = load_splits(write("t.jsonl", [{"text": "one " * 20, "label": i} for i in (0, 1)]))
    for asked, length in ((3, 3), (8, 8), (100, 8), (None, 8)):
        assert len(tokenize(data, tokenizer, max_length=asked)["train"]["input_ids"][0]) == length
    assert "max_length=100: the model reads 8 tokens." in caplog.messages
    for asked in (2, 0, -5):
        with pytest.raises(ValueError, match=f"max_length={asked} leaves no room for text: 2 tokens"):
            tokenize(data, tokenizer, max_length=asked)
