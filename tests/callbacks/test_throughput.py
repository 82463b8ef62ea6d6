"""Throughput against counts by hand, a clock that ticks by the phase, and two real ranks."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from tests.callbacks.ranks import on_two_ranks
from tests.conftest import SIZES, logged, rows, tiny_model
from trainer_ext.callbacks import throughput
from trainer_ext.callbacks.flops import FlopCounter, measured_peak
from trainer_ext.callbacks.throughput import Throughput

LENGTHS = [8, 3, 5, 1, 7, 2, 6, 4]
STOCK = {"cls": Trainer, "arguments_class": TrainingArguments, "train_sampling_strategy": "sequential"}


def padded_rows(count=8):
    """Rows of 8 places, of which the first few are real, as many as `LENGTHS` says in turn."""
    masks = iter([[1] * LENGTHS[i % 8] + [0] * (8 - LENGTHS[i % 8]) for i in range(count)])
    return rows(count).map(lambda row: {"attention_mask": next(masks)})


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "samples_per_second" in entry]


def training_seconds(entry):
    return sum(entry[f"seconds_{phase}"] for phase in ("data", "forward_backward", "optimizer", "other"))


def amount(entry, name):
    return entry[name] * training_seconds(entry)


def test_samples_and_tokens_are_those_counted_by_hand(trainer):
    run = trainer(
        **STOCK, train=padded_rows(), callbacks=[Throughput()], per_device_train_batch_size=2, max_steps=4,
        gradient_accumulation_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=1, evaluation=padded_rows(),
    )  # fmt: skip
    run.train()
    *steps, whole = entries(run)
    assert len(steps) == 4
    for entry, lengths in zip(steps, (LENGTHS[:4], LENGTHS[4:]) * 2, strict=True):
        assert amount(entry, "samples_per_second") == pytest.approx(4, rel=1e-9)
        assert amount(entry, "padded_tokens_per_second") == pytest.approx(32, rel=1e-9)
        assert amount(entry, "tokens_per_second") == pytest.approx(sum(lengths), rel=1e-9)
        assert entry["padding_share"] == pytest.approx(1 - sum(lengths) / 32, rel=1e-12)
    assert whole["train_runtime"] > 0
    assert amount(whole, "samples_per_second") == pytest.approx(16, rel=1e-9)
    assert amount(whole, "tokens_per_second") == pytest.approx(2 * sum(LENGTHS), rel=1e-9)
    # A hook that took the evaluations' batches for training's would have counted eight more rows a step.
    assert not run.model._forward_pre_hooks


def test_accumulation_counts_every_micro_batch(trainer, monkeypatch):
    """Mutation: micro-batches whose end goes unnoticed are counted once a step."""
    options = {**STOCK, "train": padded_rows(), "per_device_train_batch_size": 2, "max_steps": 1}
    run = trainer(**options, callbacks=[Throughput()], gradient_accumulation_steps=4)
    run.train()
    assert amount(entries(run)[0], "samples_per_second") == pytest.approx(8, rel=1e-9)
    monkeypatch.setattr(Throughput, "on_substep_end", lambda *args, **kwargs: None)
    run = trainer(**options, callbacks=[Throughput()], gradient_accumulation_steps=4)
    run.train()
    assert amount(entries(run)[0], "samples_per_second") == pytest.approx(2, rel=1e-9)


# Operations


def linear_flops(tokens, inputs, outputs, *, inputs_need_gradients=True):
    return 2 * tokens * inputs * outputs * (3 if inputs_need_gradients else 2)


def bert_flops(B, T, *, attention):
    """A forward and backward of the tiny BERT; `attention` matrix products of (T, H) and (H, T) in its kernel."""
    H, F, C = SIZES["hidden_size"], SIZES["intermediate_size"], 2
    block = 4 * linear_flops(B * T, H, H) + linear_flops(B * T, H, F) + linear_flops(B * T, F, H)
    return block + attention * 2 * B * T * T * H + linear_flops(B, H, H) + linear_flops(B, H, C)


def counted(model, **inputs):
    with FlopCounter() as counter:
        found = model(**inputs)
        (found["loss"] if isinstance(found, dict) else found.sum()).backward()
    return counter.flops


def test_operations_of_linear_layers():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
    expected = linear_flops(4, 3, 5, inputs_need_gradients=False) + linear_flops(4, 5, 2)
    assert counted(model, input=torch.ones(4, 3)) == expected == 480
    model[0].requires_grad_(False)  # no gradient of its weight, nor of the input of the second layer
    assert counted(model, input=torch.ones(4, 3)) == 2 * 4 * (3 * 5 + 2 * 5 * 2)


@pytest.mark.parametrize(("implementation", "products"), [("eager", 2 + 4), ("sdpa", 2 + 5)])
def test_operations_of_attention(implementation, products):
    """Its fused kernel computes the scores a second time in the backward pass."""
    batch = default_data_collator([rows()[i] for i in range(3)])
    model = tiny_model(dropout=0.0, attn_implementation=implementation)
    assert counted(model, **batch) == bert_flops(3, 8, attention=products)


def test_the_log_has_the_operations_of_the_batches(trainer):
    """The last micro-batch of an epoch has another shape; each is counted on its first batch and remembered."""
    model = tiny_model(dropout=0.0, attn_implementation="eager")
    run = trainer(
        **STOCK,
        model=model,
        train=padded_rows(5),
        callbacks=[Throughput()],
        per_device_train_batch_size=4,
        max_steps=6,
    )
    run.train()
    *steps, whole = entries(run)
    expected = [bert_flops(B, 8, attention=6) for B in (4, 1)]
    found = [amount(entry, "flops_per_second") for entry in steps]
    assert found == pytest.approx(expected * 3, rel=1e-9)
    assert amount(whole, "flops_per_second") == pytest.approx(3 * sum(expected), rel=1e-9)
    peaks = {round(entry["flops_per_second"] / entry["flops_utilization"]) for entry in [*steps, whole]}
    assert len(peaks) == 1
    assert peaks.pop() > 1e6


def test_the_peak_draws_from_no_global_generator():
    state = torch.get_rng_state()
    peak = measured_peak(torch.float32, torch.device("cpu"))
    assert math.isfinite(peak)
    assert peak > 1e6
    assert torch.equal(torch.get_rng_state(), state)


# Time


class Clock:
    """Stands still but where the code under test passes by: every phase takes seconds of its own."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Ticking(Trainer):
    clock: Clock

    def get_batch_samples(self, *args):
        self.clock.now += 1
        return super().get_batch_samples(*args)

    def training_step(self, *args, **kwargs):
        self.clock.now += 10
        return super().training_step(*args, **kwargs)

    def _get_learning_rate(self):  # between the optimizer's step and the step's end
        self.clock.now += 100
        return super()._get_learning_rate()

    def evaluation_loop(self, *args, **kwargs):
        self.clock.now += 1000
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args):
        self.clock.now += 10000
        return super()._save_checkpoint(*args)

    def store_flos(self):  # on the way to the log, and in saving
        self.clock.now += 0.5
        return super().store_flos()


