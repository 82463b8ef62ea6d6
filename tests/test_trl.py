"""The mixin before TRL's SFTTrainer, and what SFTTrainer does without it."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.test_exactness import assert_same
from trainer_ext import ExactLossMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ExactLossMixin replaces:UserWarning"),  # a test of its own expects it
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # TRL's own default
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "red", "blue", "green", "<pad>", "<eos>"]


@pytest.fixture(scope="module")
def exact():
    with pytest.warns(UserWarning, match="ExactLossMixin replaces compute_loss of SFTTrainer"):

        class ExactSFTTrainer(ExactLossMixin, SFTTrainer):
            pass

    return ExactSFTTrainer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def step(cls, model, folder, *, micro_batch, accumulation, **options):
    """The loss and the gradient of one step over 16 texts of different lengths."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(WORDS[(i + j) % 12] for j in range(3 + i % 5)) for i in range(16)]
    seen = {"loss": 0.0}

    class Spy(cls):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen["loss"] += loss
            return loss

        def _clip_grad_norm(self, model):
            seen["gradient"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return super()._clip_grad_norm(model)

    trainer = Spy(
        model=copy.deepcopy(model),
        args=SFTConfig(
            str(folder), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation, max_steps=1,
            save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, log_level="error",
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        **options,
    )  # fmt: skip
    trainer.train()
    return seen["loss"], seen["gradient"]


def test_sft_is_one_number_for_every_split(exact, model, tmp_path):
    whole = step(exact, model, tmp_path, micro_batch=16, accumulation=1)
    for micro_batch, accumulation in ((4, 4), (2, 8)):
        found = step(exact, model, tmp_path, micro_batch=micro_batch, accumulation=accumulation)
        assert_same(found, whole, 1e-5)
    assert_same(step(SFTTrainer, model, tmp_path, micro_batch=16, accumulation=1), whole, 1e-5)


def test_another_loss_for_sft(exact, model, tmp_path):
    found = [
        step(exact, model, tmp_path, micro_batch=m, accumulation=16 // m, loss=loss)
        for m, loss in ((16, "focal"), (4, "focal"), (16, "cross_entropy"), (16, None))
    ]
    assert_same(found[1], found[0], 1e-5)
    assert_same(found[2], found[3], 1e-5)
    with pytest.raises(AssertionError):
        assert_same(found[0], found[2], 1e-2)
