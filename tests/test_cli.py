"""The command as a person types it: exit codes, files, messages."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from tests.conftest import SIZES
from trainer_ext.cli import app
from trainer_ext.metrics.table import METRICS, PER_CLASS
from trainer_ext.parity import Trajectory

PAIRS = [("a b c", "a b c", 1), ("a b c", "c b a", 1), ("a b d", "a e f", 0), ("d e", "d e", 1), ("f a", "b c", 0)]


@pytest.fixture
def corpus(tmp_path):
    """A folder of pairs, and a checkpoint that reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    data = tmp_path / "data"
    data.mkdir()
    for split, repeats in (("train", 9), ("validation", 3)):
        rows = [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in PAIRS * repeats]
        (data / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "model")
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    return ["--dataset", str(data), "--model", str(tmp_path / "model"), "--learning-rate", "1e-3"]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def parity(corpus, folder, *words):
    found = call("parity", "run", *corpus, "--output-dir", folder, "--max-steps", 3, "--use_cpu", *words)
    document = json.loads((folder / "parity.json").read_text()) if (folder / "parity.json").exists() else None
    return found, document


def test_parity_agrees_and_shows_the_stock_trainer(corpus, tmp_path):
    found, document = parity(
        corpus, tmp_path / "out", "--modes", "single,ga4,ragged", "--include-stock", "--batch-size", 8
    )
    assert found.exit_code == 0, found.output
    rows = {row["mode"]: row for row in document["modes"]}
    assert list(rows) == ["single", "stock:single", "ga4", "stock:ga4", "ragged", "stock:ragged"]
    for mode in ("single", "ga4", "ragged"):
        assert rows[mode]["verdict"] == "equal"
        assert rows[mode]["error"] is None
        assert rows[mode]["first_difference"] is None
        assert rows[mode]["steps"] == 3
        assert (rows[mode]["max_abs_loss_difference"], rows[mode]["max_abs_weight_difference"]) == (0.0, 0.0)
        assert rows[mode]["runs_on"] == {
            "engine": "BertForSequenceClassification",
            "stage": None,
            "world_size": 1,
            "local_fraction": 1.0,
        }
        assert rows[mode]["dropout"]
    assert rows["stock:single"]["verdict"] == "equal"
    assert rows["stock:ga4"]["verdict"] == "differs"
    assert rows["stock:ga4"]["first_difference"]["quantity"] == "loss"
    assert rows["stock:ga4"]["loss_ratio"] == pytest.approx(4, rel=1e-3)
    assert rows["stock:ga4"]["gradient_ratio"] == pytest.approx(4, rel=1e-3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bitwise equal in single, ga4, ragged" in page
    assert page.count("<svg") == 3
    assert "bitwise equal in single, ga4, ragged" in found.output.replace("\n", " ")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parity_with_the_whole_batch(corpus, tmp_path, dtype):
    words = ["--modes", "ga2,ga4,ragged", "--whole-batch", "--dtype", dtype, "--class-weights", "[0.7, 3.1]"]
    found, document = parity(corpus, tmp_path / "out", *words, "--batch-size", 8)
    assert found.exit_code == 0, found.output
    assert [row["verdict"] for row in document["modes"]] == ["equal"] * 3
    assert not any(row["dropout"] for row in document["modes"])
    largest = max(row["max_abs_loss_difference"] for row in document["modes"])
    assert 0 < largest < (1e-13 if dtype == "float64" else 1e-5)


def test_accumulation_is_for_the_modes_that_do_not_say(corpus, tmp_path):
    words = ["--modes", "single,ga4,ragged", "--batch-size", "8", "--accumulation", "2"]
    found, _ = parity(corpus, tmp_path / "out", *words)
    assert found.exit_code == 0, found.output
    for mode, expected in {"single": {2}, "ga4": {4}, "ragged": {2, 1}}.items():
        record = Trajectory.load(tmp_path / "out" / mode / "manual")
        assert {len(step.sizes) for step in record.steps} == expected


def test_parity_says_no(corpus, tmp_path, monkeypatch):
    """A fault in CustomTrainer: exit code 1, the row says where, the page too."""
    from trainer_ext.trainer import CustomTrainer

    monkeypatch.setattr(CustomTrainer, "_data_parallel_size", lambda self: 2)
    found, document = parity(corpus, tmp_path / "out", "--modes", "single")
    assert found.exit_code == 1
    row = document["modes"][0]
    assert row["verdict"] == "differs"
    assert (row["first_difference"]["step"], row["first_difference"]["quantity"]) == (1, "loss")
    assert row["first_difference"]["candidate"] == pytest.approx(2 * row["first_difference"]["reference"])
    assert "Not the same run: single differs" in (tmp_path / "out" / "report.html").read_text()


def test_a_mode_that_breaks_is_a_row(corpus, tmp_path, monkeypatch):
    from trainer_ext.trainer import CustomTrainer

    def fail(self, *args, **kwargs):
        raise RuntimeError("no such <device>")

    monkeypatch.setattr(CustomTrainer, "training_step", fail)
    found, document = parity(corpus, tmp_path / "out", "--modes", "single", "--include-stock")
    assert found.exit_code == 1
    broken, stock = document["modes"]
    assert (broken["verdict"], broken["error"]) == ("failed", "RuntimeError: no such <device>")
    assert (broken["steps"], broken["max_abs_loss_difference"]) == (0, None)
    assert stock["verdict"] == "equal"
    assert "no such &lt;device&gt;" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--modes", "ga4", "--batch-size", "6"], "batch size 6"),
        (["--modes", "sngle"], "mode 'sngle' is not known. Choices: single, gaN"),
        (["--modes", ","], "names no mode"),
        (["--dtype", "float16"], "choose float32 or float64"),
        (["--class-weights", "[1, 2, 3]"], "3 weights"),
        (["--class-weights", "[1, NaN]"], "is nan"),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type=cosine"),
        (["--accumulation", "3"], "batch size 16 cannot be"),
        (["--accumulation", "2", "--modes", "ga4"], "--accumulation would be ignored"),
        (["--lerning-rate", "1"], "did you mean --learning-rate?"),
        (["--max-steps", "many"], "--max-steps"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(corpus, tmp_path, words, says):
    found = call("parity", "run", *corpus, "--output-dir", tmp_path / "out", *words)
    assert found.exit_code == 2
    assert says in found.output + getattr(found, "stderr", "")
    assert "Traceback" not in found.output
    assert not (tmp_path / "out" / "parity.json").exists()


@pytest.mark.parametrize("command", ["train", "manual"])
def test_a_trained_folder_is_a_checkpoint(corpus, tmp_path, command):
    out = tmp_path / "out"
    found = call(
        command, *corpus, "--output-dir", out, "--epochs", 1, "--batch-size", 4, "--accumulation", 2,
        "--class-weights", "balanced", "--seed", 3, "--weight-decay", 0.1, "--use-cpu", "--disable-tqdm", "true",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    metrics = json.loads((out / "eval_results.json").read_text())
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= metrics.keys()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in out.iterdir()}


def test_training_leaves_all_metrics_and_two_pictures(corpus, tmp_path):
    """The best checkpoint by a metric of one class; the counts of the matrix are those behind the metrics."""
    out = tmp_path / "out"
    found = call(
        "train", *corpus, "--output-dir", out, "--epochs", 2, "--use-cpu", "--eval-strategy", "epoch",
        "--save-strategy", "epoch", "--load-best-model-at-end", "--metric-for-best-model", "recall_0",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    metrics = json.loads((out / "eval_results.json").read_text())
    names = {f"{name}_{label}" for name in PER_CLASS for label in (0, 1)} | METRICS.keys() - set(PER_CLASS)
    assert {f"eval_{name}" for name in names} <= metrics.keys()
    assert re.search(rf"eval_auroc\W+{metrics['eval_auroc']:.4f}", found.output)
    matrix = ElementTree.parse(out / "confusion_matrix.svg")
    counts = [int(text) for text in matrix.getroot().itertext() if text.isdigit() and len(text) <= 2][-4:]
    assert sum(counts) == 15
    assert metrics["eval_accuracy"] == pytest.approx((counts[0] + counts[3]) / 15)
    assert metrics["eval_recall_0"] == pytest.approx(counts[0] / (counts[0] + counts[1]))
    curve = "".join(ElementTree.parse(out / "precision_recall.svg").getroot().itertext())
    assert f"AP {metrics['eval_average_precision']:.3f}: 1" in curve
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in logged if "eval_mcc" in entry]) == 2


def test_the_other_ranks_draw_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer_ext.trainer.CustomTrainer.is_world_process_zero", lambda self: False)
    found = call("train", *corpus, "--output-dir", tmp_path / "out", "--max-steps", 1, "--use-cpu")
    assert found.exit_code == 0, found.output
    assert list((tmp_path / "out").glob("*.svg")) == []


def test_train_and_manual_end_in_the_same_numbers(corpus, tmp_path):
    def metrics(command):
        out = tmp_path / command
        words = ["--output-dir", out, "--epochs", 2, "--batch-size", 4, "--accumulation", 3, "--use-cpu"]
        found = call(command, *corpus, *words, "--class-weights", '{"1": 2.5}')
        assert found.exit_code == 0, found.output
        read = json.loads((out / "eval_results.json").read_text())
        return {name: read[name] for name in ("eval_loss", "eval_accuracy", "eval_f1")}

    assert metrics("train") == metrics("manual")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dataset", "no/such/folder.jsonl"], "no such file or folder"),
        (["--model", "./nowhere"], "no such checkpoint folder"),
        (["--loss", "dise"], "loss 'dise' is not known"),
        (["--class-weights", "[1, -1]"], "is -1"),
        (["--max-grad-nrm", "1"], "did you mean --max-grad-norm?"),
        (["--metric-for-best-model", "aurok"], "choose one of loss, accuracy, "),
        (["--metric-for-best-model", "eval_recall_2"], "recall_0, recall_1."),
        (["--metric-for-best-model", "calibration_error"], "keeps the worst checkpoint"),
    ],
)
def test_train_refuses_before_training(corpus, tmp_path, words, says):
    found = call("train", *corpus, "--output-dir", tmp_path / "out", *words)
    assert found.exit_code == 2
    assert says in " ".join((found.output + getattr(found, "stderr", "")).split())


