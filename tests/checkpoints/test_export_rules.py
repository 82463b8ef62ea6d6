"""What an export writes, what it refuses, and what it leaves where it fails; on checkpoints of one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, default_data_collator

from tests.checkpoints.engines_run import craft
from tests.conftest import SIZES, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, EMACallback
from trainer_ext.checkpoints.export import WRITTEN, export
from trainer_ext.checkpoints.manifest import MANIFEST, write_manifest
from trainer_ext.checkpoints.resume import BadCheckpointError
from trainer_ext.checkpoints.trusted import UntrustedPickleError
from trainer_ext.models import load_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of one process with averages, and what the model was when train() ended: the averages."""
    out = tmp_path_factory.mktemp("plain")
    args = CustomTrainingArguments(
        str(out), use_cpu=True, report_to="none", max_steps=2, save_steps=2, disable_tqdm=True, log_level="error",
        dataloader_pin_memory=False, learning_rate=1e-2,
    )  # fmt: skip
    trainer = CustomTrainer(
        tiny_model(), args, default_data_collator, rows(), processing_class=load_tokenizer("tiny"),
        callbacks=[EMACallback(0.5)],
    )  # fmt: skip
    trainer.train()
    return out / "checkpoint-2", {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.fixture
def checkpoint(plain, tmp_path):
    """One that tests change: without the manifest, as the stock class saves it."""
    return Path(shutil.copytree(plain[0], tmp_path / "checkpoint-2", ignore=shutil.ignore_patterns(MANIFEST)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def weights(folder):
    return BertForSequenceClassification.from_pretrained(folder).state_dict()


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def nothing_is_left(out):
    return not out.exists() and not list(out.parent.glob(".*"))


def test_the_command(checkpoint, out, call):
    result = call("export", checkpoint, out, "--max-shard-size", "10KB")
    assert (result.exit_code, result.stdout.strip()) == (
        0,
        f"25 tensors (model.safetensors), equal after loading: {out}",
    )
    assert equal(weights(out), load_file(checkpoint / "model.safetensors"))
    assert json.loads((out / WRITTEN).read_text())["checkpoint"] == str(checkpoint)
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".py") for path in out.iterdir())


def test_the_averages(checkpoint, plain, out, call):
    assert call("export", checkpoint, out, "--averages").exit_code == 0
    assert equal(weights(out), plain[1])
    assert not equal(weights(out), load_file(checkpoint / "model.safetensors"))


def test_a_checkpoint_that_changed_is_not_exported(checkpoint, out):
    write_manifest(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(BadCheckpointError, match=r"config\.json has 2 bytes"):
        export(checkpoint, out)
    assert nothing_is_left(out)


def test_without_averages(checkpoint, out, call):
    (checkpoint / "ema.safetensors").unlink()
    result = call("export", checkpoint, out, "--averages")
    assert (result.exit_code, "has no ema.safetensors" in result.output) == (2, True)
    assert nothing_is_left(out)


def test_an_earlier_export_is_replaced(checkpoint, out):
    export(checkpoint, out)
    export(checkpoint, out, max_shard_size="10KB", averages=True)
    assert len(list(out.glob("model-*.safetensors"))) == 2
    assert not (out / "model.safetensors").exists()
    assert not list(out.parent.glob(".*"))


def add(out):
    (out / "notes.txt").write_text("mine")


def change(out):
    (out / "config.json").write_text("{}")


@pytest.mark.parametrize("touch", [add, change])
def test_what_is_not_an_exports_stays(checkpoint, out, call, touch):
    export(checkpoint, out)
    touch(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result = call("export", checkpoint, out)
    assert (result.exit_code, "holds other files than an export's" in result.output) == (2, True)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda checkpoint: checkpoint / "out", "lie in one another"),
        (lambda checkpoint: checkpoint, "lie in one another"),
        (lambda checkpoint: checkpoint.parent, "lie in one another"),
        (lambda checkpoint: checkpoint / "config.json", "is a file or a link"),
    ],
)
def test_where_nothing_may_be_written(checkpoint, call, place, said):
    result = call("export", checkpoint, place(checkpoint))
    assert (result.exit_code, said in result.output) == (2, True)


def test_no_link_is_followed(checkpoint, out, tmp_path, call):
    (tmp_path / "elsewhere").mkdir()
    out.symlink_to(tmp_path / "elsewhere")
    assert "is a file or a link" in call("export", checkpoint, out).output
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.json").symlink_to(tmp_path / "secret")
    result = call("export", checkpoint, tmp_path / "other")
    assert (result.exit_code, "outside of its folder" in result.output) == (2, True)


