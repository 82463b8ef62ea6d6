"""A user's mistake is one message and exit code 2; nothing else ends a command so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """A group of commands; a value that an option does not take is one message, too, with the value."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            found: list[Any] = getattr(error.__cause__, "errors", list)()
            given = f" It is {found[0]['input']!r}." if found else ""
            end_with(f"{error.format_message().rstrip('.')}.{given}")


@contextmanager
def users_mistakes(
    kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError, ImportError, RuntimeError),
) -> Iterator[None]:
    """Turn an error about what was asked for into one message and exit code 2."""
    try:
        yield
    except kinds as error:
        end_with(str(error))


def end_with(message: str) -> NoReturn:
    """Say what is wrong, on one line and without what a terminal would act on, and end with exit code 2."""
    from trainer_ext.plain_text import masked, printable

    typer.echo(f"trainer-ext: error: {printable(masked(' '.join(message.split())))}", err=True)
    raise typer.Exit(2) from None
