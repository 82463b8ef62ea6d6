"""The averages of a checkpoint: one file beside the model, or one a rank where the ranks hold different parts."""

import os
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class Part(NamedTuple):
    """Which of the files of a checkpoint is this process's.

    Attributes:
        rank: This process; 0 where the ranks hold the same.
        of: The files of a checkpoint.
    """

    rank: int
    of: int

    @property
    def name(self) -> str:
        """`ema.safetensors`, or `ema-00001-of-00004.safetensors` for the first of four ranks."""
        return "ema.safetensors" if self.of == 1 else f"ema-{self.rank + 1:05d}-of-{self.of:05d}.safetensors"


def save_averages(folder: Path, part: Part, averages: dict[str, Tensor], *, run: str, step: int) -> None:
    """Write the averages into a checkpoint: all of the file, or none.

    Args:
        folder: The checkpoint's, which exists.
        part: This process's.
        averages: By name.
        run: The run that saves.
        step: The optimizer step of the checkpoint.
    """
    unfinished = folder / f"{part.name}.unfinished"
    save_file(averages, unfinished, metadata={"run": run, "step": str(step)})
    os.replace(unfinished, folder / part.name)


def load_averages(folder: Path, part: Part, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the averages of a checkpoint.

    Args:
        folder: The checkpoint's.
        part: This process's.
        like: The averages that are expected, for their names, shapes, types and places.

    Raises:
        ValueError: The file is missing or holds others.
    """
    if not (folder / part.name).is_file():
        raise ValueError(missing(folder, part))
    found = load_file(folder / part.name)
    wrong = sorted(found.keys() ^ like.keys())
    wrong += [name for name in found.keys() & like.keys() if found[name].shape != like[name].shape]
    if wrong:
        raise ValueError(
            f"{folder / part.name} holds averages of other weights: {', '.join(wrong[:5])} differ from what is trained. "
            "Resume with the model, the engine and the frozen parameters of the run that saved it."
        )
    return {name: average.to(like[name]) for name, average in found.items()}


def find_averages(args: TrainingArguments, part: Part, *, run: str, step: int) -> Path:
    """The folder that a run goes on from, of which a callback is not told.

    It is `args.resume_from_checkpoint` or `checkpoint-STEP` in the output folder: the one whose averages were saved by
    the run and at the step of which the checkpoint's trainer_state.json tells.

    Raises:
        ValueError: None of them is.
    """
    folders = [Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"]
    if args.resume_from_checkpoint:
        folders.insert(0, Path(args.resume_from_checkpoint))
    said = []
    for folder in folders:
        if not (folder / part.name).is_file():
            said.append(missing(folder, part))
            continue
        with safe_open(folder / part.name, framework="pt") as file:
            saved = file.metadata()
        if saved == {"run": run, "step": str(step)}:
            return folder
        said.append(f"{folder / part.name} is of another run (step {saved['step']})")
    raise ValueError(
        f"the averages of step {step}, from which this run goes on, are not found: {'; '.join(said)}. Set "
        "args.resume_from_checkpoint to the folder that train(resume_from_checkpoint=...) is given."
    )


def missing(folder: Path, part: Part) -> str:
    """Why there is no file to read."""
    others = sorted(path.name for path in folder.glob("ema*.safetensors"))
    if others:
        return f"{folder} has {', '.join(others)} of as many ranks, and this run needs {part.name}"
    return f"{folder} has no {part.name}"
