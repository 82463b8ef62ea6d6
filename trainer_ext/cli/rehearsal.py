"""`trainer-ext rehearse`: a GPU launch, on processes of this CPU."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trainer_ext.cli.mistakes import users_mistakes


def rehearse(
    ctx: typer.Context,
    processes: Annotated[int, typer.Option("--processes", help="CPU processes, in the place of GPUs.", min=1)] = 2,
    steps: Annotated[
        int,
        typer.Option("--steps", help="Optimizer steps; the last is taken again after a resume.", min=2),
    ] = 2,
    resume: Annotated[bool, typer.Option(help="Resume from the checkpoint in new processes.")] = True,
    keep_hosts: Annotated[
        bool,
        typer.Option(
            "--keep-hosts",
            help="This host's part of a launch on several hosts.",
        ),
    ] = False,
    log: Annotated[Path | None, typer.Option("--log", help="Keep what the processes print.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write the verdict as JSON here too.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for each of the two runs.", min=1)] = 1800,
) -> None:
    """Run a GPU launch on CPU processes with the real engine, and verify what really ran.

    Put the command behind [cyan]--[/], as for GPUs:

    [cyan]trainer-ext rehearse -- accelerate launch --config_file fsdp_configs/fsdp2.yaml script.py --output_dir runs/a[/]

    It takes a few steps, saves, resumes and exports the weights into the command's output_dir, where it leaves
    rehearsal.json too. Exit code 1 where the launch fell back, trained nothing or broke.
    """
    with users_mistakes():
        from trainer_ext.rehearsal.report import show
        from trainer_ext.rehearsal.run import rehearse as run_rehearsal

        found = run_rehearsal(
            ctx.args,
            processes=processes,
            steps=steps,
            resume=resume,
            keep_hosts=keep_hosts,
            timeout=timeout,
            log=log,
            progress=True,
        )
        if report is not None:
            report.write_text(json.dumps(found.as_json(), indent=1))
    show(found)
    if not found.passed:
        raise typer.Exit(1)
