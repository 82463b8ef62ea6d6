"""Two ranks of real engines save one whole checkpoint, refuse one that rots, and go on from the older one together."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.callbacks.processes import DEEPSPEED, FSDP2, run_ranks, settle_on_cpu, zero
from trainer_ext.engine import REHEARSING

SHARDED = {**FSDP2, REHEARSING: "as a rehearsal, on the CPU", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
ENGINES = {
    "ddp": ({}, None, "optimizer.pt"),
    "zero2": (DEEPSPEED, zero(2), "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "fsdp2": (SHARDED, None, "pytorch_model_fsdp_0/__1_0.distcp"),
}


def make(out, config, seed=0):
    from transformers import default_data_collator

    from tests.conftest import rows, tiny_model
    from trainer_ext import CustomTrainer, CustomTrainingArguments, EMACallback

    args = CustomTrainingArguments(
        output_dir=str(out), report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=2, max_steps=6,
        logging_steps=1, log_level="error", deepspeed=config, use_cpu=True, per_device_train_batch_size=2,
    )  # fmt: skip
    return CustomTrainer(
        model=tiny_model(seed, attn_implementation="eager"),
        args=args,
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=[EMACallback()],
    )


def digest(trainer):
    from trainer_ext.engine import full_parameters

    found = hashlib.sha256()
    for _, whole in full_parameters(trainer.model):
        found.update(whole.numpy().tobytes())
    return found.hexdigest()


def said_by(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def saves_and_resumes(out, config, harmed):
    """A whole run; a fault in its checkpoint of step 4; what each way to go on from there leads to."""
    settle_on_cpu(config)
    import shutil

    import torch.distributed as dist

    from trainer_ext.checkpoints.manifest import verify
    from trainer_ext.engine import runs_on

    out = Path(out)
    whole = make(out, config)
    whole.train()
    seen = {
        "on": asdict(runs_on(whole)),
        "whole": digest(whole),
        "saved": sorted(path.name for path in out.iterdir()),
        "files": sorted(str(p.relative_to(out / "checkpoint-4")) for p in (out / "checkpoint-4").rglob("*")),
        "wrong": [str(finding) for step in (2, 4, 6) for finding in verify(out / f"checkpoint-{step}")],
    }
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(out / "checkpoint-6")
        content = bytearray((out / "checkpoint-4" / harmed).read_bytes())
        content[len(content) // 2] ^= 1
        (out / "checkpoint-4" / harmed).write_bytes(content)
    dist.barrier()
    resumed = make(out, config, seed=1)
    seen["refused"] = said_by(lambda: resumed.train(resume_from_checkpoint=str(out / "checkpoint-4")))
    resumed.train(resume_from_checkpoint=True)
    seen["resumed"] = digest(resumed)
    seen["after"] = sorted(path.name for path in out.iterdir())
    return seen


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks(tmp_path, engine):
    environment, config, harmed = ENGINES[engine]
    first, second = run_ranks(
        saves_and_resumes, 2, str(tmp_path / "run"), config, harmed, environment=environment, timeout=300
    )
    on = first["on"]
    assert on["world_size"] == 2
    assert on["engine"] == {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine"}.get(engine, on["engine"])
    if engine == "zero2":
        assert on["stage"] == 2
        assert 0.45 < on["optimizer_fraction"] < 0.55
    if engine == "fsdp2":
        assert on["placements"] == ("(Shard(dim=0),)",)
        assert 0.45 < on["local_fraction"] < 0.55
    parts = {"ema-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors"}
    assert {"manifest.json", "rng_state_0.pth", "rng_state_1.pth", harmed} <= set(first["files"])
    assert ({"ema.safetensors"} if engine == "ddp" else parts) <= set(first["files"])
    for seen in (first, second):
        assert seen["saved"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        assert seen["wrong"] == []
        assert seen["refused"].startswith(
            f"BadCheckpointError: {tmp_path}/run/checkpoint-4 is not as it was saved: {harmed} "
        )
        assert seen["resumed"] == seen["whole"] == first["whole"]
        assert seen["after"] == ["_bad-checkpoint-4", "checkpoint-2", "checkpoint-4", "checkpoint-6"]
