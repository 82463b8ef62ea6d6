"""The float32 weights in the files of DeepSpeed's ZeRO, and what its optimizer keeps of them: each put together from the
ranks' flat partitions.

ZeRO-1 and 2 lay the parameters of a group one behind the other, and cut the whole among the ranks:

    rank 0: [ a a a a b b ]   rank 1: [ b b c c c . ]        . is padding

ZeRO-3 cuts each parameter among the ranks, and each rank lays its parts one behind the other:

    rank 0: [ a a b b c c ]   rank 1: [ a a b b c . ]
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer_ext.checkpoints.trusted import load

OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class Placed(NamedTuple):
    """A tensor whose parts are in the files: its sizes, its type, and what puts it together."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


def zero_weights(folder: Path) -> tuple[int, dict[str, Placed]]:
    """The stage, and every weight and buffer by its name; of tied ones the first.

    Args:
        folder: A tag's, such as checkpoint-500/global_step500, whose pickles were checked.

    Raises:
        ValueError: Files of ranks are missing, or the layout is of parallelism besides the data's.
    """
    ranks = _ranks(folder)
    if not ranks:
        state = load(_file(folder, "mp_rank_00_model_states.pt"))
        return 0, _from_module(state, state["module"].keys())
    stage, optimizers = _optimizers(folder, ranks)
    if stage == 3:
        names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(len(ranks))]
        models = [load(_file(folder, name)) for name in names]
        found = _cut_each([state["fp32_flat_groups"] for state in optimizers], models[0]["param_shapes"], folder)
        return stage, found | _frozen_fragments(models) | _from_module(models[0], models[0]["buffer_names"])
    model = load(_file(folder, "mp_rank_00_model_states.pt"))
    flats = [state["single_partition_of_fp32_groups"] for state in optimizers]
    found = _cut_whole(flats, model["param_shapes"], optimizers[0].get("param_alignment_paddings"), folder)
    return stage, found | _from_module(model, model["module"].keys() - found.keys() - model["shared_params"].keys())


def zero_moments(folder: Path) -> dict[str, dict[str, Placed]]:
    """What the optimizer keeps of each parameter, by the parameter's name: moments of its shape, and numbers.

    Args:
        folder: A tag's, of ZeRO-1, 2 or 3, whose pickles were checked.

    Raises:
        ValueError: As `zero_weights`; or the groups are not at one step.
    """
    ranks = _ranks(folder)
    stage, optimizers = _optimizers(folder, ranks)
    model = load(_file(folder, f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"))
    shapes, paddings = model["param_shapes"], optimizers[0].get("param_alignment_paddings")
    states = [_by_flat(state) for state in optimizers]
    found: dict[str, dict[str, Placed]] = {name: {} for names in shapes for name in names}
    first = states[0][0] if states[0] else {}
    for key, value in first.items():
        if torch.is_tensor(value) and value.dim():
            flats = [[group[key] for group in groups] for groups in states]
            cut = _cut_each(flats, shapes, folder) if stage == 3 else _cut_whole(flats, shapes, paddings, folder)
        else:
            number = _one_number(key, states, folder)
            cut = dict.fromkeys(found, Placed(number.shape, number.dtype, number.clone))
        for name, placed in cut.items():
            found[name][key] = placed
    return found


def _optimizers(folder: Path, ranks: list[Path]) -> tuple[int, list[dict[str, Any]]]:
    """The stage, and the optimizer's state on each rank."""
    optimizers = [load(path)["optimizer_state_dict"] for path in ranks]
    _require_all(folder, optimizers[0]["partition_count"], len(ranks))
    return int(optimizers[0].get("zero_stage", 1)), optimizers


def _by_flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What one rank's base optimizer keeps of each of its flat partitions."""
    base = state["base_optimizer_state"] if "base_optimizer_state" in state else state["optimizer_state_dict"]
    return base if isinstance(base, list) else [base["state"][i] for i in sorted(base["state"])]


def _one_number(key: str, states: list[list[dict[str, Any]]], folder: Path) -> Tensor:
    """A number such as the step, which is the same for all partitions."""
    numbers = {float(group[key]) for groups in states for group in groups}
    if len(numbers) > 1:
        raise ValueError(
            f"{folder}: the optimizer's {key} is {sorted(numbers)} in its groups, where one was expected."
        )
    return torch.as_tensor(states[0][0][key])


def _ranks(folder: Path) -> list[Path]:
    """The optimizer's file of each rank, in their order."""
    matches = [match for path in folder.iterdir() if (match := OPTIMIZER.fullmatch(path.name))]
    others = [path.name for path in folder.glob("*expert*_states.pt")]
    others += [match[0] for match in matches if int(match[3])]
    if others:
        raise ValueError(
            f"{folder} has {min(others)}, of experts or of tensor parallelism, which cannot be put together here: call "
            "trainer.save_model() in a run that resumes from it."
        )
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[2]))]


