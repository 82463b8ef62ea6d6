"""What of a checkpoint may be loaded: every pickle in it is read, and none is run.

    findings = check_pickles(folder)   # empty, or what is wrong: file, and the global that it names
    require_trusted(folder)            # the same as an error; before an engine sees the folder
    state = load(path)                 # one file of torch.save, by torch.load(weights_only=True)

DeepSpeed's engine loads with `weights_only=False`, and torch.distributed.checkpoint unpickles its index and the values
that are no tensors: for both the check has to come first. It holds for the files as they are when it reads them; who may
write into the folder later is trusted.
"""

import fnmatch
import os
import pickle
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from trainer_ext.checkpoints.allowed import ARGUMENTS, ARRAYS, DEEPSPEED, DISTRIBUTED, TENSORS
from trainer_ext.checkpoints.inert import Inert, parse
from trainer_ext.checkpoints.parts import parts_of
from trainer_ext.checkpoints.resume import BadCheckpointError

# What a file may name, by its own name; the first pattern that fits.
ALLOWED: dict[str, Collection[str]] = {
    "training_args.bin": TENSORS | ARRAYS | ARGUMENTS,
    "rng_state*.pth": TENSORS | ARRAYS,
    "*_states.pt": TENSORS | DEEPSPEED,
    "*.metadata": DISTRIBUTED,
    "*": TENSORS,
}
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".metadata")
TAGS = ("latest", "latest_universal")  # files in which DeepSpeed keeps the name of the folder to load
INDEX = "torch.distributed.checkpoint.metadata."
SAVED = "is not what torch.save writes (a zip archive with a data.pkl)"


class Finding(NamedTuple):
    """Why a file is not loaded.

    Attributes:
        file: Its path.
        why: What is wrong with it.
        name: The global that it must not name, if it is that.
    """

    file: Path
    why: str
    name: str | None = None

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{self.file} {self.why}")


class UntrustedPickleError(BadCheckpointError):
    """A checkpoint has a pickle that does more than hold state."""


def check_pickles(folder: Path, *, arguments: Collection[str] = ()) -> list[Finding]:
    """Read every pickle of a checkpoint, without running any of them.

    Args:
        folder: The checkpoint's.
        arguments: Globals that training_args.bin may name besides those of transformers and of this package.

    Returns:
        What is wrong, by file; nothing where all of them hold state alone.
    """
    findings = []
    for path in sorted(_files(folder)):
        if path.name in TAGS:
            findings += _check_tag(path)
        elif path.name.endswith(".metadata"):
            findings += _check_index(path)
        elif path.name.endswith(".index.json"):
            findings += _check_parts(path)
        elif path.suffix in PICKLED:
            also = arguments if path.name == "training_args.bin" else ()
            with path.open("rb") as file:
                findings += _check_saved(path, file, {*allowed_in(path), *also})
    return findings


def require_trusted(folder: Path, *, arguments: Collection[str] = (), without: Collection[str] = ()) -> None:
    """Raise where a checkpoint has a pickle that does more than hold state.

    Args:
        folder: The checkpoint's.
        arguments: As `check_pickles` takes them.
        without: Names of files that the caller does not load.

    Raises:
        UntrustedPickleError: With every file, and the global that it names.
    """
    findings = [one for one in check_pickles(folder, arguments=arguments) if one.file.name not in without]
    if findings:
        raise UntrustedPickleError(
            f"{folder} is not loaded: {'; '.join(map(str, findings))}. A checkpoint holds tensors, numbers and text; what "
            "is named here could run commands. Use a checkpoint that you saved yourself, or its model.safetensors alone."
        )
    for path in sorted(_files(folder)):
        if path.suffix == ".pt" and path.parent != folder:  # DeepSpeed's, which its engine unpickles as it finds them
            load(path)


