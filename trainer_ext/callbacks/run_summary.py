"""A page and a model card of a run, written when it ends.

In go the run's own arguments, logs, model and optimizer (`run_facts`); out come `run_summary.html`, which needs nothing
besides itself, and `README.md` with the metadata that the hub reads, both in `output_dir`, by rank 0.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trainer_ext.callbacks.run_facts import Data, RunFacts, data_of, run_facts
from trainer_ext.plain_text import for_markdown, for_pages

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData
    from markupsafe import Markup
    from matplotlib.figure import Figure

logger = logging.get_logger(__name__)

PAGE, CARD = "run_summary.html", "README.md"
MARKER = "<!-- Written by trainer_ext's RunSummary, which writes it anew after the next run. -->"
UNITS = {
    "train_runtime": " seconds",
    "samples_per_second": " over all ranks",
    "tokens_per_second": " over all ranks",
    "padding_share": " of the tokens",
    "flops_utilization": " of the measured peak",
}


class RunSummary(TrainerCallback):
    """Writes `run_summary.html` and the model card `README.md` into `output_dir` when a training ends.

    What was run: the model, its data, the engine it ran on, the arguments that differ from their defaults, the
    environment, the parameter groups. What was measured: losses, every evaluation, the best metric with its step, the
    time; what `Throughput` measured of the whole run and the steps that were skipped, where these were logged. Numbers
    are those of `state.log_history`; what is not known is left out. All names are escaped. A `README.md` that this did
    not write is left alone.
    """

    def __init__(self) -> None:
        self._began_at = 0
        self._evaluated_on: set[Data] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began_at, self._evaluated_on = state.global_step, set()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._evaluated_on.add(data_of(getattr(eval_dataloader, "dataset", None)))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        assert model is not None
        run = run_facts(
            args,
            state,
            model,
            optimizer,
            trained_on=data_of(getattr(train_dataloader, "dataset", None)),
            evaluated_on=next(iter(self._evaluated_on)) if len(self._evaluated_on) == 1 else None,
            began_at=self._began_at,
        )
        write_summary(run, Path(str(args.output_dir)))


def write_summary(run: RunFacts, folder: Path) -> None:
    """Write the page; and the card, where there is none of someone else's."""
    from huggingface_hub import ModelCard

    from trainer_ext.checkpoints.durable import write_durably

    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / PAGE, rendered(run, "run_summary.html"))
    card = folder / CARD
    if card.exists() and MARKER not in card.read_text(encoding="utf-8", errors="replace"):
        logger.warning(f"{card} was not written by RunSummary and is left as it is; the run is in {folder / PAGE}.")
        return
    write_durably(card, str(ModelCard(f"---\n{metadata(run).to_yaml()}\n---\n\n{rendered(run, 'model_card.md')}")))


def rendered(run: RunFacts, template: str) -> str:
    """The page or the card's text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from trainer_ext.parity.environment import environment

    page = template.endswith("html")
    templates = Environment(
        loader=PackageLoader("trainer_ext.callbacks"),
        autoescape=page,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=for_pages,
    )
    templates.filters["plain"] = for_markdown
    return templates.get_template(template).render(
        run=run,
        columns=list(dict.fromkeys(name for entry in run.evaluations for name in entry)),
        curves=curves(run) if page else [],
        environment=environment(),
        marker=MARKER,
        shown=shown,
        units=UNITS,
    )


def metadata(run: RunFacts) -> "ModelCardData":
    """The card's metadata; the last evaluation is in it where the hub knows the task and the data that it was of."""
    from huggingface_hub import EvalResult, ModelCardData

    data, task = run.evaluated_on, run.task
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.repository,
            dataset_name=data.name or data.repository,
            dataset_split=data.split,
            metric_type=name.removeprefix("eval_"),
            metric_value=value,
        )
        for name, value in (run.evaluations[-1] if run.evaluations else {}).items()
        if task and data and data.repository and name.startswith("eval_") and math.isfinite(value)
    ]
    known: dict[str, Any] = {
        "base_model": run.base_model,
        "datasets": [run.trained_on.repository] if run.trained_on.repository else None,
        "pipeline_tag": run.task,
        "eval_results": results or None,
    }
    given = {name: value for name, value in known.items() if value}
    return ModelCardData(model_name=run.model_name, library_name="transformers", tags=["trainer_ext"], **given)


def curves(run: RunFacts) -> "list[Markup]":
    """The losses, the gradient norm, the rate and each metric of the evaluations over the steps."""
    metrics = dict.fromkeys(name for entry in run.evaluations for name in entry if name.startswith("eval_"))
    losses = [name for name in metrics if name.endswith("_loss")]
    rest = [name for name in metrics if name not in losses]
    wanted = [["loss", *losses], ["grad_norm"], ["learning_rate"], *([name] for name in rest)]
    return [svg for names in wanted if (svg := curve(run, names)) is not None]


def curve(run: RunFacts, names: list[str]) -> "Markup | None":
    """One drawing of the quantities `names`; None where none of them was logged twice."""
    from trainer_ext.inline_svg import inline_svg

    points = {name: [(e["step"], e[name]) for e in run.logs if name in e] for name in names}
    points = {name: values for name, values in points.items() if len({step for step, _ in values}) > 1}
    if not points:
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for name, values in points.items():
            axes.plot(*zip(*values, strict=True), "-" if len(values) > 20 else ".-", linewidth=1.2, label=name)
        axes.set(xlabel="optimizer step", ylabel=names[0])
        if len(points) > 1:
            axes.legend(fontsize="small", framealpha=0)

    ends = [f"{name} from {shown(values[0][1])} to {shown(values[-1][1])}" for name, values in points.items()]
    steps = max(values[-1][0] for values in points.values())
    return inline_svg(draw, (7, 3), name=" ".join(points), described=f"{', '.join(ends)} at step {steps}")


def shown(value: float) -> str:
    """Four digits of a fraction, all of a whole number."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
