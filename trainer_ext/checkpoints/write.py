"""A checkpoint that is whole or not there.

It is written beside, in `_saving/checkpoint-STEP`. When all ranks are done everything is brought to the disk, the manifest
is written last, and one rename puts the folder in its place. A save that fails or is killed leaves the checkpoints before
it as they were; what is left of it is removed when the next one begins.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainer_ext.checkpoints.durable import sync_folder, sync_tree, walk
from trainer_ext.checkpoints.manifest import MANIFEST, read_manifest, write_manifest
from trainer_ext.checkpoints.ranks import Ranks
from trainer_ext.checkpoints.resume import checkpoints_in, step_of

SAVING = (
    "_saving"  # no `checkpoint-`, which a rotation would count; uploads to the hub leave out what begins with a `_`
)
REPLACED = "replaced"  # in it: what a finished save takes the place of, for a moment
Stamp = tuple[int, int, int, int]


class CheckpointNotSavedError(RuntimeError):
    """A checkpoint was not saved; those before it are as they were."""


class Save:
    """One checkpoint on its way to the disk. All ranks make one, and call its methods together.

    Args:
        run_dir: The folder that gets the checkpoint.
        name: The checkpoint's, such as `checkpoint-500`.
        ranks: This process among all.

    Attributes:
        staging: What stands for `run_dir` while the files are written.
        folder: Where they are written.
        place: Where the checkpoint is when it is whole.
    """

    def __init__(self, run_dir: str, name: str, ranks: Ranks) -> None:
        self.staging = Path(run_dir) / SAVING
        self.folder = self.staging / name
        self.place = Path(run_dir) / name
        self._ranks = ranks
        self._stamps: dict[str, Stamp] = {}
        self._replaces = os.path.lexists(self.place)

    def begin(self) -> None:
        """Make the folder, after what a killed save left is gone.

        Raises:
            CheckpointNotSavedError: It cannot be made.
        """
        self._together(self._ranks.on_every_node, lambda: remove_leftovers(self.place.parent))
        self._together(self._ranks.on_every_node, lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def commit(self) -> None:
        """Put the checkpoint in its place, now that all ranks have written their files.

        Raises:
            CheckpointNotSavedError: The disk refuses.
        """
        self._ranks.gather(None)
        self._together(self._ranks.on_every_node, lambda: sync_tree(self.folder))
        self._together(self._ranks.once_for_each_storage, self._put_in_place)

    def seal(self) -> None:
        """Take up what was changed in the place since `commit`, by callbacks that save files of their own.

        Raises:
            CheckpointNotSavedError: The disk refuses.
        """
        self._ranks.gather(None)
        if wrong := self._ranks.once_for_each_storage(self._take_up_changes):
            raise CheckpointNotSavedError(
                f"{self.place}: what callbacks saved into it is not on the disk: {wrong[0]}."
            )

    def give_up(self, reason: object) -> "CheckpointNotSavedError":
        """Remove what was written, and say so."""
        shutil.rmtree(self.staging, ignore_errors=True)
        run_dir, later = self.place.parent, " when the next save begins" if self.staging.exists() else ""
        try:
            kept = checkpoints_in(run_dir)
            before = f"{kept[0]} is as it was" if kept else "no other checkpoint is there yet"
            room = f"; {shutil.disk_usage(run_dir).free / 1e6:,.0f} MB are free there"
        except OSError:  # such as no file handle to look with
            before, room = "those before it are as they were", ""
        return CheckpointNotSavedError(
            f"{self.place} was not saved: {reason}. What was written of it is removed{later}{room}; {before}."
        )

    def _together(self, how: Callable[[Callable[[], None]], list[str]], action: Callable[[], None]) -> None:
        if wrong := how(action):
            raise self.give_up(wrong[0])

    def _put_in_place(self) -> None:
        if not self.folder.is_dir() and not self._ranks.first:
            return  # the storage is rank 0's
        write_manifest(self.folder)
        self._stamps = stamps(self.folder)
        if os.path.lexists(self.place):
            if not self._replaces:
                raise ValueError(
                    "something was put there while it was being saved, such as by a callback's on_save: with async_save "
                    "the folder is not there yet, and a callback's files go through StatefulCallback.save_files"
                )
            (self.staging / REPLACED).mkdir()
            self.place.rename(self.staging / REPLACED / self.place.name)
        self.folder.rename(self.place)
        sync_folder(self.place.parent)
        shutil.rmtree(self.staging, ignore_errors=True)

    def _take_up_changes(self) -> None:
        if not self._stamps or not self.place.is_dir():
            return  # another process put it in its place, or a callback has moved it away
        now = stamps(self.place)
        if now == self._stamps:
            return
        saved = read_manifest(self.place)
        untouched = {path for path, stamp in now.items() if stamp == self._stamps.get(path)}
        unchanged = {path: entry for path, entry in saved.items() if path in untouched}
        sync_tree(self.place)
        write_manifest(self.place, unchanged=unchanged)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed save left in an output folder, and put back what it was about to replace.

    Several processes may do it at a time.
    """
    staging = run_dir / SAVING
    if staging.is_symlink():  # whoever put it there: what is saved would land elsewhere
        staging.unlink(missing_ok=True)
    for path in (staging / REPLACED).glob("*"):
        if not os.path.lexists(run_dir / path.name):
            with suppress(FileNotFoundError):
                path.rename(run_dir / path.name)
    shutil.rmtree(staging, ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep so many checkpoints, the newest and the best among them, as `rotate_checkpoints` of transformers does.

    One that is removed leaves its place at once: half of it would be the newest by its folder's time, and be kept for a
    whole one.
    """
    found = sorted(checkpoints_in(run_dir), key=lambda folder: (folder.stat().st_mtime, step_of(folder.name)))
    if not limit or limit < 0 or len(found) <= limit:
        return
    kept = {found[-1]} | ({Path(best)} if best else set())
    surplus = len(found) - max(limit, len(kept))
    removed = run_dir / SAVING / "removed"
    removed.mkdir(parents=True, exist_ok=True)
    for folder in [path for path in found if path not in kept][:surplus]:
        with suppress(OSError):  # it stays, and the next rotation tries again
            os.rename(folder, removed / folder.name)
    shutil.rmtree(run_dir / SAVING, ignore_errors=True)


def stamps(folder: Path) -> dict[str, Stamp]:
    """What tells of each file of a checkpoint that it was written to."""
    found = {path: entry.stat(follow_symlinks=False) for path, entry in walk(folder) if path != MANIFEST}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found.items()}