def _require_all(folder: Path, count: Any, files: int) -> None:
    ranks = max(count) if isinstance(count, list) else int(count)
    if ranks != files:
        raise ValueError(f"{folder} has the optim_states.pt of {files} of {ranks} ranks: copy those of all hosts.")


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}: copy the files of all hosts.")
    return folder / name


def _cut_whole(
    flats: list[list[Tensor]], groups: list[dict[str, torch.Size]], paddings: list[list[int]] | None, folder: Path
) -> dict[str, Placed]:
    """ZeRO-1 and 2."""
    found = {}
    for number, shapes in enumerate(groups):
        parts, offset = [flat[number] for flat in flats], 0
        for place, (name, shape) in enumerate(shapes.items()):
            found[name] = _placed(shape, partial(_span, parts, offset, _numel(shape)))
            offset += _numel(shape) + (paddings[number][place] if paddings else 0)
        _require_room(folder, offset, sum(part.numel() for part in parts))
    return found


def _cut_each(flats: list[list[Tensor]], groups: list[dict[str, torch.Size]], folder: Path) -> dict[str, Placed]:
    """ZeRO-3; a parameter's part may cross from one of a rank's sub-groups into the next."""
    found, offset = {}, 0
    for name, shape in [item for shapes in groups for item in shapes.items()]:
        length = math.ceil(_numel(shape) / len(flats))
        found[name] = _placed(shape, partial(_across, flats, offset, length))
        offset += length
    _require_room(folder, offset, sum(part.numel() for part in flats[0]))
    return found


def _across(flats: list[list[Tensor]], offset: int, length: int) -> Tensor:
    """The parts of all ranks, one behind the other."""
    return torch.cat([_span(flat, offset, length) for flat in flats])


def _require_room(folder: Path, wanted: int, there: int) -> None:
    if wanted > there:
        raise ValueError(
            f"{folder} holds {there} numbers of a group of parameters, which has {wanted}: it is damaged."
        )


def _span(parts: Sequence[Tensor], offset: int, length: int) -> Tensor:
    """`length` numbers from `offset` on, of flat tensors one behind the other."""
    pieces, start = [], 0
    for part in parts:
        begin, end = max(offset - start, 0), min(offset + length - start, part.numel())
        if begin < end:
            pieces.append(part[begin:end])
        start += part.numel()
    return torch.cat(pieces) if pieces else torch.empty(0)


def _frozen_fragments(models: list[dict[str, Any]]) -> dict[str, Placed]:
    """Parameters of ZeRO-3 that are not trained, which the optimizer does not hold: one part a rank."""
    found = {}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in models]
        found[name] = _placed(shape, partial(torch.cat, parts))
    return found


def _from_module(model: dict[str, Any], names: Collection[str]) -> dict[str, Placed]:
    """What the module itself saved whole: buffers, and without ZeRO-3 what is not trained."""
    return {
        name: _placed(tensor.shape, tensor.flatten)
        if tensor.is_floating_point()
        else Placed(tensor.shape, tensor.dtype, tensor.detach)
        for name, tensor in model["module"].items()
        if name in names
    }


def _placed(shape: Any, read: Callable[[], Tensor]) -> Placed:
    """The numbers that `read` gives, without padding, in float32: the masters' type, which holds halves exactly."""
    return Placed(torch.Size(shape), torch.float32, lambda: read()[: _numel(shape)].float().reshape(shape))


def _numel(shape: Any) -> int:
    return math.prod(shape)
