"""The engine under a trainer: which was asked for, which it got, and what each rank holds of the model.

DeepSpeed, FSDP and DDP all fall back in silence where something is missing: on a machine without an accelerator an
FSDP launch trains as DDP, or as many single runs that overwrite each other. What is said here is read from the live
objects, never from the configuration.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

REHEARSING = "TRAINER_EXT_REHEARSAL"  # set by a rehearsal in the processes that it starts


@dataclass(frozen=True)
class RunsOn:
    """What a trainer stands on, on one rank.

    Attributes:
        engine: The class that owns the forward pass.
        stage: The ZeRO stage, or None.
        world_size: Processes.
        local_fraction: The share of the model's parameters that this rank holds.
        optimizer: The class that takes the step.
        optimizer_fraction: The share of the optimizer's state that this rank holds; None before its first step.
        offload: Where parts of the state were moved to, as `{"optimizer": "cpu", "parameters": "cpu"}`.
        placements: How FSDP2 placed the parameters on its mesh, such as `(Shard(dim=0),)`.
    """

    engine: str
    stage: int | None
    world_size: int
    local_fraction: float
    optimizer: str | None = None
    optimizer_fraction: float | None = None
    offload: dict[str, str] | None = None
    placements: tuple[str, ...] = ()


def runs_on(trainer: "Trainer", *, elements: int | None = None) -> RunsOn:
    """What `trainer` runs on, asked between two steps.

    Args:
        trainer: In training, or after it.
        elements: The model's number of parameter elements, where an engine split them before they could be counted.
    """
    wrapped: Any = trainer.model_wrapped
    model = cast(nn.Module, trainer.model)
    parameters = list(model.parameters())
    total = elements or count_elements(model)
    optimizer = base_optimizer(trainer.optimizer)
    state = [t for entry in getattr(optimizer, "state", {}).values() for t in tensors_of(entry) if t.numel() > 1]
    return RunsOn(
        engine=type(wrapped).__name__,
        stage=wrapped.zero_optimization_stage() if is_deepspeed(wrapped) else None,
        world_size=trainer.args.world_size,
        local_fraction=sum(local_elements(p) for p in parameters) / total,
        optimizer=type(optimizer).__name__ if optimizer is not None else None,
        optimizer_fraction=sum(local_elements(t) for t in state) / total / _moments(optimizer) if state else None,
        offload=_offload(wrapped),
        placements=tuple(sorted({str(p.placements) for p in parameters if isinstance(p, DTensor)})),
    )


def count_elements(model: nn.Module) -> int:
    """The elements of all parameters, whole, however they are split."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def local_elements(tensor: Any) -> int:
    """The elements of `tensor` that are in this process's memory."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().numel()
    if hasattr(tensor, "ds_tensor") and tensor.ds_status.name != "AVAILABLE":  # ZeRO-3; small ones stay gathered
        return tensor.ds_tensor.numel()
    return tensor.numel()


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer, whole, one at a time: a collective, to be walked through by all ranks.

    Names are those of the model itself, without what wrappers put in.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        whole = tensor.detach()
        if hasattr(tensor, "ds_tensor"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                whole = tensor.detach().clone()
        elif getattr(tensor, "ds_is_replaced_module", False):  # split over tensor-parallel ranks by AutoTP
            from deepspeed.module_inject.layers import GatherReplacedLayerParams

            owner = model.get_submodule(name.rpartition(".")[0])
            with GatherReplacedLayerParams(list(owner.parameters(recurse=False)), owner):
                whole = tensor.detach().clone()
        elif isinstance(whole, DTensor):
            whole = whole.full_tensor()
        yield plain_name(name), whole.cpu()


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers (compiled, checkpointed, FSDP1) put in."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(part, "")
    return name


def parameter_groups(trainer: "Trainer") -> list[list[nn.Parameter]]:
    """The model's own parameters in each of the optimizer's groups; ZeRO replaces them by flat partitions."""
    return optimizer_groups(trainer.optimizer, deepspeed=trainer.is_deepspeed_enabled)


def optimizer_groups(optimizer: Any, *, deepspeed: bool) -> list[list[nn.Parameter]]:
    """The same, of a trainer's optimizer."""
    zero = getattr(optimizer, "optimizer", optimizer)
    for own in ("bit16_groups", "fp16_groups"):  # ZeRO-1 and 2, ZeRO-3
        if (found := getattr(zero, own, None)) and deepspeed:
            return _by_inner_group(zero, found)
    return [group["params"] for group in base_optimizer(optimizer).param_groups]


