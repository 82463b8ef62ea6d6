"""What a checkpoint needs besides weights to become a model again: its configuration and tokenizer."""

from pathlib import Path
from typing import Any

from torch import nn


def save_description(model: nn.Module, processing_class: Any, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files, as far as there are such.

    Args:
        model: Whose configuration is saved, if it has one.
        processing_class: A tokenizer or processor, or None.
        folder: A checkpoint's; made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # what fully_shard calls the class
        config.save_pretrained(folder)
    parts: list[Any] = [getattr(model, "generation_config", None), processing_class]
    for part in parts:
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)
