"""What a run's loss was, kept beside its checkpoints as `loss.json`, and shown as a table."""

import json
import math
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from trainer_ext.losses.contract import ConfiguredLoss
from trainer_ext.losses.weighted_sum import WeightedSum
from trainer_ext.plain_text import printable

FILE = "loss.json"
COUNTED = "class_counts"  # for people; a loss that goes by them has them among its options


def description(loss: ConfiguredLoss | None) -> dict[str, Any]:
    """A loss as JSON; the model's own where there is none."""
    if loss is None:
        return {"loss": "model"}
    name = getattr(loss.loss, "__name__", type(loss.loss).__name__)
    weights = None if loss.class_weights is None else loss.class_weights.tolist()
    found = {
        "loss": name,
        "class_weights": weights,
        "reduction": loss.reduction,
        "reweight_after": loss.reweight_after,
    }
    if isinstance(loss.loss, WeightedSum):
        found |= {"parts": loss.loss.weights, "options of parts": loss.loss.options}
    plain = {key: v.tolist() if isinstance(v, Tensor) else v for key, v in loss.options.items()}
    if getattr(loss.loss, "needs_class_counts", False):
        plain[COUNTED] = loss.class_counts
    whole = {**found, "options": plain, COUNTED: loss.class_counts}
    return cast(dict[str, Any], json.loads(json.dumps(whole, default=str)))


def save_loss(folder: Path, loss: ConfiguredLoss | None) -> None:
    """Write the loss into a checkpoint's folder."""
    (folder / FILE).write_text(json.dumps(description(loss), indent=2) + "\n")


def check_same_loss(folder: str, loss: ConfiguredLoss | None) -> None:
    """Hold the loss of a resumed run to that of its checkpoint; one that was saved without it is taken as it is.

    Raises:
        ValueError: They differ; the message names what, and both values.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return
    try:
        saved: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not what was saved there: go on from another checkpoint.") from error
    now = description(loss)
    names = sorted((saved.keys() | now.keys()) - {COUNTED})
    gaps = [f"{k}: {saved.get(k)}, now {now.get(k)}" for k in names if not _same(saved.get(k), now.get(k))]
    if gaps:
        raise ValueError(
            f"{folder} was trained with another loss ({'; '.join(gaps)}). Resume with the same arguments and training "
            f"data. To go on with the new loss on purpose, remove {FILE} from the checkpoint, and have it accepted so by "
            f"`trainer-ext verify --accept {folder}`."
        )


def weights_table(loss: ConfiguredLoss, model: Any) -> str:
    """The classes with their counts, where they were counted, and weights, a line each."""
    assert loss.class_weights is not None
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    counts: Any = loss.class_counts or [None] * len(loss.class_weights)
    lines = [
        f"{printable(str(names.get(i, i))):>20}  {'' if count is None else f'{count:g}':>10}  {weight:10.6g}"
        for i, (count, weight) in enumerate(zip(counts, loss.class_weights.tolist(), strict=True))
    ]
    return "\n".join([f"{'class':>20}  {'count':>10}  {'weight':>10}", *lines])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b)
