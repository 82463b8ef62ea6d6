"""Every accelerate config: read by accelerate's own launcher, and the plugin that it gives does what the name says."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.dataclasses import FP8BackendType
from accelerate.utils.fsdp_utils import fsdp2_apply_ac
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import default_data_collator

from tests.conftest import rows, tiny_model
from trainer_ext.configs.catalog import config_folder

FOLDER = config_folder("fsdp_configs")
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
FSDP = [name for name, config in CONFIGS.items() if config["distributed_type"] == "FSDP"]
FSDP1 = [name for name in FSDP if name.startswith("fsdp1")]
FSDP2 = [name for name in FSDP if name.startswith("fsdp2")]
# accelerate takes these for FSDP1 alone, and the next for FSDP2 alone.
ONLY_FSDP1 = {
    "fsdp_backward_prefetch",
    "fsdp_forward_prefetch",
    "fsdp_sharding_strategy",
    "fsdp_sync_module_states",
    "fsdp_use_orig_params",
}
ONLY_FSDP2 = {"fsdp_reshard_after_forward"}
DEFAULTS = vars(launch_command_parser().parse_args(["script.py"]))
ONLY_TPU = {"main_training_function"}


def environment(name, *options):
    """What `accelerate launch` puts into the environment of the processes that it starts."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


def plugin(name, monkeypatch):
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)
    with patch_environment(**environment(name)):
        return FullyShardedDataParallelPlugin()


def dead_keys(config):
    """The keys that the launcher does not know or does not take from a file, or that this version of FSDP does not read.

    From a file's top level it takes only what has no default of its own on the command line.
    """
    top = [key for key, value in config.items() if not isinstance(value, dict)]
    block = config.get("fsdp_config", {})
    other = ONLY_FSDP1 if block.get("fsdp_version") == 2 else ONLY_FSDP2
    blocks = [
        key for part in ("fsdp_config", "deepspeed_config", "parallelism_config") for key in config.get(part, {})
    ]
    dead = [key for key in top if DEFAULTS.get(key) is not None or key in ONLY_TPU]
    return dead + [key for key in blocks if key not in DEFAULTS] + [key for key in block if key in other]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it_and_no_key_is_dead(name):
    loaded = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # which refuses unknown keys at the top
    assert loaded.num_processes == CONFIGS[name]["num_processes"]
    assert dead_keys(CONFIGS[name]) == []


def test_the_launcher_does_not_read_those_keys(tmp_path):
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump({**CONFIGS["fsdp2_multinode"], "rdzv_backend": "c10d", "same_network": True}))
    words = ["--config_file", str(file), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (args.rdzv_backend, args.same_network) == ("static", False)


def test_a_dead_key_is_found():
    two, one = CONFIGS["fsdp2"], CONFIGS["fsdp1_full_shard"]
    misspelt = {**two, "fsdp_config": {**two["fsdp_config"], "fsdp_reshard_after_fwd": True}}
    assert dead_keys(misspelt) == ["fsdp_reshard_after_fwd"]
    assert dead_keys({**two, "rdzv_backend": "c10d", "same_network": True}) == ["rdzv_backend", "same_network"]
    assert dead_keys({**two, "fsdp_config": {**two["fsdp_config"], "fsdp_use_orig_params": True}})
    assert dead_keys({**one, "fsdp_config": {**one["fsdp_config"], "fsdp_reshard_after_forward": True}})


@pytest.mark.parametrize("name", FSDP2)
def test_the_plugin_is_what_the_name_says(name, monkeypatch):
    found = plugin(name, monkeypatch)
    assert found.fsdp_version == 2
    assert found.state_dict_type.name == ("SHARDED" if "sharded" in name else "FULL") + "_STATE_DICT"
    assert bool(found.activation_checkpointing) is ("activation_checkpointing" in name)
    assert found.transformer_cls_names_to_wrap is None
    assert found.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert found.reshard_after_forward is ("no_reshard" not in name)
    assert isinstance(found.cpu_offload, CPUOffloadPolicy) is ("offload" in name)
    assert found.cpu_ram_efficient_loading is ("fp8" not in name)  # which accelerate refuses together with torchao


@pytest.mark.parametrize("name", FSDP1)
def test_what_fsdp1_is_told(name):
    """Its plugin cannot be made without an accelerator."""
    found = environment(name)
    assert found["FSDP_VERSION"] == "1"
    strategies = {"fsdp1_shard_grad_op": "SHARD_GRAD_OP", "fsdp1_hybrid": "HYBRID_SHARD"}
    assert found["FSDP_SHARDING_STRATEGY"] == strategies.get(name, "FULL_SHARD")
    assert found["FSDP_OFFLOAD_PARAMS"] == ("true" if "offload" in name else "false")
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in found


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("fsdp2_hsdp", (2, 2, 1)), ("fsdp2_hsdp_multinode", (2, 2, 1)), ("fsdp2_cp", (1, 1, 2))],
)
def test_the_mesh_is_what_the_name_says(name, sizes):
    with patch_environment(**environment(name)):
        mesh = ParallelismConfig()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size, mesh.cp_size) == sizes
    assert mesh.total_size == CONFIGS[name]["num_processes"]


@pytest.mark.parametrize("name", CONFIGS)
def test_precision_comes_from_the_arguments(name):
    assert CONFIGS[name].get("mixed_precision", "no") == ("fp8" if "fp8" in name else "no")


@pytest.mark.parametrize("name", CONFIGS)
def test_hosts(name):
    several = name.endswith("multinode")
    assert CONFIGS[name]["num_machines"] == (2 if several else 1)
    assert ("main_process_ip" in CONFIGS[name]) is several


def test_fp8_is_torchaos(monkeypatch):
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)
    found = environment("fsdp2_fp8")
    assert found["ACCELERATE_MIXED_PRECISION"] == "fp8"
    assert FP8BackendType(found["ACCELERATE_FP8_BACKEND"]) == FP8BackendType.AO


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fsdp2_checkpoints_activations_with_other_dropout_masks(dropout):
    """What the README warns of; when this fails for 0.1, accelerate keeps the masks, and the warning can go."""
    state = SimpleNamespace(
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            activation_checkpointing=True,
        )
    )
    model, batch = tiny_model(dropout=dropout).train(), default_data_collator(list(rows(16)))
    plain = gradient(model, batch)
    checkpointed = gradient(fsdp2_apply_ac(SimpleNamespace(state=state), copy.deepcopy(model)), batch)
    assert torch.equal(plain, checkpointed) is (dropout == 0)


def gradient(model, batch):
    torch.manual_seed(0)
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_by_our_json(stage):
    found = environment(f"deepspeed_zero{stage}")
    assert found["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == f"ds_configs/zero{stage}.json"
    assert found["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == ("true" if stage == 3 else "false")
    assert (FOLDER.parent / found["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).is_file()


def test_the_number_of_processes_can_be_overridden():
    words = ["--config_file", str(FOLDER / "fsdp2.yaml"), "--num_processes", "8", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 8


@pytest.mark.parametrize("name", FSDP1)
def test_fsdp1_is_marked_legacy(name):
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# Legacy")


def test_readme_lists_every_file():
    readme = (FOLDER / "README.md").read_text()
    listed = {
        word for line in readme.splitlines() if line.startswith("| `") for word in line.split("`") if ".yaml" in word
    }
    assert listed >= {f"{name}.yaml" for name in CONFIGS}
