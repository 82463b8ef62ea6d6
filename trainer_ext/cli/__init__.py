"""The command `trainer-ext`: options in, one call of the library, a table out.

Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

import typer

from trainer_ext.cli import checkpoints, configs, optimizer, parity, rehearsal, training
from trainer_ext.cli.mistakes import Commands
from trainer_ext.cli.options import OTHERS, PASS_ON

__all__ = ["app", "main"]

app = typer.Typer(
    name="trainer-ext",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune with the Hugging Face Trainer, and prove that the arithmetic is right.",
    epilog="Exit codes: 0 done; 1 the answer is no (a mode differs or failed); 2 a mistake in what was asked for; 85 "
    "stopped by a signal or the time limit, with a checkpoint to resume from.",
)
parity_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Hold training paths against the plain PyTorch loop."
)
app.add_typer(parity_app, name="parity")
app.command(context_settings=PASS_ON, epilog=OTHERS)(training.train)
app.command(context_settings=PASS_ON, epilog=OTHERS)(training.manual)
parity_app.command(context_settings=PASS_ON, epilog=OTHERS)(parity.run)
parity_app.command(context_settings=PASS_ON, epilog=OTHERS)(parity.calibrate)
parity_app.command(context_settings=PASS_ON)(parity.record)
parity_app.command()(parity.compare)
app.command(context_settings=PASS_ON)(rehearsal.rehearse)
app.command()(optimizer.groups)
app.command()(optimizer.schedule)
app.command()(checkpoints.verify)
app.command()(checkpoints.export)
app.command()(configs.configs)


def main() -> None:
    """The entry point."""
    app()
