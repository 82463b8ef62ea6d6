"""What is written is on the disk, and survives a loss of power."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a file: all of it, or what was there before.

    Args:
        path: Of the file. Beside it `NAME.unfinished` is written first.
        text: Goes there as UTF-8.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Have the content of a file on the disk."""
    opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk; some network file systems have no such call, and need none."""
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Have all that is in a folder on the disk, the innermost first."""
    folders = {Path()}
    for path, entry in walk(folder):
        folders |= set(Path(path).parents)
        if entry.is_file(follow_symlinks=False):
            sync_file(folder / path)
    for inner in sorted(folders, reverse=True):
        sync_folder(folder / inner)


def walk(folder: Path, under: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What is in a folder and the folders below, but these themselves, by relative path; links are not followed."""
    with os.scandir(folder / under) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = f"{under}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from walk(folder, f"{path}/")
            else:
                yield path, entry
