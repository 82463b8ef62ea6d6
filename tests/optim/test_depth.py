"""Layer-wise rates against tables written by hand, and against the formula of timm and BEiT."""

import pytest
import torch
import transformers
from torch import nn

from tests.conftest import SIZES, tiny_model
from tests.optim.architectures import CORE, check_groups, on_meta
from trainer_ext.optim.depth import base_model, find_depths, head_parameters
from trainer_ext.optim.groups import assign

DECAY = 0.5  # powers of it are exact
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 64,
}
STACK = {"d_model": 16, "vocab_size": 64}
MODELS = {
    "BertForSequenceClassification": SMALL,
    "DebertaV2ForSequenceClassification": {
        **SMALL,
        "relative_attention": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": ["p2c", "c2p"],
    },
    "ModernBertForSequenceClassification": {
        **SMALL,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    },
    "LlamaForSequenceClassification": {**SMALL, "num_key_value_heads": 2},
    "T5ForConditionalGeneration": {**STACK, "d_kv": 8, "d_ff": 20, "num_layers": 3, "num_decoder_layers": 2},
    "BartForSequenceClassification": {**STACK, "encoder_layers": 2, "decoder_layers": 3},
    "ViTForImageClassification": SMALL,
}
# By hand, for three layers: the head 1, then half of it for each layer down, the embeddings 0.5 ** 4.
TABLES = {
    "BertForSequenceClassification": {
        "bert.embeddings.word_embeddings.weight": 0.0625,
        "bert.embeddings.LayerNorm.bias": 0.0625,
        "bert.encoder.layer.0.attention.self.query.weight": 0.125,
        "bert.encoder.layer.1.output.dense.bias": 0.25,
        "bert.encoder.layer.2.output.LayerNorm.weight": 0.5,
        "bert.pooler.dense.weight": 1.0,
        "classifier.weight": 1.0,
    },
    "DebertaV2ForSequenceClassification": {
        "deberta.embeddings.word_embeddings.weight": 0.0625,
        "deberta.encoder.rel_embeddings.weight": 0.0625,  # registered after the layers, and an input all the same
        "deberta.encoder.LayerNorm.weight": 0.0625,  # normalises these
        "deberta.encoder.layer.0.attention.self.query_proj.weight": 0.125,
        "deberta.encoder.layer.2.output.dense.weight": 0.5,
        "pooler.dense.weight": 1.0,
        "classifier.bias": 1.0,
    },
    "ModernBertForSequenceClassification": {
        "model.embeddings.tok_embeddings.weight": 0.0625,
        "model.embeddings.norm.weight": 0.0625,
        "model.layers.0.attn.Wqkv.weight": 0.125,
        "model.layers.2.mlp.Wo.weight": 0.5,
        "model.final_norm.weight": 1.0,
        "head.dense.weight": 1.0,
        "classifier.weight": 1.0,
    },
    "LlamaForSequenceClassification": {
        "model.embed_tokens.weight": 0.0625,
        "model.layers.0.self_attn.q_proj.weight": 0.125,
        "model.layers.1.mlp.down_proj.weight": 0.25,
        "model.layers.2.input_layernorm.weight": 0.5,
        "model.norm.weight": 1.0,
        "score.weight": 1.0,
    },
    "T5ForConditionalGeneration": {
        "shared.weight": 0.0625,
        "encoder.block.0.layer.0.SelfAttention.q.weight": 0.125,
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": 0.125,  # a block's own parts are no blocks
        "encoder.block.2.layer.0.SelfAttention.q.weight": 0.5,
        "encoder.final_layer_norm.weight": 1.0,
        "decoder.block.0.layer.0.SelfAttention.q.weight": 0.25,  # two blocks: aligned at the top
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": 0.5,
        "decoder.final_layer_norm.weight": 1.0,
    },
    "BartForSequenceClassification": {
        "model.shared.weight": 0.0625,
        "model.encoder.embed_positions.weight": 0.125,  # one below the encoder's own first block
        "model.encoder.layers.0.fc1.weight": 0.25,
        "model.encoder.layers.1.fc1.weight": 0.5,
        "model.encoder.layernorm_embedding.weight": 0.125,  # registered after the layers
        "model.decoder.embed_positions.weight": 0.0625,
        "model.decoder.layers.0.fc1.weight": 0.125,
        "model.decoder.layers.2.fc1.weight": 0.5,
        "classification_head.dense.weight": 1.0,
    },
    "ViTForImageClassification": {
        "vit.embeddings.cls_token": 0.0625,
        "vit.embeddings.position_embeddings": 0.0625,
        "vit.embeddings.patch_embeddings.projection.weight": 0.0625,
        "vit.layers.0.mlp.fc1.weight": 0.125,
        "vit.layers.1.attention.q_proj.bias": 0.25,
        "vit.layers.2.layernorm_after.weight": 0.5,
        "vit.layernorm.weight": 1.0,
        "classifier.weight": 1.0,
    },
}


