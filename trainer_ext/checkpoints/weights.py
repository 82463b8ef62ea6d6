"""The weights of a checkpoint of any engine, by name, each read when it is asked for.

    weights = open_weights(Path("checkpoint-500"))
    weights["classifier.weight"].read()

A file is mapped and not read, so that one tensor at a time is in memory. Nothing is unpickled but through
`trainer_ext.checkpoints.trusted`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer_ext.callbacks.averages_file import Part
from trainer_ext.checkpoints.parts import parts_of
from trainer_ext.checkpoints.trusted import load, require_trusted
from trainer_ext.checkpoints.zero_weights import zero_weights

SHARDED = "pytorch_model_fsdp_0"  # accelerate's folder of torch.distributed.checkpoint
PREFIX = "model."  # of every name in it


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: Its sizes.
        dtype: Its type.
        read: Gives it.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


Weights = dict[str, Stored]


def open_weights(folder: Path) -> tuple[str, Weights]:
    """Find the weights of a checkpoint: of DeepSpeed its float32 masters, else what the engine saved.

    Args:
        folder: A checkpoint of a `Trainer`.

    Returns:
        The format, in words, and the weights.

    Raises:
        ValueError: There are none, or only an adapter's, or they do not fit together.
        UntrustedPickleError: A pickle of them does more than hold state.
    """
    if (folder / "latest").is_file():
        tag = (folder / "latest").read_text().strip()
        require_trusted(folder, without=("training_args.bin",))
        stage, placed = zero_weights(folder / tag)
        return f"DeepSpeed ZeRO-{stage}", {name: Stored(*tensor) for name, tensor in placed.items()}
    if (folder / SHARDED).is_dir():
        require_trusted(folder / SHARDED)
        tensors, others = sharded(folder / SHARDED)
        if others:
            raise ValueError(f"{folder / SHARDED} holds {', '.join(others[:5])}, which are no tensors.")
        return "FSDP, sharded", {key.removeprefix(PREFIX): stored for key, stored in tensors.items()}
    for name, opened in (("model.safetensors", _safetensors), ("pytorch_model.bin", _saved)):
        if (folder / f"{name}.index.json").is_file():
            found: Weights = {}
            for part in _parts(folder / f"{name}.index.json"):
                found |= opened(part)
            return f"parts of {name}", found
        if (folder / name).is_file():
            return name, opened(folder / name)
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return "FSDP, whole", _saved(folder / "pytorch_model_fsdp.bin")
    if list(folder.glob("adapter_model.*")):
        raise ValueError(
            f"{folder} holds an adapter and not a model: load it with peft's PeftModel and save merge_and_unload()."
        )
    raise ValueError(f"{folder} holds no weights that are known: name a folder checkpoint-N that a Trainer saved.")


def with_averages(folder: Path, weights: Weights) -> Weights:
    """The same weights with those that `EMACallback` averaged in their place, in the type of the weights.

    Raises:
        ValueError: The checkpoint has no averages, or they are not of whole weights.
    """
    path = folder / Part(0, 1).name
    if not path.is_file():
        parts = sorted(found.name for found in folder.glob("ema-*.safetensors"))
        raise ValueError(
            f"{folder} has averages in shards of the ranks ({parts[0]} ..), which cannot be put together here: export the "
            "model that train() left, which has the averages."
            if parts
            else f"{folder} has no {path.name}: it was trained without EMACallback."
        )
    averages = _safetensors(path)
    if wrong := sorted(
        name for name in averages if name not in weights or averages[name].shape != weights[name].shape
    ):
        raise ValueError(f"{path} holds averages of other weights: {', '.join(wrong[:5])}.")
    return weights | {name: _as(weights[name].dtype, average) for name, average in averages.items()}


def _as(dtype: torch.dtype, stored: Stored) -> Stored:
    return Stored(stored.shape, dtype, lambda: stored.read().to(dtype))


def _parts(index: Path) -> list[Path]:
    try:
        return parts_of(index)
    except ValueError as error:
        raise ValueError(f"{index} {error}.") from error


def _safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, "pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    return {name: Stored(tensor.shape, tensor.dtype, partial(_tensor, path, name)) for name, tensor in mapped.items()}


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _saved(path: Path) -> Weights:
    """Of torch.save."""
    state = load(path)
    others = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if others:
        raise ValueError(f"{path} holds {', '.join(map(str, others[:5]))}, which are no tensors.")
    return {name: Stored(tensor.shape, tensor.dtype, tensor.detach) for name, tensor in state.items()}


def sharded(folder: Path) -> tuple[Weights, list[str]]:
    """What torch.distributed.checkpoint wrote: the tensors by their keys, and the keys of what is none."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def read(key: str, like: Any) -> Tensor:
        tensor = torch.empty(like.size, dtype=like.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is one process
            dcp.load({key: tensor}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return tensor

    index = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        key: Stored(kind.size, kind.properties.dtype, partial(read, key, kind))
        for key, kind in index.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    return found, sorted(index.keys() - found.keys())
