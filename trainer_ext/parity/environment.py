"""What a run's numbers may depend on besides its arguments: versions, machine, threads, code and data."""

import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from trainer_ext.fast import cpu_capabilities, has_bf16
from trainer_ext.plain_text import masked_words

PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "datasets", "tokenizers", "deepspeed")


def environment() -> dict[str, Any]:
    """Date, versions, machine and threads, as JSON takes them."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **{name: _version(name) for name in PACKAGES},
    }


def _cpu() -> str:
    """Its name, and what decides which of PyTorch's kernels it runs: two that differ there differ in the last bits."""
    named = [cpu_capabilities().get("cpu_name", "unnamed"), torch.backends.cpu.get_cpu_capability()]
    return ", ".join([*named, "bf16"] if has_bf16(gpu=False) else named)


def code() -> dict[str, Any]:
    """The command, and the revision of the git checkout that it ran in, if any; a `+` behind it: with changes."""
    command = masked_words(sys.argv)
    try:
        revision, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"command": command, "git": None}
    return {"command": command, "git": revision + ("+" if changed else "")}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def about_dataset(dataset: Any) -> dict[str, Any] | None:
    """Its number of rows and its fingerprint, where it has them; those of `datasets.Dataset` see every change."""
    if dataset is None:
        return None
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    return {"rows": rows, "fingerprint": getattr(dataset, "_fingerprint", None)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
