"""From arguments, model and data to the loss that is trained, with everything that cannot work refused."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from trainer_ext.labels import check_class_labels, has_float_labels, label_column, read_labels
from trainer_ext.losses import LOSSES, ConfiguredLoss, Loss, WeightedSum, check_loss, class_weights, find_loss
from trainer_ext.losses.class_weights import label_counts
from trainer_ext.losses.contract import ClassLoss
from trainer_ext.losses.of_batches import HeadLoss, LogitsLoss

MODEL_LOSS = "model"
STANDARD_COLLATORS = (DataCollatorWithPadding, DataCollatorForTokenClassification)
CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
SEQ2SEQ = frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
LANGUAGE = CAUSAL | SEQ2SEQ | frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
CHOICES = frozenset(MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values())


def loss_of_batches(
    args: Any,
    model: nn.Module,
    *,
    loss: Loss | str | None = None,
    label_names: list[str] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    data_collator: Any = default_data_collator,
) -> LogitsLoss | HeadLoss:
    """The loss to train: one over the logits, bound to its weights and options, or the model's own.

    Args:
        args: `TrainingArguments`; the fields of `CustomTrainingArguments` are used where they are there.
        model: The model; a PEFT wrapper is looked through.
        loss: A loss object or name, which wins over `args.loss`.
        label_names: The columns that the model takes for labels.
        train_dataset: Whose classes are counted where weights or the loss ask for it. Its labels are checked, and those of:
        eval_dataset: A dataset, or a dict of them.
        data_collator: One that is not transformers' own may make labels of its own, which are not checked here.

    Raises:
        ValueError: The loss is unknown, or its weights, options or the labels do not fit.
    """
    chosen = loss or getattr(args, "loss", None) or default_loss(model, train_dataset)
    weights, column = getattr(args, "class_weights", None), getattr(args, "sample_weight_column", None)
    options = dict(getattr(args, "loss_kwargs", None) or {})
    if chosen == MODEL_LOSS:
        if type(_base_model(model)).__name__.endswith("ForCTC"):
            raise ValueError(
                "a CTC head's loss is no mean over labels: give it as compute_loss_func, or use the Trainer."
            )
        smoothing = args.label_smoothing_factor
        _refuse_for_model_loss(
            class_weights=weights, loss_kwargs=options, label_smoothing=smoothing, sample_weight_column=column
        )
        return HeadLoss(label_names or ["labels"], shifted=shifts_labels(model))
    found = named_loss(chosen, options)
    if args.label_smoothing_factor:
        if "label_smoothing" in options:
            raise ValueError("label_smoothing_factor and loss_kwargs['label_smoothing'] are both given: choose one.")
        options["label_smoothing"] = args.label_smoothing_factor
    reweight_after = _reweight_after(options, weights)
    classes, by_class = count_classes(model), goes_by_class(found)
    if by_class and classes is not None and _is_standard(data_collator):
        _check_datasets(classes, train_dataset, eval_dataset)
    counts = options.pop("class_counts", None)
    if counts is None and (isinstance(weights, str) or getattr(found, "needs_class_counts", False)):
        counts = _counted(train_dataset, classes, "class_weights" if isinstance(weights, str) else "the loss").tolist()
    configured = ConfiguredLoss(
        loss=found,
        class_weights=_weights(weights, classes, counts, model),
        reduction=getattr(args, "loss_reduction", "weighted_mean"),
        options=options,
        class_counts=counts,
        reweight_after=reweight_after,
    )
    ours = found in LOSSES.values() or isinstance(found, WeightedSum)
    if ours:
        _try_options(configured, classes or 2, by_class=by_class)
    base = _base_model(model)
    decodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return LogitsLoss(
        configured,
        shifted=shifts_labels(model),
        decoder_inputs=getattr(base, "prepare_decoder_input_ids_from_labels", None) if decodes else None,
        sample_weights=column,
        proven=ours,
    )


def named_loss(chosen: Any, options: dict[str, Any]) -> Loss:
    """The loss that a name, an import path, an object, or a dict from name to weight means.

    A dict is a weighted sum, and takes its parts' options, by their names, out of `options`.

    Raises:
        ValueError: A loss is not known, or is none.
    """
    if isinstance(chosen, dict):
        parts = {name: find_loss(name) for name in chosen}
        return WeightedSum(parts, chosen, {name: options.pop(name) for name in list(options) if name in parts})
    return find_loss(chosen) if isinstance(chosen, str) else check_loss(chosen, getattr(chosen, "__name__", "loss"))


def goes_by_class(loss: Loss) -> bool:
    """Whether a loss of `LOSSES` takes one class index an item."""
    parts = loss.parts.values() if isinstance(loss, WeightedSum) else [loss]
    return all(isinstance(part, ClassLoss) for part in parts)


def default_loss(model: nn.Module, train_dataset: Any = None) -> str:
    """`"cross_entropy"` for heads that give one label an item out of several, else `"model"`."""
    base = _base_model(model)
    heads = {
        name
        for mapping in (
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        )
        for name in mapping.values()
    }
    config = getattr(base, "config", None)
    single_label = (
        getattr(config, "problem_type", None) in (None, "single_label_classification")
        and getattr(config, "num_labels", 1) > 1
    )
    indices = not has_float_labels(train_dataset)
    return "cross_entropy" if type(base).__name__ in heads and single_label and indices else MODEL_LOSS


def shifts_labels(model: nn.Module) -> bool:
    """Whether the head predicts the next token, so that the first label of a row is never a target."""
    base = _base_model(model)
    loss_type = getattr(base, "loss_type", None)
    causal = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss if loss_type else type(base).__name__ in CAUSAL
    return causal and not getattr(getattr(base, "config", None), "is_encoder_decoder", False)


def count_classes(model: nn.Module) -> int | None:
    """How many classes the head's last dimension has; None where the model does not say."""
    base = _base_model(model)
    config, name = getattr(base, "config", None), type(base).__name__
    if name in CHOICES or config is None:
        return None
    return config.get_text_config().vocab_size if name in LANGUAGE else getattr(config, "num_labels", None)


