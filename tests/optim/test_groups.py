"""Parameter groups: by type and dimension where names mislead; rates, rules and freezing."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    Trainer,
)

from tests.conftest import SIZES, tiny_model
from trainer_ext.optim.freezing import freeze
from trainer_ext.optim.groups import assign, groups
from trainer_ext.optim.rules import lora_plus, parse_rules, read_rules


def two_layers():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_hidden_layers": 2}))


def decayed(model):
    return {row.name for row in assign(model, weight_decay=0.1) if row.settings["weight_decay"]}


def test_bert_decays_its_matrices():
    model = tiny_model()
    assert decayed(model) == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert not any("bias" in name or "LayerNorm" in name for name in decayed(model))


def test_an_architecture_whose_name_holds_layernorm_decays_too():
    model = RobertaPreLayerNormForSequenceClassification(RobertaPreLayerNormConfig(**SIZES))
    by_name = set(Trainer.get_decay_parameter_names(None, model))
    ours = decayed(model)
    assert ours == {name for name, p in model.named_parameters() if p.ndim == 2}
    assert len(ours - by_name) > 5  # what the name pattern leaves without decay


def test_normalisation_of_two_dimensions_does_not_decay():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 4))
    assert decayed(model) == {"1.weight"}


def test_a_tied_parameter_stands_once():
    model = BertForMaskedLM(BertConfig(**SIZES))
    names = [row.name for row in assign(model, weight_decay=0.1)]
    assert len(names) == len(set(names)) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out_and_the_rest_is_whole():
    model = tiny_model()
    model.bert.embeddings.requires_grad_(False)
    rows = assign(model, weight_decay=0.1)
    assert {row.name for row in rows} == {name for name, p in model.named_parameters() if p.requires_grad}
    grouped = [p for group in groups(rows) for p in group["params"]]
    assert len(grouped) == len(rows)
    torch.optim.AdamW(groups(rows))  # refuses a parameter that is in two groups


def test_groups_do_not_depend_on_the_decay():
    """A run with decay 0 keeps its two groups, so that its optimizer state fits a run with decay."""
    found = groups(assign(tiny_model(), weight_decay=0.0))
    assert [group["weight_decay"] for group in found] == [0.0, 0.0]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        assign(nn.Linear(2, 2).requires_grad_(False), weight_decay=0.1)


# Rates


def test_scaled_groups_carry_their_rate():
    rows = assign(two_layers(), weight_decay=0.1, layerwise_lr_decay=0.5, head_lr_multiplier=8.0)
    found = {row.group: row.lr_multiplier for row in rows}
    assert found["head.decay"] == found["head.no_decay"] == 8.0
    assert found["depth_3.decay"] == 1.0  # the pooler, above both layers
    assert [found[f"depth_{i}.decay"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert {row.settings["weight_decay"] for row in rows if row.group.endswith("no_decay")} == {0.0}
    torch_groups = groups(rows, lr=1024.0)
    assert len(torch_groups) == len(found)
    assert torch.optim.AdamW(torch_groups).param_groups[0]["lr"] == 128.0
    with pytest.raises(ValueError, match="there is no rate"):
        groups(rows)


def test_the_head_alone_leaves_the_other_groups_as_they_are():
    rows = assign(two_layers(), weight_decay=0.1, head_lr_multiplier=8.0)
    assert {row.group for row in rows} == {"decay", "no_decay", "head.decay", "head.no_decay"}
    assert [set(group) for group in groups(rows, lr=1.0)][:2] == [{"params", "name", "weight_decay"}] * 2


def test_a_tag_keeps_a_matrix_from_decaying():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight._no_weight_decay = True
    model[1]._no_weight_decay = True
    assert decayed(model) == {"2.weight"}


# Rules


def by_name(model, *rules, **options):
    return {row.name: row for row in assign(model, weight_decay=0.1, rules=parse_rules(rules), **options)}


def test_the_first_rule_claims_and_what_it_leaves_open_stays():
    rows = by_name(
        two_layers(),
        {"match": "classifier.weight", "lr_multiplier": 10, "weight_decay": 0},
        {"match": "classifier.*", "lr_multiplier": 20, "name": "mine"},
        {"module": "Embedding", "weight_decay": 0.5},
        {"depth": [1, 2], "ndim": 1, "weight_decay": 0.25},
        layerwise_lr_decay=0.5,
    )
    assert rows["classifier.weight"].settings == {"lr_multiplier": 10.0, "weight_decay": 0.0}
    assert rows["classifier.bias"].settings == {"lr_multiplier": 20.0, "weight_decay": 0.0}
    assert rows["classifier.bias"].group == "mine.no_decay"
    words = rows["bert.embeddings.word_embeddings.weight"]
    assert words.settings == {"lr_multiplier": 0.125, "weight_decay": 0.5}
    assert words.group == "rule_3.depth_0"
    assert rows["bert.encoder.layer.0.output.dense.bias"].settings["weight_decay"] == 0.25
    assert rows["bert.encoder.layer.0.output.dense.weight"].settings["weight_decay"] == 0.1
    assert rows["bert.pooler.dense.bias"].settings["weight_decay"] == 0.0


def test_dead_rules_are_errors_all_at_once():
    model = two_layers()
    model.bert.embeddings.requires_grad_(False)
    with pytest.raises(ValueError) as error:
        by_name(
            model,
            {"match": "*.nowhere.*", "lr_multiplier": 2},
            {"match": "classifier.*", "lr_multiplier": 2},
            {"match": "classifier.weight", "weight_decay": 0},
            {"depth": 0, "weight_decay": 0},
            {"tag": "_mine", "weight_decay": 0},
        )
    assert [finding.rpartition("} ")[2] for finding in str(error.value).split("; ")] == [
        "matches no parameter",
        "matches only parameters that an earlier rule claims",
        "matches only frozen parameters",
        "matches no parameter",
    ]


def test_what_is_wrong_with_rules_is_said_at_once():
    wrong = [
        {"mtach": "*", "lr_multiplier": 0},
        {"match": "*"},
        3,
        {"ndim": -1, "depth": [2, 1], "weight_decay": True},
    ]
    with pytest.raises(ValueError) as error:
        parse_rules(wrong)
    said = str(error.value)
    for part in (
        "[0]: 'mtach' is no key of a rule",
        "[0]: lr_multiplier=0 must be above 0",
        "has no condition",
        "[1]: {'match': '*'} changes nothing",
        "[2]: 3 must be a dict",
        "ndim=-1 must be a whole number",
        "depth=[2, 1] must be a whole number, or [lowest, highest]",
        "weight_decay=True must be 0 or more",
    ):
        assert part in said


def test_rules_come_as_json_or_from_a_file(tmp_path):
    file = tmp_path / "rules.json"
    file.write_text('[{"ndim": 1, "weight_decay": 0}]')
    assert read_rules(str(file)) == read_rules(file.read_text()) == [{"ndim": 1, "weight_decay": 0}]
    with pytest.raises(ValueError, match="neither JSON nor a file"):
        read_rules(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="not valid JSON"):
        read_rules("[{")


PEFT_ASKS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # peft reads it


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_lora_plus_raises_b_alone_and_keeps_decay():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(two_layers(), LoraConfig(target_modules=["query", "word_embeddings"]))
    rows = by_name(model, *lora_plus(16))
    assert rows
    for name, row in rows.items():
        is_b = "lora_B" in name or "lora_embedding_B" in name
        assert row.lr_multiplier == (16.0 if is_b else 1.0)
        assert row.settings["weight_decay"] == 0.1


# Freezing


def test_freezing_by_place_and_by_name():
    model = two_layers()
    frozen = freeze(model, ["embeddings", "layers:1", "bert.pooler.*"])
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    assert kept == {n for n, _ in model.named_parameters() if "layer.1." in n or n.startswith("classifier")}


def test_what_matches_nothing_freezes_nothing():
    model = two_layers()
    with pytest.raises(ValueError) as error:
        freeze(model, ["embeddings", "bert.pooler", "nowhere*", "layers:3"])
    assert "'bert.pooler.*' matches what is in it" in str(error.value)
    assert "'nowhere*' matches no parameter" in str(error.value)
    assert "'layers:3' is more than the 2 layers" in str(error.value)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="'embeddings' needs the depth"):
        freeze(nn.Linear(2, 2), ["embeddings"])
