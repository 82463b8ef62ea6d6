"""An output folder: made when it is needed, gone again where nothing came of it, and nothing written in it lands elsewhere.

    with output_folder(Path("runs/a")):
        ...

The folder itself may be a link, as on clusters where runs lie on another disk. So may folders in it that are only read,
such as an older `checkpoint-500`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer_ext.checkpoints.durable import walk


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Have a folder there, as `make_folder`; where the block raises, remove it again if it was made here and is empty."""
    above = [path for path in (folder, *folder.parents) if not os.path.exists(path)]  # False for a name that cannot be
    try:
        make_folder(folder)
        yield
    except BaseException:
        with suppress(OSError):  # of those that are not empty
            for path in above:
                path.rmdir()
        raise


def make_folder(folder: Path, *, whole: bool = False) -> None:
    """Make a folder, with those above it, unless it is there.

    Args:
        folder: For output.
        whole: Whether all that is in it is written to, the folders below too.

    Raises:
        ValueError: It cannot be made, or a link in it leads elsewhere.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"output_dir {folder} is a file; name a folder.") from None
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be made: {error.strerror}. Name another folder.") from error
    refuse_links(folder, whole=whole)


def refuse_links(folder: Path, *, whole: bool = False) -> None:
    """Raise where something in an output folder is a link through which a later write would land elsewhere.

    Args:
        folder: The output folder.
        whole: Whether links to folders and links in folders below count, too.

    Raises:
        ValueError: With the link, and where it leads.
    """
    links = [folder / path for path, entry in walk(folder) if entry.is_symlink()] if whole else []
    if message := _said(links) or leads_out(folder):
        raise ValueError(message)


def leads_out(folder: Path, *folders: str) -> str:
    """What is wrong with an output folder, empty where nothing is: a file in it is a link, or one of `folders` is."""
    if not folder.is_dir():
        return ""
    with os.scandir(folder) as entries:
        links = [Path(e.path) for e in entries if e.is_symlink() and (e.name in folders or not e.is_dir())]
    return _said(links)


def _said(links: list[Path]) -> str:
    return (
        f"{links[0]} is a link to {os.readlink(links[0])}, and what is written there would land outside of the output "
        "folder: remove the link, or name another output_dir."
        if links
        else ""
    )
