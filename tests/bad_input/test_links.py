"""A link that somebody put into an output folder leads nothing out of it; paths in a checkpoint do not climb."""

import json
import os

import pytest
from transformers import Trainer, TrainingArguments

from tests.bad_input.laid_out import seen
from trainer_ext.callbacks.run_summary import RunSummary
from trainer_ext.checkpoints.manifest import verify, write_manifest
from trainer_ext.checkpoints.trusted import check_pickles
from trainer_ext.rehearsal.watch import claim

WRITTEN = (
    "all_results.json", "train_results.json", "trainer_state.json", "config.json", "model.safetensors", "training_args.bin",
    "README.md", "run_summary.html", "confusion_matrix.svg", "eval_results.json",
)  # fmt: skip


@pytest.fixture
def outside(tmp_path):
    """A folder with a file in it, and what was in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "kept").write_text("mine")
    before = seen(folder)
    yield folder
    assert seen(folder) == before


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("target", ["kept", "new"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_that_is_a_link_ends_the_run_before_it_begins(trainer, out, outside, name, target):
    (out / name).symlink_to(outside / target)
    made = trainer(output_dir=str(out))
    with pytest.raises(ValueError, match=f"{name} is a link to .*outside/{target}.*remove the link"):
        made.train()
    assert made.state.global_step == 0


def test_the_stock_class_writes_through(trainer, out, tmp_path):
    (out / "trainer_state.json").symlink_to(tmp_path / "written")
    made = trainer(Trainer, arguments_class=TrainingArguments, output_dir=str(out))
    made.save_state()
    assert (tmp_path / "written").is_file()


@pytest.mark.parametrize("name", ["checkpoint-2", "_saving"])
def test_a_folder_that_is_a_link_is_not_written_to(trainer, out, outside, name):
    (out / name).symlink_to(outside)
    trainer(output_dir=str(out), save_strategy="steps", save_steps=2, max_steps=2).train()
    assert not (out / "checkpoint-2").is_symlink()
    assert verify(out / "checkpoint-2") == []
    assert not (out / "_saving").exists()


def test_the_output_folder_may_be_a_link(trainer, out, tmp_path):
    (tmp_path / "linked").symlink_to(out)
    trainer(output_dir=str(tmp_path / "linked"), save_strategy="steps", save_steps=2, max_steps=2).train()
    assert verify(out / "checkpoint-2") == []


def test_an_older_checkpoint_may_be_a_link(trainer, out, tmp_path):
    trainer(output_dir=str(out), save_strategy="steps", save_steps=1, max_steps=1).train()
    (out / "checkpoint-1").rename(tmp_path / "elsewhere")
    (out / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    before = seen(tmp_path / "elsewhere")
    made = trainer(output_dir=str(out), save_strategy="steps", save_steps=1, max_steps=2)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 2
    assert seen(tmp_path / "elsewhere") == before


def test_a_page_takes_the_place_of_a_link(trainer, out, outside):
    """Of a stock Trainer, which refuses no links."""
    for name in ("run_summary.html", "README.md"):
        (out / name).symlink_to(outside / f"new {name}")
    trainer(Trainer, arguments_class=TrainingArguments, output_dir=str(out), callbacks=[RunSummary()]).train()
    assert not any((out / name).is_symlink() for name in ("run_summary.html", "README.md"))


@pytest.mark.parametrize("name", ["single", "single/manual", "report.html"])
def test_a_comparison(call, out, outside, name):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).symlink_to(outside)
    words = ["parity", "run", "--dataset", "sample", "--modes", "single", "--max-steps", 1, "--use-cpu"]
    found = call(*words, "--output-dir", out)
    assert found.exit_code == 2
    assert "is a link to" in " ".join(found.output.split())


@pytest.mark.parametrize("name", ["rehearsal", "rehearsal.json", "config.json"])
def test_a_rehearsal(out, outside, tmp_path, name):
    (out / name).symlink_to(outside if name == "rehearsal" else outside / "new")
    with pytest.raises(SystemExit) as ended:
        claim(out, tmp_path)
    assert ended.value.code == 2
    assert "is a link to" in json.loads((tmp_path / "mistake.json").read_text())


def test_a_manifest_that_climbs(out, outside):
    checkpoint = out / "checkpoint-1"
    checkpoint.mkdir()
    os.link(outside / "kept", checkpoint / "kept")
    write_manifest(checkpoint)
    text = (checkpoint / "manifest.json").read_text()
    assert verify(checkpoint) == []
    (checkpoint / "manifest.json").write_text(text.replace('"kept"', '"../../outside/kept"'))
    assert [finding.path for finding in verify(checkpoint)] == ["manifest.json"]


@pytest.mark.parametrize("name", ["../kept", "/etc/passwd", "a/../../kept", 3])
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_that_climbs_is_not_loaded(out, file, name):
    (out / file).write_text(json.dumps({"weight_map": {"a": name}}))
    assert [str(finding) for finding in check_pickles(out)] == [
        f"{out / file} names {name!r}, which is no file beside it"
    ]
