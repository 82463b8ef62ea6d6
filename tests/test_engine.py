"""What is read from live objects: names, elements, FSDP's blocks; and what is refused where an engine is missing."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
)

from tests.conftest import SIZES, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.engine import (
    REHEARSING,
    asks_for_fsdp,
    base_optimizer,
    blocks_without_embeddings,
    check_engine,
    count_elements,
    flattens_parameters,
    full_parameters,
    local_elements,
    parameter_groups,
    plain_name,
    runs_on,
    settle_on_cpu,
    shard_blocks_without_embeddings,
)

SMALL = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, **options))


def modernbert():
    return ModernBertForSequenceClassification(
        ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    )


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (tiny_model, ["BertLayer"]),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)), ["RobertaLayer"]),
        (llama, ["LlamaDecoderLayer"]),
        (lambda: llama(tie_word_embeddings=True), ["LlamaDecoderLayer"]),
        (modernbert, ["ModernBertEncoderLayer"]),
    ],
)
def test_the_blocks_that_a_model_names_but_those_around_embeddings(make, blocks):
    model = make()
    named = set(model._no_split_modules)
    found = blocks_without_embeddings(model, named)
    assert found == blocks
    assert set(found) <= named
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    sharded = [block for block in model.modules() if type(block).__name__ in found]
    assert len(sharded) == 1  # each has one layer
    assert embeddings.isdisjoint(inner for block in sharded for inner in block.modules())


def test_bert_names_its_embeddings_too():
    """Else the test above shows nothing."""
    assert "BertEmbeddings" in tiny_model()._no_split_modules
    assert blocks_without_embeddings(tiny_model(), {"BertEmbeddings", "BertLayer", "NoSuchLayer"}) == ["BertLayer"]


def test_a_class_that_holds_an_embedding_once_is_left_out():
    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.free, self.full = Block(nn.Linear(2, 2)), Block(nn.Embedding(3, 2))

        def get_input_embeddings(self):
            return self.full.inner

        def get_output_embeddings(self):
            return None

    assert blocks_without_embeddings(Model(), {"Block"}) == []
    assert blocks_without_embeddings(Model(), {"Linear"}) == ["Linear"]


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        ({}, ["BertLayer"]),
        ({"transformer_cls_names_to_wrap": ["BertAttention"]}, ["BertAttention"]),
        ({"fsdp_version": 1}, None),
    ],
)
def test_a_list_of_the_users_own_stays(plugin, expected):
    held = SimpleNamespace(**{"fsdp_version": 2, "transformer_cls_names_to_wrap": None, **plugin})
    trainer = SimpleNamespace(model=tiny_model(), accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=held)))
    shard_blocks_without_embeddings(trainer)
    assert held.transformer_cls_names_to_wrap == expected
    assert flattens_parameters(trainer) == (held.fsdp_version == 1)


def test_without_fsdp_there_is_nothing_to_shard(trainer):
    made = trainer()
    shard_blocks_without_embeddings(made)
    assert not flattens_parameters(made)


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.bert.weight",
        "bert._checkpoint_wrapped_module.weight",
        "_fsdp_wrapped_module.bert._fsdp_wrapped_module._checkpoint_wrapped_module.weight",
        "bert.weight",
    ],
)
def test_a_name_without_wrappers(name):
    assert plain_name(name) == "bert.weight"


def zero3(elements, part, status):
    """A parameter as ZeRO-3 leaves it: its elements are somewhere else, or gathered for a while."""
    parameter = nn.Parameter(torch.zeros(elements if status == "AVAILABLE" else 0))
    parameter.ds_numel = elements
    parameter.ds_tensor = torch.zeros(part)
    parameter.ds_status = SimpleNamespace(name=status)
    return parameter


def test_elements_of_a_split_model():
    model = nn.Module()
    model.split, model.gathered = zero3(10, 5, "NOT_AVAILABLE"), zero3(4, 2, "AVAILABLE")
    model.whole = nn.Parameter(torch.zeros(3, 2))
    assert count_elements(model) == 20
    assert [local_elements(p) for p in (model.split, model.gathered, model.whole)] == [5, 4, 6]


def test_elements_of_a_dtensor(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement in (Shard(0), Replicate()):
            tensor = distribute_tensor(torch.arange(6.0), mesh, [placement])
            assert local_elements(tensor) == 6
            model = nn.Module()
            model.weight = nn.Parameter(tensor)
            assert dict(full_parameters(model))["weight"].tolist() == [0, 1, 2, 3, 4, 5]
    finally:
        torch.distributed.destroy_process_group()


def test_what_one_process_runs_on(trainer):
    made = trainer()
    elements = count_elements(made.model)
    before = runs_on(made)
    assert (before.optimizer, before.optimizer_fraction) == (None, None)
    made.train()
    found = runs_on(made, elements=2 * elements)
    assert (found.engine, found.stage, found.world_size) == ("BertForSequenceClassification", None, 1)
    assert (found.local_fraction, found.optimizer, found.optimizer_fraction) == (0.5, "AdamW", 0.5)
    assert runs_on(made).optimizer_fraction == 1.0  # of two moments each
    assert (found.offload, found.placements) == (None, ())


def test_groups_below_the_wrappers(trainer):
    made = trainer(weight_decay=0.1)
    made.train()
    inner = base_optimizer(made.optimizer)
    assert type(inner) is torch.optim.AdamW
    decay, no_decay = parameter_groups(made)
    assert all(p.ndim > 1 for p in decay)
    assert all(p.ndim == 1 for p in no_decay)
    assert len(decay) + len(no_decay) == len(list(made.model.parameters()))


@pytest.mark.parametrize(
    ("sub_groups", "of_subgroup", "expected"),
    [
        ([["a", "b"], ["c"]], {}, [["a", "b"], ["c"]]),
        ([["a"], ["b"], ["c"]], {0: 0, 1: 0, 2: 1}, [["a", "b"], ["c"]]),
    ],
)
def test_zero_groups_are_put_together_again(sub_groups, of_subgroup, expected):
    zero = SimpleNamespace(param_groups=[{}, {}], sub_group_to_group_id=of_subgroup, fp16_groups=sub_groups)
    trainer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=zero), is_deepspeed_enabled=True)
    assert parameter_groups(trainer) == expected


@pytest.fixture
def host(monkeypatch):
    """A host as `settle_on_cpu` sees it; the machine of the test may have GPUs."""

    def make(*, accelerator=False, **variables):
        for name in (REHEARSING, "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
        begun = []
        monkeypatch.setattr("deepspeed.init_distributed", lambda **options: begun.append(options))
        return begun

    return make


def settled(**fields):
    args = SimpleNamespace(**{"use_cpu": False, "fsdp": None, "deepspeed": None, **fields})
    settle_on_cpu(args)
    return args.use_cpu


@pytest.mark.parametrize("variables", [{"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_USE_FSDP": "True"}])
def test_fsdp_by_the_launcher_is_refused_without_an_accelerator(host, variables):
    host(WORLD_SIZE="2", **variables)
    with pytest.raises(
        ValueError, match=r"FSDP is asked for.*accelerate would train without it.*`trainer-ext rehearse"
    ):
        settled()


@pytest.mark.parametrize("fsdp", [True, "full_shard"])
def test_fsdp_by_an_argument_is_refused_without_an_accelerator(host, fsdp):
    host()
    with pytest.raises(ValueError, match="put `trainer-ext rehearse --` before the command"):
        settled(fsdp=fsdp)
    with pytest.raises(ValueError, match="FSDP is asked for"):
        CustomTrainingArguments("out", fsdp=fsdp)


def test_several_processes_are_one_run(host):
    begun = host(WORLD_SIZE="2")
    assert settled()
    assert begun == []


@pytest.mark.parametrize(
    ("variables", "fields"), [({}, {"deepspeed": "zero2.json"}), ({"ACCELERATE_USE_DEEPSPEED": "true"}, {})]
)
def test_deepspeed_has_its_communication(host, variables, fields):
    begun = host(WORLD_SIZE="2", **variables)
    assert settled(**fields)
    assert begun == [{"dist_backend": "gloo", "auto_mpi_discovery": False}]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "false"},
        {"WORLD_SIZE": "2", REHEARSING: "plan.json", "ACCELERATE_USE_FSDP": "true"},
    ],
)
def test_what_is_left_alone(host, variables):
    begun = host(**variables)
    assert not settled()
    assert begun == []


def test_an_accelerator_is_left_alone(host):
    begun = host(accelerator=True, WORLD_SIZE="2", ACCELERATE_USE_FSDP="true")
    assert not settled(deepspeed="zero2.json", fsdp=True)
    assert begun == []


@pytest.mark.parametrize(("value", "asked"), [("true", True), ("TRUE", True), ("false", False), (None, False)])
def test_who_asks_for_fsdp(monkeypatch, value, asked):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    assert asks_for_fsdp() == asked
    assert asks_for_fsdp(SimpleNamespace(fsdp=None)) == asked
    assert asks_for_fsdp(SimpleNamespace(fsdp=True))


def stands_on(*, deepspeed=None, fsdp=None, has=None):
    return SimpleNamespace(
        args=SimpleNamespace(deepspeed=deepspeed, fsdp=fsdp, world_size=2),
        is_deepspeed_enabled=has == "deepspeed",
        is_fsdp_enabled=has == "fsdp",
        accelerator=SimpleNamespace(distributed_type=DistributedType.MULTI_CPU),
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"deepspeed": "zero2.json"}, ["deepspeed=zero2.json", "MULTI_CPU with 2 process", "`deepspeed SCRIPT`"]),
        ({"deepspeed": "zero2.json", "has": "fsdp"}, ["deepspeed=zero2.json is asked for"]),
        (
            {"fsdp": True},
            ["FSDP is asked for", "MULTI_CPU with 2 process", "without --cpu", "`trainer-ext rehearse --`"],
        ),
        ({"fsdp": True, "has": "deepspeed"}, ["FSDP is asked for"]),
    ],
)
def test_another_engine_than_asked_for_is_an_error(monkeypatch, asked, says):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with pytest.raises(RuntimeError) as error:
        check_engine(stands_on(**asked))
    for part in says:
        assert part in str(error.value)


def test_the_engine_that_was_asked_for_is_none(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for asked in ({}, {"has": "fsdp"}, {"deepspeed": "x.json", "has": "deepspeed"}, {"fsdp": True, "has": "fsdp"}):
        check_engine(stands_on(**asked))


def test_custom_trainer_asks(trainer, monkeypatch):
    """Plain `TrainingArguments` do not settle anything, and accelerate says nothing of FSDP that it dropped."""
    monkeypatch.setattr("trainer_ext.arguments.settle_on_cpu", lambda args: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer(Trainer)
    with pytest.raises(RuntimeError, match="FSDP is asked for, and accelerate set up"):
        trainer(CustomTrainer)
