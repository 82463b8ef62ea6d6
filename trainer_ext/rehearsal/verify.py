"""What a command asked for, held against what its processes recorded: pure functions over records."""

import math
from dataclasses import dataclass
from typing import Any

from trainer_ext.rehearsal.launch import Asked

# Two runs of the same step in the same engine, the second after a resume: equal but for the order of summation.
SAME_STEP = 1e-5


@dataclass(frozen=True)
class Check:
    """One thing that was verified: its name, whether it held, and what was seen."""

    name: str
    held: bool
    seen: str


def verify(
    asked: Asked,
    processes: int,
    world_size: int,
    steps: int,
    trained: list[dict[str, Any]],
    resumed: list[dict[str, Any]] | None,
    export: dict[str, Any] | None,
) -> list[Check]:
    """Every check of a rehearsal, in the order in which a launch goes wrong.

    Args:
        asked: What the command asks for.
        processes: How many were started on this host.
        world_size: How many there are on all hosts.
        steps: Optimizer steps that were to be taken.
        trained: The records of the first run, one a rank; empty where nothing was trained.
        resumed: Those of the run that continued from the first one's checkpoint, or None where none was to.
        export: The exported files, as `compare_export` found them; None on a host that exports nothing.
    """
    if not trained:
        return [Check("trained", False, "the script ended without a finished Trainer.train()")]
    checks = [
        _processes(processes, world_size, trained),
        _engine(asked, trained),
        *_shards(asked, world_size, trained),
    ]
    checks += [_offload(asked, trained)] if asked.offload else []
    checks += [_trained(steps, trained), _same_on_all_ranks(trained)]
    if resumed is not None:
        checks.append(_resumed(trained, resumed))
    checks += [_exported(export)] if export is not None else []
    return checks


def expected_engine(asked: Asked, seen: dict[str, Any]) -> bool:
    """Whether what a rank ran on is the engine that was asked for."""
    name = seen["engine"]
    if asked.engine == "deepspeed":
        return name == "DeepSpeedEngine" and asked.stage in (None, seen["stage"])
    if asked.engine == "fsdp":
        return bool(seen["placements"]) or name == "FullyShardedDataParallel"
    if asked.engine == "ddp":
        return name == "DistributedDataParallel" or seen["world_size"] == 1
    return seen["world_size"] == 1


def _processes(processes: int, world_size: int, ranks: list[dict[str, Any]]) -> Check:
    worlds = sorted({rank["runs_on"]["world_size"] for rank in ranks if "runs_on" in rank})
    held = len(ranks) == processes and worlds == [world_size]
    seen = f"{len(ranks)} process(es) of {processes} trained, in a world of {', '.join(map(str, worlds)) or 'none'}"
    return Check("one run", held, seen)


def _engine(asked: Asked, ranks: list[dict[str, Any]]) -> Check:
    wanted = asked.engine if asked.stage is None else f"{asked.engine}, ZeRO stage {asked.stage}"
    seen = [rank.get("runs_on") or {} for rank in ranks]
    held = all(one and expected_engine(asked, one) for one in seen)
    stage = "" if seen[0].get("stage") is None else f", ZeRO stage {seen[0]['stage']}"
    placed = f", placed {' '.join(seen[0]['placements'])}" if seen[0].get("placements") else ""
    return Check("engine", held, f"asked for {wanted}; ran on {seen[0].get('engine')}{stage}{placed}")


def _shards(asked: Asked, world_size: int, ranks: list[dict[str, Any]]) -> list[Check]:
    """ZeRO-1 splits the optimizer's state, ZeRO-3 and FSDP the parameters too."""
    if world_size == 1 or asked.engine not in ("deepspeed", "fsdp"):
        return []
    checks = []
    if asked.engine == "fsdp" or asked.stage == 3:
        held = [rank["runs_on"]["local_fraction"] for rank in ranks if "runs_on" in rank]
        checks.append(Check("parameters sharded", bool(held) and max(held) < 1, _shares("parameters", held)))
    if asked.engine == "fsdp" or (asked.stage or 0) >= 1:
        state = [rank["runs_on"]["optimizer_fraction"] for rank in ranks if "runs_on" in rank]
        known = [share for share in state if share is not None]
        if known or not asked.offload:
            checks.append(
                Check("optimizer state sharded", bool(known) and max(known) < 1, _shares("optimizer state", known))
            )
    return checks


def _shares(what: str, shares: list[float]) -> str:
    return f"each rank holds {', '.join(f'{share:.3f}' for share in shares) or 'none'} of the {what}"


def _offload(asked: Asked, ranks: list[dict[str, Any]]) -> Check:
    found = ranks[0].get("runs_on", {}).get("offload") or {}
    seen = ", ".join(f"{part} on {place}" for part, place in found.items()) or "nothing was moved"
    return Check("offload", set(asked.offload) <= found.keys(), f"asked for {', '.join(asked.offload)}; {seen}")


def _trained(steps: int, ranks: list[dict[str, Any]]) -> Check:
    first = ranks[0]
    numbers = [*first["losses"], *first["grad_norms"]]
    finite = bool(numbers) and all(math.isfinite(number) for number in numbers)
    moved = all(rank.get("moved") for rank in ranks)
    losses = ", ".join(f"{loss:.6g}" for loss in first["losses"]) or "none"
    weights = "moved" if moved else "did not move"
    seen = f"{first['steps']} of {steps} steps, losses {losses}; the weights {weights}"
    return Check("trained", first["steps"] == steps and finite and moved, seen)


def _same_on_all_ranks(ranks: list[dict[str, Any]]) -> Check:
    held = len({str(rank["losses"]) for rank in ranks}) == 1  # as text, in which NaN is equal to itself
    return Check("losses equal on all ranks", held, "equal" if held else str([rank["losses"] for rank in ranks]))


def _resumed(trained: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> Check:
    """The steps after the checkpoint, taken by the first run and by the one that resumed."""
    if not resumed or not resumed[0]["losses"]:
        return Check("checkpoint saved and resumed", False, "the resumed run took no step")
    again = len(resumed[0]["losses"])
    pairs = [
        pair
        for quantity in ("losses", "grad_norms")
        for pair in zip(trained[0][quantity][-again:], resumed[0][quantity], strict=False)
    ]
    gap = max((_gap(a, b) for a, b in pairs), default=math.inf)
    held = gap <= SAME_STEP and len(trained[0]["losses"]) > again
    seen = (
        f"step {resumed[0]['steps'] + len(trained[0]['losses']) - again} again: loss and gradient norm {gap:.1e} apart"
    )
    return Check("checkpoint saved and resumed", held, seen)


def _gap(a: float, b: float) -> float:
    """Relative; infinite where either is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a or b else 0.0


def _exported(export: dict[str, Any]) -> Check:
    if not export["files"]:
        return Check("weights exported", False, "save_model() wrote no safetensors file")
    told = (
        f"not the trained ones: {', '.join(export['wrong'][:3])}" if export["wrong"] else "equal to the trained ones"
    )
    return Check(
        "weights exported", not export["wrong"], f"{export['tensors']} tensors in {', '.join(export['files'])}, {told}"
    )