def base_optimizer(optimizer: Any) -> Any:
    """What takes the step, below accelerate's and DeepSpeed's wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer) or hasattr(
        getattr(optimizer, "optimizer", None), "optimizer"
    ):
        optimizer = optimizer.optimizer
    return optimizer


def is_deepspeed(model: Any) -> bool:
    """Whether `model` is a DeepSpeed engine."""
    return hasattr(model, "zero_optimization_stage")


def tensors_of(entry: Any) -> list[Tensor]:
    """The tensors among the values of one parameter's optimizer state."""
    return [value for value in entry.values() if isinstance(value, Tensor)]


def asks_for_fsdp(args: "TrainingArguments | None" = None) -> bool:
    """Whether `accelerate launch` or the arguments ask for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(args is not None and args.fsdp)


def settle_on_cpu(args: "TrainingArguments") -> None:
    """Make a launch on a machine without an accelerator the one run that was asked for.

    Sets `use_cpu` where several processes were launched: without it each of them would train alone. With
    DeepSpeed, its communication is set up here, since ZeRO-3 asks for the world size when the model is made.

    Raises:
        ValueError: FSDP is asked for, which accelerate drops on a CPU.
    """
    if torch.accelerator.is_available() or os.environ.get(REHEARSING):
        return
    if asks_for_fsdp(args):
        raise ValueError(
            "FSDP is asked for and there is no accelerator: accelerate would train without it, and not say so. To try "
            "this launch on the CPU with real FSDP, put `trainer-ext rehearse --` before the command."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        args.use_cpu = True
        if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def check_engine(trainer: "Trainer") -> None:
    """Raise where the trainer did not get the engine that was asked for.

    Raises:
        RuntimeError: DeepSpeed or FSDP was asked for, and the trainer would run without it.
    """
    if trainer.args.deepspeed and not trainer.is_deepspeed_enabled:
        raise RuntimeError(
            f"deepspeed={trainer.args.deepspeed} is asked for, and accelerate set up {_found(trainer)}. Launch with "
            "`deepspeed SCRIPT` or `accelerate launch` without --cpu."
        )
    if asks_for_fsdp(trainer.args) and not trainer.is_fsdp_enabled:
        raise RuntimeError(
            f"FSDP is asked for, and accelerate set up {_found(trainer)}. Launch with `accelerate launch` without --cpu; "
            "without an accelerator put `trainer-ext rehearse --` before the command."
        )


def refuse_zenflow(trainer: "Trainer") -> None:
    """Raise where DeepSpeed would train scrambled weights.

    It flattens matrices transposed for ZenFlow's ZeRO-1 and 2 and takes them back untransposed: seen in 0.19.8.

    Raises:
        ValueError: ZenFlow is asked for.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin is not None else {}
    if zero.get("zenflow") is not None:
        raise ValueError(
            "the DeepSpeed config has a zenflow block, with which DeepSpeed (seen in 0.19.8) scrambles every matrix before "
            "the first step. Leave it out: zero2_offload.json does the same without stale gradients."
        )


def checkpoint_with_dropout_masks(trainer: "Trainer") -> None:
    """Have the model itself recompute activations where FSDP2 is to.

    accelerate's way does not keep the state of the random generator, so that blocks are computed again with other
    dropout masks, and the gradient is not that of the loss.
    """
    plugin = _fsdp_plugin(trainer, version=2)
    enable = getattr(trainer.model, "gradient_checkpointing_enable", None)
    if plugin is not None and plugin.activation_checkpointing and enable is not None:
        plugin.activation_checkpointing = False
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def materialise_new_weights(trainer: "Trainer") -> None:
    """Give each weight that a checkpoint lacks, such as a new head's, memory of its own on every rank.

    With `cpu_ram_efficient_loading` transformers leaves them on the meta device of all ranks but the first, and
    accelerate, which finds the optimizer's parameters again by their addresses, takes them all for one: these ranks
    never train their shards of the others. What is put here is overwritten by rank 0's.
    """
    if _fsdp_plugin(trainer, version=2) is None:
        return
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied one stays tied
    for module in cast(nn.Module, trainer.model).modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                new = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
                setattr(module, name, made.setdefault(parameter, new))


