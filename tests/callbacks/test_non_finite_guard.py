"""`NonFiniteGuard` under every engine: bitwise what a run by hand gives that leaves the bad steps out."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import Trainer

from tests.callbacks import guard_run
from tests.callbacks.guard_run import BAD_STEPS, STEPS, data, run_all, train
from tests.callbacks.processes import DEEPSPEED, FSDP2, run_ranks, zero
from trainer_ext import CustomTrainer
from trainer_ext.callbacks import non_finite_guard
from trainer_ext.callbacks.non_finite_guard import NonFiniteGuard, _check_it_can_be_guarded

UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}
RUNS = ("skipped", "by hand", "raised", "raised at the loss")
ENGINES = {
    "single": ("BertForSequenceClassification", None),
    "ddp": ("DistributedDataParallel", None),
    "fsdp2": ("FSDPBertForSequenceClassification", None),
    "zero2": ("DeepSpeedEngine", 2),
    "zero3": ("DeepSpeedEngine", 3),
    "zero2 unchecked": ("DeepSpeedEngine", 2),
}


@pytest.fixture(scope="module")
def found():
    """Of each engine what its ranks saw."""
    launched = {"environment": DEEPSPEED}
    return {
        "single": [run_all()],
        "ddp": run_ranks(run_all, 2),
        "fsdp2": run_ranks(run_all, 2, environment=FSDP2),
        "zero2": run_ranks(partial(run_all, only=RUNS), 2, zero(2), **launched),
        "zero3": run_ranks(partial(run_all, only=RUNS), 2, zero(3), **launched),
        "zero2 unchecked": run_ranks(
            partial(run_all, only=("skipped", "by hand", "without")), 2, zero(2, **UNCHECKED), **launched
        ),
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_it_ran_on_the_engine(found, engine):
    name, stage = ENGINES[engine]
    for rank in found[engine]:
        for run in rank.values():
            on = run["runs_on"]
            assert (on["engine"], on["stage"], on["world_size"]) == (name, stage, len(found[engine]))
            if engine in ("fsdp2", "zero3"):
                assert 0.45 < on["local_fraction"] < 0.6
            if stage is not None and on["optimizer_fraction"] is not None:
                assert 0.45 < on["optimizer_fraction"] < 0.6


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_is_that_without_the_bad_steps(found, engine):
    for rank in found[engine]:
        skipped, by_hand = rank["skipped"], rank["by hand"]
        assert skipped["error"] is None
        good = [0, *(step for step in range(1, STEPS + 1) if step not in BAD_STEPS)]
        for kept in ("weights", "states", "rates"):
            for step in BAD_STEPS:
                assert skipped[kept][step] == skipped[kept][step - 1], (kept, step)
            assert [skipped[kept][step] for step in good][1:] == by_hand[kept][1:], kept
        assert len(set(by_hand["weights"])) == len(set(by_hand["states"])) == len(good)  # every good step moved both
        assert skipped["skipped"] == len(BAD_STEPS)
        assert skipped["logged"] == [1, 1, 1, 2, 3, 3]
        assert skipped["marked"] == [step in BAD_STEPS for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["raised", "raised at the loss"])
def test_the_error_says_what_and_where(found, engine, kind):
    ranks = found[engine]
    for rank in ranks:
        raised = rank[kind]
        assert raised["error"] == ranks[0][kind]["error"]
        assert "of step 3 is not finite" in raised["error"]
        for kept in ("weights", "states"):
            assert len(raised[kept]) == 4  # at the beginning, after two steps, and after the error
            assert len(set(raised[kept])) == 3
            assert raised[kept][3] == raised[kept][2]
    error = ranks[0][kind]["error"]
    bad, place, number = ("rank 0", "5 in the batch", 5) if len(ranks) == 1 else ("rank 1", "1 in the batch", 5)
    assert f"{bad}: micro-batch 2 of 2 (batch {number} of epoch 0, from 0)" in error
    if len(ranks) == 2:
        assert "rank 0" not in error
    if kind == "raised":
        assert f"rows 45 of the dataset, {place}" in error
        # Eight positions of 16 elements each: the poisoned row's words are cut off. ZeRO is told by the loss's gradient.
        counted = "position_embeddings.weight, 128 of 256 elements"  # where the host looks in the step itself
        first = {"zero": "word_embeddings.weight, ", "fsdp": counted}.get(engine[:4], "position_embeddings.weight.")
        assert f"First parameter: bert.embeddings.{first}" in error


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp2", "zero2 unchecked"])
def test_without_it_the_weights_are_lost(found, engine):
    for rank in found[engine]:
        assert not rank["without"]["finite"]
        assert rank["skipped"]["finite"]


def test_deepspeed_without_zero_is_refused():
    (said,) = run_ranks(guard_run.refusal, 1, zero(0), environment=DEEPSPEED)
    assert "DeepSpeed without ZeRO (stage 0)" in said


def test_an_optimizer_that_clears_its_gradients_first():
    """`BF16_Optimizer`, of ZeRO-1 with bf16 and gradients in float32: the step is left out, the parameter not known."""
    config = zero(1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    for rank in run_ranks(partial(run_all, only=("raised",)), 2, config, environment=DEEPSPEED):
        raised = rank["raised"]
        assert raised["runs_on"]["stage"] == 1
        assert "First parameter: not known with this optimizer" in raised["error"]
        assert "rank 1: micro-batch 2 of 2" in raised["error"]
        assert raised["weights"][3] == raised["weights"][2] != raised["weights"][1]
        assert raised["states"][3] == raised["states"][2] != raised["states"][1]


# One process


def test_too_many_in_a_row(tmp_path):
    table = data(bad_steps=(2, 4, 5, 6))
    ended = train(NonFiniteGuard("skip", max_consecutive=2), table=table)
    assert "of step 6 is not finite" in ended["error"]
    assert "It is number 3 in a row." in ended["error"]
    assert ended["skipped"] == 3
    assert ended["finite"]
    assert train(NonFiniteGuard("skip", max_consecutive=3), table=table)["error"] is None


def test_no_checkpoint_is_poisoned_and_a_resume_goes_on_counting(tmp_path):
    options = {"table": data(bad_steps=(2, 4)), "out": tmp_path, "save_strategy": "steps", "save_steps": 1}
    whole = train(NonFiniteGuard("skip"), **options)
    for step in range(1, STEPS + 1):
        weights = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    resumed = train(NonFiniteGuard("skip"), **options, resume=str(tmp_path / "checkpoint-3"))
    assert resumed["skipped"] == 2
    assert resumed["weights"][1:] == whole["weights"][4:]
    ended = train(NonFiniteGuard(), **options, resume=str(tmp_path / "checkpoint-3"))
    assert "micro-batch 2 of 2 (batch 7 of epoch 0, from 0), 5 in the batch" in ended["error"]
    ended = train(NonFiniteGuard(), **{**options, "out": tmp_path / "raised"})
    assert [path.name for path in (tmp_path / "raised").iterdir()] == ["checkpoint-1"]


def test_a_finite_loss_whose_gradient_is_not(monkeypatch):
    """One element of one gradient is made infinite on its way."""
    own = guard_run.poisoned

    def poisoned(kind):
        model = own(kind)
        model.classifier.bias.register_hook(lambda gradient: gradient.new_tensor([float("inf"), 0.0]))
        return model

    monkeypatch.setattr(guard_run, "poisoned", poisoned)
    for clipping in (0.0, 0.5):
        said = train(NonFiniteGuard(), table=data(bad_steps=()), max_grad_norm=clipping)["error"]
        assert "of step 1 is not finite" in said
        assert "First parameter: classifier.bias. All outputs of the model are finite" in said


def test_a_loss_outside_of_the_model():
    """Its gradient tells the rows."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            losses = cross_entropy(model(**inputs).logits, labels, reduction="none")
            bad = inputs["input_ids"][:, 0] == guard_run.POISON
            return (losses * torch.where(bad, torch.nan, 1.0)).mean()

    table = data(bad_steps=(3,))
    said = train(NonFiniteGuard(), kind="outside", table=table, trainer_class=Own)["error"]
    assert "rank 0: micro-batch 2 of 2 (batch 5 of epoch 0, from 0), rows 45 of the dataset, 5 in the batch" in said


