"""Muon for the hidden matrices, AdamW for the rest: one torch optimizer, so that one schedule drives both.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the orthogonalised momentum of a matrix. It is meant for the
matrices inside the blocks; embeddings, the head and everything of one dimension take AdamW. By default its step has the
size of AdamW's (`0.2 * sqrt(max(rows, columns))`, https://arxiv.org/abs/2502.16982), so that both share one learning rate.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from trainer_ext.optim.depth import whole_shape
from trainer_ext.optim.groups import Assignment

MUON = "use_muon"


def with_muon(rows: Sequence[Assignment], model: nn.Module) -> list[Assignment]:
    """The table with `use_muon` in the settings: True for matrices inside the blocks that are no embeddings.

    Raises:
        ValueError: There is no such matrix.
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    split = []
    for row in rows:
        hidden = row.in_block and len(whole_shape(row.parameter)) == 2 and row.parameter not in embeddings
        group = f"{row.group}.muon" if hidden else row.group
        split.append(replace(row, group=group, settings={**row.settings, MUON: hidden}))
    if not any(row.settings[MUON] for row in split):
        raise ValueError(f"{type(model).__name__} has no trainable matrix in a numbered list of blocks for Muon.")
    return split


class MuonWithAdamW(Optimizer):
    """Two optimizers behind one: groups with `use_muon` true are stepped by `torch.optim.Muon`, the others by AdamW.

    Groups, state and `state_dict` are one, so schedulers and checkpoints see a single optimizer. Muon needs each matrix
    whole: under FSDP2 each rank keeps the momentum of its shard, gathers one matrix after the other and orthogonalises it.
    ZeRO flattens its parameters, so it cannot.

    Args:
        params: Groups with `use_muon`, as `groups(with_muon(assign(...), model))` makes them.
        lr: The learning rate of groups without their own.
        weight_decay: Likewise.
        muon: Options of `torch.optim.Muon`, such as `{"momentum": 0.95}`.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ValueError: A group does not say whether Muon steps it.
        RuntimeError: This torch has no Muon (it came with 2.9).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        muon: dict[str, Any] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise RuntimeError(f"torch {torch.__version__} has no Muon; it came with 2.9.")
        listed = list(params)
        if missing := [
            place for place, group in enumerate(listed) if not isinstance(group, dict) or MUON not in group
        ]:
            raise ValueError(f"groups {missing} do not say {MUON}: make them with groups(with_muon(rows, model)).")
        common = {"lr": lr, "weight_decay": weight_decay}
        hidden = {**common, "adjust_lr_fn": "match_rms_adamw", **(muon or {})}
        others = {**common, "betas": betas, "eps": eps}
        self._steppers: dict[bool, Optimizer] = {}
        for use_muon, (cls, options) in {True: (torch.optim.Muon, hidden), False: (AdamW, others)}.items():
            if own := [group for group in listed if group[MUON] is use_muon]:
                self._steppers[use_muon] = cls(own, **options)  # fills each group with what it needs
        filled = [group for inner in self._steppers.values() for group in inner.param_groups]
        super().__init__(filled, common)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon, inner in self._steppers.items():  # groups and state are replaced where a checkpoint is loaded
            inner.param_groups = [group for group in self.param_groups if group[MUON] is use_muon]
            inner.state = self.state
            if use_muon and any(isinstance(p, DTensor) for group in inner.param_groups for p in group["params"]):
                _step_shards(inner)
            else:
                inner.step()
        return loss


def _step_shards(muon: Optimizer) -> None:
    """`torch.optim.Muon.step`, with each matrix gathered to be orthogonalised: in torch's own, the sharded products
    are added up over the ranks in bfloat16."""
    from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

    for group in muon.param_groups:
        lr, momentum = float(group["lr"]), group["momentum"]
        for parameter in group["params"]:
            if (grad := parameter.grad) is None:
                continue
            held = muon.state[parameter].setdefault("momentum_buffer", torch.zeros_like(grad))
            held.lerp_(grad, 1 - momentum)
            update = grad.lerp(held, momentum) if group["nesterov"] else held
            whole = _zeropower_via_newtonschulz(
                update.full_tensor(), group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            own = DTensor.from_local(whole, update.device_mesh).redistribute(placements=update.placements)
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(own, alpha=-_adjust_lr(lr, group["adjust_lr_fn"], parameter.shape))
