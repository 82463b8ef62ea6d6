"""The cost model's formulas beside real models, and beside a real training on two ranks."""

import dataclasses
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    default_data_collator,
)

from tests.callbacks.processes import FSDP2, run_ranks, settle_on_cpu
from tests.conftest import rows, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.engine import REHEARSING

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cost_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("cost_model", BENCHMARKS / "cost_model.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "cost_model", module)
        spec.loader.exec_module(module)
        yield module


def real(shape):
    """The model of transformers that has this shape."""
    if shape.kind == "gpt2":
        config = GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.length, n_embd=shape.hidden, n_layer=shape.layers,
            n_head=shape.hidden // 16, n_inner=shape.inner,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    cls, build = {
        "bert": (BertConfig, AutoModelForSequenceClassification), "llama": (LlamaConfig, AutoModelForCausalLM),
    }[shape.kind]  # fmt: skip
    config = cls(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 16, intermediate_size=shape.inner,
    )  # fmt: skip
    return build.from_config(config, attn_implementation="eager")


def test_parameters_are_those_of_the_real_models(cost_model):
    for title, shape in cost_model.SHAPES.items():
        with torch.device("meta"):
            found = real(shape).num_parameters()
        assert shape.parameters == found, title
        assert dataclasses.replace(shape, inner=shape.inner + 1).parameters != found


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_flops_are_those_that_torch_counts(cost_model, kind):
    shape = cost_model.Shape(kind, layers=2, hidden=64, inner=160, vocabulary=50, length=64, rows=2)
    model, ids = real(shape), torch.ones(shape.rows, shape.length, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids if kind != "bert" else ids[:, 0]).loss.backward()
    assert abs(shape.flops / counted.get_total_flops() - 1) <= 0.01
    no_attention = 6 * shape.tokens * shape.matrices
    assert not abs(no_attention / counted.get_total_flops() - 1) <= 0.1


def carried(steps, folder):
    """In a rank: the wrapper, and what its collectives carry in `steps` steps, as (collective, shapes of its inputs)."""
    settle_on_cpu()
    counts = []
    for count in (2, 2 + steps):
        args = CustomTrainingArguments(
            output_dir=f"{folder}/out", use_cpu=True, report_to="none", disable_tqdm=True, log_level="error",
            max_steps=count, logging_strategy="no", save_strategy="no", per_device_train_batch_size=4,
            dataloader_pin_memory=False, max_grad_norm=0, ddp_find_unused_parameters=False,
        )  # fmt: skip
        trainer = CustomTrainer(tiny_model(), args, default_data_collator, rows(64))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
            trainer.train()
        counts.append(Counter((e.name, str(e.input_shapes)) for e in seen.events() if e.name.startswith("gloo:")))
    return type(trainer.model_wrapped).__name__, counts[1] - counts[0]


def test_ddp_sends_each_gradient_once_and_three_numbers(cost_model, tmp_path):
    engine, parameters = cost_model.ENGINES["DDP"], tiny_model().num_parameters()
    for wrapper, found in run_ranks(carried, 2, 3, str(tmp_path)):
        assert wrapper == "DistributedDataParallel"
        reduced = {shape: times for (name, shape), times in found.items() if name == "gloo:all_reduce"}
        ours = reduced.pop("[[]]") + reduced.pop("[[1]]")
        assert ours == 3 * (len(engine.collectives) + 1)  # and the signal's
        assert reduced == {f"[[{parameters}]]": 3}
        assert cost_model.sent(engine, parameters, 2) == 4 * parameters  # of two ranks each sends its half twice


def test_fsdp2_gathers_each_layer_twice_and_scatters_once(cost_model, tmp_path):
    engine, parameters = cost_model.ENGINES["FSDP2"], tiny_model().num_parameters()
    environment = {**FSDP2, REHEARSING: "as a rehearsal, on the CPU"}
    for wrapper, found in run_ranks(carried, 2, 3, str(tmp_path), environment=environment):
        assert wrapper == "FSDPBertForSequenceClassification"
        reduced = {shape: times for (name, shape), times in found.items() if name == "gloo:all_reduce"}
        assert reduced.pop("[[]]") + reduced.pop("[[1]]") == 3 * (len(engine.collectives) + 1)
        assert reduced.pop("[[25]]") == 3  # the norms of the gradients, put together by the stock class
        scattered = sum(elements(shape) * times for shape, times in reduced.items()) / 3  # gloo reduces and cuts
        assert scattered == parameters
        whole = {2 * elements(shape): times / 3 for (name, shape), times in found.items() if name == "gloo:all_gather"}
        (kept,) = (
            size for size, times in whole.items() if times == 1
        )  # the outermost one stays for the backward pass
        assert all(times == 2 for size, times in whole.items() if size != kept)
        gathered = sum(size * times for size, times in whole.items())
        of_bf16 = 2 * (gathered + scattered) / 2  # bytes that one of two ranks sends
        assert cost_model.sent(engine, parameters, 2) == of_bf16 + kept  # the model has it gathered twice, too


def elements(shape):
    return int(shape.strip("[]"))
