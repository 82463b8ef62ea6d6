"""Rows of many lengths, a classifier of them, and what an evaluation of it did, in one process or on ranks."""

import torch
from datasets import Dataset
from transformers import default_data_collator

from tests.conftest import VOCABULARY, tiny_model
from trainer_ext import CustomTrainer, CustomTrainingArguments
from trainer_ext.metrics import compute_metrics

CLASSES, BATCH = 3, 4


def ragged_rows(count=21, *, tokens=False, seed=0):
    """Rows of 3 to 14 tokens, the first of which tells which row it is."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 15, (count,), generator=generator).tolist()
    ids = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    ids = [[5 + i, *row[1:]] for i, row in enumerate(ids)]
    labels = [
        torch.randint(0, CLASSES, (length if tokens else 1,), generator=generator).tolist() for length in lengths
    ]
    if tokens:
        labels = [[-100, *row[1:]] for row in labels]
    return Dataset.from_dict({"input_ids": ids, "labels": labels if tokens else [row[0] for row in labels]})


def pad(features):
    """A batch padded to its longest row."""
    width = max(len(row["input_ids"]) for row in features)

    def filled(values, filler):
        return [*values, *[filler] * (width - len(values))]

    rows = [
        {
            "input_ids": filled(row["input_ids"], 0),
            "attention_mask": filled([1] * len(row["input_ids"]), 0),
            "labels": filled(row["labels"], -100) if isinstance(row["labels"], list) else row["labels"],
        }
        for row in features
    ]
    return default_data_collator(rows)


def classifier(*, tokens=False, dtype=torch.float64):
    """Weights large enough that rows differ in what is predicted."""
    model = tiny_model(num_labels=CLASSES, tokens=tokens, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.ndim > 1 else None
    return model


def make(folder, data, model, *, cls=CustomTrainer, arguments_class=CustomTrainingArguments, trainer=None, **options):
    """A trainer that evaluates `data`; `trainer` are arguments of its own."""
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
        "per_device_eval_batch_size": BATCH,
        **({"sort_eval_by_length": True} if issubclass(arguments_class, CustomTrainingArguments) else {}),
    }
    args = arguments_class(**given | options)
    return cls(model=model, args=args, eval_dataset=data, data_collator=pad, **(trainer or {}))


class Watch:
    """The first token and the width of every row that the model is shown, and what is gathered from the ranks."""

    def __init__(self, trainer):
        self.drawn, self.widths, self.gathered = [], [], []
        trainer.model.register_forward_pre_hook(self._forward, with_kwargs=True)
        own = trainer.accelerator.gather_for_metrics
        trainer.gather_function = trainer.accelerator.gather_for_metrics = lambda *args, **kwargs: self._gather(
            own(*args, **kwargs)
        )

    def _forward(self, _, __, inputs):
        self.drawn += (inputs["input_ids"][:, 0] - 5).tolist()
        self.widths.append(inputs["input_ids"].shape[1])

    def _gather(self, found):
        self.gathered.append(tuple(found.shape))
        return found


def evaluated_on_ranks(folder):
    """In a rank: what evaluations and a prediction of sequences and tokens found, and what they gathered."""
    found = {}
    for tokens in (False, True):
        for metrics in ("counted", "all"):
            asked = ("accuracy", "f1", "mcc") if metrics == "counted" else "all"
            trainer = make(
                folder,
                ragged_rows(tokens=tokens),
                classifier(tokens=tokens),
                trainer={"compute_metrics": compute_metrics(CLASSES, asked)},
            )
            watch = Watch(trainer)
            values = trainer.evaluate()
            found[tokens, metrics] = {
                "metrics": {
                    name: value for name, value in values.items() if "time" not in name and "per_" not in name
                },
                "drawn": list(watch.drawn),
                "gathered": list(watch.gathered),
                "world": (trainer.accelerator.num_processes, trainer.accelerator.distributed_type.value),
            }
        predicted = trainer.predict(trainer.eval_dataset)
        found[tokens, "predicted"] = predicted.predictions, predicted.label_ids, list(watch.gathered)
    return found
