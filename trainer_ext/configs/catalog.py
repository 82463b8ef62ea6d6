"""Where the shipped configs are: beside the package in a checkout, inside it once installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
FOLDERS = {"ds_configs": ".json", "fsdp_configs": ".yaml"}


def list_configs() -> list[Path]:
    """Every shipped config, DeepSpeed's first, by name."""
    return [path for folder, suffix in FOLDERS.items() for path in sorted(config_folder(folder).glob(f"*{suffix}"))]


def config_path(name: str) -> Path:
    """The file of the config called `name`, with or without its ending.

    Raises:
        ValueError: There is none; the message lists the choices.
    """
    found = {path.stem: path for path in list_configs()}
    if Path(name).stem not in found:
        raise ValueError(f"config {name!r} is not known. Choices: {', '.join(sorted(found))}.")
    return found[Path(name).stem]


def config_folder(folder: str) -> Path:
    """`ds_configs` or `fsdp_configs` of this installation.

    Raises:
        FileNotFoundError: The installation is incomplete.
    """
    for place in (PACKAGE / folder, PACKAGE.parent / folder):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{folder} is missing beside and inside {PACKAGE}: reinstall trainer_ext.")
