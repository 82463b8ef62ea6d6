"""Which checkpoint a run goes on from: one that is as it was saved, or none.

What `resume_from_checkpoint` asks for goes in, and a folder comes out, with what was passed over and why. Nothing of a
checkpoint is parsed here but its manifest.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from trainer_ext.checkpoints.manifest import has_manifest, verify
from trainer_ext.checkpoints.ranks import Ranks

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
BAD = "_bad-"  # before the name of one that was passed over; uploads to the hub leave out what begins with a `_`
ALONE = Ranks()
SHOWN = 5
UNSEALED = "manifest.json is missing, and others here have theirs: the save did not end, or another program wrote it"
MEND = "Where the change is meant, `trainer-ext verify --accept {folder}` takes the checkpoint as it is now."


class BadCheckpointError(ValueError):
    """A checkpoint is not loaded: it is not as it was saved, or does more than hold state."""


@dataclass(frozen=True)
class Choice:
    """What to go on from.

    Attributes:
        folder: The checkpoint.
        passed_over: Newer ones, and what is wrong with each.
        verified: Whether it is known to be as it was saved; False where no checkpoint there has a manifest.
    """

    folder: Path
    passed_over: dict[Path, list[str]] = field(default_factory=dict)
    verified: bool = True

    def notes(self) -> list[str]:
        """What a user should hear of."""
        notes = [f"{folder} is passed over: {shortened(wrong)}." for folder, wrong in self.passed_over.items()]
        if not self.verified:
            notes.append(
                f"{self.folder} has no manifest.json, as it was saved by another program: it is not verified."
            )
        return notes


def newest_good(output_dir: Path, ranks: Ranks = ALONE) -> Choice | None:
    """The newest checkpoint of a run that verifies, for all ranks the same; None where there is no checkpoint.

    Raises:
        BadCheckpointError: There are some, and none is good.
    """
    names = ranks.together(lambda: [path.name for path in checkpoints_in(output_dir)])
    folders = [output_dir / name for name in sorted(names, key=step_of, reverse=True)]
    sealed = _sealed(folders, ranks)
    passed_over: dict[Path, list[str]] = {}
    for folder in folders:
        if not sealed:
            return Choice(folder, verified=False)
        if not (wrong := _wrong(folder, sealed, ranks)):
            return Choice(folder, passed_over)
        passed_over[folder] = wrong
    if passed_over:
        raise BadCheckpointError(
            f"No checkpoint in {output_dir} is as it was saved. "
            + " ".join(f"{folder.name}: {shortened(wrong)}." for folder, wrong in passed_over.items())
            + " "
            + MEND.format(folder="CHECKPOINT")
        )
    return None


def named(folder: Path, ranks: Ranks = ALONE) -> Choice:
    """A checkpoint that a user names, verified.

    Raises:
        BadCheckpointError: It is not as it was saved.
    """
    names = ranks.together(lambda: [str(path) for path in checkpoints_in(folder.absolute().parent)])
    sealed = _sealed([folder, *map(Path, names)], ranks)
    if not sealed:
        return Choice(folder, verified=False)
    if wrong := _wrong(folder, sealed, ranks):
        raise BadCheckpointError(f"{folder} is not as it was saved: {shortened(wrong)}. {MEND.format(folder=folder)}")
    return Choice(folder)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    found = CHECKPOINT.fullmatch(name)
    assert found is not None
    return int(found.group(1))


def move_aside(folder: Path) -> None:
    """Give a checkpoint that was passed over another name, under which nothing counts it."""
    if not folder.exists():
        return
    aside, count = folder.with_name(f"{BAD}{folder.name}"), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{BAD}{folder.name}-{count}")
    folder.rename(aside)


def shortened(findings: list[str]) -> str:
    """The first findings, and how many there are besides."""
    more = [f"and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
    return "; ".join([*findings[:SHOWN], *more])


def verdicts(folder: Path) -> dict[Path, list[str]]:
    """What is wrong with a checkpoint, or with each of an output folder; nothing where it is as it was saved.

    Raises:
        ValueError: There is no such folder, or no checkpoint in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder.")
    found = checkpoints_in(folder)
    if not found and not (has_manifest(folder) or (folder / "trainer_state.json").is_file()):
        raise ValueError(f"{folder} is no checkpoint (it has no manifest.json), and has no folder checkpoint-STEP.")
    return {path: [str(finding) for finding in verify(path)] for path in found[::-1] or [folder]}


def _sealed(folders: list[Path], ranks: Ranks) -> list[str]:
    """Those with a manifest, on any storage."""
    return ranks.together(lambda: [str(folder) for folder in folders if has_manifest(folder)])


def _wrong(folder: Path, sealed: list[str], ranks: Ranks) -> list[str]:
    if str(folder) not in sealed:
        return [UNSEALED]
    return ranks.together(lambda: [str(finding) for finding in verify(folder)])
