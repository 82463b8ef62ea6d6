"""The files in which weights are kept in parts, as their index (`*.index.json`) names them."""

import json
from pathlib import Path


def parts_of(index: Path) -> list[Path]:
    """The files that an index names, all of them beside it.

    Raises:
        ValueError: It names others, or is no index.
    """
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"is no index of weights: {type(error).__name__}: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"names {name!r}, which is no file beside it")
    return sorted(index.with_name(name) for name in names)