@pytest.mark.parametrize("command", ["train", "manual"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--learning-rate", "nan"], "learning_rate=nan"),
        (["--max-steps", "2", "--max_steps", "3"], "--max-steps and --max_steps are both given"),
        (["--epochs", "1", "--num-train-epochs=2"], "--epochs and --num-train-epochs=2 are both given"),
        (["--output-dir", "__file__"], "is a file; name a folder"),
        (["--dataset", "three", "--model", "two labels"], "has a head for 2 labels"),
    ],
)
def test_what_would_be_lost_later_is_refused_now(corpus, tmp_path, command, words, says):
    three = [{"sentence": "a b", "label": i % 3} for i in range(9)]
    (tmp_path / "three.jsonl").write_text("\n".join(json.dumps(row) for row in three))
    replaced = {"__file__": corpus[1] + "/train.jsonl", "three": tmp_path / "three.jsonl", "two labels": corpus[3]}
    found = call(command, *corpus[:4], *[replaced.get(word, word) for word in words])
    assert found.exit_code == 2, found.output
    assert says in " ".join((found.output + getattr(found, "stderr", "")).split())


def test_resuming_from_the_command_line(corpus, tmp_path):
    out = tmp_path / "out"
    words = ["train", *corpus, "--output-dir", out, "--max-steps", 4, "--save-steps", 2, "--use-cpu"]
    assert "there is no checkpoint" in call(*words, "--resume-from-checkpoint", "true").output
    assert "no checkpoint folder" in call(*words, "--resume-from-checkpoint", tmp_path / "nope").output
    assert call(*words).exit_code == 0
    whole = (out / "model.safetensors").read_bytes()
    (out / "checkpoint-4").rename(tmp_path / "later")
    assert call(*words, "--resume-from-checkpoint", "true").exit_code == 0
    other = call(*words, "--resume-from-checkpoint", "true", "--class-weights", "balanced")
    assert other.exit_code == 2
    assert "was trained with another loss (class_weights: None, now [" in " ".join(other.output.split())
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_run_of_warmup_alone_is_equal(corpus, tmp_path):
    found, document = parity(corpus, tmp_path / "out", "--modes", "single", "--warmup-steps", 100, "--epochs", 1)
    assert document["modes"][0]["verdict"] == "equal", found.output


