"""Which parameters are not trained: patterns in, `requires_grad=False` on what they match.

This changes the model, so it stands apart from the groups, which only read it. It has to happen before an engine wraps
the model: DDP, FSDP and ZeRO look at `requires_grad` once.
"""

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

from trainer_ext.optim.depth import Depths, find_depths

EMBEDDINGS = "embeddings"
LAYERS = re.compile(r"layers:([1-9]\d*)")


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Set `requires_grad=False` on every parameter that one of `patterns` matches.

    Args:
        model: It is changed.
        patterns: `"embeddings"`, everything before the first block; `"layers:N"`, the first N blocks of each list of
            blocks (without the embeddings); else a pattern for whole parameter names, such as `"bert.pooler.*"`.
            A tied parameter is frozen where one of its names matches.

    Returns:
        The names of the frozen parameters, in the model's order.

    Raises:
        ValueError: A pattern matches nothing; nothing is frozen then. All such are named.
    """
    depths = find_depths(model)
    findings, chosen = [], set()
    for pattern in patterns:
        matched = _matched(model, depths, pattern)
        if isinstance(matched, str):
            findings.append(f"freeze: {pattern!r} {matched}")
        else:
            chosen |= matched
    if findings:
        raise ValueError("; ".join(findings))
    for parameter in chosen:
        parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter in chosen]


def _matched(model: nn.Module, depths: Depths | None, pattern: str) -> set[nn.Parameter] | str:
    """The parameters that `pattern` means, or why there are none."""
    layers = LAYERS.fullmatch(pattern)
    if layers is None and pattern != EMBEDDINGS:
        named = model.named_parameters(remove_duplicate=False)
        found = {parameter for name, parameter in named if fnmatch.fnmatchcase(name, pattern)}
        if found:
            return found
        inside = any(name.startswith(f"{pattern}.") for name, _ in model.named_parameters())
        hint = f"; {pattern + '.*'!r} matches what is in it" if inside else ""
        return f"matches no parameter of {type(model).__name__}{hint}"
    if depths is None:
        return f"needs the depth of parameters, and {type(model).__name__} has no numbered list of blocks"
    last = 0 if layers is None else int(layers[1])
    if last > depths.layers:
        return f"is more than the {depths.layers} layers of {type(model).__name__}"
    first = min(last, 1)
    found = {parameter for parameter, at in depths.of.items() if at.layer is not None and first <= at.layer <= last}
    return found or f"matches no parameter of {type(model).__name__}"
