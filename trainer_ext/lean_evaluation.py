"""`LeanEvaluationMixin`: an evaluation that gathers, pads and keeps nothing that nobody reads.

The stock loop gathers every batch's loss, logits and labels from all ranks and appends them to arrays that it copies each
time. Here:

1. the loss is summed by `ExactLossMixin`, and no batch's is gathered;
2. a `compute_metrics` that has a method `running_metrics`, as ours, is fed batch by batch in `evaluate`, which returns
   no predictions;
3. what a `compute_metrics` without it, or `predict`, needs is put together once, after the last batch;
4. with `sort_eval_by_length` rows are drawn longest first, where their lengths are read in a moment and nothing but
   rounding depends on it.

A subclass that overrides a step of this, or gives a loader of its own, has the stock way of it.
"""

from contextlib import ExitStack
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from trainer_ext.evaluated_rows import LongestFirst, has_cheap_lengths, put_together, sampler_of
from trainer_ext.exact_loss import ExactLossMixin
from trainer_ext.losses.of_batches import LogitsLoss
from trainer_ext.repeated_rows import count_real_rows

ANSWER = {"start_positions", "end_positions"}


class LeanEvaluationMixin(ExactLossMixin):
    """`ExactLossMixin` with a leaner evaluation of the same numbers."""

    _only_metrics = False  # whether nobody reads what the next evaluation loop predicts
    _running: Any = None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stock evaluation, without the predictions, which it does not return."""
        self._only_metrics = True
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._only_metrics = False

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop over sorted rows; its predictions are in the dataset's order."""
        only_metrics, self._only_metrics = self._only_metrics, False
        outer, self._running = self._running, self._new_metrics() if only_metrics else None
        together = _Together(self) if self.args.eval_do_concat_batches and not self.args.batch_eval_metrics else None
        with ExitStack() as stack:
            stack.callback(setattr, self, "_running", outer)
            if together is not None:
                sampler = sampler_of(dataloader) if "loss" not in self.args.include_for_metrics else None
                if sampler is not None:
                    together.order = stack.enter_context(sampler.sorted_rows())
                stack.enter_context(together)
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self._running is not None:
                found = self._running.result(self._sum_over_ranks, gather_object)
                output = output._replace(metrics={**(output.metrics or {}), **_prefixed(found, metric_key_prefix)})
            return output if together is None else together.of(output)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The stock step; the loop gets what somebody reads of it."""
        self._in_split = False
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not self._keeps("prediction_step"):
            return loss, logits, labels
        if self._in_split and "loss" not in self.args.include_for_metrics:
            loss = None
        first = logits[0] if isinstance(logits, tuple) else logits
        if self._running is None or not isinstance(first, Tensor) or not isinstance(labels, Tensor):
            return loss, logits, labels
        real = count_real_rows(len(labels), self._split_loader)
        self._running.add(first[:real], labels[:real])
        return loss, None, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """The stock count in training; an evaluation's loss, where it is ours, does not go by it."""
        if self._split_sums is not None and not self._loss_is_not_ours():
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """One that an evaluation sorts, where that changes rounding alone; else the stock one."""
        column = getattr(self.model, "main_input_name", "input_ids")
        if (
            getattr(self.args, "sort_eval_by_length", False)
            and not (self.args.dataloader_drop_last or self.args.eval_use_gather_object)
            and self._ranks_sharing_a_batch == 1
            and has_cheap_lengths(eval_dataset, column)
            and self._loss_adds_up_over_rows(eval_dataset.column_names)
        ):
            return LongestFirst(eval_dataset, column)
        return super()._get_eval_sampler(eval_dataset)

    def _loss_adds_up_over_rows(self, columns: list[str]) -> bool:
        """Whether a row's share of the loss does not depend on the rows that it comes with."""
        if self._loss_is_not_ours():
            return False
        given = {name for name in self.label_names if name in columns}
        return isinstance(self._loss, LogitsLoss) or given == ANSWER or (len(given) <= 1 and not self.can_return_loss)

    def _new_metrics(self) -> Any:
        begin = getattr(self.compute_metrics, "running_metrics", None)
        stock = self._loss_is_not_ours() or self._ranks_sharing_a_batch > 1 or not self._keeps("prediction_step")
        if begin is None or stock or self.args.batch_eval_metrics or self.preprocess_logits_for_metrics is not None:
            return None
        return begin()

    def _keeps(self, name: str) -> bool:
        return getattr(type(self), name) is getattr(LeanEvaluationMixin, name)


class _Together:
    """While it lasts, the stock loop keeps its batches as they are; `compute_metrics` gets them as one, in order."""

    def __init__(self, trainer: LeanEvaluationMixin) -> None:
        self.trainer, self.compute_metrics = trainer, trainer.compute_metrics
        self.order: Any = None
        self.given: EvalPrediction | None = None

    def __enter__(self) -> None:
        self.trainer.args.eval_do_concat_batches = False
        if self.compute_metrics is not None:
            self.trainer.compute_metrics = self.compute

    def __exit__(self, *_: Any) -> None:
        self.trainer.args.eval_do_concat_batches = True
        self.trainer.compute_metrics = self.compute_metrics

    def compute(self, batches: Any) -> dict[str, float]:
        """The user's metrics of all batches."""
        self.__exit__()
        self.given = EvalPrediction(
            **{
                name: put_together(getattr(batches, name), self.order)
                for name in ("predictions", "label_ids", "inputs", "losses")
            }
        )
        assert self.compute_metrics is not None
        return self.compute_metrics(self.given)

    def of(self, output: EvalLoopOutput) -> EvalLoopOutput:
        """The loop's output with its batches put together."""
        if self.given is not None:
            return output._replace(predictions=self.given.predictions, label_ids=self.given.label_ids)
        predictions, labels = (put_together(value, self.order) for value in (output.predictions, output.label_ids))
        return output._replace(predictions=predictions, label_ids=labels)


def _prefixed(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}