def test_a_model_that_cannot_be_used_is_a_mistake(corpus, tmp_path):
    found, document = parity([*corpus[:2], "--model", str(tmp_path)], tmp_path / "out", "--modes", "single")
    assert (found.exit_code, document) == (2, None)


def test_a_mode_is_run_once(corpus, tmp_path):
    _, document = parity(corpus, tmp_path / "out", "--modes", "single, single")
    assert [row["mode"] for row in document["modes"]] == ["single"]


def test_configs_are_listed_and_found():
    listed = call("configs")
    assert listed.exit_code == 0
    assert "zero2.json" in listed.output
    assert call("configs", "zero2").output.strip().endswith("ds_configs/zero2.json")
    assert call("configs", "zero9").exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["train"],
        ["manual"],
        ["parity"],
        ["parity", "run"],
        ["parity", "record"],
        ["parity", "compare"],
        ["parity", "calibrate"],
        ["configs"],
    ],
)
def test_help_teaches(words):
    found = call(*words, "--help")
    assert found.exit_code == 0
    assert "Usage" in found.output
    if words in (["train"], ["parity", "run"]):
        assert "TrainingArguments" in found.output


@pytest.mark.parametrize("words", ["import trainer_ext", "from trainer_ext.cli import app, main"])
def test_nothing_heavy_is_imported_before_it_is_needed(words):
    heavy = ("torch", "transformers", "accelerate", "datasets", "deepspeed", "numpy", "matplotlib", "sklearn")
    code = f"{words}; import sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
