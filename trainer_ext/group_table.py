"""The parameter groups of a model as a table, from its configuration alone: no weights are read or made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoConfig

from trainer_ext.models import checkpoint_folder
from trainer_ext.optim.freezing import freeze
from trainer_ext.optim.groups import Assignment, assign
from trainer_ext.optim.rules import parse_rules, read_rules
from trainer_ext.plain_text import printable

FROZEN = "frozen"


def weightless_model(model: str, model_class: str | None = None) -> nn.Module:
    """The model on the meta device.

    Args:
        model: A hub name, a checkpoint folder, the path of a config.json, or `tiny`.
        model_class: A class of transformers; by default the one that the configuration names, else `AutoModel`.

    Raises:
        ValueError: There is no such model or class, or it cannot be made.
        ConnectionError: A hub name, and the hub does not answer.
    """
    path = Path(model).expanduser()
    source = str(path) if path.is_file() and path.suffix == ".json" else checkpoint_folder(model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model {model!r} has no configuration that can be read: {error}") from error
    name = model_class or next(iter(config.architectures or []), "AutoModel")
    cls: Any = getattr(transformers, name, None)
    if not (hasattr(cls, "from_config") or hasattr(cls, "_from_config")):
        raise ValueError(f"{name!r} is no model of transformers; name one such as AutoModelForSequenceClassification.")
    make = cls.from_config if hasattr(cls, "from_config") else cls._from_config
    try:
        with torch.device("meta"):
            return make(config)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(f"model {model!r} cannot be made as {name}: {error}") from error


def show_groups(
    model: str,
    *,
    model_class: str | None = None,
    weight_decay: float = 0.0,
    layerwise_lr_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    patterns: Sequence[str] = (),
    rules: str | None = None,
    every: bool = False,
) -> None:
    """Print the groups, or with `every` each parameter.

    Raises:
        ValueError: The options do not fit the model.
    """
    made = weightless_model(model, model_class)
    if patterns:
        freeze(made, patterns)
    rows = assign(
        made,
        weight_decay=weight_decay,
        layerwise_lr_decay=layerwise_lr_decay,
        head_lr_multiplier=head_lr_multiplier,
        rules=parse_rules(read_rules(rules)) if rules else (),
    )
    frozen = [(name, parameter) for name, parameter in made.named_parameters() if not parameter.requires_grad]
    console = Console()
    console.print(parameter_table(rows, frozen) if every else group_table(rows, frozen))
    total = sum(row.parameter.numel() for row in rows)
    console.print(
        f"{type(made).__name__}: {len(rows)} parameters are trained, {total:,} elements; {len(frozen)} frozen."
    )


def group_table(rows: Sequence[Assignment], frozen: Sequence[tuple[str, nn.Parameter]]) -> Table:
    """One line a group, lowest first."""
    table = Table()
    for column in ("group", "parameters", "elements", "lr x", "decay", "names"):
        table.add_column(column, justify="left" if column in ("group", "names") else "right", overflow="fold")
    found: dict[str, list[Assignment]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    for group, members in found.items():
        first = members[0]
        table.add_row(
            Text(printable(group)),
            str(len(members)),
            f"{sum(row.parameter.numel() for row in members):,}",
            f"{first.lr_multiplier:.4g}",
            f"{first.settings['weight_decay']:g}",
            _examples([row.name for row in members]),
        )
    if frozen:
        elements = sum(parameter.numel() for _, parameter in frozen)
        table.add_row(FROZEN, str(len(frozen)), f"{elements:,}", "", "", _examples([name for name, _ in frozen]))
    return table


def parameter_table(rows: Sequence[Assignment], frozen: Sequence[tuple[str, nn.Parameter]]) -> Table:
    """One line a parameter."""
    table = Table()
    for column in ("parameter", "shape", "group", "depth", "lr x", "decay"):
        table.add_column(column, overflow="fold")
    for row in rows:
        depth = "" if row.depth is None else str(row.depth)
        shape, decay = _shape(row.parameter), f"{row.settings['weight_decay']:g}"
        table.add_row(row.name, shape, row.group, depth, f"{row.lr_multiplier:.4g}", decay)
    for name, parameter in frozen:
        table.add_row(Text(printable(name)), _shape(parameter), FROZEN, "", "", "")
    return table


def _shape(parameter: nn.Parameter) -> str:
    return "x".join(map(str, parameter.shape)) or "scalar"


def _examples(names: list[str]) -> Text:
    shown = names[0] if len(names) == 1 else f"{names[0]}, {'.. ' if len(names) > 2 else ''}{names[-1]}"
    return Text(printable(shown))
