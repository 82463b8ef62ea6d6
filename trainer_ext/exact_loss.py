"""`ExactLossMixin`: a `Trainer` whose numbers do not depend on how a step is split.

It brings the loss contract (`losses/contract.py`) to any `Trainer` subclass:

1. `get_batch_samples` sums the loss's denominator over the step's micro-batches and over all ranks, before
   the first forward, and hands the total on as `num_items_in_batch`;
2. `compute_loss` returns `numerator * data_parallel_size / total`. DDP, FSDP and DeepSpeed average gradients
   over data-parallel ranks, which takes the factor out again, and nothing else divides
   (`loss_is_scaled_for_ga = True`);
3. rows that a loader repeats so that every rank draws as many are left out of all sums, and `ExactOrderMixin` has
   all ranks draw from one order;
4. evaluation sums numerators and denominators over the whole split, so that `eval_loss` is one number for
   every batch size and every number of ranks.
"""

import functools
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint
from transformers.utils import logging

from trainer_ext.head_probe import probe_head
from trainer_ext.loss_record import check_same_loss, save_loss, weights_table
from trainer_ext.loss_setup import loss_of_batches
from trainer_ext.losses.announcement import Announcement
from trainer_ext.losses.contract import ConfiguredLoss, Loss, LossTerms, divide, exact_dtype
from trainer_ext.losses.of_batches import HeadLoss, LogitsLoss, logits_of
from trainer_ext.losses.weighted_sum import PartsSinceTheLog, WeightedSum
from trainer_ext.repeated_rows import (
    UncountedBatch,
    count_real_rows,
    first_rows,
    whole_window,
    without_repeated_rows,
)
from trainer_ext.samplers import ExactOrderMixin

logger = logging.get_logger(__name__)


