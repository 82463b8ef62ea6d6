"""Layer-wise rates against those of timm itself, on its own models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "timm"
HOW = f"pip install --no-deps --target {FOLDER.relative_to(ROOT)} timm torchvision"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"timm is not here: {HOW}")
def test_the_rates_are_timms():
    command = [sys.executable, "-m", "tests.soak.timm_rates"]
    paths = os.pathsep.join(map(str, (FOLDER, ROOT)))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout.splitlines()[-1])
    assert len(models) == 5
    for name, rates in models.items():
        assert len({theirs for _, theirs in rates.values()}) > 10
        differs = {parameter for parameter, (ours, theirs) in rates.items() if not abs(ours - theirs) <= 1e-12}
        # timm puts a final normalisation that the head does not hold beside the last block, BEiT's own code above it.
        assert differs == ({"norm.weight", "norm.bias"} if name.startswith(("vit", "deit", "swin")) else set()), name
        assert all(rates[parameter] == [1.0, 0.75] for parameter in differs)
