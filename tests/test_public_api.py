"""What the package promises: its names, who imports whom, and what the wheel carries."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trainer_ext

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trainer_ext"
HEAVY = {"torch", "transformers", "accelerate", "datasets", "deepspeed"}
LAW = {  # who may not import what
    "losses": {"transformers", "accelerate"},
    "optim/depth.py": {"transformers", "accelerate"},
    "optim/freezing.py": {"transformers", "accelerate"},
    "optim/groups.py": {"transformers", "accelerate"},
    "optim/muon.py": {"transformers", "accelerate"},
    "optim/rules.py": {"transformers", "accelerate"},
    "manual_loop.py": {"transformers", "accelerate"},
    "loop_settings.py": {"transformers", "accelerate"},
    "reference_optimizer.py": {"transformers", "accelerate"},
    "seeded_data.py": {"transformers", "accelerate"},
    "parity/comparison.py": {"transformers", "accelerate"},
    "parity/differences.py": {"transformers", "accelerate"},
    "parity/signs": {"transformers", "accelerate"},
    "parity/trajectory.py": {"transformers", "accelerate"},
    "checkpoints/durable.py": HEAVY,
    "checkpoints/manifest.py": HEAVY,
    "checkpoints/ranks.py": HEAVY,
    "checkpoints/resume.py": HEAVY,
    "checkpoints/write.py": HEAVY,
    "configs": HEAVY,
    "cli": HEAVY,
    "__init__.py": HEAVY,
    "sample.py": HEAVY,
}


def test_the_public_names():
    assert trainer_ext.__all__ == sorted(trainer_ext.__all__, key=lambda name: (name[0].islower(), name))
    for name in trainer_ext.__all__:
        assert getattr(trainer_ext, name) is not None
    assert set(trainer_ext.__all__) <= set(dir(trainer_ext))
    with pytest.raises(AttributeError, match="no attribute 'Custom'"):
        trainer_ext.Custom  # noqa: B018


def test_modules_are_modules():
    from trainer_ext import manual_loop, parity

    assert callable(manual_loop.train)
    assert callable(parity.compare)
    for name in parity.__all__:
        assert getattr(parity, name) is not None


def imported_at_the_top(file):
    """The top-level packages that a module imports when it is imported."""
    found, queue = set(), list(ast.parse(file.read_text()).body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("place", LAW)
def test_the_import_law(place):
    files = [PACKAGE / place] if place.endswith(".py") else sorted((PACKAGE / place).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_at_the_top(file) & LAW[place], file


def test_the_law_sees_an_import(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("if True:\n    from transformers import Trainer\n")
    assert imported_at_the_top(file) == {"transformers"}


def test_the_wheel_carries_the_configs(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("ds_configs", "fsdp_configs"):
        shipped = {f"trainer_ext/{folder}/{file.name}" for file in (ROOT / folder).iterdir()}
        assert shipped
        assert shipped <= names
    assert {"trainer_ext/py.typed", "trainer_ext/parity/templates/report.html"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_an_installed_package_finds_its_configs(tmp_path):
    """The wheel's layout, without a checkout beside it."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from trainer_ext.configs.catalog import config_path; print(config_path('zero2'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "site" / "trainer_ext" / "ds_configs" / "zero2.json"
