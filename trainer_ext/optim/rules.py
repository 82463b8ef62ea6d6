"""Rules for single parameters, as data: a JSON list of objects, the first that claims a parameter decides on it.

A rule names conditions, all of which must hold, and what holds for the parameters that it claims:

    {"match": "*.classifier.*", "lr_multiplier": 10, "weight_decay": 0}

| condition | a parameter is claimed where |
|---|---|
| `match` | its whole name fits the pattern (`*` any characters, dots too; `?` one; `[ab]` one of these) |
| `module` | the class name of the module that owns it fits the pattern, such as `"Embedding"` or `"*Norm"` |
| `ndim` | it has so many dimensions |
| `depth` | it stands at this depth, or from the first to the second of two, such as `[0, 6]` |
| `tag` | it or its module has an attribute of this name that is true |

`lr_multiplier` takes the place of layer-wise decay and head multiplier, `weight_decay` that of the decay by type; what a
rule does not say stays as it would be without it. `name` names the group.
"""

import fnmatch
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trainer_ext.optim.depth import whole_shape

CONDITIONS = ("match", "module", "ndim", "depth", "tag")
SETTINGS = ("lr_multiplier", "weight_decay")
KEYS = (*CONDITIONS, *SETTINGS, "name")


@dataclass(frozen=True)
class Standing:
    """A parameter as rules see it.

    Attributes:
        name: Its name in `model.named_parameters()`.
        module: The module that owns it.
        parameter: The parameter itself.
        depth: Its depth, or None where none can be found.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter
    depth: int | None

    def has_tag(self, tag: str) -> bool:
        """Whether the parameter or its module carries `tag`."""
        return bool(getattr(self.parameter, tag, False) or getattr(self.module, tag, False))


@dataclass(frozen=True)
class Rule:
    """One rule; a condition that is None holds for every parameter."""

    name: str
    match: str | None = None
    module: str | None = None
    ndim: int | None = None
    depth: tuple[int, int] | None = None
    tag: str | None = None
    lr_multiplier: float | None = None
    weight_decay: float | None = None

    def fits(self, standing: Standing) -> bool:
        """Whether all its conditions hold for a parameter."""
        return (
            (self.match is None or fnmatch.fnmatchcase(standing.name, self.match))
            and (self.module is None or fnmatch.fnmatchcase(type(standing.module).__name__, self.module))
            and (self.ndim is None or len(whole_shape(standing.parameter)) == self.ndim)
            and (self.depth is None or (standing.depth is not None and _within(standing.depth, self.depth)))
            and (self.tag is None or standing.has_tag(self.tag))
        )

    def __str__(self) -> str:
        said = {key: getattr(self, key) for key in (*CONDITIONS, *SETTINGS) if getattr(self, key) is not None}
        return f"{self.name} {json.dumps(said)}"


def read_rules(text: str) -> Any:
    """The rules in `text`: JSON, or the path of a file with JSON in it.

    Raises:
        ValueError: It is neither.
    """
    source = "param_group_rules"
    if not text.lstrip().startswith(("[", "{")):
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(f"param_group_rules={text!r} is neither JSON nor a file.")
        source, text = f"param_group_rules: {path}", path.read_text()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from error


def parse_rules(rules: Any) -> list[Rule]:
    """Rules from their JSON form, a list of dicts.

    Raises:
        ValueError: With everything that is wrong with them, at once.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise ValueError(f"param_group_rules={rules!r} must be a list of dicts")  # noqa: TRY004
    if findings := [f"param_group_rules[{i}]: {what}" for i, rule in enumerate(rules) for what in _findings(rule)]:
        raise ValueError("; ".join(findings))
    return [_rule(rule, f"rule_{place}") for place, rule in enumerate(rules, start=1)]


def dead_rules(rules: Iterable[Rule], trainable: Sequence[Standing], frozen: Sequence[Standing]) -> list[str]:
    """What to say of the rules that claim no trainable parameter."""
    findings = []
    unclaimed = list(trainable)
    for rule in rules:
        if not any(map(rule.fits, unclaimed)):
            if any(map(rule.fits, trainable)):
                why = "matches only parameters that an earlier rule claims"
            elif any(map(rule.fits, frozen)):
                why = "matches only frozen parameters"
            else:
                why = "matches no parameter"
            findings.append(f"param_group_rules: {rule} {why}")
        unclaimed = [standing for standing in unclaimed if not rule.fits(standing)]
    return findings


def lora_plus(ratio: float) -> list[dict[str, Any]]:
    """LoRA+ as `param_group_rules`: the B matrices learn at `ratio` times the rate of the A matrices; decay is kept.

    Args:
        ratio: The paper finds 16 good where the A matrices have their usual rate (https://arxiv.org/abs/2402.12354).
    """
    return [{"match": "*.lora_*B.*", "lr_multiplier": ratio, "name": "lora_B"}]


def _findings(rule: Any) -> list[str]:
    if not isinstance(rule, dict):
        return [f"{rule!r} must be a dict"]
    findings = [f"{key!r} is no key of a rule; choose from {', '.join(KEYS)}" for key in rule if key not in KEYS]
    for key in ("match", "module", "tag", "name"):
        if key in rule and not (isinstance(rule[key], str) and rule[key]):
            findings.append(f"{key}={rule[key]!r} must be a text")
    if "ndim" in rule and not _is_count(rule["ndim"]):
        findings.append(f"ndim={rule['ndim']!r} must be a whole number, 0 or more")
    if "depth" in rule:
        ends = rule["depth"] if isinstance(rule["depth"], list | tuple) else [rule["depth"]] * 2
        if len(ends) != 2 or not all(map(_is_count, ends)) or ends[0] > ends[1]:
            findings.append(f"depth={rule['depth']!r} must be a whole number, or [lowest, highest]")
    if "lr_multiplier" in rule and not (is_number(rule["lr_multiplier"]) and rule["lr_multiplier"] > 0):
        findings.append(f"lr_multiplier={rule['lr_multiplier']!r} must be above 0 (to train nothing there, freeze it)")
    if "weight_decay" in rule and not (is_number(rule["weight_decay"]) and rule["weight_decay"] >= 0):
        findings.append(f"weight_decay={rule['weight_decay']!r} must be 0 or more")
    if not any(key in rule for key in CONDITIONS):
        findings.append(f"{rule} has no condition; give one of {', '.join(CONDITIONS)}")
    if not any(key in rule for key in SETTINGS):
        findings.append(f"{rule} changes nothing; give {' or '.join(SETTINGS)}")
    return findings


def _rule(rule: dict[str, Any], default_name: str) -> Rule:
    depth = rule.get("depth")
    if depth is not None:
        depth = tuple(depth) if isinstance(depth, list | tuple) else (depth, depth)
    return Rule(**{"name": default_name, **rule, "depth": depth})


def rate_findings(layerwise_lr_decay: Any, head_lr_multiplier: Any) -> list[str]:
    """What is wrong with the two factors of the learning rate."""
    findings = []
    if not (is_number(layerwise_lr_decay) and 0 < layerwise_lr_decay <= 1):
        findings.append(f"layerwise_lr_decay={layerwise_lr_decay!r} must be above 0 and at most 1 (1 is off)")
    if not (is_number(head_lr_multiplier) and head_lr_multiplier > 0):
        findings.append(f"head_lr_multiplier={head_lr_multiplier!r} must be a finite number above 0")
    return findings


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _within(depth: int, ends: tuple[int, int]) -> bool:
    return ends[0] <= depth <= ends[1]
