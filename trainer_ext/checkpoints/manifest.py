"""The manifest of a checkpoint: every file with its size and SHA-256, by which a later change is found.

A folder goes in, and `manifest.json` in it comes out; a folder with a manifest goes in, and what is wrong comes out. The
manifest says nothing of who wrote it: it guards against accidents, not against somebody who writes a new one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer_ext.checkpoints.durable import walk, write_durably

MANIFEST = "manifest.json"
VERSION = 1
MISSING = "is missing"
ADDED = "is not in the manifest: it was added later"


class Entry(NamedTuple):
    """A file as it was saved.

    Attributes:
        size: In bytes.
        sha256: Of the content, in hexadecimal digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a checkpoint.

    Attributes:
        path: Of the file, relative to the checkpoint.
        what: What is wrong with it.
    """

    path: str
    what: str

    def __str__(self) -> str:
        path = self.path if self.path.isprintable() else ascii(self.path)
        return f"{path} {self.what}"


def write_manifest(folder: Path, *, unchanged: Mapping[str, Entry] | None = None) -> None:
    """Write `manifest.json`, last and at once: it is there only where all that it names was there before.

    Args:
        folder: A checkpoint, all of whose files are written.
        unchanged: Files that need not be read again.

    Raises:
        ValueError: There is a link or another thing that is no file.
    """
    known = unchanged or {}
    found = _content(folder)
    for path, entry in found.items():
        if not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{folder / path} is no regular file, and a checkpoint is made of files: remove it.")
    read = [path for path in found if path not in known]
    entries = {path: known[path] for path in found if path in known}
    write_durably(folder / MANIFEST, _render(entries | _read(folder, read)))


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint as they were saved, by relative path.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not as it was written.
    """
    with _open(folder / MANIFEST) as file:
        text = file.read().decode("utf-8")
    try:
        files: dict[str, Any] = json.loads(text)["files"]
        entries = {path: Entry(entry["size"], entry["sha256"]) for path, entry in files.items()}
        whole = all(isinstance(size, int) for size, _ in entries.values()) and _render(entries) == text
    except (KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError("it is not as it was written")
    return entries


def has_manifest(folder: Path) -> bool:
    """Whether a checkpoint was saved with a manifest, good or not."""
    return os.path.lexists(folder / MANIFEST)


def verify(folder: Path) -> list[Finding]:
    """What is wrong with a checkpoint; nothing, where every file is as it was saved and there are no others.

    Args:
        folder: The checkpoint. What is in it is read, and never what a link in it leads to.
    """
    if not folder.is_dir():
        return [Finding(".", f"is no folder: {folder}")]
    if not has_manifest(folder):
        return [Finding(MANIFEST, MISSING)]
    try:
        found = _content(folder)
    except OSError as error:
        return [Finding(".", f"cannot be read ({error})")]
    try:
        expected = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [Finding(MANIFEST, f"is damaged ({error})")]
    findings = [Finding(path, MISSING) for path in expected if path not in found]
    same = []
    for path, entry in found.items():
        if not entry.is_file(follow_symlinks=False):
            findings.append(Finding(path, "is no regular file, but a link or the like"))
        elif path not in expected:
            findings.append(Finding(path, ADDED))
        elif (size := entry.stat(follow_symlinks=False).st_size) != expected[path].size:
            findings.append(Finding(path, f"has {size:,} bytes, and was saved with {expected[path].size:,}"))
        else:
            same.append(path)
    for path, now in _read(folder, same, or_error=True).items():
        if isinstance(now, OSError):
            findings.append(Finding(path, f"cannot be read ({now})"))
        elif now != expected[path]:
            findings.append(Finding(path, "is not as it was saved: its SHA-256 differs"))
    return sorted(findings, key=lambda finding: finding.path)


def _content(folder: Path) -> dict[str, os.DirEntry[str]]:
    """What is in a folder but its manifest."""
    own = (MANIFEST, f"{MANIFEST}.unfinished")
    return {path: entry for path, entry in walk(folder) if path not in own}


def _render(entries: Mapping[str, Entry]) -> str:
    """The text of a manifest, of which one bit changed is found by rendering it again."""
    files = {path: entry._asdict() for path, entry in sorted(entries.items())}
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"version": VERSION, "sha256": own, "files": files}, indent=1) + "\n"


def _read(folder: Path, paths: list[str], *, or_error: bool = False) -> dict[str, Any]:
    """Files as they are now, several at a time: hashing lets other threads run."""

    def read(path: str) -> Entry | OSError:
        try:
            with _open(folder / path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return Entry(file.tell(), digest)
        except OSError as error:
            if or_error:
                return error
            raise

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))


def _open(path: Path) -> Any:
    """Open a file to read, and no link or pipe that has taken its place."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
