"""From a batch to the two sums of its loss: by a loss over the logits, or by the head that the model has itself.

Both know a batch's denominator before its forward, and take the same steps: `denominator(batch)`, then
`terms(model, batch)`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer_ext.losses.contract import ConfiguredLoss, LossTerms, check_terms
from trainer_ext.losses.model_head import answer_denominator, answer_terms, head_denominator, head_terms

Batch = Mapping[str, Any]


class LogitsLoss:
    """A loss of ours, over the logits of a model that is not shown the labels.

    Args:
        configured: The loss and what is bound to it.
        shifted: The model predicts the next token: the first label of a row is no target, the last logits predict none.
        decoder_inputs: For an encoder-decoder, which makes its decoder's inputs of the labels: how it does.
        sample_weights: The batch's column with a weight for every row.
        proven: Whether the loss is known to keep the contract; one that is not is held to it on its first batch.
    """

    def __init__(
        self,
        configured: ConfiguredLoss,
        *,
        shifted: bool = False,
        decoder_inputs: Callable[..., Tensor] | None = None,
        sample_weights: str | None = None,
        proven: bool = False,
    ) -> None:
        self.configured: ConfiguredLoss | None = configured
        self.now: ConfiguredLoss | None = configured  # what it is at this point of training
        self.shifted, self.decoder_inputs, self.sample_weights = shifted, decoder_inputs, sample_weights
        self._proven = proven

    def counts(self, batch: Batch) -> bool:
        """Whether the items of a batch can be counted before its forward."""
        return True

    def denominator(self, batch: Batch) -> Tensor:
        """Scalar: the denominator of a training batch.

        Raises:
            ValueError: It has no labels, or not the weights that were asked for.
        """
        if self.sample_weights is not None and self.sample_weights not in batch:
            raise ValueError(
                f"sample_weight_column={self.sample_weights!r}: the batch has no such column (it has {', '.join(batch)}). "
                "The dataset needs it, and a data collator that passes it on."
            )
        return self._now.denominator(self._targets(batch), self._weights(batch))

    def terms(self, model: Any, batch: Batch) -> tuple[LossTerms, Any]:
        """The two sums, and the model's outputs."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", self.sample_weights)}
        if self.decoder_inputs is not None and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            inputs["decoder_input_ids"] = self.decoder_inputs(labels=labels_of(batch))
        outputs = model(**inputs)
        return self.of_rows(logits_of(outputs), batch), outputs

    def of_rows(self, logits: Tensor, batch: Batch, rows: int | None = None) -> LossTerms:
        """The two sums of the first rows, of logits that are there already."""
        weights, targets = self._weights(batch), self._targets(batch)
        logits = logits[:, :-1] if self.shifted else logits
        if not self._proven:
            check_terms(self._now, logits.detach(), targets, weights)
            self._proven = True
        return self._now(logits[:rows], targets[:rows], weights if weights is None else weights[:rows])

    @property
    def _now(self) -> ConfiguredLoss:
        assert self.now is not None
        return self.now

    def _targets(self, batch: Batch) -> Tensor:
        labels = labels_of(batch)
        return labels[:, 1:] if self.shifted else labels

    def _weights(self, batch: Batch) -> Tensor | None:
        return None if self.sample_weights is None else batch.get(self.sample_weights)


class HeadLoss:
    """The model's own loss: a mean over the batch's labels, turned back into its sum.

    Args:
        label_names: The columns that the model takes for labels, as the trainer found them.
        shifted: The head predicts the next token.
    """

    configured: ConfiguredLoss | None = None
    now: ConfiguredLoss | None = None
    sample_weights: str | None = None

    def __init__(self, label_names: list[str], *, shifted: bool = False) -> None:
        self.label_names, self.shifted = label_names, shifted

    def counts(self, batch: Batch) -> bool:
        """Whether the loss goes by `labels` alone, or by an answer's two ends; a head may go by others, or by boxes."""
        given = [name for name in self.label_names if batch.get(name) is not None]
        return _is_answer(batch) or (isinstance(batch.get("labels"), Tensor) and len(given) <= 1)

    def denominator(self, batch: Batch, shifted: bool | None = None) -> Tensor:
        """Scalar: how many labels the head averages over."""
        if _is_answer(batch):
            return answer_denominator(batch["start_positions"], batch["end_positions"], batch["input_ids"].shape[1])
        return head_denominator(labels_of(batch), shifted=self.shifted if shifted is None else shifted)

    def terms(self, model: Any, batch: Batch) -> tuple[LossTerms, Any]:
        """The two sums, and the model's outputs."""
        outputs = model(**batch)
        if (found := _terms_of_answers(batch, outputs)) is not None:
            return found, outputs
        mean = _own_loss(outputs)
        if mean.ndim:  # DataParallel: one of each replica, which got one of as many chunks
            chunks = labels_of(batch).chunk(len(mean))
            parts = [head_terms(one, self.denominator({"labels": c})) for one, c in zip(mean, chunks, strict=True)]
            return LossTerms(*(torch.stack(sums).sum() for sums in zip(*parts, strict=True))), outputs
        return head_terms(mean, self.denominator(batch)), outputs

    def mean(self, model: Any, batch: Batch) -> Tensor:
        """The batch's loss as the head gives it, scalar; of an answer's ends, of its logits."""
        outputs = model(**batch)
        found = _terms_of_answers(batch, outputs)
        return _own_loss(outputs).mean() if found is None else found.mean()


def labels_of(batch: Batch) -> Tensor:
    """The batch's `labels`.

    Raises:
        ValueError: It has none.
    """
    if batch.get("labels") is None:
        raise ValueError(
            f"the batch has no labels (it has {', '.join(batch)}), and the loss needs them. Name the dataset's label "
            "column 'label' or 'labels', or use loss='model' for a head that computes its loss from other columns."
        )
    return batch["labels"]


def logits_of(outputs: Any) -> Tensor:
    """A model's logits."""
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _own_loss(outputs: Any) -> Tensor:
    """The loss that a model computed itself."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]


def _terms_of_answers(batch: Batch, outputs: Any) -> LossTerms | None:
    """The two sums over an answer's two ends, where the head gives their logits."""
    if _is_answer(batch) and isinstance(outputs, Mapping) and "start_logits" in outputs:
        ends = (batch["start_positions"], batch["end_positions"])
        return answer_terms(outputs["start_logits"], outputs["end_logits"], *ends)
    return None


def _is_answer(batch: Batch) -> bool:
    """Whether the batch is one of extractive question answering."""
    return all(isinstance(batch.get(name), Tensor) for name in ("start_positions", "end_positions", "input_ids"))
