"""The weights that a run exported, loaded as a user would load them and held against the trained ones."""

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open

from trainer_ext.parity.digests import digest, digests

VERDICT = "rehearsal.json"


def exported_earlier(folder: Path) -> list[Path]:
    """The files in `folder` that are there as an earlier rehearsal exported them."""
    verdict = folder / VERDICT
    try:
        said = dict(json.loads(verdict.read_text())["exported"]["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    there = {folder / name: sha for name, sha in said.items() if Path(name).name == name and (folder / name).is_file()}
    return [path for path, sha in there.items() if file_digest(path) == sha]


def compare_export(record: dict[str, Any]) -> dict[str, Any]:
    """Load what a run exported.

    Args:
        record: Rank 0's, with the `architecture`, the folder `exported_to`, and the digests of its `weights`.

    Returns:
        The `files` with their SHA-256, the number of `tensors`, and the names of those that are `wrong`.
    """
    folder, trained = Path(record["exported_to"]), record["weights"]
    files = {path.name: file_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    found = _loaded(folder, record["architecture"]) if files else {}
    wrong = sorted(name for name in trained.keys() | found.keys() if trained.get(name) != found.get(name))
    return {"files": files, "tensors": len(found), "wrong": wrong}


def _loaded(folder: Path, architecture: str) -> dict[str, str]:
    """By `from_pretrained`, which gives tensors the model's own names; a model from elsewhere by its files."""
    cls = getattr(transformers, architecture, None)
    if cls is not None:
        return digests(cls.from_pretrained(folder, dtype="auto").state_dict())
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
