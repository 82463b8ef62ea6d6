"""Read a pickle without running it: what it names, and its structure in objects that do nothing.

The parser is Python's own, so that nothing is read here that the real loading would read otherwise. But each global
that a pickle names becomes an empty class of its own: nothing is imported and nothing of it is called.
"""

import io
import pickle
import pickletools
from typing import Any

MAPPINGS = ("collections.OrderedDict", "collections.Counter")


class _Fixed(type):
    """A pickle may set attributes of the classes that it names; here it may not."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {cls.__name__}")


class Inert(metaclass=_Fixed):
    """Stands for an object of a pickle.

    Attributes:
        called: The global that made it, as `module.name`.
        args: What it was called with.
        state: What was set of it, or None.
    """

    called = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Any arguments will do."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """A mapping's. In a tensor it writes wherever the key says (CVE-2026-24747, mended in torch 2.10)."""
        if self.called not in MAPPINGS:
            raise pickle.UnpicklingError(f"it sets an item of a {self.called}")

    def append(self, value: Any) -> None:
        """A list's."""

    def add(self, value: Any) -> None:
        """A set's."""


class InertUnpickler(pickle.Unpickler):
    """Parses one pickle; `names` are the globals that it asked for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """An empty class in the place of the one that is named."""
        called = f"{module}.{name}"
        self.names.add(called)
        return _Fixed(called, (Inert,), {"called": called})

    def persistent_load(self, pid: Any) -> Any:
        """A storage of torch's: its type is among the names already."""
        return None


def _check_memo(data: bytes) -> None:
    """A pickle may number its values as it likes, and a parser makes room for all numbers up to the highest."""
    for opcode, number, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and number is not None and number > len(data):
            raise pickle.UnpicklingError(f"it numbers a value {number:,}, in {len(data):,} bytes")


def parse(data: bytes) -> tuple[Any, set[str]]:
    """The object of a pickle, made of inert ones, and the globals that it names.

    Raises:
        ValueError: It cannot be parsed, or does what no saved state does.
    """
    unpickler = InertUnpickler(data)
    try:
        _check_memo(data)
        found = unpickler.load()
    except Exception as error:  # hostile bytes end in errors of any kind
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return found, unpickler.names
