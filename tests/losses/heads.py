"""The heads of transformers' models that the loss is proved on, and how far a trainer is off on one of them.

Every model is tiny, has random weights and no dropout. None has batch normalisation, whose output depends on how the
rows are split, so that no loss could be exact.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import default_data_collator

from tests.conftest import SIZES, rows
from tests.test_exactness import first_step

ROWS, TOKENS, CLASSES, CHOICES, PIXELS = 16, 8, 3, 2, 8
PAD, BEGIN, END, IGNORED = 0, 1, 2, -100
TOLERANCE = 1e-5  # what float32 sums in another order may be off


@dataclass(frozen=True, eq=False)
class Head:
    """One head of one model.

    Attributes:
        task: A name in `TASKS`.
        model: The model's class in transformers.
        options: What its config needs besides `COMMON` and the task's own; None leaves the config its default.
    """

    task: str
    model: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.task}: {self.model}"

    def make(self) -> nn.Module:
        model = getattr(transformers, self.model)
        options = {**COMMON, **TASKS[self.task].options, **self.options}
        config = model.config_class(**{name: value for name, value in options.items() if value is not None})
        for name, value in list(vars(config).items()):
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        torch.manual_seed(0)
        return model(config)


@dataclass(frozen=True)
class Measured:
    """A step of four micro-batches of four rows, beside the same rows in one batch through the head and autograd.

    Attributes:
        loss: The step's loss, as a multiple of the batch's.
        gradient: The norm of its gradient before clipping, likewise.
        loss_error: How far the loss is off, as a share of the batch's.
        gradient_error: How far the gradient's worst element is off, as a share of the batch's largest.
    """

    loss: float
    gradient: float
    loss_error: float
    gradient_error: float


def measure(head: Head, make: Callable[..., Any], cls: type, **options: Any) -> Measured:
    """How far a trainer is off that splits a step into micro-batches.

    Args:
        head: The model and its rows.
        make: The fixture `trainer`.
        cls: The trainer's class.
        options: Training arguments, such as `loss`.
    """
    model, true_loss, true = whole_batch(head)
    loss, found = first_step(make, cls, model=model, data=rows_of(head.task), batch=4, accumulation=4, **options)
    assert found.keys() == true.keys()
    worst = torch.stack([(found[name] - g).abs().max() for name, g in true.items()]).max()  # NaN where one is
    return Measured(
        loss=(loss / true_loss).item(),
        gradient=(_norm(found) / _norm(true)).item(),
        loss_error=(abs(loss - true_loss) / abs(true_loss)).item(),
        gradient_error=(worst / max(g.abs().max() for g in true.values())).item(),
    )


@cache
def whole_batch(head: Head) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """The untrained model, and the loss and gradient of all rows as one batch."""
    model = head.make()
    whole = copy.deepcopy(model).train()
    loss = whole(**default_data_collator(list(rows_of(head.task)))).loss
    loss.backward()
    return model, loss.detach(), {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


@cache
def rows_of(task: str) -> Dataset:
    return Dataset.from_dict({name: value.tolist() for name, value in TASKS[task].columns().items()})


def _norm(gradient: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.norm() for g in gradient.values()]).norm()


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _words(seed: int = 1) -> Tensor:
    return torch.tensor(rows(ROWS, seed=seed)["input_ids"])


def _padded(ids: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Rows cut to 3 to 8 tokens, the last of them END, padded on the right; and which tokens are real."""
    length = torch.randint(3, TOKENS + 1, (ROWS, 1), generator=_random(seed))
    position = torch.arange(TOKENS)
    return ids.where(position < length - 1, END).where(position < length, PAD), position < length


def _text(**labels: Tensor) -> dict[str, Tensor]:
    ids, real = _padded(_words())
    return {"input_ids": ids, "attention_mask": real.long(), **labels}


def _classes(count: int = CLASSES) -> Tensor:
    return torch.tensor(rows(ROWS, num_labels=count)["labels"])


def sequences() -> dict[str, Tensor]:
    return _text(labels=_classes())


def numbers() -> dict[str, Tensor]:
    return _text(labels=torch.randn(ROWS, generator=_random(5)))


def several_labels() -> dict[str, Tensor]:
    return _text(labels=torch.randint(0, 2, (ROWS, CLASSES), generator=_random(5)).float())


