"""What a rehearsing process does to the arguments, and which output folders it takes."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from tests.conftest import tiny_model
from trainer_ext.parity.digests import digests
from trainer_ext.rehearsal import on_cpu
from trainer_ext.rehearsal.exported import compare_export, exported_earlier, file_digest
from trainer_ext.rehearsal.watch import cap, claim, local_sums


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def rehearsed(out, name="model.safetensors", content=b"weights"):
    """An output folder as a rehearsal leaves it."""
    (out / name).write_bytes(content)
    (out / "config.json").write_text("{}")
    (out / "training_args.bin").write_bytes(b"arguments")
    files = {name: file_digest(out / name)}
    (out / "rehearsal.json").write_text(json.dumps({"exported": {"files": files, "tensors": 1, "wrong": []}}))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "best.pt", "checkpoint-500"]
)
def test_a_folder_with_a_run_is_refused(out, records, name):
    (out / name).mkdir() if name.startswith("checkpoint") else (out / name).write_bytes(b"trained for a week")
    with pytest.raises(SystemExit) as end:
        claim(out, records)
    assert end.value.code == 2
    said = json.loads((records / "mistake.json").read_text())
    assert said == f"output_dir {out} holds a run ({name}); rehearse into a folder of its own."


def test_a_run_after_a_rehearsal_is_refused(out, records):
    rehearsed(out)
    claim(out, records)
    (records / "output_dir").unlink()
    (out / "model.safetensors").write_bytes(b"trained for a week")
    with pytest.raises(SystemExit):
        claim(out, records)


def test_a_folder_is_taken_once(out, records):
    """What the rehearsal itself writes, or another of its ranks, is no run."""
    claim(out, records)
    (out / "model.safetensors").write_bytes(b"of this rehearsal")
    claim(out, records)
    (records / "output_dir").unlink()
    with pytest.raises(SystemExit):
        claim(out, records)


@pytest.mark.parametrize("there", ["nothing", "logs", "a rehearsal", "a failed rehearsal"])
def test_a_folder_that_is_taken(out, records, there):
    if there == "nothing":
        out.rmdir()
    elif there == "logs":
        (out / "notes.txt").write_text("mine")
    elif there == "a rehearsal":
        rehearsed(out)
    else:
        (out / "rehearsal.json").write_text(json.dumps({"exported": None}))
    claim(out, records)
    assert (records / "output_dir").read_text() == str(out)
    assert not (records / "mistake.json").exists()


def test_what_an_earlier_rehearsal_exported(out):
    assert exported_earlier(out) == []
    rehearsed(out)
    assert exported_earlier(out) == [out / "model.safetensors"]
    (out / "model.safetensors").unlink()
    assert exported_earlier(out) == []


def test_a_few_steps_and_all_of_them_seen(tmp_path):
    args = TrainingArguments(
        str(tmp_path), max_steps=1, num_train_epochs=7, save_only_model=True, eval_strategy="epoch",
        save_strategy="epoch", load_best_model_at_end=True, use_cpu=True,
    )  # fmt: skip
    cap(args, {"steps": 3, "resume": None})
    assert (args.max_steps, args.logging_steps, args.save_steps) == (3, 1, 1)
    assert (args.save_strategy, args.logging_strategy, args.eval_strategy) == ("steps", "steps", "no")
    assert not any((args.save_only_model, args.load_best_model_at_end, args.push_to_hub))


def test_what_a_cpu_cannot_do_is_said(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    plain = {"deepspeed": None, "fp16_full_eval": False, "dataloader_pin_memory": True, "ddp_backend": None}
    args = SimpleNamespace(fp16=True, tf32=True, **plain)
    assert on_cpu.adapt(args) == [
        "fp16 needs a GPU; float32 was rehearsed",
        "tf32 needs a GPU; float32 was rehearsed",
    ]
    assert (args.fp16, args.tf32, args.use_cpu, args.dataloader_pin_memory) == (False, None, True, False)
    assert on_cpu.adapt(args) == []


def test_a_changed_accelerate_is_named(monkeypatch):
    monkeypatch.setattr("accelerate.state.PartialState._prepare_backend", lambda self, device: None)
    with pytest.raises(RuntimeError, match=r"accelerate [\d.]+ has no PartialState._prepare_backend\(cpu"):
        on_cpu.install()


def test_sums_tell_whether_weights_moved():
    model = nn.Linear(2, 1)
    before = local_sums(model)
    assert local_sums(model) == before
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    after = local_sums(model)
    assert after[0] != before[0]
    assert after[1] == before[1]
    assert all(map(math.isfinite, after))


def exported(out, **options):
    model = tiny_model()
    model.save_pretrained(out, **options)
    return model, {
        "exported_to": str(out),
        "architecture": type(model).__name__,
        "weights": digests(model.state_dict()),
    }


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "SomethingElse"])
def test_an_export_is_held_against_the_trained_weights(out, architecture):
    model, record = exported(out)
    record["architecture"] = architecture
    found = compare_export(record)
    assert found == {
        "files": {"model.safetensors": file_digest(out / "model.safetensors")},
        "tensors": len(model.state_dict()),
        "wrong": [],
    }
    record["weights"]["classifier.bias"] = "another"
    del record["weights"]["classifier.weight"]
    record["weights"]["unknown"] = "more"
    assert compare_export(record)["wrong"] == ["classifier.bias", "classifier.weight", "unknown"]


def test_an_export_in_several_files(out):
    _, record = exported(out, max_shard_size="4KB")
    found = compare_export(record)
    assert len(found["files"]) > 1
    assert found["wrong"] == []


def test_no_export(out):
    _, record = exported(out)
    (out / "model.safetensors").unlink()
    found = compare_export(record)
    assert (found["files"], found["tensors"]) == ({}, 0)
    assert found["wrong"] == sorted(record["weights"])
