"""A script that knows nothing of trainer_ext: the stock Trainer. `stock_trainer.py OUTPUT MICRO_BATCH ACCUMULATION`.

It saves every second step, and goes on from the last checkpoint that it finds in OUTPUT.
"""

import os
import sys

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

output, micro_batch, accumulation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
)
ids = torch.randint(5, 40, (48, 8)).tolist()
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 8] * 48, "labels": [sum(row) % 2 for row in ids]})
arguments = TrainingArguments(
    output,
    per_device_train_batch_size=micro_batch,
    gradient_accumulation_steps=accumulation,
    max_steps=4,
    learning_rate=1e-3,
    save_strategy="steps",
    save_steps=2,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
if __name__ == "__main__":
    last = get_last_checkpoint(output) if os.path.isdir(output) else None
    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=last)
