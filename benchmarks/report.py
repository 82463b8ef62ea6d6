"""`docs/performance.md` and its plots, from the records in `benchmarks/results` and nothing else.

    python benchmarks/report.py

A section whose record is not there is left out. A ratio whose control is too far from 1 bears a mark.
"""

import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import curve_page, shown
from pairs import AGAIN, CONTROL, MEGABYTES, RESULTS, added, control_holds
from plots import dots, save

DOCS = Path(__file__).parents[1] / "docs"
MARK = " †"
TITLE = """# Performance

Built by `python benchmarks/report.py` from the records in `benchmarks/results`; `make bench` measures them again. Arms
take turns, so that a machine whose speed wanders changes all of them, and a ratio is of two runs of one round. Times and
ratios are medians, with the smallest and the largest behind them. Of each comparison the base runs a second time: this
control's ratio is the noise. Ratios with a dagger (†) have a control that is more than {control} from 1: they are not to be
quoted.

The same for all: {environment}. What differs stands with each.
"""

ACCURACY = """On the validation split: mean and standard deviation over the seeds. `stock` is the stock Trainer in float32,
`fast` the same recipe with the fast profile, `chosen` the recipe that did best on a fold of the train split ([what it is,
how it was chosen, and what did not help](recipe.md))."""


@dataclass(frozen=True)
class Section:
    """A question, the records that answer it (patterns of names), the command that measured them, and what its arms are."""

    title: str
    records: tuple[str, ...]
    command: str
    text: str
    added_to: str | None = None  # the arm whose addition to the base the others' are compared with


SECTIONS = (
    Section(
        "What a step costs besides its arithmetic",
        ("overhead",),
        "overhead.py",
        "A model so small that the arithmetic does not hide the rest, with the same rows, order and optimizer in all arms. "
        "*Added* is what an arm adds to the plain loop, as a ratio to what `Trainer` adds.",
        added_to="Trainer",
    ),
    Section(
        "The fast profile",
        ("fast_pace", "fast_settings", "fast_memory", "fast_ranks", "fast_tokens"),
        "fast.py",
        "Training MRPC with a MiniLM of 22.7 M parameters: `--profile fast` beside slower ways to train the same rows, and "
        "with one of its settings changed at a time ([what they are](fast.md)). A time is of the same 64 rows; ratios are "
        "to the profile. What it does to accuracy is [below](#accuracy-on-mrpc).",
    ),
    Section(
        "What the defaults cost",
        ("fast_defaults",),
        "fast.py",
        "`CustomTrainer`, with the exact loss and the guards that are on by default, beside `Trainer`: the same MiniLM, "
        "settings and rows.",
    ),
    Section(
        "Evaluation",
        ("evaluation_*",),
        "evaluation.py",
        "Evaluations of ours beside the stock one: of MRPC's validation split by a trained MiniLM, and of a token "
        "classifier of 2,000 classes, whose logits outweigh its model ([what is done otherwise](evaluation.md)).",
    ),
    Section("Accuracy on MRPC", ("accuracy",), "accuracy.py", ACCURACY),
    Section(
        "Start-up",
        ("import_time", "first_step"),
        "import_time.py",
        "Processes from their start to their end, with bytecode at hand as after an installation. The second table is of a "
        "training script that ends after its first optimizer step.",
    ),
    Section(
        "How time and memory grow",
        ("scaling",),
        "scaling.py",
        "At each point three processes take turns, a step each: `Trainer`, `CustomTrainer`, and `Trainer` again as the "
        "control. BERTs with random weights, float32, AdamW, one thread a process, freed memory kept. Memory is the most "
        "that a process held, less what it held after its imports. The growth is the exponent *e* of *xᵉ* that fits all "
        "points best.",
    ),
    Section(
        "Checkpoints",
        ("checkpoint_save", "checkpoint_parts", "checkpoint_resume", "checkpoint_step"),
        "checkpoints.py",
        "A checkpoint of a BERT of 22.7 M parameters with its AdamW state, 272 MB: a save (with `async_save`, as long as "
        "it blocks), parts of ours by themselves, a resume until all is loaded, and a step of a small model in which "
        "nothing is saved.",
    ),
    Section(
        "Recording",
        ("recording",),
        "recording.py",
        "A step of a training that is recorded for `trainer-ext parity`.",
    ),
    Section(
        "On 8, 64 and 1,024 GPUs: a model",
        ("cost_model",),
        "cost_model.py",
        "**Computed, not measured**: from the formulas and assumptions that are written in `benchmarks/cost_model.py`.",
    ),
)


def build(results: Path, docs: Path) -> None:
    """Write `docs/performance.md` and `docs/performance/*.svg`."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines = [TITLE.format(control=CONTROL, environment=shown(take_out_what_is_common(list(records.values()))))]
    for section in SECTIONS:
        there = [name for pattern in section.records for name in fnmatch.filter(records, pattern)]
        if there:
            lines += [f"## {section.title}\n", f"{section.text}\n"]
        for name in there:
            lines += [f"### {name.replace('_', ' ').capitalize()}\n"] if len(there) > 1 else []
            lines += answer(name, records[name], section, docs)
    (docs / "performance.md").write_text("\n".join(lines).rstrip() + "\n")


def take_out_what_is_common(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What all records say of their environment, which they no longer say then."""
    parts = [part for found in records for part in (found, *found.get("curves", {}).values())]
    environments = [part["environment"] for part in parts if "environment" in part]
    first = environments[0] if environments else {}
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in environments)}
    for environment in environments:
        for name in common:
            del environment[name]
    return common


