"""Exports of checkpoints that every engine saved on two ranks, all in one launch: the trained weights, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification

from tests.callbacks.ranks import on_two_ranks
from tests.checkpoints.engines_run import ENGINES, STEPS, UNPICKLED, craft
from tests.conftest import tiny_model
from trainer_ext.checkpoints.export import export
from trainer_ext.checkpoints.trusted import UntrustedPickleError
from trainer_ext.checkpoints.weights import open_weights

ON = {
    "ddp": ("DistributedDataParallel", None, "model.safetensors"),
    "fsdp2": ("FSDPBertForSequenceClassification", None, "model.safetensors"),
    "fsdp2_sharded": ("FSDPBertForSequenceClassification", None, "FSDP, sharded"),
    "zero0": ("DeepSpeedEngine", 0, "DeepSpeed ZeRO-0"),
    "zero1": ("DeepSpeedEngine", 1, "DeepSpeed ZeRO-1"),
    "zero2": ("DeepSpeedEngine", 2, "DeepSpeed ZeRO-2"),
    "zero3": ("DeepSpeedEngine", 3, "DeepSpeed ZeRO-3"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def seen(folder):
    return on_two_ranks("../checkpoints/engines_run.py", folder)


@pytest.fixture
def checkpoint(seen, folder, tmp_path):
    """A copy of an engine's checkpoint."""
    return lambda engine: Path(
        shutil.copytree(
            folder / engine / f"checkpoint-{STEPS}", tmp_path / engine, ignore=shutil.ignore_patterns("manifest.json")
        )
    )


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engines_are_those_and_resume(seen, engine):
    name, stage, _ = ON[engine]
    for rank in seen:
        on = rank[engine]["on"]
        assert (on["engine"], on["stage"], on["world_size"]) == (name, stage, 2)
        assert on["local_fraction"] == (pytest.approx(0.5, abs=0.05) if "fsdp2" in engine or stage == 3 else 1.0)
        assert rank[engine]["resumed"] == STEPS + 1


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_never_sees_a_command(seen, engine):
    for rank in seen:
        assert f"{UNPICKLED[engine]} names posix.system" in rank[engine]["refused"]["said"]
        assert not rank[engine]["refused"]["ran"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_export_is_the_trained_model(seen, folder, checkpoint, tmp_path, engine):
    found = export(checkpoint(engine), tmp_path / "out", max_shard_size="8KB")
    assert found.source == ON[engine][2]
    model, said = BertForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = load_file(folder / engine / "trained.safetensors")
    assert equal(model.state_dict(), trained)
    moved = {name for name, tensor in trained.items() if not torch.equal(tensor, tiny_model().state_dict()[name])}
    assert moved == {name for name in trained if "pooler" not in name}  # which is frozen
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) > 100
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_deepspeeds_own_script_puts_the_same_together(checkpoint, engine):
    """But for what is frozen under ZeRO-1, which it leaves out."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = checkpoint(engine)
    theirs = get_fp32_state_dict_from_zero_checkpoint(folder)
    ours = {name: stored.read() for name, stored in open_weights(folder)[1].items()}
    frozen = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert ours.keys() - theirs.keys() == (frozen if engine == "zero1" else set())
    assert equal({name: ours[name] for name in theirs}, theirs)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_the_files_of_one_rank_are_not_enough(checkpoint, tmp_path, engine):
    folder = checkpoint(engine)
    (folder / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="has the optim_states.pt of 1 of 2 ranks"):
        export(folder, tmp_path / "out")


def test_ranks_in_the_wrong_order_are_seen(seen, folder, checkpoint):
    """Mutation: the partitions of two ranks changed places."""
    saved = checkpoint("zero2")
    first, second = (saved / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    first.rename(saved / "kept")
    second.rename(first)
    (saved / "kept").rename(second)
    found = {name: stored.read() for name, stored in open_weights(saved)[1].items()}
    assert not equal(found, load_file(folder / "zero2" / "trained.safetensors"))


@pytest.mark.parametrize("engine", ["fsdp2_sharded", "zero3"])
def test_a_command_in_an_engines_files_is_not_run(checkpoint, tmp_path, engine):
    folder = checkpoint(engine)
    path = next(folder.glob("pytorch_model_fsdp_0/.metadata" if "fsdp" in engine else "*/*rank_1*_model_states.pt"))
    craft(path, tmp_path / "made")
    with pytest.raises(UntrustedPickleError, match="names posix.system"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


def test_averages_in_shards_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="has averages in shards of the ranks"):
        export(checkpoint("fsdp2"), tmp_path / "out", averages=True)


def test_averages_of_two_ranks(folder, checkpoint, tmp_path):
    export(checkpoint("ddp"), tmp_path / "out", averages=True)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert equal(model.state_dict(), load_file(folder / "ddp" / "averaged.safetensors"))
