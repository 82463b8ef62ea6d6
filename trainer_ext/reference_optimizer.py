"""The optimizer of the plain loops: groups made by hand, from the parameters' names and dimensions alone.

What `CustomTrainer` reads from how modules are nested (`optim/groups.py`), this reads from names such as
`bert.encoder.layer.3.output.dense.weight`, so that neither can be wrong unseen.
"""

import re
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from trainer_ext.loop_settings import LoopSettings
from trainer_ext.optim.muon import MuonWithAdamW


def build_optimizer(model: nn.Module, settings: LoopSettings) -> Optimizer:
    """AdamW over a group for each rate: matrices, which decay, and all else (biases, scales), which does not.

    With `settings.muon`, Muon takes the matrices of the numbered layers.
    """
    layers = {name: numbered_layer(name) for name, _ in model.named_parameters()}
    top, base = max(layers.values()), f"{getattr(model, 'base_model_prefix', '')}."
    members: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer = layers[name] if layers[name] or "embed" in name else top + 1
            head = 1.0 if name.startswith(base) else settings.head_lr_multiplier
            multiplier = settings.layerwise_lr_decay ** (top + 1 - layer) * head
            hidden = settings.muon and parameter.ndim == 2 and layers[name] > 0
            members.setdefault((multiplier, parameter.ndim >= 2, hidden), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": of, "lr": settings.learning_rate * multiplier, "weight_decay": settings.weight_decay * matrices}
        for (multiplier, matrices, _), of in members.items()
    ]
    common: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.epsilon}
    if settings.muon:
        for group, (*_, hidden) in zip(groups, members, strict=True):
            group["use_muon"] = hidden
        return MuonWithAdamW(groups, **common)
    return AdamW(groups, **common, fused=settings.fused)


def numbered_layer(name: str) -> int:
    """The layer of a parameter from 1, read from its name (`bert.encoder.layer.3.` is 4); 0 where it is in none."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) + 1 if number else 0