def load(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, its tensors mapped from the file and not read before they are used.

    Raises:
        UntrustedPickleError: It names a global that is not in `ALLOWED`, or cannot be read.
    """
    with path.open("rb") as file:
        findings = _check_saved(path, file, allowed_in(path))
    if findings:
        raise UntrustedPickleError(f"{'; '.join(map(str, findings)).rstrip('.')}.")
    try:
        with _objects(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        raise UntrustedPickleError(f"{path} is not loaded by torch.load(weights_only=True): {error}") from error


def allowed_in(path: Path) -> Collection[str]:
    """The globals that a file of this name may name."""
    return next(names for pattern, names in ALLOWED.items() if fnmatch.fnmatch(path.name, pattern))


def _files(folder: Path) -> Iterator[Path]:
    """Every file below, also behind links, which a loader follows too."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root) / name for name in files)


def _check_saved(path: Path, file: BinaryIO, allowed: Collection[str]) -> list[Finding]:
    """Of one archive of torch.save, by torch's own reader of such archives."""
    try:
        archive = torch._C.PyTorchFileReader(file)
        names = archive.get_all_records()
        data = archive.get_record("data.pkl")
    except (RuntimeError, OSError) as error:  # the reader seeks before the beginning of a short file
        return [Finding(path, f"{SAVED}: {str(error).splitlines()[0].partition('. ')[0]}")]
    if "constants.pkl" in names:
        return [Finding(path, "is a TorchScript archive, which holds code")]
    return _check_pickle(path, data, allowed)


def _check_pickle(path: Path, data: bytes, allowed: Collection[str]) -> list[Finding]:
    try:
        _, names = parse(data)
    except ValueError as error:
        return [Finding(path, f"has a pickle that cannot be read: {error}")]
    return _not_allowed(path, names, allowed)


def _not_allowed(path: Path, names: Collection[str], allowed: Collection[str]) -> list[Finding]:
    return [Finding(path, f"names {name}", name) for name in sorted(names) if name not in allowed]


def _check_tag(path: Path) -> list[Finding]:
    tag = path.read_text(errors="replace").strip()
    if tag in ("", ".", "..") or "/" in tag or "\\" in tag or "\0" in tag:
        return [Finding(path, f"names {tag!r}, which is no folder beside it")]
    return []


def _check_parts(path: Path) -> list[Finding]:
    try:
        parts_of(path)
    except ValueError as error:
        return [Finding(path, str(error))]
    return []


def _check_index(path: Path) -> list[Finding]:
    """Of torch.distributed.checkpoint's index, and of the pickles in the files that it points into."""
    data = path.read_bytes()
    findings = _check_pickle(path, data, allowed_in(path))
    if findings:
        return findings
    try:
        places = list(_pickled_places(parse(data)[0]))
    except (KeyError, TypeError, AttributeError) as error:
        return [Finding(path, f"is not an index of torch.distributed.checkpoint: {type(error).__name__}: {error}")]
    for relative, offset, length in places:
        if Path(relative).name != relative or relative in (".", ".."):
            return [Finding(path, f"points to {relative!r}, which is no file beside it")]
        if offset is None:
            continue
        part = path.with_name(relative)
        if not part.is_file():
            return [Finding(path, f"points to {relative!r}, which is missing")]
        findings += _check_slice(part, offset, length)
    return findings


def _check_slice(part: Path, offset: int, length: int) -> list[Finding]:
    with part.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    return _check_saved(part, BytesIO(data), TENSORS)


def _pickled_places(index: Any) -> Iterator[tuple[str, int | None, int]]:
    """The file of every value, and the place of those that are unpickled: all but tensors."""
    _require(index, f"{INDEX}Metadata")
    kinds = index.state["state_dict_metadata"]
    for key, info in index.state["storage_data"].items():
        _require(key, f"{INDEX}MetadataIndex")
        _require(info, "torch.distributed.checkpoint.filesystem._StorageInfo")
        kind = kinds[key.state["fqn"]]
        tensor = isinstance(kind, Inert) and kind.called == f"{INDEX}TensorStorageMetadata"
        offset = None if tensor else int(info.state["offset"])
        yield str(info.state["relative_path"]), offset, int(info.state["length"])


def _require(found: Any, called: str) -> None:
    if not isinstance(found, Inert) or found.called != called:
        raise TypeError(f"a {type(found).__name__} stands where a {called.rpartition('.')[2]} should")


def _objects(path: Path) -> AbstractContextManager[None]:
    """Have `torch.load` take what a file of this name may name, and torch does not know by itself."""
    names = [name for name in allowed_in(path) if name in DEEPSPEED | ARRAYS]
    objects: list[Any] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module != "numpy.core.multiarray":  # numpy 2 warns of it; it is the one in numpy._core
            objects.append(getattr(import_module(module), attribute))
    if "numpy.dtype" in names:
        import numpy as np

        objects.append(type(np.dtype(np.uint32)))  # of the random state; arrays of others have no place there
    return torch.serialization.safe_globals(objects)
