"""From arguments, model and data to the loss that is trained, with everything that cannot work refused."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from trainer_ext.labels import check_class_labels, has_float_labels, label_column, read_labels
from trainer_ext.losses import ConfiguredLoss, Loss, check_loss, class_weights, cross_entropy, find_loss

MODEL_LOSS = "model"
STANDARD_COLLATORS = (DataCollatorWithPadding, DataCollatorForTokenClassification)
CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def configure_loss(
    args: Any,
    model: nn.Module,
    *,
    loss: Loss | str | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    data_collator: Any = default_data_collator,
) -> ConfiguredLoss | None:
    """The loss to train, bound to its weights and options; None where the model's own head computes it.

    Args:
        args: `TrainingArguments`; the fields of `CustomTrainingArguments` are used where they are there.
        model: The model; a PEFT wrapper is looked through.
        loss: A loss object or name, which wins over `args.loss`.
        train_dataset: What `class_weights="balanced"` counts. Its labels are checked, and those of:
        eval_dataset: A dataset, or a dict of them.
        data_collator: One that is not transformers' own may make labels of its own, which are not checked here.

    Raises:
        ValueError: The loss is unknown, or its weights, options or the labels do not fit.
    """
    chosen = loss or getattr(args, "loss", None) or default_loss(model, train_dataset)
    weights = getattr(args, "class_weights", None)
    options = dict(getattr(args, "loss_kwargs", None) or {})
    if chosen == MODEL_LOSS:
        if type(_base_model(model)).__name__.endswith("ForCTC"):
            raise ValueError(
                "a CTC head's loss is no mean over labels: give it as compute_loss_func, or use the Trainer."
            )
        _refuse_for_model_loss(class_weights=weights, loss_kwargs=options, label_smoothing=args.label_smoothing_factor)
        return None
    found = find_loss(chosen) if isinstance(chosen, str) else check_loss(chosen, getattr(chosen, "__name__", "loss"))
    if args.label_smoothing_factor:
        if "label_smoothing" in options:
            raise ValueError("label_smoothing_factor and loss_kwargs['label_smoothing'] are both given: choose one.")
        options["label_smoothing"] = args.label_smoothing_factor
    config = getattr(_base_model(model), "config", None)
    if found is cross_entropy and (shifts_labels(model) or getattr(config, "is_encoder_decoder", False)):
        raise ValueError(
            f"loss='cross_entropy' is for classification, and {type(model).__name__} predicts its own labels' next tokens. "
            "Use loss='model'."
        )
    num_labels = getattr(config, "num_labels", None)
    standard = data_collator is default_data_collator or isinstance(data_collator, STANDARD_COLLATORS)
    if found is cross_entropy and num_labels is not None and standard:
        _check_datasets(num_labels, train_dataset, eval_dataset)
    configured = ConfiguredLoss(
        loss=found,
        class_weights=_weights(weights, num_labels, train_dataset, model),
        reduction=getattr(args, "loss_reduction", "weighted_mean"),
        options=options,
    )
    if found is cross_entropy:
        _try_options(configured, num_labels or 2)
    return configured


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


def _weights(spec: Any, num_labels: int | None, train_dataset: Any, model: nn.Module) -> Tensor | None:
    if spec is None:
        return None
    if num_labels is None:
        if isinstance(spec, str | dict):
            raise ValueError(
                f"class_weights={spec!r} needs model.config.num_labels, which this model does not have. Give a list."
            )
        num_labels = len(spec)
    labels = None
    if isinstance(spec, str) and train_dataset is not None:
        labels = read_labels(train_dataset)
        if labels is None:
            raise ValueError(
                f"class_weights={spec!r} counts the labels of train_dataset, which is streamed or has no label column. "
                "Give the weights as a list."
            )
        check_class_labels(labels, num_labels, "train_dataset")
    label2id = getattr(getattr(model, "config", None), "label2id", None)
    return class_weights(spec, num_labels, labels=labels, label2id=label2id)


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


def _try_options(configured: ConfiguredLoss, num_labels: int) -> None:
    """Call the loss once on nothing much, so that a wrong option is an error now and not at the first step."""
    try:
        configured(torch.zeros(1, num_labels), torch.zeros(1, dtype=torch.long))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"loss_kwargs={dict(configured.options)} do not fit the loss: {error}") from error
