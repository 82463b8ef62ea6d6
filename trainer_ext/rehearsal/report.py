"""A rehearsal's verdict as a table to read."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer_ext.plain_text import masked, printable
from trainer_ext.rehearsal.run import Rehearsal


def show(found: Rehearsal) -> None:
    """Print what was verified, what each rank took, and what a CPU could not show."""
    console = Console()
    table = Table("", "check", "seen", box=None, title="Rehearsal", title_justify="left")
    for check in found.checks:
        table.add_row("[green]yes[/]" if check.held else "[red]no[/]", check.name, escape(printable(check.seen)))
    console.print(table)
    if found.ranks:
        memory = ", ".join(f"{rank['peak_memory_bytes'] / 2**20:,.0f}" for rank in found.ranks)
        console.print(f"Peak memory of each rank, libraries included: {memory} MiB")
    for missed in found.not_covered:
        console.print(f"Not covered: {escape(missed)}")
    if found.reason is not None:
        console.print(f"[red]Ended early:[/] {escape(printable(masked(found.reason)))}")
    if found.output_dir is not None:
        files = "rehearsal.json" if found.export is None else "Weights and rehearsal.json"
        console.print(f"{files}: {escape(found.output_dir)}")
    console.print("[green]passed[/]" if found.passed else "[red]failed[/]")
