"""The reference: fine-tuning a classification head in plain PyTorch, written to be read in five minutes.

It owns its data order, accumulation, normalising, clipping and step order, and shares no numerics with
`CustomTrainer`, which must equal it bit for bit. One optimizer step:

    window       the next `accumulation` micro-batches (fewer at the end of an epoch)
    total        sum of w[y] over every label of the window that is not -100
    each micro   sum of w[y] * -log p[y], divided by `total`, backward
    then         clip the gradient's norm, step the optimizer, step the schedule, clear the gradients
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trainer_ext.loop_settings import LoopSettings
from trainer_ext.reference_optimizer import build_optimizer
from trainer_ext.seeded_data import seed_data


@dataclass
class LoopResult:
    """What is left when the loop ends: the optimizer, the number of steps, and the evaluations in order."""

    optimizer: Optimizer
    steps: int
    evaluations: list[dict[str, float]]


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
    """Train `model` in place.

    Args:
        model: Called as `model(**inputs).logits`, shape (..., C).
        train_dataset: Map-style, with a length; `collate` makes batches with `labels` of it.
        collate: From a list of rows to a batch of tensors.
        settings: The hyperparameters.
        eval_dataset: Evaluated at the end, and after every epoch where the settings say so.
        metric: An `evaluate.Metric`, fed by `add_batch`.
        class_weights: Shape (C,), float64, or None for 1 each.
        on_step: Called after every optimizer step with keywords `window`, `denominator`, `loss`, `grad_norm`,
            `learning_rates` (those the step was taken with).
        on_evaluate: Called with what each evaluation found.
        progress: Whether to show a progress bar.
    """
    torch.manual_seed(settings.seed)
    model.to(settings.device)
    total_steps = settings.total_steps(len(train_dataset))
    optimizer = build_optimizer(model, settings)
    schedule = LambdaLR(optimizer, linear_with_warmup(settings.warmup_steps, total_steps))
    result = LoopResult(optimizer, steps=0, evaluations=[])
    bar = tqdm(total=total_steps, desc="manual loop", disable=not progress)

    for epoch in count():
        order = epoch_order(len(train_dataset), settings.seed, epoch)
        loader = DataLoader(train_dataset, settings.batch_size, sampler=order, collate_fn=collate)
        seed_data(loader, seed=settings.seed, epoch=epoch)
        batches = iter(loader)
        while result.steps < total_steps and (window := list(islice(batches, settings.accumulation))):
            model.train()
            total = sum(denominator(batch["labels"], class_weights, settings) for batch in window)
            loss = sum(backward(model, batch, total, class_weights, settings) for batch in window)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_at)
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            result.steps += 1
            bar.update()
            if on_step is not None:
                on_step(
                    window=window,
                    denominator=total,
                    loss=float(loss),
                    grad_norm=float(norm),
                    learning_rates=rates,
                )
        done = result.steps == total_steps
        if eval_dataset is not None and (done or settings.evaluate_each_epoch):
            result.evaluations.append(evaluate(model, eval_dataset, collate, settings, metric, class_weights))
            if on_evaluate is not None:
                on_evaluate(result.evaluations[-1])
        if done:
            bar.close()
            return result
    raise AssertionError("unreachable: the loop over epochs ends at total_steps")


def backward(
    model: nn.Module, batch: Any, total: float, class_weights: Tensor | None, settings: LoopSettings
) -> Tensor:
    """Add one micro-batch's part of the step's gradient to `.grad`; returns its part of the loss, a scalar."""
    inputs = {name: value.to(settings.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    loss = summed_loss(model(**inputs).logits, labels, class_weights, settings)
    loss = loss / torch.tensor(total or 1.0, dtype=loss.dtype, device=loss.device)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    settings: LoopSettings,
    metric: Any = None,
    class_weights: Tensor | None = None,
) -> dict[str, float]:
    """The loss over the whole split as one batch would give it (`"loss"`), and what `metric` computes."""
    model.eval()
    numerator = total = 0.0
    own = torch.Generator()  # so that training draws the same with and without evaluations
    for batch in DataLoader(dataset, settings.eval_batch_size, collate_fn=collate, generator=own):
        inputs = {name: value.to(settings.device) for name, value in batch.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        numerator += summed_loss(logits, labels, class_weights, settings).item()
        total += denominator(labels, class_weights, settings)
        if metric is not None:
            kept = labels != -100
            metric.add_batch(predictions=logits.argmax(-1)[kept], references=labels[kept])
    found = {} if metric is None else metric.compute()
    return {"loss": numerator / (total or 1.0), **found}


def summed_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None, settings: LoopSettings) -> Tensor:
    """`sum w[y] * -log p[y]` over labels that are not -100: a scalar in the logits' dtype."""
    weight = None if class_weights is None else class_weights.to(logits)
    return F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten(),
        weight=weight,
        label_smoothing=settings.label_smoothing,
        reduction="sum",
    )


def denominator(labels: Tensor, class_weights: Tensor | None, settings: LoopSettings) -> float:
    """`sum w[y]`, or the number of labels, over labels that are not -100; added up in float64."""
    kept = labels[labels != -100].cpu()
    if class_weights is None or settings.divide_by == "items":
        return float(len(kept))
    return class_weights.cpu().double()[kept].sum().item()


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: a permutation that depends on the seed and the epoch, nothing else."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def linear_with_warmup(warmup: float, total_steps: int) -> Callable[[int], float]:
    """The multiplier of the rate at a step: from 0 to 1 over the warmup, then down to 0 at `total_steps`."""
    warmup_steps = int(warmup) if warmup >= 1 else math.ceil(total_steps * warmup)

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return multiplier
