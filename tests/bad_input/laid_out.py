"""The working folder of an entry of the catalogue: good data, a model, a run and a record, each in a moment's copy.

`lay_out_good(folder)` makes them once; `lay_out(entry, good, folder)` copies them and writes the entry's own files over.
"""

import hashlib
import io
import json
import os
import shutil
from contextlib import chdir
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from typer.testing import CliRunner

from tests.conftest import SIZES
from trainer_ext.cli import app

PAIRS = [("a b c", "a b c", 1), ("a b c", "c b a", 1), ("a b d", "a e f", 0), ("d e", "d e", 1), ("f a", "b c", 0)]


def jsonl(*rows):
    """Lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(**columns):
    """The bytes of a parquet file."""
    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def link(target):
    """What makes a link to `target`."""
    return lambda path: path.symlink_to(target)


def without(path):
    """What removes a file that is there."""
    path.unlink()


def lay_out_good(folder):
    """Data, a model, a run of two steps with a checkpoint, and a record of the manual loop."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    (folder / "data").mkdir(parents=True)
    for split, repeats in (("train", 4), ("validation", 1)):
        rows = [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in PAIRS * repeats]
        (folder / "data" / f"{split}.jsonl").write_text(jsonl(*rows))
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdef"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "model"
    )
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(folder / "model")
    run = ["--dataset", "data", "--model", "model", "--max-steps", "2", "--use-cpu", "--batch-size", "8"]
    with chdir(folder):
        for words in (
            ["train", *run, "--output-dir", "run", "--save-steps", "2", "--disable-tqdm", "true"],
            ["parity", "run", *run, "--modes", "single", "--output-dir", "parity"],
        ):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
    for name in ("single/manual", "single/CustomTrainer"):
        (folder / "parity" / name).rename(folder / {"manual": "manual"}.get(name[7:], "trainer"))
    shutil.rmtree(folder / "parity")


def lay_out(files, good, folder):
    """A copy of what is good, with `files` written over: text, bytes, or a function of the path."""
    shutil.copytree(good, folder, symlinks=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)


def seen(folder):
    """Every file with its digest, every link with its target, and every folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            else:
                found[str(path)] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found
