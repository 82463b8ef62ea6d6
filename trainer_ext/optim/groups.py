"""Which parameter gets which settings: a table first, torch's parameter groups from it.

A parameter's settings come from the first of these that speaks:

1. the first of `rules` that claims it, for what that rule says;
2. the recipes: for its learning rate `layerwise_lr_decay ** (L + 1 - depth)`, times `head_lr_multiplier` in the head; for
   its weight decay none where it is a bias, a normalisation's or has less than two dimensions, else `weight_decay`.

Weight decay pulls matrices towards zero; on biases and on the scales of normalisation layers it only fights
the training. What a parameter is, is read from its module's type and its dimension, never from its name:
name patterns miss `RobertaPreLayerNorm*` and hit every module that happens to be called `norm_proj`.

Layer-wise decay (ULMFiT, https://arxiv.org/abs/1801.06146; as BEiT, https://arxiv.org/abs/2106.08254, counts): the head
learns at the full rate, the top block at `decay` of it, the embeddings at `decay ** (L + 1)`. See `depth.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer_ext.optim.depth import NORMALISATION, Depths, find_depths, head_parameters, whole_shape
from trainer_ext.optim.rules import Rule, Standing, dead_rules, rate_findings

NO_DECAY_TAG = "_no_weight_decay"  # what models such as Mamba's set on a matrix that must not decay


@dataclass(frozen=True)
class Assignment:
    """One row of the table: a trainable parameter and the settings of its group.

    Attributes:
        name: The parameter's name in `model.named_parameters()`.
        parameter: The parameter itself.
        group: The name of its group, such as `decay` or `depth_3.no_decay`.
        settings: What that group carries besides the optimizer's defaults: `weight_decay`, and `lr_multiplier` where its
            rate is not the run's own.
        depth: Where it stands (`depth.py`), or None where no blocks were found.
        in_block: Whether it stands in one of the blocks.
    """

    name: str
    parameter: nn.Parameter
    group: str
    settings: dict[str, Any]
    depth: int | None = None
    in_block: bool = False

    @property
    def lr_multiplier(self) -> float:
        """Its learning rate, as a multiple of the run's."""
        return self.settings.get("lr_multiplier", 1.0)


def assign(
    model: nn.Module,
    *,
    weight_decay: float,
    layerwise_lr_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    rules: Sequence[Rule] = (),
) -> list[Assignment]:
    """The settings of every trainable parameter, in the model's own order; a tied parameter stands once.

    Args:
        model: Any module; it is read, never changed.
        weight_decay: The decay of matrices (two or more dimensions, outside normalisation layers);
            everything else gets 0.
        layerwise_lr_decay: The factor from each layer to the one below; 1 for equal rates.
        head_lr_multiplier: Of the learning rate of what is outside the base model, or, where the model is its own
            base, of what comes after the last block.
        rules: What holds for some parameters instead.

    Raises:
        ValueError: With all that cannot be done: no parameter is trainable, no depth or no head can be found where one
            is needed, or a rule claims nothing.
    """
    depths = find_depths(model)
    head = head_parameters(model, depths)
    trainable: list[Standing] = []
    frozen: list[Standing] = []
    for name, module, parameter in _owned_parameters(model):
        standing = Standing(name, module, parameter, depths.of[parameter].depth if depths is not None else None)
        (trainable if parameter.requires_grad else frozen).append(standing)
    findings = rate_findings(layerwise_lr_decay, head_lr_multiplier) + dead_rules(rules, trainable, frozen)
    if not trainable:
        findings = [f"{type(model).__name__} has no trainable parameter: every one has requires_grad=False."]
    if layerwise_lr_decay != 1 and depths is None:
        findings.append(
            f"layerwise_lr_decay={layerwise_lr_decay}: {type(model).__name__} has no numbered list of blocks, so that no "
            "depth can be found; use param_group_rules"
        )
    if head_lr_multiplier != 1 and not any(standing.parameter in head for standing in trainable):
        findings.append(
            f"head_lr_multiplier={head_lr_multiplier}: {type(model).__name__} has no trainable head, neither outside its "
            "base model nor after its last block; use param_group_rules"
        )
    if findings:
        raise ValueError("; ".join(findings))
    recipe = _Recipe(weight_decay, layerwise_lr_decay, head_lr_multiplier, depths, head)
    return [
        recipe.row(standing, next((rule for rule in rules if rule.fits(standing)), None)) for standing in trainable
    ]


def decays(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to `parameter`, which belongs to `module` itself."""
    tagged = getattr(parameter, NO_DECAY_TAG, False) or getattr(module, NO_DECAY_TAG, False)
    return len(whole_shape(parameter)) >= 2 and not isinstance(module, NORMALISATION) and not tagged


def groups(rows: Sequence[Assignment], lr: float | None = None) -> list[dict[str, Any]]:
    """Torch's parameter groups, in order of appearance, each with its `name`.

    Args:
        rows: The table.
        lr: The run's learning rate, where one group's is a multiple of it.

    Raises:
        ValueError: A rate is to be multiplied and there is none.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        settings = dict(row.settings)
        if (multiplier := settings.pop("lr_multiplier", None)) is not None:
            if lr is None:
                raise ValueError(f"group {row.group} has {multiplier} times the learning rate, and there is no rate.")
            settings["lr"] = lr * multiplier
        found.setdefault(row.group, {"params": [], "name": row.group, **settings})["params"].append(row.parameter)
    return list(found.values())


@dataclass(frozen=True)
class _Recipe:
    weight_decay: float
    layerwise_lr_decay: float
    head_lr_multiplier: float
    depths: Depths | None
    head: set[nn.Parameter]

    def row(self, standing: Standing, rule: Rule | None) -> Assignment:
        """The settings of one parameter, and the name of the group that has exactly these."""
        parts, settings = [], {}
        if rule is not None:
            parts.append(rule.name)
        if rule is not None and rule.lr_multiplier is not None:
            settings["lr_multiplier"] = float(rule.lr_multiplier)
        elif (scaled := self._rate(standing)) is not None:
            where, settings["lr_multiplier"] = scaled
            parts.append(where)
        if rule is not None and rule.weight_decay is not None:
            settings["weight_decay"] = float(rule.weight_decay)
        else:
            decaying = decays(standing.module, standing.parameter)
            settings["weight_decay"] = self.weight_decay if decaying else 0.0
            parts.append("decay" if decaying else "no_decay")
        place = self.depths.of[standing.parameter] if self.depths is not None else None
        in_block = place is not None and bool(place.layer)
        return Assignment(standing.name, standing.parameter, ".".join(parts), settings, standing.depth, in_block)

    def _rate(self, standing: Standing) -> tuple[str, float] | None:
        """What a rate is scaled by and where; None where it is left alone."""
        layers = self.depths if self.layerwise_lr_decay != 1 else None
        scale = self.layerwise_lr_decay ** layers.distance(standing.parameter) if layers is not None else 1.0
        if self.head_lr_multiplier != 1 and standing.parameter in self.head:
            return "head", scale * self.head_lr_multiplier
        return (f"depth_{standing.depth}", scale) if layers is not None else None


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, module, parameter
