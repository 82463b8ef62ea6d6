"""`trainer-ext configs`: the config files that come with the package."""

from typing import Annotated

import typer

from trainer_ext.cli.mistakes import users_mistakes


def configs(
    name: Annotated[str | None, typer.Argument(help="A file's name without its ending, such as zero2.")] = None,
) -> None:
    """List the DeepSpeed and FSDP configs that come with the package, or print the path of one."""
    from trainer_ext.configs.catalog import config_path, list_configs

    with users_mistakes():
        for path in [config_path(name)] if name else list_configs():
            typer.echo(path)
