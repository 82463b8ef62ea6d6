"""What the `parity` commands do: run the matrix, measure its noise, compare two records."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from trainer_ext.checkpoints.durable import write_durably
from trainer_ext.parity import calibration, report
from trainer_ext.parity.causes import diagnose
from trainer_ext.parity.comparison import compare
from trainer_ext.parity.matrix import Matrix, Row
from trainer_ext.parity.modes import Mode, find_mode
from trainer_ext.parity.progress import progress_over
from trainer_ext.parity.tolerance import BITWISE, ROUNDING, Tolerance, rounding_of
from trainer_ext.parity.trajectory import Trajectory
from trainer_ext.task import TaskParser, prepare_task


@dataclass(frozen=True)
class Asked:
    """The options of `parity run` that are not the training's; named as there."""

    modes: str
    processes: int = 2
    include_stock: bool = False
    whole_batch: bool = False
    dtype: str = "float32"
    calibration: Path | None = None


@dataclass(frozen=True)
class Plan:
    """The matrices to run, one a dtype, each with its modes."""

    matrices: list[tuple[Matrix, list[Mode]]]
    include_stock: bool = False


def plan(asked: Asked, argv: list[str], folder: Path) -> Plan:
    """Read and check everything before anything is trained.

    Raises:
        ValueError: A mistake of the user's.
    """
    dtypes = list(dict.fromkeys(name.strip() for name in asked.dtype.split(",")))
    if wrong := [name for name in dtypes if name not in ("float32", "float64")]:
        raise ValueError(f"--dtype {wrong[0]}: choose float32 or float64.")
    rounding = None if asked.calibration is None else _calibrated(asked.calibration)
    task_arguments, args = TaskParser(prog="trainer-ext parity run").parse(argv)
    names = list(dict.fromkeys(name.strip() for name in asked.modes.split(",") if name.strip()))
    if not names:
        raise ValueError("--modes names no mode.")
    if args.gradient_accumulation_steps > 1 and all(name.startswith("ga") for name in names):
        raise ValueError(f"--accumulation would be ignored: {', '.join(names)} name their own.")
    chosen = [find_mode(name, args.gradient_accumulation_steps, asked.processes) for name in names]
    task, matrices = prepare_task(task_arguments), []
    for name in dtypes:
        home = folder if len(dtypes) == 1 else folder / name
        matrix = Matrix(task, args, home, getattr(torch, name), asked.whole_batch, argv=argv, rounding=rounding)
        # A mode that has no float64 is left out of it where it is held in float32 besides.
        modes = [mode for mode in chosen if not (len(dtypes) > 1 and name == "float64" and mode.deepspeed)]
        for mode in modes:
            matrix.check(mode)
        matrices.append((matrix, modes))
    task.new_model(args.seed)  # a model that cannot be used is a mistake, not a mode that failed
    return Plan(matrices, asked.include_stock)


def run(planned: Plan, folder: Path, *, command: list[str]) -> bool:
    """Run the matrices, show and write the report; whether every row that counts is equal."""
    disable_progress_bar()  # of loading weights, one bar a model
    stock = planned.include_stock
    names = [run for matrix, modes in planned.matrices for mode in modes for run in matrix.runs(mode, stock=stock)]
    rows: list[Row] = []
    done = 0
    with progress_over(names) as progress:
        for matrix, modes in planned.matrices:
            own = replace(matrix, on_step=progress.step)
            for mode in modes:
                for row in own.run(mode, stock=stock):
                    rows.append(row)
                    if row.error:
                        progress.say(f"{row.mode} failed: {report.explained(row)}")
                done += len(matrix.runs(mode, stock=stock))
                progress.done(done)
    about = report.quality(rows, planned.matrices[0][0].task.validation)
    report.write(rows, folder, command=command, about=about)
    report.show(rows, folder, about=about)
    return all(row.verdict == "equal" for row in rows if row.counts)


def calibrate(planned: Plan, folder: Path) -> None:
    """Measure the noise of one matrix, print it, and write `calibration.json`."""
    disable_progress_bar()
    (matrix, modes), found = planned.matrices[0], []
    steps = matrix.runs(modes[0])[0][1]
    names = ["the reference", *calibration.ways(matrix)]
    with progress_over([(name, steps) for name in names]) as progress:
        for noise in calibration.calibrate(replace(matrix, on_step=progress.step)):
            found.append(noise)
            progress.done(len(found) + 1)
    table = Table("changed", "loss", "grad norm", "eval loss", "weights", title="Largest difference", box=SIMPLE_HEAD)
    for one in found:
        table.add_row(one.way, *(f"{value:.2g}" for value in (one.loss, one.grad_norm, one.metric, one.weights)))
    document = {**calibration.as_json(found), "dtype": str(matrix.dtype).removeprefix("torch."), "steps": steps}
    path = folder / "calibration.json"
    write_durably(path, json.dumps({**document, "environment": report.environment()}, indent=2) + "\n")
    held = calibration.tolerance(found)
    console = Console()
    console.print(table)
    console.print(
        f"Tolerance, {calibration.MULTIPLE} times the largest: {held.relative:.2g} relative, {held.weights:.2g} of the way "
        f"that a weight can have gone. Written to {path}",
        markup=False,
    )


def compare_records(a: Path, b: Path, tolerance: str, folder: Path | None, *, command: list[str]) -> bool:
    """Compare two records, show and, with a folder, write the report; whether they are equal.

    Raises:
        ValueError: One is no record, or the tolerance none.
    """
    reference, candidate = Trajectory.load(a), Trajectory.load(b)
    held = _tolerance(tolerance, reference, candidate)
    found = compare(reference, candidate, held, same_split=held.bitwise)
    first = found.first_difference
    row = Row(
        mode=candidate.path,
        dtype=", ".join(sorted({dtype for dtype, _ in candidate.parameters.values()})),
        tolerance=held,
        dropout=True,
        folders=(a, b),
        comparison=found,
        diagnosis=diagnose(reference, candidate, first) if first else None,
        reference=reference,
        candidate=candidate,
    )
    if folder is not None:
        report.write([row], folder, command=command)
    report.show([row], folder)
    return found.equal


def _tolerance(text: str, reference: Trajectory, candidate: Trajectory) -> Tolerance:
    if text == "bitwise":
        return BITWISE
    if text in ROUNDING:
        return ROUNDING[text]
    if Path(text).suffix == ".json":
        return _calibrated(Path(text))
    try:
        relative = float(text) if text else None
    except ValueError:
        relative = -1.0
    if relative is not None and not 0 <= relative < float("inf"):
        raise ValueError(f"--tolerance {text}: give bitwise, a number from 0, or a calibration.json.")
    return rounding_of(reference, candidate, relative)


def _calibrated(path: Path) -> Tolerance:
    try:
        return calibration.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"calibration {path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"calibration {path}: {error}") from None