def test_the_exact_loss_of_custom_trainer():
    """Its loss is computed outside of the model, from the logits."""
    options = {"trainer_class": CustomTrainer, "table": data(bad_steps=(3,))}
    skipped = train(NonFiniteGuard("skip"), **options)
    by_hand = train(None, **{**options, "table": data(without_bad_steps=True, bad_steps=(3,)), "steps": STEPS - 1})
    assert [*skipped["weights"][:3], *skipped["weights"][4:]] == by_hand["weights"]
    assert "rank 0: micro-batch 2 of 2" in train(NonFiniteGuard(), **options)["error"]


@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_custom_trainer_shows_it_the_norms_of_its_clipping(monkeypatch, clipping):
    """One pass of its own, in the first step; from then on what clipping finds out names the parameter."""
    own, passes = guard_run.poisoned, []

    def poisoned(kind):
        model, seen = own(kind), []

        def spoil(gradient):  # in the second micro-batch of step 3
            seen.append(gradient)
            return gradient.new_tensor([0.0, float("inf")]) if len(seen) == 6 else gradient

        model.classifier.bias.register_hook(spoil)
        return model

    monkeypatch.setattr(guard_run, "poisoned", poisoned)
    norms = non_finite_guard.gradient_norms
    monkeypatch.setattr(non_finite_guard, "gradient_norms", lambda model: passes.append(model) or norms(model))
    options = {"table": data(bad_steps=()), "max_grad_norm": clipping, "trainer_class": CustomTrainer}
    found = train(NonFiniteGuard(), **options)
    assert "of step 3 is not finite" in found["error"]
    assert "First parameter: classifier.bias. All outputs of the model are finite" in found["error"]
    assert len(passes) == 1
    assert len(set(found["weights"])) == 3  # at the beginning and after two steps