def shard_blocks_without_embeddings(trainer: "Trainer") -> None:
    """Have FSDP2 shard the blocks that the model names, but those around the embeddings.

    `_no_split_modules` of BERT and its kin names the block of the embeddings too, and accelerate gives the input
    embedding a unit of its own: sharded twice, `fully_shard` fails. A list of the user's own is left as it is.
    """
    plugin = _fsdp_plugin(trainer, version=2)
    named = getattr(trainer.model, "_no_split_modules", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap or not named:
        return
    plugin.transformer_cls_names_to_wrap = blocks_without_embeddings(cast(nn.Module, trainer.model), set(named))


def flattens_parameters(trainer: "Trainer") -> bool:
    """Whether the engine is FSDP1, after which a parameter's dimension can no longer be told."""
    return _fsdp_plugin(trainer, version=1) is not None


def saves_shards(trainer: "Trainer") -> bool:
    """Whether FSDP writes one file a rank instead of whole weights."""
    plugin = _fsdp_plugin(trainer)
    return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)


def blocks_without_embeddings(model: nn.Module, names: set[str]) -> list[str]:
    """The class names among `names` that occur in `model`, none of whose modules holds its input or output embedding."""
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}  # type: ignore[operator]
    found: dict[str, bool] = {}
    for module in model.modules():
        name = type(module).__name__
        if name in names:
            found[name] = found.get(name, True) and embeddings.isdisjoint(module.modules())
    return sorted(name for name, free in found.items() if free)


def _fsdp_plugin(trainer: "Trainer", version: int | None = None) -> Any:
    """What accelerate was told of FSDP; None without it, or where it is another version."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin if plugin is not None and version in (None, plugin.fsdp_version) else None


def _by_inner_group(zero: Any, found: Any) -> list[list[nn.Parameter]]:
    """ZeRO-3 may cut one group into several sub-groups; they are put together again."""
    if len(found) == len(zero.param_groups):
        return [list(group) for group in found]
    of_subgroup = getattr(zero, "sub_group_to_group_id", {})
    groups: list[list[nn.Parameter]] = [[] for _ in zero.param_groups]
    for place, parameters in enumerate(found):
        groups[of_subgroup[place]].extend(parameters)
    return groups


def _moments(optimizer: Any) -> int:
    """State tensors that the optimizer keeps for each element."""
    entries = [tensors_of(entry) for entry in optimizer.state.values()]
    return max((sum(t.numel() > 1 for t in entry) for entry in entries), default=1) or 1


def _offload(wrapped: Any) -> dict[str, str] | None:
    """What an engine says of its live state's places."""
    if is_deepspeed(wrapped):
        zero = getattr(wrapped, "optimizer", None)
        places = {
            "optimizer": getattr(zero, "offload_optimizer", None) or getattr(zero, "cpu_offload", None),
            "parameters": getattr(zero, "offload_param", None),
        }
        found = {part: "nvme" if "nvme" in str(place) else "cpu" for part, place in places.items() if place}
        return found or None
    policy = _fsdp_offload_policy(wrapped)
    return {"parameters": "cpu", "optimizer": "cpu"} if policy == "CPUOffloadPolicy" else None


def _fsdp_offload_policy(wrapped: Any) -> str | None:
    state = getattr(wrapped, "_get_fsdp_state", None)
    group = getattr(state(), "_fsdp_param_group", None) if state is not None else None
    return type(group.offload_policy).__name__ if group is not None else None


def _found(trainer: "Trainer") -> str:
    return f"{trainer.accelerator.distributed_type} with {trainer.args.world_size} process(es)"
