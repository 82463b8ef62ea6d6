"""The page and the card hold the numbers of the log, and no name of anyone's is more than text in them.

On several ranks and engines they are looked at in `test_on_engines.py`.
"""

import math
import re
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.conftest import rows, tiny_model
from trainer_ext.callbacks import run_summary
from trainer_ext.callbacks.run_facts import changed_arguments, evaluations
from trainer_ext.callbacks.run_summary import MARKER, RunSummary
from trainer_ext.callbacks.throughput import Throughput
from trainer_ext.plain_text import for_markdown

HOSTILE = "<script>alert('x')</script> | [a](javascript:b) --- `c`"
VOID = {"meta", "link", "br", "use", "path"}


class Page(HTMLParser):
    """Tables by their id, as rows of cells (a `data` element is its value), and all tags and texts."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.open, self.attributes, self._table = {}, [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.attributes += values.items()
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(values["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "data":
            self._table[-1][-1] = float(values["value"])

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            cell = self._table[-1][-1]
            self._table[-1][-1] = cell + text if isinstance(cell, str) else cell


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def named_rows(name, count=24, *, repository=None):
    """Rows as `load_dataset` gives them: with a name, and the addresses of their files."""
    data = rows(count)
    data.info.dataset_name = name
    if repository is not None:
        data.info.download_checksums = {f"hf://datasets/{repository}@bcdcba79/mrpc/train.parquet": {}}
    return data


@pytest.fixture
def trained(trainer, tmp_path):
    def train(**options):
        options = {
            "callbacks": [Throughput(), RunSummary()], "train": named_rows("glue", repository="nyu-mll/glue"),
            "evaluation": named_rows("glue", 8, repository="nyu-mll/glue"),
            "compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "weight_decay": 0.125,
            "output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 2,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", **options,
        }  # fmt: skip
        run = trainer(**options)
        run.train()
        return run, Page((tmp_path / "run" / "run_summary.html").read_text())

    return train


def test_the_numbers_are_those_of_the_log(trained, tmp_path):
    run, page = trained()
    assert not page.open
    log = run.state.log_history
    numbers = dict(page.tables["numbers"])
    assert numbers["loss"] == [entry["loss"] for entry in log if "loss" in entry][-1]
    last = log[-1]
    for name in ("train_loss", "train_runtime", "samples_per_second", "tokens_per_second", "flops_utilization"):
        assert numbers[name] == last[name]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert (numbers["best eval_loss"], numbers["best step"]) == (losses[best], best)
    header, *found = page.tables["evaluations"]
    assert header == ["step", "epoch", "eval_loss", "eval_accuracy"]
    assert found == [[e["step"], e["epoch"], e["eval_loss"], e["eval_accuracy"]] for e in log if "eval_loss" in e]
    assert len(found) == 3


def test_what_was_run(trained):
    run, page = trained()
    about = dict(page.tables["about"])
    elements = sum(p.numel() for p in run.model.parameters())
    assert about["model"] == "BertForSequenceClassification"
    assert about["parameters"] == f"{elements:,}, of which {elements:,} are trained"
    assert (about["training data"], about["training rows"]) == ("glue", "24")
    assert (about["engine"], about["processes"], about["steps"]) == ("one process", "1", "6 of 6")
    assert (about["optimizer"], "from" in about, "resumed at step" in about) == ("AdamW", False, False)
    _, *groups = page.tables["groups"]
    assert [row[:1] + row[2:] for row in groups] == [
        [name, sum(p.numel() for p in group["params"]), 1e-3, decay]
        for name, group, decay in zip(("decay", "no_decay"), run.optimizer.param_groups, (0.125, 0.0), strict=True)
    ]
    arguments = dict(page.tables["arguments"])
    assert {"max_steps": "6", "learning_rate": "0.001", "weight_decay": "0.125"}.items() <= arguments.items()
    assert not {"adam_beta1", "seed", "num_train_epochs", "accelerator_config", "report_to"} & arguments.keys()
    assert dict(page.tables["environment"])["torch"] == version("torch")


def test_the_page_needs_nothing_besides_itself(trained, tmp_path):
    _, page = trained()
    text = (tmp_path / "run" / "run_summary.html").read_text()
    assert not {"script", "img", "iframe", "object", "base"} & set(page.tags)
    outside = [v for name, v in page.attributes if name in ("src", "href", "xlink:href", "action") and v]
    assert all(value.startswith(("#", "data:,")) for value in outside)
    assert "@import" not in text
    assert all(found.startswith("#") for found in re.findall(r"url\(['\"]?([^)'\"]*)", text))
    assert page.tags.count("svg") == 4  # losses, gradient norm, rate, accuracy
    assert "prefers-color-scheme: dark" in text
    assert ("name", "viewport") in page.attributes
    described = [value for name, value in page.attributes if name == "aria-label"]
    assert described[0].startswith("loss from ")
    assert "eval_loss from " in described[0]


def test_the_card(trained, tmp_path):
    run, _ = trained()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.model_name, card.data.library_name) == ("run", "transformers")
    assert (card.data.datasets, card.data.pipeline_tag) == (["nyu-mll/glue"], "text-classification")
    assert card.data.get("license") is None
    assert card.data.get("base_model") is None
    last = [entry for entry in run.state.log_history if "eval_loss" in entry][-1]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": last["eval_loss"], "accuracy": last["eval_accuracy"]}
    assert {(r.dataset_type, r.dataset_name) for r in card.data.eval_results} == {("nyu-mll/glue", "glue")}
    text = (tmp_path / "run" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert ModelCard(text).data.to_dict() == front | {"model-index": front["model-index"]}
    assert re.search(r"^\| step \| epoch \| eval\\_loss \| eval\\_accuracy \|$", text, re.MULTILINE)
    table = re.findall(r"^\| \d.*\|$", text, re.MULTILINE)
    assert len(table) == 3


def test_a_hostile_name_is_text(trained, tmp_path):
    _, page = trained(train=named_rows(HOSTILE, repository=HOSTILE), run_name=HOSTILE)
    assert "script" not in page.tags
    assert dict(page.tables["about"])["training data"] == HOSTILE
    assert dict(page.tables["arguments"])["run_name"] == HOSTILE
    text = (tmp_path / "run" / "README.md").read_text()
    assert "<script" not in text
    assert "](javascript" not in text
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.get("datasets") is None


def test_results_of_data_that_the_hub_does_not_know_are_not_in_the_metadata(trained, tmp_path):
    """Its training data's name is not its evaluation's; and two sets that were evaluated are not one."""
    trained(evaluation=rows(8))
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.datasets, card.data.eval_results) == (["nyu-mll/glue"], None)
    two = {name: named_rows(name, 8, repository=f"mine/{name}") for name in ("a", "b")}
    trained(evaluation=two, metric_for_best_model="eval_a_loss")
    assert ModelCard.load(tmp_path / "run" / "README.md").data.eval_results is None


def test_a_page_that_does_not_escape_is_seen(trained, monkeypatch):
    """Mutation: without autoescape the name is an element."""
    import jinja2

    real = jinja2.Environment
    monkeypatch.setattr(jinja2, "Environment", lambda **options: real(**{**options, "autoescape": False}))
    try:
        _, page = trained(train=named_rows("<script>alert(1)</script>"))
    except AssertionError:
        return
    assert "script" in page.tags


def test_plain_text():
    assert for_markdown("a | b\n# c <b> &amp; [d](e) *f* _g_") == (
        r"a \| b \# c &lt;b&gt; &amp;amp; \[d\]\(e\) \*f\* \_g\_"
    )


def test_a_card_of_someone_else_is_left_alone(trained, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(run_summary.logger, "warning", said.append)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    trained()
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert len(said) == 1
    assert "README.md was not written by RunSummary" in said[0]
    (folder / "README.md").write_text(f"---\ntags: []\n---\n{MARKER}\nold\n")
    trained()
    assert "old" not in (folder / "README.md").read_text()
    assert len(said) == 1


def test_what_is_not_known_is_left_out(trained, tmp_path):
    _, page = trained(
        callbacks=[RunSummary()], evaluation=None, compute_metrics=None, eval_strategy="no", save_strategy="no",
        load_best_model_at_end=False, train=rows(24), max_steps=1, metric_for_best_model=None,
    )  # fmt: skip
    assert page.tables.keys() == {"about", "numbers", "groups", "arguments", "environment"}
    assert dict(page.tables["numbers"]).keys() == {"loss", "train_loss", "train_runtime", "epoch"}
    assert "training data" not in dict(page.tables["about"])
    assert "svg" not in page.tags
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.get("datasets") is None
    assert card.data.eval_results is None


def test_skipped_steps_and_a_resumed_run(trained, tmp_path):
    class Skips(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            state.log_history[-1]["skipped_steps"] = 3

    trained()
    other = {"model": tiny_model(seed=4), "callbacks": [Skips(), RunSummary()]}

    class Resumes(Trainer):
        def train(self, *args, **kwargs):
            return super().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))

    _, page = trained(cls=Resumes, arguments_class=TrainingArguments, **other)
    assert dict(page.tables["about"])["resumed at step"] == "4"
    assert dict(page.tables["numbers"])["skipped_steps"] == 3
    assert len(page.tables["evaluations"]) == 1 + 3
    assert [row[0] for row in page.tables["evaluations"][1:]] == [2, 4, 6]


def test_evaluations_of_several_sets_are_one_row():
    logs = [
        {"step": 2, "epoch": 1.0, "eval_a_loss": 1.0, "eval_a_runtime": 3.0},
        {"step": 2, "epoch": 1.0, "eval_b_loss": 2.0, "eval_b_samples_per_second": 3.0},
        {"step": 2, "epoch": 1.0, "loss": 2.0},
    ]
    assert evaluations(logs) == [{"step": 2, "epoch": 1.0, "eval_a_loss": 1.0, "eval_b_loss": 2.0}]


def test_numbers_that_are_none(trained, tmp_path):
    """A loss that is no number is shown as such, and is in no metadata."""

    def metrics(found):
        return {"broken": math.nan, "kept": 0.5}

    _, page = trained(compute_metrics=metrics)
    header, *found = page.tables["evaluations"]
    assert all(math.isnan(row[header.index("eval_broken")]) for row in found)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "kept"}


def test_secrets_are_masked(arguments):
    found = changed_arguments(arguments(TrainingArguments, hub_token="hf_secret", data_seed=0, max_grad_norm=0.0))
    assert found["hub_token"] == "<HUB_TOKEN>"
    assert (found["data_seed"], found["max_grad_norm"]) == (0, 0.0)