def test_there_is_no_checkpoint(out, tmp_path, call):
    assert "there is no such checkpoint folder" in call("export", tmp_path / "none", out).output
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "holds no weights that are known" in call("export", tmp_path / "empty", out).output


def test_a_checkpoint_without_a_configuration(checkpoint, out, tmp_path, call):
    (tmp_path / "model").mkdir()
    (checkpoint / "config.json").rename(tmp_path / "model" / "config.json")
    result = call("export", checkpoint, out)
    assert (result.exit_code, "Give --model FOLDER" in result.output) == (2, True)
    assert call("export", checkpoint, out, "--model", tmp_path / "model").exit_code == 0
    assert equal(weights(out), load_file(checkpoint / "model.safetensors"))


def saved_as_bin(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    return checkpoint / "pytorch_model.bin"


def test_weights_in_a_pickle(checkpoint, out):
    expected = load_file(checkpoint / "model.safetensors")
    saved_as_bin(checkpoint)
    assert export(checkpoint, out).source == "pytorch_model.bin"
    assert equal(weights(out), expected)


def test_a_command_in_the_weights(checkpoint, out, tmp_path, call):
    craft(saved_as_bin(checkpoint), tmp_path / "made")
    with pytest.raises(UntrustedPickleError, match="pytorch_model.bin names posix.system"):
        export(checkpoint, out)
    assert call("export", checkpoint, out).exit_code == 2
    assert not (tmp_path / "made").exists()
    assert nothing_is_left(out)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_command_elsewhere_is_not_read(checkpoint, out, tmp_path, name):
    craft(checkpoint / name, tmp_path / "made")
    export(checkpoint, out)
    assert not (tmp_path / "made").exists()
    assert not (out / name).exists()


def test_an_index_does_not_point_elsewhere(checkpoint, out):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '../x.safetensors', which is no file beside it"):
        export(checkpoint, out)


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_what_does_not_load_is_not_left(checkpoint, out, kind):
    tensors = load_file(checkpoint / "model.safetensors")
    if kind == "missing":
        del tensors["classifier.weight"]
    elif kind == "unexpected":
        tensors["more"] = torch.ones(2)
    else:
        tensors["classifier.weight"] = torch.ones(7, 16)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=f"{kind}.*(classifier.weight|more)"):
        export(checkpoint, out)
    assert nothing_is_left(out)


def test_code_that_comes_with_a_model_is_not_run(checkpoint, out, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')")
    with pytest.raises(ValueError, match="code that comes with a model is not run"):
        export(checkpoint, out)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_and_other_types(tmp_path, out, dtype):
    model = BertForMaskedLM(BertConfig(**SIZES)).to(dtype)
    model.save_pretrained(tmp_path / "checkpoint-1")
    torch.save(model.state_dict(), tmp_path / "checkpoint-1" / "pytorch_model.bin")
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    config = json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())
    (tmp_path / "checkpoint-1" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    export(tmp_path / "checkpoint-1", out)
    loaded = BertForMaskedLM.from_pretrained(out)
    assert loaded.dtype == dtype
    assert equal(loaded.state_dict(), model.state_dict())


LARGE = """
import sys, threading, time
from pathlib import Path
from trainer_ext.checkpoints.export import _write_weights
from trainer_ext.checkpoints.weights import open_weights
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
before, most, done = held(), 0, False
def watch():
    global most
    while not done:
        most = max(most, held()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
_write_weights(Path(sys.argv[2]), open_weights(Path(sys.argv[1]))[1], sys.argv[3])
done = True; thread.join()
print(most - before)
"""


def test_memory_is_bounded_by_a_shard(tmp_path):
    """Not by the model: 96 MB in tensors of 4 MB."""
    torch.save({f"weight{i}": torch.rand(1024, 1024) for i in range(24)}, tmp_path / "pytorch_model.bin")
    held = []
    for size in ("8MB", "1GB"):
        (tmp_path / size).mkdir()
        words = [sys.executable, "-c", LARGE, str(tmp_path), str(tmp_path / size), size]
        held.append(int(subprocess.run(words, check=True, capture_output=True, text=True, cwd=os.getcwd()).stdout))
    assert held[0] < 40_000 < 90_000 < held[1]  # kB
