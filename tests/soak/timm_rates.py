"""The rate of every parameter of some of timm's models, ours and timm's, as JSON: a process of its own.

timm needs torchvision to be imported, whose compiled operators a CPU build of torch cannot load and timm does not call:
two of them have to be known by name. transformers would not bear such a torchvision beside it.
"""

import json

import torch

NAMED = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    NAMED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from timm.optim import param_groups_layer_decay  # noqa: E402

from trainer_ext.optim.groups import assign  # noqa: E402

MODELS = ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224",
          "convnext_tiny")  # fmt: skip
DECAY = 0.75


def rates(name):
    """By parameter: our multiplier and timm's."""
    model = timm.create_model(name, pretrained=False)
    groups = param_groups_layer_decay(model, layer_decay=DECAY)
    theirs = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    ours = assign(model, weight_decay=0.05, layerwise_lr_decay=DECAY)
    assert {row.parameter for row in ours} == set(theirs)
    return {row.name: (row.lr_multiplier, theirs[row.parameter]) for row in ours}


if __name__ == "__main__":
    print(json.dumps({name: rates(name) for name in MODELS}))
