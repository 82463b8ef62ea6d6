"""Every fault in every file of the newest checkpoint, on one process, ZeRO-2 and FSDP2 sharded, and what the stock class
makes of the same on one process: goes to `docs/proof/checkpoint_faults.md`.

A run of six steps with a shuffled order and dropout has checkpoints after 2 and 4. One file of the newer is harmed, a fresh
trainer goes on from there with `resume_from_checkpoint=True`, and its weights and losses are held against the whole run's.
"""

import hashlib
import shutil
from collections import Counter
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import Trainer, default_data_collator

from tests.callbacks.processes import DEEPSPEED, run_ranks, settle_on_cpu, zero
from tests.checkpoints.test_faults import FAULTS
from tests.checkpoints.test_on_ranks import SHARDED
from tests.conftest import logged, rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, EMACallback
from trainer_ext.callbacks.agreement import of_all_ranks
from trainer_ext.checkpoints import resume
from trainer_ext.checkpoints.manifest import MANIFEST, verify
from trainer_ext.checkpoints.resume import BAD
from trainer_ext.engine import full_parameters, runs_on

pytestmark = pytest.mark.soak

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "checkpoint_faults.md"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "deepspeed")
RANKS = {"ZeRO-2, 2 ranks": (DEEPSPEED, zero(2)), "FSDP2 sharded, 2 ranks": (SHARDED, None)}
OURS = ("one process", *RANKS)
STOCK = "stock, one process"
FELL_BACK, SILENT, HARMLESS, RAISED = "falls back", "**silently wrong**", "not noticed, no effect", "raises"
FOUND = {}  # by column: {(file, fault): what came of it}


def trainer_of(cls, out, config=None, seed=0):
    args = CustomTrainingArguments(
        output_dir=str(out), report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=2, max_steps=6,
        logging_steps=1, log_level="error", deepspeed=config, use_cpu=True, per_device_train_batch_size=2,
    )  # fmt: skip
    return cls(
        model=tiny_model(seed, attn_implementation="eager"),
        args=args,
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=[EMACallback()] if cls is CustomTrainer else None,
    )


def end(trainer):
    """The trained weights and the logged losses, as one digest."""
    found = hashlib.sha256(repr(logged(trainer)).encode())
    for name, whole in full_parameters(trainer.model):
        found.update(name.encode() + whole.detach().numpy().tobytes())
    return found.hexdigest()


def matrix(cls, home, config=None):
    """What came of every fault in every file; and the engine of the whole run. All ranks call it together."""
    settle_on_cpu(config)
    torch.set_num_threads(1)
    home = Path(home)
    whole = trainer_of(cls, home / "whole", config)
    whole.train()
    expected, on = end(whole), asdict(runs_on(whole))
    newer, older = home / "whole" / "checkpoint-4", home / "whole" / "checkpoint-2"
    names = sorted(str(path.relative_to(newer)) for path in newer.rglob("*") if path.is_file())
    found = {}
    for name in names:
        for fault in FAULTS:
            other = older / name.replace("global_step4", "global_step2")
            together(lambda: harmed(home, fault, name, other))  # noqa: B023
            if (now := home / "run" / "checkpoint-4" / name).exists() and now.read_bytes() == (
                newer / name
            ).read_bytes():
                assert fault.__name__ == "swapped", f"{fault.__name__} does not change {name}"
                continue
            found[name, fault.__name__] = of_all_ranks(outcome(cls, home / "run", config, name, expected))
    return found, on


def together(action):
    """Have rank 0 do what the others wait for; and before it, let all be done with what they do."""
    first = of_all_ranks(None)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        action()
    of_all_ranks(first)


def harmed(home, fault, name, older):
    """A run as it was when it was killed after step 4, with a fault in its newest checkpoint."""
    shutil.rmtree(home / "run", ignore_errors=True)
    for step in (2, 4):
        shutil.copytree(home / "whole" / f"checkpoint-{step}", home / "run" / f"checkpoint-{step}")
    fault(home / "run" / "checkpoint-4" / name, older)