def test_time_goes_to_its_phase(trainer, monkeypatch):
    Ticking.clock = Clock()
    monkeypatch.setattr(throughput, "perf_counter", Ticking.clock)
    run = trainer(
        Ticking, arguments_class=TrainingArguments, train=padded_rows(), evaluation=padded_rows(),
        callbacks=[Throughput()], per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
        logging_steps=2, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    run.train()
    names = ("data", "forward_backward", "optimizer", "evaluation", "saving", "other")
    found = [tuple(entry[f"seconds_{name}"] for name in names) for entry in entries(run)]
    saved = 10000 + 0.5
    assert found == [
        (2, 40, 200, 0, 0, 0.5),
        (2, 40, 200, 0, 0, 0.5),
        (2, 40, 200, 1000, saved, 0.5),
        (6, 120, 600, 2000, 2 * saved, 1.5 + 0.5),
    ]
    assert entries(run)[2]["samples_per_second"] == pytest.approx(8 / 242.5, rel=1e-12)


# It changes nothing, and others see it


class Sees(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(copy.copy(logs))


@pytest.mark.parametrize("options", [{"cls": Trainer, "arguments_class": TrainingArguments}, {}])
def test_the_training_is_bitwise_the_same(trainer, options):
    options = options | {"train": padded_rows(), "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    plain = trainer(**options)
    torch.manual_seed(1)
    plain.train()
    sees, run = Sees(), trainer(**options)
    run.add_callback(sees)
    run.callback_handler.callbacks.insert(0, Throughput())
    torch.manual_seed(1)
    run.train()
    assert logged(run) == logged(plain)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True))
    shown = [entry for entry in sees.logs if "samples_per_second" in entry]
    assert len(shown) == 4
    for entry, kept in zip(shown, entries(run), strict=True):
        assert {name: kept[name] for name in entry} == entry
        assert entry["peak_memory_bytes_rank_0"] > 50e6


def test_an_error_in_a_step_leaves_no_counter_behind(trainer):
    class Breaks(Trainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            if breaking:
                raise RuntimeError("breaks")
            return torch.tensor(0.0)

    breaking, note = [True], Throughput()
    run = trainer(Breaks, arguments_class=TrainingArguments, callbacks=[note])
    with pytest.raises(RuntimeError, match="breaks"):
        run.train()
    breaking.clear()
    run.train()
    assert len(entries(run)) == 4
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not run.model._forward_pre_hooks


class Images(nn.Module):
    """No tokens, and a batch that comes by position."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 1)

    def forward(self, pixels=None, labels=None):
        return {"loss": (self.layer(pixels.flatten(1)) ** 2).mean()}


def test_batches_without_tokens(trainer):
    data = [{"pixels": torch.ones(3, 4), "labels": 0} for _ in range(8)]
    run = trainer(**STOCK, model=Images(), train=data, callbacks=[Throughput()], per_device_train_batch_size=4)
    run.train()
    first = entries(run)[0]
    assert amount(first, "samples_per_second") == pytest.approx(4, rel=1e-9)
    assert not {"tokens_per_second", "padded_tokens_per_second", "padding_share"} & first.keys()
    assert amount(first, "flops_per_second") == pytest.approx(4 * 12 * 4, rel=1e-9)


def test_a_compiled_model_has_no_count_of_operations(trainer):
    """Its compiled backward pass runs past the counter, which would see a third of them."""
    run = trainer(
        **STOCK,
        callbacks=[Throughput()],
        per_device_train_batch_size=4,
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    run.train()
    first = entries(run)[0]
    assert type(run.model_wrapped).__name__ == "OptimizedModule"
    assert amount(first, "samples_per_second") == pytest.approx(4, rel=1e-9)
    assert not {"flops_per_second", "flops_utilization"} & first.keys()


# Two ranks


def test_sums_are_over_both_ranks(tmp_path):
    """A micro-batch takes one second on the first rank and two on the second: the slower one is waited for."""
    first, second = on_two_ranks("throughput_run.py", tmp_path)
    assert (first["engine"], first["world_size"]) == ("DistributedDataParallel", 2)
    assert first["real"] != second["real"]
    *windows, whole = first["entries"]
    for entry, steps in zip([*windows, whole], (2, 2, 4), strict=True):
        seconds = 2 * steps
        assert entry["seconds_forward_backward"] == 1.5 * steps
        assert entry["samples_per_second"] * seconds == pytest.approx(2 * 3 * steps, rel=1e-12)
        assert entry["padded_tokens_per_second"] * seconds == pytest.approx(2 * 3 * 8 * steps, rel=1e-12)
        assert entry["flops_per_second"] * seconds == pytest.approx(
            2 * steps * bert_flops(3, 8, attention=6), rel=1e-12
        )
        assert min(entry[f"peak_memory_bytes_rank_{rank}"] for rank in (0, 1)) > 50e6
    assert whole["tokens_per_second"] * 8 == pytest.approx(first["real"] + second["real"], rel=1e-12)
    names = whole.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for entry, other in zip(first["entries"], second["entries"], strict=True):
        assert all(entry[name] == other[name] for name in names & entry.keys())
