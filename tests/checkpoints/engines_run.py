"""A training that saves a checkpoint, on each engine in turn: python engines_run.py OUT [ENGINE..].

Every rank writes what it saw, and rank 0 the trained weights, put together from the live engine.
"""

import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from transformers import default_data_collator

from tests.callbacks.engines_run import FSDP2, zero
from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments, EMACallback
from trainer_ext.checkpoints.manifest import write_manifest
from trainer_ext.checkpoints.trusted import UntrustedPickleError
from trainer_ext.engine import full_parameters, runs_on
from trainer_ext.models import load_tokenizer

STEPS = 2
SHARDED = {**FSDP2, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
ZERO3 = {"stage": 3, "sub_group_size": 500, "stage3_param_persistence_threshold": 0}
ENGINES = {
    "ddp": ({}, None),
    "fsdp2": (FSDP2, None),
    "fsdp2_sharded": (SHARDED, None),
    "zero0": ({}, zero(0)),
    "zero1": ({}, zero(1)),
    "zero2": ({}, zero(2)),
    "zero3": ({}, {**zero(3), "zero_optimization": ZERO3}),
}
# Where the engine, or what it calls, unpickles: a file of each checkpoint, by the engine.
UNPICKLED = {
    "ddp": "optimizer.pt",
    "fsdp2": "pytorch_model_fsdp.bin",
    "fsdp2_sharded": "optimizer_0/.metadata",
    "zero0": "global_step2/mp_rank_00_model_states.pt",
    "zero1": "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "zero2": "global_step2/mp_rank_00_model_states.pt",
    "zero3": "global_step2/zero_pp_rank_1_mp_rank_00_model_states.pt",
}
RANK = int(os.environ.get("RANK", "0"))


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


def begin(engine):
    """Have this process's next trainer ask for `engine`."""
    for name in [*FSDP2, "ACCELERATE_USE_DEEPSPEED"]:
        os.environ.pop(name, None)
    os.environ.update(ENGINES[engine][0])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_trainer(engine, out, steps=STEPS, resume=None):
    begin(engine)
    args = CustomTrainingArguments(
        output_dir=str(out), report_to="none", disable_tqdm=True, save_steps=STEPS, max_steps=steps, learning_rate=1e-2,
        log_level="error", per_device_train_batch_size=4, deepspeed=ENGINES[engine][1], use_cpu=True,
        freeze=["bert.pooler.*"], resume_from_checkpoint=resume,
    )  # fmt: skip
    return CustomTrainer(
        model=tiny_model(dropout=0.0),
        args=args,
        train_dataset=rows(24),
        data_collator=default_data_collator,
        callbacks=[EMACallback(0.5)] if engine in ("ddp", "fsdp2") else None,
        processing_class=load_tokenizer("tiny"),
    )


class Kept:
    """The weights as they are when the checkpoint is saved, and the averages."""

    def __init__(self, trainer):
        self.weights = {}
        save = trainer._save_checkpoint

        def keep(model, trial):
            self.weights = {name: weight.clone() for name, weight in full_parameters(trainer.model)}
            save(model, trial)

        trainer._save_checkpoint = keep


def trained(engine, out):
    elements = sum(p.numel() for p in tiny_model().parameters())
    trainer = make_trainer(engine, out)
    kept = Kept(trainer)
    trainer.train()
    seen = {"on": asdict(runs_on(trainer, elements=elements))}
    averaged = {name: weight.clone() for name, weight in full_parameters(trainer.model)}
    if RANK == 0:
        save_file({name: weight.contiguous() for name, weight in kept.weights.items()}, out / "trained.safetensors")
        save_file({name: weight.contiguous() for name, weight in averaged.items()}, out / "averaged.safetensors")
    checkpoint = out / f"checkpoint-{STEPS}"
    resumed = make_trainer(engine, out / "resumed", STEPS + 1, str(checkpoint))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    seen["resumed"] = resumed.state.global_step
    return seen | {"refused": refusal(engine, out, checkpoint)}


def refusal(engine, out, checkpoint):
    """What a resume says where a file holds a command, and whether the command ran; the file is put back."""
    path = checkpoint / UNPICKLED[engine]
    trainer, made, kept = make_trainer(engine, out / "refused"), out / "made", path.read_bytes()
    torch.distributed.barrier()
    if RANK == 0:
        craft(path, made)
        write_manifest(checkpoint)
    torch.distributed.barrier()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        said = None
    except UntrustedPickleError as error:
        said = str(error)
    torch.distributed.barrier()
    if RANK == 0:
        path.write_bytes(kept)
        write_manifest(checkpoint)
    return {"said": said, "ran": made.exists()}


def craft(path, made):
    """Put a command into a file."""
    if path.name == ".metadata":
        path.write_bytes(pickle.dumps(Command(made)))
    else:
        torch.save({"module": Command(made)}, path)


def main():
    out, engines = Path(sys.argv[1]), sys.argv[2:] or list(ENGINES)
    seen = {engine: trained(engine, out / engine) for engine in engines}
    (out / f"rank{RANK}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
