"""A script that knows nothing of trainer_ext: TRL's SFTTrainer. `sft_trainer.py OUTPUT`."""

import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

words = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "red", "blue", "green", "<pad>", "<eos>"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
)
texts = [" ".join(words[(i + j) % 12] for j in range(3 + i % 5)) for i in range(16)]
if __name__ == "__main__":
    SFTTrainer(
        model=model,
        args=SFTConfig(
            sys.argv[1],
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
    ).train()
