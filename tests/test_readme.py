"""Every command that README shows, run as it stands there (with two optimizer steps, to be quick)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
RUN_BY_CI = {"make demo", "make test"}


def test_the_commands_are_found():
    assert set(COMMANDS) >= RUN_BY_CI
    assert sum(command.startswith("trainer-ext ") for command in COMMANDS) >= 4
    assert (ROOT / ".ci" / "run").read_text().count("make lint test demo") == 1


def shortened(command):
    """The command for this environment: no downloads, and two steps where it trains."""
    if command.startswith("pip install"):
        return f"{command} --quiet --no-deps --no-build-isolation --target site"
    others = ("use_model", "ext configs", "parity compare", "ext groups", "ext verify", "ext export")
    if any(words in command for words in others):
        return command
    return f"{command} --max_steps 2 --use_cpu"


def test_readme_from_top_to_bottom(tmp_path):
    """In order and in one folder, since later commands read what earlier ones wrote."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "trainer_ext"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("ds_configs", "fsdp_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for command in COMMANDS:
        if command not in RUN_BY_CI:
            done = subprocess.run(
                ["bash", "-c", shortened(command)], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "parity" / "report.html").is_file()


def test_the_python_blocks_compile():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


@pytest.mark.parametrize("file", sorted({*re.findall(r"\]\(([\w/.-]+)\)", README)}))
def test_links_lead_somewhere(file):
    assert (ROOT / file).exists()
