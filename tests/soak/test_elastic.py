"""A checkpoint of every engine is gone on from on every other, and from one process to two, four and back; what was equal
goes to `docs/proof/elastic.md`."""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.callbacks.processes import run_ranks
from tests.checkpoints.elastic_run import ENGINES, STEPS, differing, leg, legs, seen_by_all

pytestmark = pytest.mark.soak

PROOF = Path(__file__).parents[2] / "docs" / "proof" / "elastic.md"
PACKAGES = ("trainer_ext", "torch", "transformers", "accelerate", "deepspeed")
TOLERANCE = 1e-6  # of a loss, relative
HELD = ([], True, True)  # no state differs, the same samples, losses within the tolerance
NAMES = {
    "one": "one process",
    "plain": "DDP x 2",
    "fsdp2": "FSDP2 whole x 2",
    "fsdp2_sharded": "FSDP2 sharded x 2",
    "zero1": "ZeRO-1 x 2",
    "zero2": "ZeRO-2 x 2",
    "zero3": "ZeRO-3 x 2",
}
TOGETHER = (("plain", "fsdp2", "fsdp2_sharded"), ("zero1", "zero2", "zero3"))  # in one launch
CHAINS = ("plain", "fsdp2_sharded", "zero2", "zero3")
SAVED, END = 2, 4  # the step of the checkpoints, and two steps later: a lost moment shows in the second
FOUND = {}  # by pair, or by chain and leg: what differs, the losses' differences of the next step and of all
SECTIONS = {
    "pairs": ("saved on", "goes on as"),
    "chains": ("from", "to"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return leg("plain", tmp_path_factory.mktemp("whole"), STEPS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of each engine's run."""
    out = tmp_path_factory.mktemp("saved")
    leg("plain", out / "one", SAVED)
    for engines in TOGETHER:
        launched([(engine, str(out / engine), SAVED, None, {}) for engine in engines])
    return {name: out / name for name in NAMES}


@pytest.mark.parametrize("engines", TOGETHER, ids=" ".join)
def test_two_ranks_go_on_from_every_engine(saved, whole, tmp_path, engines):
    pairs = [(source, engine) for engine in engines for source in NAMES if source != engine]
    plans = [
        (engine, str(tmp_path / f"{source} {engine}"), END, str(saved[source] / f"checkpoint-{SAVED}"), {})
        for source, engine in pairs
    ]
    for (source, engine), plan, ranks in zip(pairs, plans, launched(plans), strict=True):
        assert noted("pairs", (NAMES[source], NAMES[engine]), whole, saved[source], Path(plan[1]), ranks) == HELD


def test_one_process_goes_on_from_every_engine(saved, whole, tmp_path):
    for source in [name for name in NAMES if name != "one"]:
        ended = leg("plain", tmp_path / source, END, str(saved[source] / f"checkpoint-{SAVED}"))
        pair = (NAMES[source], NAMES["one"])
        assert noted("pairs", pair, whole, saved[source], tmp_path / source, [ended]) == HELD


@pytest.mark.parametrize("engine", CHAINS)
def test_one_two_four_one(whole, tmp_path, engine):
    leg("plain", tmp_path / "1", 2)
    name = NAMES[engine].removesuffix(" x 2")
    before, step, was = tmp_path / "1", 2, NAMES["one"]
    for world_size in (2, 4):
        after, until = tmp_path / str(world_size), step + 2
        plan = (engine, str(after), until, str(before / f"checkpoint-{step}"), {})
        ranks = launched([plan], world_size)[0]
        assert noted("chains", (was, f"{name} x {world_size}"), whole, before, after, ranks) == HELD
        before, step, was = after, until, f"{name} x {world_size}"
    ended = leg("plain", tmp_path / "end", STEPS, str(before / f"checkpoint-{step}"))
    assert noted("chains", (was, f"one process, {name} before"), whole, before, tmp_path / "end", [ended]) == HELD


def launched(plans, ranks=2):
    """What each rank saw, by plan."""
    found = run_ranks(legs, ranks, plans, environment=ENGINES[plans[0][0]][0], timeout=900)
    return list(zip(*found, strict=True))


def noted(section, key, whole, before, after, ranks):
    """Of a leg: the state that differs from what was saved, and whether samples and losses are those of one process."""
    assert {rank["on"]["world_size"] for rank in ranks} == {len(ranks)}
    seen = seen_by_all(ranks)
    gaps = [abs(rank["losses"][step] / whole["losses"][step] - 1) for step in seen for rank in ranks]
    wrong = differing(before / "end.safetensors", after / "begin.safetensors")
    samples = all(rows == sorted(whole["seen"][step]) for step, rows in seen.items())
    FOUND[section, key] = (wrong, samples, gaps[0], max(gaps))
    return wrong, samples, all(gap <= TOLERANCE for gap in gaps)


@pytest.fixture(scope="module", autouse=True)
def _proof():
    yield
    pairs = len(NAMES) * (len(NAMES) - 1)
    if len(FOUND) != pairs + 3 * len(CHAINS):
        return
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    text = [
        "# From every engine to every other",
        f"Generated on {date.today()} by `make soak` with {versions}, on the CPU with gloo.",
        "A tiny BERT is trained in float32 without dropout, eight rows a step on any number of processes, three steps an "
        f"epoch, the last of six. Each of {pairs} pairs trains {SAVED} steps on the first engine, saves, and goes on to "
        f"step {END} on the second, from the middle of the first epoch. Weights, moments and the step are read back from "
        "the live engine before the save and after the resume by the engine's own means, and compared by `torch.equal`; "
        "the rows of each step are those of one process that was never stopped; losses are compared with its losses, "
        f"relative, at the next step and at the worst of all. The largest difference that passes is {TOLERANCE:g}.",
    ]
    for section, head in SECTIONS.items():
        rows = {key: row for (of, key), row in FOUND.items() if of == section}
        text.append(
            "\n".join([table_row(*head, *HEAD), table_row(*["---"] * 7), *(shown(k, r) for k, r in rows.items())])
        )
    PROOF.write_text("\n\n".join(text) + "\n")


HEAD = ("weights equal", "moments equal", "rows of each step", "next loss", "worst loss")


def shown(key, row):
    wrong, samples, following, worst = row
    weights = not any(name.startswith("weight ") for name in wrong)
    moments = not any(not name.startswith("weight ") for name in wrong)
    said = ["yes" if fine else "NO" for fine in (weights, moments)]
    return table_row(*key, *said, "the same" if samples else "OTHERS", f"{following:.1e}", f"{worst:.1e}")


def table_row(*cells):
    return f"| {' | '.join(cells)} |"