def test_outputs_that_cannot_be_watched():
    """Gradients are looked at all the same, and nothing is claimed of the outputs."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    ended = train(NonFiniteGuard(), kind="object", table=data(bad_steps=(3,)), trainer_class=Own)
    assert "of step 3 is not finite" in ended["error"]
    assert "The model's outputs hold no tensor that could be watched" in ended["error"]
    assert ended["finite"]


def test_a_schedule_that_moves_on_would_be_seen(monkeypatch):
    monkeypatch.setattr("trainer_ext.callbacks.non_finite_guard._mark_skipped", lambda *_: None)
    rates = train(NonFiniteGuard("skip"), table=data(bad_steps=(3,)))["rates"]
    assert rates[3] != rates[2]


def test_the_optimizer_is_not_called(tmp_path):
    calls = []

    class Counting(Trainer):
        def create_optimizer(self, model=None):
            made = super().create_optimizer(model)
            made.register_step_post_hook(lambda *_: calls.append(self.state.global_step + 1))
            return made

    train(NonFiniteGuard("skip"), trainer_class=Counting)
    assert calls == [step for step in range(1, STEPS + 1) if step not in BAD_STEPS]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"action": "stop"}, "action='stop' must be"),
        ({"max_consecutive": 0}, "max_consecutive=0 must be"),
        ({"action": "skip", "max_consecutive": 1.5}, "max_consecutive=1.5 must be"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        NonFiniteGuard(**options)


def test_runs_that_cannot_be_guarded(arguments):
    args = arguments()
    args.fp16 = True
    with pytest.raises(ValueError, match="NonFiniteGuard and fp16"):
        _check_it_can_be_guarded(args, None)
    args.fp16, args._n_gpu = False, 2
    with pytest.raises(ValueError, match="DataParallel over 2 GPUs"):
        _check_it_can_be_guarded(args, None)
