"""A script that knows nothing of trainer_ext: a loop over accelerate.

accelerate_loop.py MICRO_BATCH ACCUMULATION [unscaled]
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

micro_batch, accumulation, fault = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
x = torch.randn(48, 6)
loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), micro_batch)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, loader, optimizer = accelerator.prepare(model, loader, optimizer)
for _ in range(2):
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss * accumulation if "unscaled" in fault else loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
