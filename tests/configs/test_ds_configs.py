"""Every DeepSpeed config: filled in by transformers, read by DeepSpeed's own parser, with no key that nobody reads."""

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from tests.conftest import tiny_model
from trainer_ext.configs.catalog import config_folder

FOLDER = config_folder("ds_configs")
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


class Watched(dict):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)

    def __deepcopy__(self, memo):
        return self


def filled_in(config, tmp_path, **options):
    """The config as DeepSpeed gets it from the Trainer."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    found = HfTrainerDeepSpeedConfig(json.loads(json.dumps(config)))
    found.trainer_config_process(args)
    found.trainer_config_finalize(args, tiny_model(), 10)
    return found.config


def dead_keys(config):
    """The keys of a filled-in config that DeepSpeed never asks for; the blocks of its own models refuse others."""
    checkpoint = Watched(config.get("checkpoint", {}))
    watched = Watched({**config, "checkpoint": checkpoint})
    DeepSpeedConfig(watched)
    dead = [key for key in config if key not in watched.read]
    return dead + [f"checkpoint.{key}" for key in checkpoint if key not in checkpoint.read]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_engines_own_parser_takes_it(name, precision, tmp_path):
    config = filled_in(CONFIGS[name], tmp_path, **precision)
    assert '"auto"' not in json.dumps(config)
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_config.stage == CONFIGS[name]["zero_optimization"]["stage"]
    assert parsed.bfloat16_config.enabled is bool(precision)
    assert parsed.train_micro_batch_size_per_gpu == 8


def two_ranks(monkeypatch):
    """Have transformers and DeepSpeed believe that this is rank 0 of 2."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_agree_on_the_batch(name, tmp_path, monkeypatch):
    """As `from_pretrained` parses it on each rank, before there is an engine."""
    two_ranks(monkeypatch)
    parsed = DeepSpeedConfig(filled_in(CONFIGS[name], tmp_path))
    assert (parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu) == (16, 8)


def test_a_batch_that_two_ranks_do_not_share_is_found(tmp_path, monkeypatch):
    two_ranks(monkeypatch)
    with pytest.raises(AssertionError, match="batch"):
        DeepSpeedConfig(filled_in({**CONFIGS["zero3"], "sequence_parallel_size": 2}, tmp_path))


def test_stage_3_muon_does_not_scatter():
    """The engine raises otherwise, after the parser."""
    assert CONFIGS["zero3_muon"]["zero_optimization"]["reduce_scatter"] is False


@pytest.mark.parametrize("name", CONFIGS)
def test_no_key_is_dead(name, tmp_path):
    assert dead_keys(filled_in(CONFIGS[name], tmp_path)) == []


def test_a_dead_key_is_found(tmp_path):
    config = filled_in(CONFIGS["zero3_universal"], tmp_path)
    config["gradient_cliping"] = 1.0
    config["checkpoint"]["load_univesal"] = True
    assert dead_keys(config) == ["gradient_cliping", "checkpoint.load_univesal"]


@pytest.mark.parametrize("block", ["zero_optimization", "bf16", "fp16"])
def test_a_dead_key_in_a_block_is_refused(block, tmp_path):
    config = filled_in(CONFIGS["zero3"], tmp_path)
    config[block]["stage3_prefetch_buckets"] = 1
    with pytest.raises(ValidationError, match="stage3_prefetch_buckets"):
        DeepSpeedConfig(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_precision_and_sizes_come_from_the_arguments(name):
    config = CONFIGS[name]
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[size] for size in sizes} == {"auto"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_name_says_what_it_does(name):
    """All that it does: the base of its stage, and what the rest of the name adds."""
    stage, _, adds = name.removeprefix("zero").partition("_")
    base, config = CONFIGS[f"zero{stage}"], CONFIGS[name]
    assert config["zero_optimization"]["stage"] == int(stage)
    top = {key: value for key, value in config.items() if key not in base}
    zero = {k: v for k, v in config["zero_optimization"].items() if k not in base["zero_optimization"]}
    assert base["zero_optimization"].items() <= config["zero_optimization"].items()
    assert set(top) | set(zero) == PROMISES.get(adds, set()) | ALSO.get(name, set())
    if stage == "3":
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


PROMISES = {
    "offload": {"offload_optimizer"},
    "offload_optimizer": {"offload_optimizer"},
    "nvme": {"offload_optimizer", "offload_param"},
    "hpz": {"zero_hpz_partition_size"},
    "zeropp": {"zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"},
    "muon": {"optimizer"},
    "zenflow": {"offload_optimizer", "optimizer", "zenflow"},
    "moe": {"leaf_module"},
    "superoffload": {"offload_optimizer"},
    "ulysses": {"seq_parallel_communication_data_type"},
    "autotp": {"tensor_parallel"},
    "universal": {"checkpoint"},
}
ALSO = {
    "zero3_offload": {"offload_param"},
    "zero1_autotp": {
        "stage3_gather_16bit_weights_on_model_save"
    },  # AutoTP splits weights too, and gathers by this key
    "zero3_muon": {"reduce_scatter"},  # which stage 3 refuses to combine with Muon
}


def test_readme_lists_every_file():
    readme = (FOLDER / "README.md").read_text()
    listed = {word for line in readme.splitlines() if line.startswith("| `") for word in line.split("`")[1::2]}
    assert listed >= {f"{name}.json" for name in CONFIGS}
