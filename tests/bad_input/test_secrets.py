"""Tokens and passwords, planted wherever a run can meet them, stand in nothing that is written or printed."""

import sys
from contextlib import chdir

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.bad_input.laid_out import lay_out_good
from trainer_ext import CustomTrainingArguments
from trainer_ext.rehearsal.run import rehearse

SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenOfTheEnvironment01",
    "WANDB_API_KEY": "planted-key-of-weights-and-biases",
    "argument": "planted-token-of-an-argument",
    "password": "planted-password",
}
URL = f"https://me:{SECRETS['password']}@example.org/data"
SCRIPT = f"""
import os, sys
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator
from tests.conftest import rows, tiny_model
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
print("reads {URL} with", os.environ["HF_TOKEN"])
Trainer(tiny_model(), args, default_data_collator, rows()).train()
raise ValueError("cannot reach {URL}")
"""


@pytest.fixture(autouse=True)
def _planted(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRETS[name])


def held_in(folder):
    """The files in which a secret stands, with it."""
    return [
        (str(path.relative_to(folder)), name)
        for path in folder.rglob("*")
        if path.is_file()
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]


@pytest.mark.filterwarnings("ignore")
def test_training_and_comparing(tmp_path, call, monkeypatch):
    lay_out_good(home := tmp_path / "home")
    run = [
        "--dataset",
        "data",
        "--model",
        "model",
        "--max-steps",
        "2",
        "--use-cpu",
        "--hub-token",
        SECRETS["argument"],
    ]
    for words in (
        ["train", *run, "--output-dir", "out", "--save-steps", "1", "--disable-tqdm", "true"],
        ["manual", *run, "--output-dir", "manually"],
        ["parity", "run", *run, "--modes", "single", "--output-dir", "compared"],
        ["parity", "compare", "compared/single/manual", "compared/single/CustomTrainer", "--output-dir", "again"],
    ):
        monkeypatch.setattr(sys, "argv", ["trainer-ext", *words])
        with chdir(home):
            found = call(*words)
        assert found.exit_code == 0, found.output
        assert not any(secret in found.output for secret in SECRETS.values())
    assert list((home / "out").glob("checkpoint-2/training_args.bin"))
    assert held_in(home) == []


@pytest.mark.parametrize("arguments_class", [TrainingArguments, CustomTrainingArguments])
def test_checkpoints(trainer, tmp_path, arguments_class):
    options = {"hub_token": SECRETS["argument"], "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    made = trainer(arguments_class=arguments_class, output_dir=str(tmp_path / "out"), **options)
    made.train()
    made.save_model()
    assert made.args.hub_token == SECRETS["argument"]
    saved = sorted(path.parent.name for path in (tmp_path / "out").rglob("training_args.bin"))
    assert saved == ["checkpoint-1", "out"]
    assert held_in(tmp_path) == []


def test_arguments_that_are_pickled_on_their_way_to_the_hub(arguments, tmp_path):
    """The stock `_push_from_checkpoint` pickles them into the folder that it uploads."""
    made = arguments(hub_token=SECRETS["argument"])
    torch.save(made, tmp_path / "training_args.bin")
    assert held_in(tmp_path) == []


def test_the_stock_class_writes_the_token(trainer, tmp_path):
    made = trainer(
        Trainer, arguments_class=TrainingArguments, hub_token=SECRETS["argument"], output_dir=str(tmp_path / "out")
    )
    made.save_model()
    assert held_in(tmp_path) == [("out/training_args.bin", "argument")]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--dataset", URL, "--model", "tiny"],
        ["train", "--dataset", "sample", "--model", f"./{URL}"],
        ["train", "--dataset", "sample", "--loss", f"x.{SECRETS['HF_TOKEN']}"],
        ["verify", URL],
        ["export", URL, "out"],
        ["configs", SECRETS["WANDB_API_KEY"]],
    ],
    ids=lambda words: words[0],
)
def test_a_message(call, tmp_path, words):
    with chdir(tmp_path):
        found = call(*words)
    assert found.exit_code == 2
    assert "***" in found.output
    assert not any(secret in found.output for secret in SECRETS.values())


@pytest.mark.filterwarnings("ignore")
def test_a_rehearsal(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    out, log = tmp_path / "out", tmp_path / "log"
    words = [f"HF_TOKEN={SECRETS['HF_TOKEN']}", "python", str(tmp_path / "script.py"), "--output_dir", str(out)]
    found = rehearse([*words, "--hub_token", SECRETS["argument"]], processes=1, resume=False, log=log)
    assert "cannot reach" in found.reason
    assert "reads https://***@example.org/data with ***" in log.read_text()
    assert "HF_TOKEN=***" in (out / "rehearsal.json").read_text()
    assert (out / "training_args.bin").is_file()
    assert {file for file, _ in held_in(tmp_path)} == {"script.py"}
