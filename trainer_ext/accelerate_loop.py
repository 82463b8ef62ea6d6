"""The reference loop with `accelerate.Accelerator` in it: what changes when one process becomes several.

Read it beside `manual_loop.train`. The Accelerator places and wraps the model, shards the batches over the
ranks, and averages the gradients over them. So that the average is the gradient of the step's loss, the total
is summed over the ranks and each rank's loss is multiplied by their number: the loss contract again.
"""

import math
from collections.abc import Callable
from itertools import count, islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trainer_ext.gloo_threads import outlast_them
from trainer_ext.manual_loop import (
    LoopResult,
    LoopSettings,
    denominator,
    epoch_order,
    linear_with_warmup,
    summed_loss,
)
from trainer_ext.reference_optimizer import build_optimizer
from trainer_ext.repeated_rows import UncountedBatch, without_repeated_rows
from trainer_ext.seeded_data import seed_data


def train(
    model: nn.Module,
    train_dataset: Any,
    collate: Callable[[list[Any]], Any],
    settings: LoopSettings,
    *,
    eval_dataset: Any = None,
    metric: Any = None,
    class_weights: Tensor | None = None,
    on_step: Callable[..., None] | None = None,
    on_evaluate: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> LoopResult:
    """Train `model` in place, on as many processes as the launcher started; arguments as `manual_loop.train`.

    `settings.batch_size` is each rank's micro-batch. `on_step` is told of the rank's own window, and of the
    whole step's denominator, loss and gradient norm.
    """
    accelerator = Accelerator()
    torch.manual_seed(settings.seed)
    optimizer = build_optimizer(model, settings)
    model, optimizer = accelerator.prepare(model, optimizer)
    ranks = accelerator.num_processes
    if ranks > 1:
        outlast_them()
    total_steps = settings.total_steps(math.ceil(len(train_dataset) / ranks))
    schedule = LambdaLR(optimizer.optimizer, linear_with_warmup(settings.warmup_steps, total_steps))
    result = LoopResult(optimizer.optimizer, steps=0, evaluations=[])
    bar = tqdm(total=total_steps, desc="accelerate loop", disable=not (progress and accelerator.is_main_process))

    for epoch in count():
        order = epoch_order(len(train_dataset), settings.seed, epoch)
        loader = DataLoader(train_dataset, settings.batch_size, sampler=order, collate_fn=collate)
        loader = accelerator.prepare(loader)
        seed_data(loader, seed=settings.seed, epoch=epoch)
        batches = iter(loader)
        while result.steps < total_steps:
            window = [without_repeated_rows(batch) for batch in islice(batches, settings.accumulation)]
            if not window:
                break
            model.train()
            counts = [batch for batch in window if not isinstance(batch, UncountedBatch)]
            own = sum(denominator(batch["labels"], class_weights, settings) for batch in counts)
            total = accelerator.reduce(torch.tensor(own, dtype=torch.float64), "sum").item()
            loss = torch.zeros((), device=accelerator.device)
            for batch in window:
                inputs = {name: value for name, value in batch.items() if name != "labels"}
                micro = summed_loss(model(**inputs).logits, batch["labels"], class_weights, settings)
                micro = micro * 0 if isinstance(batch, UncountedBatch) else micro
                micro = micro * ranks / torch.tensor(total or 1.0, dtype=micro.dtype, device=micro.device)
                accelerator.backward(micro)
                loss = loss + micro.detach() / ranks
            norm = accelerator.clip_grad_norm_(model.parameters(), settings.clip_at)
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            result.steps += 1
            bar.update()
            if on_step is not None:
                whole = accelerator.reduce(loss, "sum").item()
                on_step(window=window, denominator=total, loss=whole, grad_norm=float(norm), learning_rates=rates)
        done = result.steps == total_steps
        if eval_dataset is not None and (done or settings.evaluate_each_epoch):
            apart = torch.Generator()  # so that training draws the same with and without evaluations
            split = DataLoader(eval_dataset, settings.eval_batch_size, collate_fn=collate, generator=apart)
            prepared = accelerator.prepare(split)
            result.evaluations.append(evaluate(accelerator, model, prepared, settings, metric, class_weights))
            if on_evaluate is not None:
                on_evaluate(result.evaluations[-1])
        if done:
            bar.close()
            return result
    raise AssertionError("unreachable: the loop over epochs ends at total_steps")


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    settings: LoopSettings,
    metric: Any = None,
    class_weights: Tensor | None = None,
) -> dict[str, float]:
    """As `manual_loop.evaluate`, over logits gathered from all ranks without the rows a loader repeated."""
    model.eval()
    numerator = total = 0.0
    for batch in loader:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = accelerator.gather_for_metrics((model(**inputs).logits, batch["labels"]))
        numerator += summed_loss(logits, labels, class_weights, settings).item()
        total += denominator(labels, class_weights, settings)
        if metric is not None:
            kept = labels != -100
            metric.add_batch(predictions=logits.argmax(-1)[kept], references=labels[kept])
    found = {} if metric is None else metric.compute()
    return {"loss": numerator / (total or 1.0), **found}