def made(name):
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**MODELS[name]))


@pytest.mark.parametrize("name", TABLES)
def test_the_table_by_hand(name):
    rows = {row.name: row for row in assign(made(name), weight_decay=0.1, layerwise_lr_decay=DECAY)}
    assert {parameter: rows[parameter].lr_multiplier for parameter in TABLES[name]} == TABLES[name]
    assert {row.lr_multiplier for row in rows.values()} == {1.0, 0.5, 0.25, 0.125, 0.0625}


def timms_rates(model, depth, decay):
    """timm's `param_groups_layer_decay` and its vision transformer's `group_matcher`: layer 0 is the stem, layer i the
    i-th block, and the last layer, of `depth + 2`, the final norm and the head; each has `decay ** (last - layer)`."""
    rates = {}
    for name, _ in model.named_parameters():
        layer = depth + 1
        if name.startswith("vit.embeddings."):
            layer = 0
        elif name.startswith("vit.layers."):
            layer = int(name.split(".")[2]) + 1
        rates[name] = decay ** (depth + 1 - layer)
    return rates


def test_a_vision_transformer_has_timms_rates():
    model = made("ViTForImageClassification")
    rows = assign(model, weight_decay=0.05, layerwise_lr_decay=0.75)
    assert {row.name: row.lr_multiplier for row in rows} == timms_rates(model, 3, 0.75)


def test_stages_are_counted_block_by_block():
    config = transformers.SwinConfig(image_size=32, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=2)
    with torch.device("meta"):
        model = transformers.SwinForImageClassification(config)
    depths = find_depths(model)
    at = {name: depths.of[parameter].depth for name, parameter in model.named_parameters()}
    assert depths.layers == 3
    assert at["swin.embeddings.patch_embeddings.projection.weight"] == 0
    assert at["swin.encoder.layers.0.blocks.1.attention.q_proj.weight"] == 2
    assert at["swin.encoder.layers.0.downsample.reduction.weight"] == 2
    assert at["swin.encoder.layers.1.blocks.0.attention.q_proj.weight"] == 3
    assert at["swin.layernorm.weight"] == at["classifier.weight"] == 4


class Expert(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Linear(8, 4))


class BlockOfExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.experts = nn.ModuleList([Expert() for _ in range(5)])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([BlockOfExperts(), BlockOfExperts()])
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.norm = nn.LayerNorm(4)


def test_experts_are_no_layers_and_a_list_of_equal_length_is_counted_along():
    model = Experts()
    depths = find_depths(model)
    at = {name: depths.of[parameter].depth for name, parameter in model.named_parameters()}
    assert depths.layers == 2
    assert at["layers.0.experts.4.0.weight"] == at["norms.0.bias"] == 1
    assert at["layers.1.attention.bias"] == at["norms.1.bias"] == 2
    assert at["norm.weight"] == 3


def test_a_tied_parameter_has_its_lowest_place():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    assert find_depths(model).of[model.bert.embeddings.word_embeddings.weight].depth == 0


def test_no_blocks_is_said():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert find_depths(model) is None
    with pytest.raises(
        ValueError, match=r"no depth can be found.*; head_lr_multiplier=2.0: Sequential has no trainable h"
    ):
        assign(model, weight_decay=0.0, layerwise_lr_decay=0.9, head_lr_multiplier=2.0)


def test_the_head_is_outside_the_base_or_after_the_blocks():
    model = tiny_model()
    assert base_model(model) is model.bert
    assert head_parameters(model, find_depths(model)) == set(model.classifier.parameters())
    t5 = made("T5ForConditionalGeneration")
    after = {t5.encoder.final_layer_norm.weight, t5.decoder.final_layer_norm.weight}
    assert head_parameters(t5, find_depths(t5)) == after | {t5.lm_head.weight} - {t5.shared.weight}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_peft_is_looked_through():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    depths = find_depths(model)
    at = {name: depths.of[parameter].depth for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {depth for name, depth in at.items() if "lora" in name} == {1}
    assert {depth for name, depth in at.items() if "classifier" in name} == {2}


@pytest.mark.parametrize("config", CORE)
def test_every_family_is_grouped(config):
    assert check_groups(on_meta(getattr(transformers, config)))[-1] is not None
