"""`GroupNorms`, `Throughput`, `RunSummary` and the range test on two ranks of every engine, all in one launch."""

import math

import pytest
import torch
from transformers import default_data_collator

from tests.callbacks.engines_run import CLIP, RATE, ROWS, STEPS
from tests.callbacks.plain_norms import norms_by_hand
from tests.callbacks.ranks import on_two_ranks
from tests.callbacks.test_run_summary import Page
from tests.callbacks.test_throughput import bert_flops
from tests.conftest import rows, tiny_model

ENGINES = {
    "ddp": ("DistributedDataParallel", None),
    "fsdp2": ("FSDPBertForSequenceClassification", None),
    "zero0": ("DeepSpeedEngine", 0),
    "zero1": ("DeepSpeedEngine", 1),
    "zero2": ("DeepSpeedEngine", 2),
    "zero3": ("DeepSpeedEngine", 3),
}
NAMES = ("decay", "no_decay", "encoder.decay", "encoder.no_decay")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def seen(folder):
    return on_two_ranks("engines_run.py", folder)


@pytest.fixture(scope="module")
def by_hand():
    model = tiny_model(dropout=0.0, attn_implementation="eager").double()
    groups = {name: [] for name in NAMES}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1
        groups[("encoder." if ".encoder." in name else "") + ("decay" if decays else "no_decay")].append(parameter)
    data = rows(ROWS)
    batches = [default_data_collator([data[i] for i in range(first, first + 8)]) for first in range(0, ROWS, 8)]
    return norms_by_hand(model, batches, list(groups.values()), rate=RATE, clip=CLIP)


def test_they_are_the_engines(seen):
    for engine, (name, stage) in ENGINES.items():
        for rank in seen:
            on = rank[engine]["on"]
            assert (on["engine"], on["stage"], on["world_size"]) == (name, stage, 2)
            assert on["local_fraction"] == (pytest.approx(0.5, abs=0.05) if engine in ("fsdp2", "zero3") else 1.0)
            split = engine not in ("ddp", "zero0")
            assert on["optimizer_fraction"] == pytest.approx(0.5 if split else 1.0, abs=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_norms_are_those_of_one_process(seen, by_hand, engine):
    assert all(rank[engine]["refused"] is None for rank in seen)
    tolerance = 1e-4 if engine.startswith("zero") else 2e-6  # float32; float64, with clipping by a float32 norm
    assert any(entry.get("grad_norm", 1.0) > CLIP for entry in seen[0][engine]["log"])  # some step is clipped
    for rank in seen:
        assert len(rank[engine]["log"]) == STEPS
        for entry, expected in zip(rank[engine]["log"], by_hand, strict=True):
            for name, (gradient, weights, moved) in zip(NAMES, expected, strict=True):
                assert entry[f"weight_norm_{name}"] == pytest.approx(weights, rel=tolerance)
                assert entry[f"update_ratio_{name}"] == pytest.approx(moved, rel=tolerance)
                if engine != "zero0":
                    assert entry[f"grad_norm_{name}"] == pytest.approx(gradient, rel=tolerance)
            if engine != "zero0":
                whole = math.hypot(*(entry[f"grad_norm_{name}"] for name in NAMES))
                assert whole == pytest.approx(entry["grad_norm"], rel=1e-5)


def test_without_a_known_norm_no_clipped_one_is_logged(seen):
    """DeepSpeed clips without ZeRO too, and does not say by how much."""
    for entry in seen[0]["zero0"]["log"]:
        assert not any(name.startswith("grad_norm") for name in entry)


def test_the_operations_are_counted_on_every_engine(seen):
    for engine in ENGINES:
        for entry in seen[0][engine]["log"]:
            operations = entry["flops_per_second"] / entry["samples_per_second"]
            assert operations == pytest.approx(bert_flops(4, 8, attention=6) / 4, rel=1e-9)
            assert entry["padded_tokens_per_second"] / entry["samples_per_second"] == pytest.approx(8, rel=1e-9)


@pytest.mark.parametrize(
    ("engine", "named"),
    [("ddp", "DDP"), ("fsdp2", "FSDP2"), *((f"zero{stage}", f"DeepSpeed ZeRO-{stage}") for stage in (1, 2, 3))],
)
def test_the_first_rank_summarises_the_whole_model(seen, folder, engine, named):
    assert not (folder / engine / "rank1" / "run_summary.html").exists()
    page = Page((folder / engine / "rank0" / "run_summary.html").read_text())
    about, elements = dict(page.tables["about"]), sum(p.numel() for p in tiny_model().parameters())
    assert (about["engine"], about["processes"]) == (named, "2")
    assert about["model"] == "BertForSequenceClassification"
    assert about["parameters"] == f"{elements:,}, of which {elements:,} are trained"
    assert about["optimizer"] == "AdamW"
    groups = {row[0]: row[2] for row in page.tables["groups"][1:]}
    assert groups.keys() == set(NAMES)
    assert sum(groups.values()) == elements
    assert dict(page.tables["numbers"])["loss"] == seen[0][engine]["log"][-1]["loss"]


def test_what_cannot_be_is_refused(seen):
    for rank in seen:
        assert "GroupNorms cannot tell the flat parameters of FSDP1 apart" in rank["fsdp1"]["refused"]
        for engine in ("fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"):
            name = "FSDP" if engine.startswith("fsdp") else "DeepSpeed"
            assert f"a model back that {name} has split" in rank[engine]["finder"]


def test_shards_that_are_not_added_up_are_seen(seen, by_hand):
    """Mutation: one rank's own half of a sharded group is not its norm."""
    (gradient, weights, _), whole = by_hand[0][0], seen[0]["fsdp2"]["log"][0]
    half = torch.tensor(whole["weight_norm_decay"]).double() / 2**0.5
    assert half.item() != pytest.approx(weights, rel=1e-3)
    assert whole["grad_norm_decay"] / 2**0.5 != pytest.approx(gradient, rel=1e-3)
