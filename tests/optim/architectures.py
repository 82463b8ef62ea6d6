"""The architectures of transformers on the meta device: their default sizes, and no memory."""

import warnings

import torch
from transformers import AutoModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from trainer_ext.optim.depth import find_depths, whole_shape
from trainer_ext.optim.groups import assign, groups

CORE = (
    "BertConfig",
    "DebertaV2Config",
    "ModernBertConfig",
    "LlamaConfig",
    "T5Config",
    "BartConfig",
    "ViTConfig",
    "SwinConfig",
    "MambaConfig",
    "XLNetConfig",
    "EncodecConfig",
)


def config_classes():
    """The configurations of every `AutoModel`, by name."""
    return {cls.__name__: cls for cls in MODEL_MAPPING}


def on_meta(config_class):
    """The `AutoModel` of a configuration with its default sizes, without weights."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return AutoModel.from_config(config_class())


def check_groups(model):
    """Each trainable parameter is in one group, no vector decays, every matrix does; the row of the table.

    Returns:
        Parameters, decayed, not decayed, matrices that the stock name pattern leaves out, vectors that it decays, L.
    """
    rows = assign(model, weight_decay=0.1)
    depths = find_depths(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grouped = [parameter for group in groups(rows) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(trainable)
    assert set(grouped) == set(trainable)
    decayed = {row.name for row in rows if row.settings["weight_decay"]}
    matrices = {row.name for row in rows if len(whole_shape(row.parameter)) >= 2}
    assert decayed == matrices
    if depths is not None:
        at = {depths.of[parameter].depth for parameter in trainable}
        assert at <= set(range(depths.layers + 2))
        assert set(range(1, depths.layers + 1)) <= at, "a layer without parameters: the count is off"
        scaled = assign(model, weight_decay=0.1, layerwise_lr_decay=0.5)
        assert [row.name for row in scaled] == [row.name for row in rows]
        assert all(row.lr_multiplier == 0.5 ** (depths.layers + 1 - row.depth) for row in scaled)
    stock = set(Trainer.get_decay_parameter_names(None, model)) & {row.name for row in rows}
    layers = None if depths is None else depths.layers
    return len(rows), len(decayed), len(rows) - len(decayed), len(matrices - stock), len(stock - matrices), layers