def outcome(cls, out, config, name, expected):
    """What a fresh trainer makes of it, and what it says is wrong."""
    made = trainer_of(cls, out, config, seed=1)
    try:
        made.train(resume_from_checkpoint=True)
    except Exception as error:
        return f"{RAISED} `{type(error).__name__}`"
    if end(made) != expected:
        return SILENT
    aside = out / f"{BAD}checkpoint-4"
    named = aside.is_dir() and (name == MANIFEST or {finding.path for finding in verify(aside)} == {name})
    return FELL_BACK if named and not verify(out / "checkpoint-6") else HARMLESS


def take(column, answers):
    """Keep what all ranks say alike."""
    for fault, said in answers.items():
        assert len(set(said)) == 1, f"the ranks differ on {fault}: {said}"
    FOUND[column] = {fault: said[0] for fault, said in answers.items()}
    return Counter(said.split(" `")[0] for said in FOUND[column].values())


def test_one_process(tmp_path):
    found, on = matrix(CustomTrainer, tmp_path)
    assert on["world_size"] == 1
    assert take(OURS[0], found) == {FELL_BACK: len(found)}
    assert len(found) >= 45


@pytest.mark.parametrize("column", RANKS)
def test_two_ranks(tmp_path, column):
    environment, config = RANKS[column]
    answers = run_ranks(matrix, 2, CustomTrainer, str(tmp_path), config, environment=environment, timeout=1500)
    (found, on), (same, _) = answers
    assert found == same
    assert on["world_size"] == 2
    if config:
        assert (on["engine"], on["stage"]) == ("DeepSpeedEngine", 2)
        assert 0.45 < on["optimizer_fraction"] < 0.55
    else:
        assert on["placements"] == ("(Shard(dim=0),)",)
    assert take(column, found) == {FELL_BACK: len(found)}
    assert len(found) >= 60


def test_the_stock_class(tmp_path):
    """The control: the same harness sees runs that go wrong without a word."""
    found, _ = matrix(Trainer, tmp_path)
    seen = take(STOCK, found)
    assert seen[SILENT] >= 5
    assert seen[RAISED] >= 5
    assert seen[FELL_BACK] == 0


def test_a_resume_that_does_not_look_is_seen_here(tmp_path, monkeypatch):
    """The mutation: without the check this table would not say that all fall back."""
    monkeypatch.setattr(resume, "verify", lambda folder: [])
    monkeypatch.setattr("tests.soak.test_checkpoint_faults.FAULTS", FAULTS[3:])
    found, _ = matrix(CustomTrainer, tmp_path)
    seen = Counter(said for (said,) in found.values())
    assert seen[FELL_BACK] == 0
    assert seen[SILENT] >= 4


def test_write_the_table():
    columns = (*OURS, STOCK)
    assert FOUND.keys() == set(columns), "some were not run"
    kinds = (FELL_BACK, SILENT, RAISED, HARMLESS)
    totals = {column: Counter(said.split(" `")[0] for said in FOUND[column].values()) for column in columns}
    lines = [f"| | faults | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    lines += [
        f"| {column} | {sum(seen.values())} | {' | '.join(str(seen[kind]) for kind in kinds)} |"
        for column, seen in totals.items()
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    PROOF.write_text(
        "# Faults in every file of a checkpoint\n\n"
        f"Generated on {date.today().isoformat()} by `make soak` ({versions}). A run of six steps has checkpoints after 2 "
        "and 4. One file of the newer one is harmed: it is missing, cut in half, its second half is zeros, one bit is "
        "flipped, or it is the older checkpoint's. A fresh trainer goes on with `resume_from_checkpoint=True`. *Falls "
        "back*: it names the file, goes on from the older checkpoint, and ends with the weights and losses of the "
        "uninterrupted run, to the bit. *Silently wrong*: it ends without an error, with others. A file that is the same "
        "in both checkpoints cannot be swapped (`-`).\n\n"
        + "\n".join(lines)
        + "\n\n"
        + "\n\n".join(section(column) for column in columns)
        + "\n"
    )


def section(column):
    """One row a file."""
    found, faults = FOUND[column], [fault.__name__ for fault in FAULTS]
    lines = [f"## {column[0].upper()}{column[1:]}", ""]
    lines += [
        f"| file | {' | '.join(fault.replace('_', ' ') for fault in faults)} |",
        "|---" * (len(faults) + 1) + "|",
    ]
    lines += [
        f"| `{name}` | {' | '.join(found.get((name, fault), '-') for fault in faults)} |"
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return "\n".join(lines)