class ExactLossMixin(ExactOrderMixin):
    """Put before a `Trainer` class among the bases, it makes that class's loss exact.

    A subclass that overrides `compute_loss` says with `loss_is_scaled_for_ga` what its loss is: `True`, divided
    by `num_items_in_batch` (the step's total denominator); `False`, the mean of one micro-batch. One that says
    nothing is taken for the second, with a warning.

    Args:
        loss: A `Loss` of your own, or a name as in `CustomTrainingArguments.loss`, over which it wins.
            Everything else goes to the `Trainer`.

    Raises:
        TypeError: The mixin stands after the `Trainer` among the bases.
        ValueError: The loss, its options or its weights do not fit the model or the labels.
    """

    loss_is_scaled_for_ga: bool | None = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(ExactLossMixin):
            raise TypeError(
                f"class {cls.__name__}: ExactLossMixin must stand before the Trainer among the bases, or the Trainer's "
                "own loss is used. Write `class MyTrainer(ExactLossMixin, Trainer)`."
            )
        between = order[order.index(ExactLossMixin) + 1 : order.index(Trainer)] if Trainer in order else ()
        for base in between:
            if replaced := {"compute_loss", "get_batch_samples"} & base.__dict__.keys():
                warnings.warn(
                    f"class {cls.__name__}: ExactLossMixin replaces {' and '.join(sorted(replaced))} of {base.__name__}, "
                    "which will not be called. Pass its loss as loss=, or put it into a subclass of this class.",
                    stacklevel=2,
                )

    def __init__(self, *args: Any, loss: Loss | str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._announcement = Announcement()
        self._split_sums: Tensor | None = None  # in evaluation: numerators, denominators, batches
        self._split_loader: Any = None
        self._in_split = False  # whether the last evaluated batch's loss is in the sums
        if not _says_what_its_loss_is(type(self)):
            self.loss_is_scaled_for_ga = False
            warnings.warn(
                f"{type(self).__name__} overrides compute_loss without saying how its loss is scaled, so it is taken "
                "for the mean of one micro-batch: the step's loss is a mean of means, which is not the mean over the "
                "step's items when micro-batches differ in size or weight. Set `loss_is_scaled_for_ga = True` on the "
                "class if the loss is divided by `num_items_in_batch`, `False` if a mean of means is meant, or pass "
                "the loss as CustomTrainer(loss=...).",
                stacklevel=3,
            )
        if self.compute_loss_func is not None and (loss or _asked_for_a_loss(self.args)):
            raise ValueError(
                "compute_loss_func and a loss (loss=, or one of the arguments loss, loss_kwargs, class_weights and "
                "sample_weight_column) are both given: choose one."
            )
        if self.compute_loss_func is not None and self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} would be ignored: compute_loss_func computes "
                "the whole loss. Smooth its labels there."
            )
        self._loss_argument = loss
        self._configure_loss()

    def _configure_loss(self) -> None:
        """Read the loss from the arguments; a class that computes its own has none unless it was asked for."""
        self._loss: LogitsLoss | HeadLoss = HeadLoss(self.label_names)
        self._probed = False
        self._parts = PartsSinceTheLog()
        if not self._loss_is_not_ours() or self._loss_argument or _asked_for_a_loss(self.args):
            self._loss = loss_of_batches(
                self.args,
                cast(nn.Module, self.model),
                loss=self._loss_argument,
                label_names=self.label_names,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                data_collator=self.data_collator,
            )
            if self.configured_loss is not None and self.configured_loss.class_weights is not None:
                logger.info(f"Class weights:\n{weights_table(self.configured_loss, self.model)}")

    @property
    def configured_loss(self) -> ConfiguredLoss | None:
        """The loss over the logits, with its weights and options; None where the model's head or a function computes it."""
        return self._loss.configured

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if trial is not None:  # the search has set arguments, which may be the loss's
            self._configure_loss()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The next step's micro-batches, and the sum of their denominators over all data-parallel ranks."""
        if self._loss_is_not_ours():
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [without_repeated_rows(batch) for batch in islice(epoch_iterator, num_batches)]
        if not batches or not self._loss.counts(batches[0]):
            return batches, None
        batches = whole_window(batches, num_batches)
        self._probe(batches[0])
        if self.configured_loss is not None:
            self._loss.now = self.configured_loss.at(self.state.global_step / max(1, self.state.max_steps))
        own = self._announcement.make([self._denominator(batch).to(device) for batch in batches])
        total = self._sum_over_ranks(own)
        return batches, total / self._ranks_sharing_a_batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss: `numerator * data_parallel_size / total`.

        Args:
            model: The model, wrapped or not.
            inputs: One micro-batch, with its `labels`.
            return_outputs: Whether to return `(loss, outputs)`.
            num_items_in_batch: The step's total denominator, as `get_batch_samples` announced it. Without it,
                and in evaluation, the loss is the mean over this micro-batch alone.

        Raises:
            RuntimeError: The caller divides this loss once more, or the loss's denominator is not the one that
                was announced.
        """
        if not self.loss_is_scaled_for_ga:
            raise RuntimeError(
                f"{type(self).__name__}: this loss is already scaled for gradient accumulation, and "
                "loss_is_scaled_for_ga is not True, so that it would be divided once more. A subclass whose compute_loss "
                "calls super().compute_loss sets `loss_is_scaled_for_ga = True`."
            )
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._loss.counts(inputs):
            return self._mean_of_means(model, inputs, return_outputs)
        self._probe(inputs)
        terms, outputs = self._loss.terms(model, inputs)
        if isinstance(inputs, UncountedBatch):
            terms = terms.of_nothing()
        if self._split_sums is not None:
            self._add_to_split(self._real_terms(model, inputs, terms, outputs))
        if torch.is_grad_enabled() and self._split_sums is None and num_items_in_batch is not None:
            self._announcement.hold(terms.denominator, now=self.state.global_step == 0)
            total = torch.as_tensor(num_items_in_batch, device=terms.numerator.device)
            size = self._data_parallel_size()
            loss = divide(terms.numerator if size == 1 else terms.numerator * size, total)
            if self.configured_loss is not None and isinstance(self.configured_loss.loss, WeightedSum):
                counted = not isinstance(inputs, UncountedBatch)
                self._parts.add(self.configured_loss.loss, total, step=self.state.global_step, counted=counted)
        else:
            loss = terms.mean()
        if not return_outputs:
            return loss
        return loss, outputs if isinstance(outputs, Mapping) else (loss, *outputs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The stock loop, with the loss as `sum(numerators) / sum(denominators)` over the whole split."""
        device, outer = self.args.device, (self._split_sums, self._split_loader, self._loss.now)
        self._loss.now = self.configured_loss
        sums = self._split_sums = torch.zeros(3, dtype=exact_dtype(device), device=device)
        self._split_loader = dataloader
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:  # an evaluation may stand inside another, such as a predict() in compute_metrics
            self._split_sums, self._split_loader, self._loss.now = outer
        numerator, denominator, batches = self._sum_over_ranks(sums)
        if batches:
            loss = {f"{metric_key_prefix}_loss": divide(numerator, denominator).item()}
            output = output._replace(metrics={**loss, **cast(dict[str, float], output.metrics), **loss})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log with the parts of a sum of losses, after a look at whether every denominator was announced."""
        self._announcement.check()
        if "loss" in logs and self._parts:
            logs |= self._parts.means(self._sum_over_ranks)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The stock training, after a look at whether the checkpoint to resume was trained with the same loss.

        Raises:
            ValueError: It was not.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if isinstance(folder, str) and not self._loss_is_not_ours():
            check_same_loss(folder, self.configured_loss)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and not self._loss_is_not_ours():
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_loss(folder, self.configured_loss)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = getattr(self.args, "sample_weight_column", None)
        columns = cast(list[str], self._signature_columns)
        if column is not None and column not in columns:
            columns.append(column)

    def _loss_is_not_ours(self) -> bool:
        return self.compute_loss_func is not None or not self.loss_is_scaled_for_ga

    def _real_terms(self, model: nn.Module, inputs: dict[str, Any], terms: LossTerms, outputs: Any) -> LossTerms:
        """The terms of an evaluated batch without the rows that its loader repeated."""
        rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
        real = count_real_rows(rows, self._split_loader)
        if real == rows:
            return terms
        if isinstance(self._loss, LogitsLoss):
            return self._loss.of_rows(logits_of(outputs), inputs, real)
        found, _ = self._loss.terms(model, first_rows(inputs, max(1, real)))
        return found if real else found.of_nothing()

    def _add_to_split(self, terms: LossTerms) -> None:
        assert self._split_sums is not None
        self._in_split = True
        self._split_sums += torch.stack([*terms, terms.denominator.new_ones(())]).detach().to(self._split_sums)

    def _probe(self, batch: dict[str, Any]) -> None:
        """Before the first batch is trained or evaluated: what the model's head does with labels."""
        if not self._probed:
            self._probed = True
            probe_head(cast(Trainer, self), self._loss, batch)

    def _denominator(self, batch: dict[str, Any]) -> Tensor:
        found = self._loss.denominator(batch)
        return found * 0 if isinstance(batch, UncountedBatch) else found

    def _mean_of_means(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """The loss of a head that does not go by `labels`, of which only the micro-batch's mean is known."""
        warnings.warn(
            f"the head's loss does not go by one tensor of labels alone (the batch has {', '.join(inputs)}), so the items "
            "of a step cannot be counted: its loss is the mean of the micro-batches' means, which is exact where they are "
            "of one size.",
            stacklevel=2,
        )
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if torch.is_grad_enabled() and self._split_sums is None:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return value if self.args.world_size == 1 else self.accelerator.reduce(value, reduction="sum")

    @functools.cached_property
    def _ranks_sharing_a_batch(self) -> int:
        """Tensor, context and sequence parallel ranks see the same samples."""
        return self.get_tp_size() * self.get_cp_size() * self.get_sp_size()

    def _data_parallel_size(self) -> int:
        return self.args.world_size // self._ranks_sharing_a_batch


def _says_what_its_loss_is(cls: type) -> bool:
    """Whether `cls` uses the mixin's loss, or declares `loss_is_scaled_for_ga` beside a `compute_loss` of its own."""
    below = cls.__mro__[: cls.__mro__.index(ExactLossMixin)]
    overrides = any("compute_loss" in base.__dict__ for base in below)
    return not overrides or any("loss_is_scaled_for_ga" in base.__dict__ for base in below)


def _asked_for_a_loss(args: Any) -> bool:
    return any(getattr(args, name, None) for name in ("loss", "class_weights", "loss_kwargs", "sample_weight_column"))
