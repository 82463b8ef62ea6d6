"""Progress over the runs of a comparison: which is under way, and how long the others will take."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """One line for all runs, in optimizer steps, with the name of the one under way."""

    def __init__(self, progress: Progress, runs: list[tuple[str, int]]) -> None:
        self._progress, self._runs, self._taken = progress, runs, 0
        self._task = progress.add_task(self._name(), total=sum(steps for _, steps in runs))

    def step(self) -> None:
        """A step was taken."""
        self._taken += 1
        self._progress.update(self._task, advance=1, description=self._name())

    def done(self, runs: int) -> None:
        """So many runs in all are over, whether they took all their steps or not."""
        self._taken = sum(steps for _, steps in self._runs[:runs])
        self._progress.update(self._task, completed=self._taken, description=self._name())

    def say(self, text: str) -> None:
        """Print something above the line."""
        self._progress.console.print(text, markup=False, highlight=False)

    def _name(self) -> str:
        begun = 0
        for name, steps in self._runs:
            begun += steps
            if self._taken < begun:
                return name
        return "done"


@contextmanager
def progress_over(runs: list[tuple[str, int]]) -> Iterator[RunProgress]:
    """Show progress over `runs`, names and optimizer steps, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        yield RunProgress(progress, runs)
