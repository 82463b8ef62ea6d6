"""From a checkpoint of any engine to a folder for `from_pretrained`, on the CPU.

    export(Path("runs/a/checkpoint-500"), Path("runs/a/model"))

Written beside the folder, shard by shard, loaded and compared there, and only then renamed into place.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils import logging

from trainer_ext.checkpoints.durable import sync_folder, sync_tree
from trainer_ext.checkpoints.resume import named
from trainer_ext.checkpoints.weights import Stored, Weights, open_weights, with_averages
from trainer_ext.rehearsal.exported import file_digest

logger = logging.get_logger(__name__)

WRITTEN = "export.json"  # what an export says of itself: by it a folder is known to be one
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# What describes a model and its inputs; data alone, no code and no pickles.
DESCRIBING = (
    *(CONFIG, "generation_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json", "vocab.txt"),
    *("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.json", "chat_template.jinja"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        source: The checkpoint's format, in words.
        tensors: How many.
        files: The names of the files.
    """

    folder: Path
    source: str
    tensors: int
    files: list[str]


def export(
    checkpoint: Path,
    out: Path,
    *,
    max_shard_size: str = "5GB",
    averages: bool = False,
    described_by: Path | None = None,
) -> Exported:
    """Write a checkpoint's weights as safetensors, with its configuration and tokenizer.

    Args:
        checkpoint: A folder checkpoint-N: plain, of DDP, of DeepSpeed's ZeRO, or of FSDP, whole or sharded.
        out: The folder to write: a new one, an empty one, or an earlier export, which is replaced.
        max_shard_size: Of a file, such as `5GB` or `200MB`; about as much is in memory while it is written.
        averages: Whether the averages of `EMACallback` are written in the place of the weights.
        described_by: A folder with config.json and tokenizer, for a checkpoint that has none.

    Raises:
        ValueError: The checkpoint cannot be exported, or `out` holds something else.
        BadCheckpointError: The checkpoint is not as it was saved.
        UntrustedPickleError: A pickle of the weights does more than hold state; nothing was written.
        RuntimeError: What was written does not load as it should; nothing is left of it.
    """
    _check_out(out, checkpoint)
    shard_size = _bytes(max_shard_size)
    for note in named(checkpoint).notes():
        logger.warning(note)
    files = _describing(described_by or checkpoint, checkpoint)
    source, weights = open_weights(checkpoint)
    weights = with_averages(checkpoint, weights) if averages else weights
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        for path in files:
            shutil.copyfile(path, staging / path.name)
        _write_config(staging / CONFIG, weights)
        _write_weights(staging, weights, shard_size)
        _verify(staging, weights)
        digests = {path.name: file_digest(path) for path in sorted(staging.iterdir())}
        said = {"checkpoint": str(checkpoint), "format": source, "averages": averages, "files": digests}
        (staging / WRITTEN).write_text(json.dumps(said, indent=1))
        _into_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(out, source, len(weights), sorted(digests))


def _check_out(out: Path, checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint}: there is no such checkpoint folder.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is a file or a link; name a folder to write.")
    here, there = out.resolve(), checkpoint.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"{out} and the checkpoint {checkpoint} lie in one another; name a folder of its own.")
    if out.is_dir() and any(out.iterdir()) and not _is_an_export(out):
        raise ValueError(f"{out} holds other files than an export's; name a new folder, or empty this one.")


def _is_an_export(folder: Path) -> bool:
    """Whether all that is in a folder is what an earlier export wrote there."""
    try:
        said = json.loads((folder / WRITTEN).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    there = {path.name for path in folder.iterdir()}
    return there == {*said, WRITTEN} and all(file_digest(folder / name) == sha for name, sha in said.items())


def _describing(folder: Path, checkpoint: Path) -> list[Path]:
    found = [folder / name for name in DESCRIBING if (folder / name).is_file()]
    for path in found:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of its folder: copy the folder with cp -rL."
            )
    if folder / CONFIG not in found:
        raise ValueError(
            f"{folder} has no {CONFIG}, by which the model is built. Give --model FOLDER with the one of the model that "
            f"{checkpoint.name} was trained from."
        )
    return found


def _write_config(path: Path, weights: Weights) -> None:
    """The same configuration, with the type that the weights have, in which they are then loaded."""
    config = json.loads(path.read_text())
    dtypes = {str(stored.dtype) for stored in weights.values() if stored.dtype.is_floating_point}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop().removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _bytes(size: str) -> int:
    """The number that stands before KB, MB, GB or TB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])B", size.strip().upper())
    if found is None or not float(found[1]):
        raise ValueError(f"max_shard_size={size!r} is no size of a file; write one such as 200MB or 5GB.")
    return int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2])))


def _write_weights(folder: Path, weights: Weights, shard_size: int) -> None:
    like = {name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in weights.items()}
    split = split_torch_state_dict_into_shards(
        like, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: _own(weights[name]) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _own(stored: Stored) -> torch.Tensor:
    """In memory of its own: tied weights, which one file may map twice, are not saved as one."""
    return stored.read().clone(memory_format=torch.contiguous_format)


def _verify(folder: Path, weights: Weights) -> None:
    """Load what was written as a user would, and compare every tensor with the checkpoint's.

    Raises:
        ValueError: The architecture is none of transformers'.
        RuntimeError: Something is missing, not expected, or not equal.
    """
    model, said = _loaded(folder)
    wrong = [f"{kind.replace('_keys', '')} {name}" for kind, names in said.items() for name in map(str, sorted(names))]
    there = model.state_dict()
    wrong += [f"changed {name}" for name, stored in weights.items() if name in there and _differs(there[name], stored)]
    if wrong:
        raise RuntimeError(f"the exported model does not load as it was trained: {', '.join(wrong[:5])}.")


def _differs(loaded: torch.Tensor, stored: Stored) -> bool:
    return loaded.dtype != stored.dtype or not torch.equal(_bits(loaded), _bits(stored.read()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, in which a NaN is equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    import transformers

    config = json.loads((folder / CONFIG).read_text())
    architecture = (config.get("architectures") or [None])[0]
    cls = getattr(transformers, str(architecture), None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ValueError(
            f"{CONFIG} names the architecture {architecture!r}, which is none of transformers' own; code that comes with a "
            "model is not run. Load the checkpoint in a script that has the class, and call its save_pretrained."
        )
    model, said = cls.from_pretrained(
        folder, output_loading_info=True, dtype="auto", local_files_only=True, ignore_mismatched_sizes=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model, {kind: said.get(kind, ()) for kind in kinds}


def _into_place(staging: Path, out: Path) -> None:
    """Rename the finished folder; an earlier export stands aside until that is done."""
    sync_tree(staging)
    aside = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.rename(out, aside)
    os.rename(staging, out)
    sync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