def _base_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper; any other model as it is."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap else model


def _refuse_for_model_loss(**given: Any) -> None:
    unused = [name for name, value in given.items() if value]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} would be ignored: the loss is the model's own (loss='model', the default where the "
            "model does not classify). A classifier takes them with loss='cross_entropy'."
        )


def _reweight_after(options: dict[str, Any], weights: Any) -> float:
    """The option of that name, taken out of `options`."""
    found = options.pop("reweight_after", 0.0)
    if not isinstance(found, int | float) or not 0 <= found < 1 or (found and weights is None):
        raise ValueError(
            f"reweight_after={found}: the share of training, from 0 to less than 1, after which class_weights count; "
            f"class_weights is {weights}."
        )
    return float(found)


def _counted(train_dataset: Any, classes: int | None, what: str) -> Tensor:
    """How often each class occurs in the training split: the same on every rank, since each reads all of it."""
    labels = None if train_dataset is None else read_labels(train_dataset)
    if labels is None or classes is None:
        raise ValueError(
            f"{what} counts the labels of train_dataset, which is missing, streamed, or has no label column. Give a list "
            "of weights, or what is known of the classes: loss_kwargs={'class_counts': [n_0, n_1, ..]}."
        )
    check_class_labels(labels, classes, "train_dataset")
    return label_counts(labels, classes)


def _weights(spec: Any, num_labels: int | None, counts: Any, model: nn.Module) -> Tensor | None:
    if spec is None:
        return None
    if num_labels is None:
        if isinstance(spec, str | dict):
            raise ValueError(
                f"class_weights={spec!r} needs model.config.num_labels, which this model does not have. Give a list."
            )
        num_labels = len(spec)
    label2id = getattr(getattr(model, "config", None), "label2id", None)
    return class_weights(spec, num_labels, class_counts=counts, label2id=label2id)


def _is_standard(data_collator: Any) -> bool:
    return data_collator is default_data_collator or isinstance(data_collator, STANDARD_COLLATORS)


def _check_datasets(num_labels: int, train_dataset: Any, eval_dataset: Any) -> None:
    splits = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        splits |= {f"eval_dataset[{name!r}]": split for name, split in eval_dataset.items()}
    else:
        splits["eval_dataset"] = eval_dataset
    for origin, split in splits.items():
        if label_column(split) is not None and len(split) and split.format["type"] != "custom":
            labels = read_labels(split)
            assert labels is not None
            check_class_labels(labels, num_labels, origin)


def _try_options(configured: ConfiguredLoss, classes: int, *, by_class: bool) -> None:
    """Call the loss once on nothing much, so that a wrong option is an error now and not at the first step."""
    labels = torch.zeros(1, dtype=torch.long) if by_class else torch.zeros(1, classes)
    try:
        configured(torch.zeros(1, classes), labels)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"loss_kwargs={dict(configured.options)} do not fit the loss: {error}") from error