def labelled_tokens() -> dict[str, Tensor]:
    """Padding has no label, and some tokens have none."""
    labels = torch.tensor(rows(ROWS, num_labels=CLASSES, tokens=True)["labels"])
    return _text(labels=labels.where(_padded(_words())[1], IGNORED))


def completions() -> dict[str, Tensor]:
    """A prompt of 0 to 5 tokens, which is not learnt, and what follows."""
    ids, real = _padded(_words())
    prompt = torch.randint(0, 6, (ROWS, 1), generator=_random(5))
    return _text(labels=ids.where(real & (torch.arange(TOKENS) >= prompt), IGNORED))


def masked_words() -> dict[str, Tensor]:
    ids, real = _padded(_words())
    hidden = real & (torch.rand(ids.shape, generator=_random(5)) < 0.3)
    return _text(labels=ids.where(hidden, IGNORED))


def translations() -> dict[str, Tensor]:
    """Targets of 3 to 8 tokens."""
    ids, real = _padded(_words(seed=2), seed=5)
    return _text(labels=ids.where(real, IGNORED))


def answers() -> dict[str, Tensor]:
    first = torch.randint(0, 4, (ROWS,), generator=_random(5))
    return _text(start_positions=first, end_positions=first + 3)


def answers_or_none() -> dict[str, Tensor]:
    """Some rows have no answer: their positions lie after the last token, where the head does not look."""
    none = torch.rand(ROWS, generator=_random(7)) < 0.4
    return {name: v.where(~none, TOKENS) if name.endswith("positions") else v for name, v in answers().items()}


def choices() -> dict[str, Tensor]:
    ids = torch.stack([_words(seed=seed) for seed in range(CHOICES)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _classes(CHOICES)}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(ROWS, 3, PIXELS, PIXELS, generator=_random(5)), "labels": _classes()}


@dataclass(frozen=True)
class Task:
    """What the heads of one kind learn from.

    Attributes:
        columns: The rows, by column.
        options: Of every such head's config.
    """

    columns: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)


TASKS = {
    "sequence classification": Task(sequences, {"num_labels": CLASSES}),
    "regression": Task(numbers, {"num_labels": 1}),
    "multi-label": Task(several_labels, {"num_labels": CLASSES, "problem_type": "multi_label_classification"}),
    "token classification": Task(labelled_tokens, {"num_labels": CLASSES}),
    "multiple choice": Task(choices),
    "question answering": Task(answers),
    "question answering, some rows without an answer": Task(answers_or_none),
    "causal language model": Task(completions),
    "masked language model": Task(masked_words),
    "sequence to sequence": Task(translations),
    "image classification": Task(images, {"num_labels": CLASSES, "image_size": PIXELS, "patch_size": 4}),
}

