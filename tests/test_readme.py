"""Every command that README shows, run as it stands there (with two optimizer steps, to be quick), or run by others."""

import re
import subprocess

import pytest

from tests.readme import COMMANDS, README, ROOT, command

RUN_BY_CI = {"make demo", "make test"}
# By how they begin: the tests that run them, and look at what came of it.
RUN_BY_TESTS = {
    "deepspeed": "test_launches.py",
    "python examples/run_mrpc.py": "test_examples.py",
    "python examples/use_model.py": "test_examples.py",
    "trainer-ext rehearse": "rehearsal/test_rehearse.py",
    "trainer-ext parity run --dataset sample --modes ddp2": "parity/test_launched_modes.py",
}


def test_the_commands_are_found():
    assert set(COMMANDS) >= RUN_BY_CI
    assert sum(typed.startswith("trainer-ext ") for typed in COMMANDS) >= 4
    assert (ROOT / ".ci" / "run").read_text().count("make lint test demo") == 1
    for start, file in RUN_BY_TESTS.items():
        assert command(start)
        assert f'command("{start}")' in (ROOT / "tests" / file).read_text()


def shortened(typed):
    """The command for this environment: no downloads, and two steps where it trains."""
    if typed.startswith("pip install"):
        return f"{typed} --quiet --no-deps --no-build-isolation --target site"
    others = ("ext configs", "parity compare", "ext groups", "ext verify", "ext export")
    if any(words in typed for words in others):
        return typed
    return f"{typed} --max_steps 2 --use_cpu"


def test_readme_from_top_to_bottom(tmp_path):
    """In order and in one folder, since later commands read what earlier ones wrote."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", "trainer_ext"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("ds_configs", "fsdp_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for typed in COMMANDS:
        if typed not in RUN_BY_CI and not typed.startswith(tuple(RUN_BY_TESTS)):
            done = subprocess.run(["bash", "-c", shortened(typed)], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{typed}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "parity" / "report.html").is_file()


def test_the_python_blocks_compile():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


@pytest.mark.parametrize("file", sorted({*re.findall(r"\]\(([\w/.-]+)\)", README)}))
def test_links_lead_somewhere(file):
    assert (ROOT / file).exists()
