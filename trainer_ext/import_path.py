"""What an import path on the command line names, such as `my_package.losses:dice`."""

from importlib import import_module
from typing import Any


def is_import_path(name: str) -> bool:
    """Whether `name` has a module in it; names of our own tables have none."""
    return "." in name or ":" in name


def imported(path: str, option: str) -> Any:
    """The object at `path`, `module:name` or `module.name`; `option` is what the error calls it.

    Raises:
        ValueError: There is no such module or name, or it fails while it is imported.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(import_module(module_name), name)
    except Exception as error:  # a module may raise anything while it is imported
        problem = f"cannot import it ({type(error).__name__}: {error})"
        raise ValueError(f"{option} {path!r}: {problem}. Write module:name.") from error