COMMON = {
    **SIZES,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "classifier_dropout": 0.0,
}
DECODER = {"decoder_start_token_id": PAD, "decoder_layers": 1, "decoder_attention_heads": 2}
BART = {**DECODER, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
T5 = {"decoder_start_token_id": PAD, "d_kv": 8, "d_ff": 32}

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sequence classification": {
        "AlbertForSequenceClassification": {"embedding_size": 8},
        "BartForSequenceClassification": BART,
        "BertForSequenceClassification": {},
        "BigBirdForSequenceClassification": {},  # replaces its attention in its first forward
        "BioGptForSequenceClassification": {},
        "BloomForSequenceClassification": {},
        "CamembertForSequenceClassification": {},
        "ConvBertForSequenceClassification": {"embedding_size": 16},
        "CTRLForSequenceClassification": {"dff": 32},
        "DebertaForSequenceClassification": {},
        "DebertaV2ForSequenceClassification": {},
        "DistilBertForSequenceClassification": {"hidden_dim": 32},
        "ElectraForSequenceClassification": {"embedding_size": 16},
        "ErnieForSequenceClassification": {},
        "EsmForSequenceClassification": {},
        "FalconForSequenceClassification": {"head_dim": None},
        "FlaubertForSequenceClassification": {},
        "FNetForSequenceClassification": {},
        "FunnelForSequenceClassification": {"num_hidden_layers": None, "block_sizes": [1], "d_head": 8, "d_inner": 32},
        "GemmaForSequenceClassification": {},
        "Gemma2ForSequenceClassification": {},
        "Gemma3TextForSequenceClassification": {},
        "GPT2ForSequenceClassification": {},
        "GPTBigCodeForSequenceClassification": {},
        "GPTNeoForSequenceClassification": {"attention_types": [[["global"], 1]]},
        "GPTNeoXForSequenceClassification": {},
        "LlamaForSequenceClassification": {},
        "LongformerForSequenceClassification": {"attention_window": [4]},
        "MBartForSequenceClassification": BART,
        "MistralForSequenceClassification": {},
        "MixtralForSequenceClassification": {"num_local_experts": 2},
        "MobileBertForSequenceClassification": {"embedding_size": 16, "intra_bottleneck_size": 16},
        "ModernBertForSequenceClassification": {},
        "MPNetForSequenceClassification": {},
        "MptForSequenceClassification": {},
        "NystromformerForSequenceClassification": {},
        "Olmo2ForSequenceClassification": {},
        "OPTForSequenceClassification": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "PhiForSequenceClassification": {},
        "Phi3ForSequenceClassification": {},
        "Qwen2ForSequenceClassification": {},
        "Qwen3ForSequenceClassification": {},
        "RemBertForSequenceClassification": {"input_embedding_size": 16},
        "RobertaForSequenceClassification": {},
        "RoFormerForSequenceClassification": {},
        "SqueezeBertForSequenceClassification": {"embedding_size": 16},
        "StableLmForSequenceClassification": {},
        "Starcoder2ForSequenceClassification": {},
        "T5ForSequenceClassification": T5,
        "XLMForSequenceClassification": {},
        "XLMRobertaForSequenceClassification": {},
        "XLNetForSequenceClassification": {"max_position_embeddings": None, "d_head": 8, "d_inner": 32},
    },
    "regression": {
        "BertForSequenceClassification": {},
        "DistilBertForSequenceClassification": {"hidden_dim": 32},
        "LlamaForSequenceClassification": {},
    },
    "multi-label": {
        "BertForSequenceClassification": {},
        "GPT2ForSequenceClassification": {},
        "RobertaForSequenceClassification": {},
    },
    "token classification": {
        "BertForTokenClassification": {},
        "DebertaV2ForTokenClassification": {},
        "DistilBertForTokenClassification": {"hidden_dim": 32},
        "ElectraForTokenClassification": {"embedding_size": 16},
        "EsmForTokenClassification": {},
        "GPT2ForTokenClassification": {},
        "ModernBertForTokenClassification": {},
        "Qwen2ForTokenClassification": {},
        "RobertaForTokenClassification": {},
    },
    "multiple choice": {"BertForMultipleChoice": {}, "RobertaForMultipleChoice": {}},
    "question answering": {"BertForQuestionAnswering": {}, "DistilBertForQuestionAnswering": {"hidden_dim": 32}},
    "question answering, some rows without an answer": {"BertForQuestionAnswering": {}},
    "causal language model": {
        "BartForCausalLM": BART,  # takes labels that are shifted already
        "BlenderbotSmallForCausalLM": BART,
        "BloomForCausalLM": {},
        "Gemma2ForCausalLM": {},
        "GPT2LMHeadModel": {},
        "GPTNeoXForCausalLM": {},
        "LlamaForCausalLM": {},
        "MistralForCausalLM": {},
        "OPTForCausalLM": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "PhiForCausalLM": {},
        "Qwen3ForCausalLM": {},
    },
    "masked language model": {
        "BertForMaskedLM": {},
        "DistilBertForMaskedLM": {"hidden_dim": 32},
        "ModernBertForMaskedLM": {},
        "RobertaForMaskedLM": {},
    },
    "sequence to sequence": {
        "BartForConditionalGeneration": BART,
        "MarianMTModel": BART,
        "MBartForConditionalGeneration": BART,
        "T5ForConditionalGeneration": T5,
    },
    "image classification": {
        "BeitForImageClassification": {},
        "ConvNextForImageClassification": {
            "num_hidden_layers": None,
            "num_stages": 2,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "patch_size": 2,
        },
        "DeiTForImageClassification": {},
        "SwinForImageClassification": {
            **dict.fromkeys(["num_hidden_layers", "num_attention_heads", "head_dim"]),
            "embed_dim": 8,
            "depths": [1],
            "num_heads": [2],
            "window_size": 2,
        },
        "ViTForImageClassification": {},
    },
}

HEADS = [Head(task, model, options) for task, models in OPTIONS.items() for model, options in models.items()]
