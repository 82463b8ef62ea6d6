"""Put what was measured of the fast profile into docs/fast.md, between its two marks, from `benchmarks/results`.

python benchmarks/fast_table.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fast.md"
BEGIN, END = "<!-- measured: benchmarks/fast_table.py -->\n", "<!-- end -->\n"
CONTROL = 0.02
TITLES = {
    "pace": "The same rows, as a multiple of the fast profile's time",
    "settings": "The profile with one setting changed, as a multiple of its time",
    "defaults": "A step with what is on by default, as a multiple of the stock Trainer's time",
    "tokens": "The token ids of the whole corpus, as a multiple of reading them",
}


def page(text: str, results: Path) -> str:
    """`text` with what the records in `results` say."""
    before, rest = text.split(BEGIN)
    parts = [ratios(TITLES[name], read) for name in TITLES if (read := _read(results / f"fast_{name}.json"))]
    if (found := _read(results / "fast_accuracy.json")) and found["summary"]:
        parts.append(accuracy(found))
    return before + BEGIN + "\n" + "\n".join(parts) + "\n" + END + rest.split(END)[1]


def ratios(title: str, found: dict[str, Any]) -> str:
    """A line for each arm; the control is the base once more."""
    base, about = found["base"], {**found["environment"], **found["about"]}
    named = ("torch", "transformers", "cores", "threads", *found["about"])
    lines = [f"**{title}**: {found['date']}, {', '.join(f'{name} {about[name]}' for name in named)}.", ""]
    lines += ["| arm | wall ms | ratio: min, median, max | CPU ratio |", "|---|---|---|---|"]
    for name, seconds in found["seconds"].items():
        of = found["ratios"].get(name)
        ratio = "1 | 1" if of is None else f"{_three(of['wall'])} | {of['cpu']['median']:.2f}"
        lines.append(f"| {name} | {1000 * seconds['wall']['median']:.0f} | {ratio} |")
    if not abs(found["ratios"][f"{base}, again"]["wall"]["median"] - 1) <= CONTROL:
        lines += [
            "",
            f"The control is more than {CONTROL} from 1: the machine was not quiet, and this is no figure to quote.",
        ]
    return "\n".join(lines) + "\n"


def accuracy(found: dict[str, Any]) -> str:
    """A line for each arm: mean and standard deviation over its seeds."""
    seeds = {arm: [run["seed"] for run in found["runs"] if run["arm"] == arm] for arm in found["summary"]}
    lines = [
        f"**Accuracy on the validation split**: {found['date']}, rate 5e-5, 3 epochs, batch 16, one thread.",
        "",
        "| arm | seeds | accuracy | F1 | CPU seconds |",
        "|---|---|---|---|---|",
    ]
    for arm, of in found["summary"].items():
        cells = [f"{of[name]['mean']:.4f} ± {of[name]['sd']:.4f}" for name in ("accuracy", "f1")]
        cells.append(f"{of['train_cpu_seconds']['mean']:.0f}")
        lines.append(f"| {arm} | {len(seeds[arm])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _three(values: dict[str, float]) -> str:
    return ", ".join(f"{values[name]:.2f}" for name in ("min", "median", "max"))


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.exists() else None


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), ROOT / "benchmarks" / "results"))
