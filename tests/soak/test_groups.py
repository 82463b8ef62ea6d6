"""The parameter groups of every architecture of transformers go to `docs/proof/groups.md`."""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.optim.architectures import check_groups, config_classes, on_meta

pytestmark = pytest.mark.soak

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "groups.md"
COLUMNS = "architecture, parameters, decayed, not decayed, stock: matrices left out, stock: vectors decayed, layers"


def test_every_family():
    found, failed, not_built = {}, {}, {}
    for name, config_class in config_classes().items():
        try:
            model = on_meta(config_class)
        except Exception as error:  # whatever a default configuration lacks
            not_built[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            continue
        try:
            found[type(model).__name__] = check_groups(model)
        except (AssertionError, ValueError) as error:
            failed[name] = " ".join(str(error).split())[:300]
    write(found, not_built)
    assert not failed
    assert len(found) > 500


def write(found, not_built):
    rows = sorted(found.items())
    unknown = sum(row[-1] is None for _, row in rows)
    left_out, vectors = (sum(row[place] > 0 for _, row in rows) for place in (3, 4))
    columns = COLUMNS.split(", ")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {name} | {' | '.join('unknown' if n is None else str(n) for n in row)} |" for name, row in rows]
    lines += ["", "Not built from their default configuration:", ""]
    lines += [f"- {name}: {why}" for name, why in sorted(not_built.items())]
    PROOF.write_text(
        "# Parameter groups of every architecture\n\n"
        f"Generated on {date.today().isoformat()} by `make soak`: every `AutoModel` of transformers that can be built from "
        f"its default configuration, {len(rows)}, on the meta device; {len(not_built)} cannot. In each, every trainable "
        "parameter is in exactly one group, nothing of fewer than two dimensions decays, and every matrix does. The stock "
        f"`Trainer` goes by names: it leaves matrices without decay in {left_out} of them, and decays vectors in "
        f"{vectors}. "
        "Layers is the length of the longest list of blocks, from which layer-wise rates are counted; in "
        f"{unknown} there is none, and `layerwise_lr_decay` is an error there.\n\n"
        + "\n".join(lines)
        + f"\n\ntorch {version('torch')}, transformers {version('transformers')}.\n"
    )