def answer(name: str, found: dict[str, Any], section: Section, docs: Path) -> Iterator[str]:
    """A record in Markdown, whatever its kind."""
    by = f"`python benchmarks/{section.command}`"
    if "curves" in found:
        for curve, measured in found["curves"].items():
            yield from curve_page(curve, measured, by, docs)
    elif "tables" in found:
        yield from model_page(found, by)
    elif "summary" in found:
        yield from accuracy(found)
    else:
        yield from comparison(found, by, section.added_to)
        if "found" in found:
            yield from what_arms_found(found["found"])
        if len(found["seconds"]) > 4:
            kind = next(iter(found["seconds"][found["base"]]))
            save(docs, name, f"Ratios of {kind} time", lambda drawn: dots(drawn, found["ratios"], kind, found["base"]))
            yield f"![Ratios of {kind} time to {found['base']}](performance/{name}.svg)\n"


def what_arms_found(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """What each arm computed, beside what it took."""
    names = list(next(iter(found.values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {arm} | {' | '.join(f'{values[name]:.6g}' for name in names)} |" for arm, values in found.items()]
    yield "\n".join([*lines, ""])


def comparison(found: dict[str, Any], by: str, added_to: str | None) -> Iterator[str]:
    """A record of `pairs.measure` as a table, with how it was measured."""
    base, kinds = found["base"], list(found["seconds"][found["base"]])
    shows_added = added_to in found["ratios"]
    yield how(found, by)
    heads = [f"{kind} | ratio |{' added |' if shows_added else ''}" for kind in kinds]
    yield "\n".join(
        [
            f"| | {' '.join(heads)}",
            "|---" * (1 + (3 if shows_added else 2) * len(kinds)) + "|",
            *(row(found, name, kinds, added_to if shows_added else None) for name in in_order(found, base)),
            "",
        ]
    )
    for kind in kinds:
        if not control_holds(found, kind):
            control = found["ratios"][base + AGAIN][kind]["median"]
            yield f"† Not to be quoted: the control of {kind} is {control:.3f}.\n"


def row(found: dict[str, Any], name: str, kinds: list[str], added_to: str | None) -> str:
    cells = [f"**{name}**" if name.startswith("CustomTrainer") else name]
    for kind in kinds:
        mark = "" if control_holds(found, kind) else MARK
        own = found["seconds"][name][kind]
        middle, least, most = (amount(own[name], kind) for name in ("median", "min", "max"))
        cells.append(f"{middle} ({least} to {most})")
        if name == found["base"]:
            cells += ["1", "0"] if added_to else ["1"]
            continue
        ratio = found["ratios"][name][kind]
        cells.append(f"{ratio['median']:.3f}{mark} ({ratio['min']:.3f} to {ratio['max']:.3f})")
        if added_to:
            cells.append(f"{added(found, added_to, kind)[name]:.2f}{mark}")
    return f"| {' | '.join(cells)} |"


def in_order(found: dict[str, Any], base: str) -> list[str]:
    """The base, its control, and the others as they were named."""
    return [base, base + AGAIN, *(name for name in found["seconds"] if name not in (base, base + AGAIN))]


def amount(value: float, kind: str) -> str:
    if kind == MEGABYTES:
        return f"{value:.0f}"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def how(found: dict[str, Any], by: str) -> str:
    return f"Measured on {found['date']} by {by}, {found['rounds']} rounds: {about(found)}.\n"


def about(found: dict[str, Any]) -> str:
    return "; ".join(filter(None, (shown(found["about"]), shown(found["environment"]))))


def accuracy(found: dict[str, Any]) -> Iterator[str]:
    """Mean and standard deviation over the seeds of each arm."""
    metrics = list(next(iter(found["summary"].values()), {}))
    yield f"Trained on {found['date']}: {about(found)}.\n"
    heads = " | ".join(name.replace("_", " ") for name in metrics)
    lines = [f"| | seeds | {heads} |", "|---" * (len(metrics) + 2) + "|"]
    for arm, values in found["summary"].items():
        digits = {name: 0 if name.endswith("seconds") else 4 for name in metrics}
        cells = [
            f"{values[name]['mean']:.{digits[name]}f} ± {values[name]['sd']:.{digits[name]}f}" for name in metrics
        ]
        lines.append(f"| {arm} | {sum(run['arm'] == arm for run in found['runs'])} | {' | '.join(cells)} |")
    yield "\n".join([*lines, ""])


def model_page(found: dict[str, Any], by: str) -> Iterator[str]:
    yield f"By {by}. Assumptions: {'; '.join(found['assumptions'])}.\n"
    for table in found["tables"]:
        heads, *cells = table["rows"]
        lines = [f"### {table['title']}\n", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        yield "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells), ""])


if __name__ == "__main__":
    build(RESULTS, DOCS)
