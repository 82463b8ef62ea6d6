"""The built-in sample: paraphrase pairs in the shape of GLUE MRPC, so that anyone can train offline.

``sample_rows("train")`` and ``sample_rows("validation")`` return rows with MRPC's fields: ``sentence1``,
``sentence2``, ``label`` (1 = equivalent) and ``idx``. No data file and no download: every sentence is
generated here, about invented people, companies, teams and places.

An *event* is a kind of news (``KINDS``) and one value for each of its slots (``POOLS``). A sentence is one
of the kind's wordings filled with the event, each ``[a|b]`` resolved to one alternative, each fact in one of
its synonyms (``SYNONYMS``), the attribution in front, behind or absent. The two sentences of a pair never
share a wording. A positive pair words one event twice. A negative pair words two events of one kind: one or
two facts changed, two actors swapped, or every fact drawn afresh (``CHANGES``).

Both events of a negative follow the distribution of the positives, so one sentence alone says nothing of the
label. No event of a validation pair occurs in training. The pools are small, the wordings short and most
changes large on purpose, so that a small BERT that starts from random weights learns to compare two
sentences in a few epochs. Changed single facts and swapped actors remain hard for it.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from random import Random
from typing import Any, NamedTuple, TypeVar

SEED = 20
SIZES = {"train": 6000, "validation": 400}
POSITIVE_PERCENT = 68
MOST_DRAWS = 10_000  # for one pair, before giving up: a pool too small for SIZES must not loop for ever

POOLS = {
    slot: tuple(words.split())
    for slot, words in {
        "company": "Altrex Bendaro Corvane Dynolab",
        "person": "Abbott Brisco Calder Ekholm",
        "city": "Belmarsh Dunmere Grenholm Kelmont",
        "number": "12 20 30 50",
        "day": "Monday Wednesday Friday",
        "verdict": "upheld overturned",
    }.items()
}

SYNONYMS = {
    "upheld": ("upheld", "confirmed"),
    "overturned": ("overturned", "quashed"),
}

ATTRIBUTIONS = (("officials", "authorities"), ("a spokesman", "a statement"))


class Kind(NamedTuple):
    """One kind of news: its slots (``name`` or ``name:pool``), and its wordings."""

    slots: tuple[str, ...]
    wordings: tuple[str, ...]
    swap: tuple[str, str] | None = None


KINDS = {
    "takeover": Kind(
        ("buyer:company", "target:company", "number", "day"),
        (
            "{buyer} [bought|acquired] {target} for {number} million on {day}",
            "{target} was [bought|acquired] by {buyer} on {day} for {number} million",
            "on {day} , {buyer} paid {number} million for {target}",
        ),
        ("buyer", "target"),
    ),
    "court": Kind(
        ("city", "verdict", "number", "person", "day"),
        (
            "a {city} court {verdict} the {number} year sentence of {person} on {day}",
            "the {number} year [sentence|term] of {person} was {verdict} by a {city} court on {day}",
            "on {day} , a {city} court {verdict} the {number} year sentence of {person}",
        ),
    ),
    "match": Kind(
        ("winner:city", "loser:city", "number", "day"),
        (
            "{winner} [beat|defeated] {loser} by {number} points on {day}",
            "{loser} lost to {winner} by {number} points on {day}",
            "on {day} , {loser} were [beaten|defeated] by {winner} by {number} points",
        ),
        ("winner", "loser"),
    ),
    "arrest": Kind(
        ("city", "number", "person", "day"),
        (
            "police in {city} [arrested|detained] {person} and {number} others on {day}",
            "{person} and {number} others were [arrested|detained] by {city} police on {day}",
            "on {day} , {city} police [arrested|held] {number} people and {person}",
        ),
    ),
    "post": Kind(
        ("company", "new:person", "old:person", "day"),
        (
            "{company} [named|appointed] {new} to [replace|succeed] {old} on {day}",
            "{new} [replaced|succeeded] {old} as chairman of {company} on {day}",
            "on {day} , {old} was [replaced|succeeded] by {new} as {company} chairman",
        ),
        ("new", "old"),
    ),
}

# Weights of the ways a negative pair's second event differs from its first.
CHANGES = {"one": 10, "two": 25, "swap": 5, "all": 60}

Event = dict[str, str]
T = TypeVar("T")


class Pair(NamedTuple):
    kind: str
    facts: tuple[Event, Event]
    row: dict[str, Any]


def sample_rows(split: str) -> list[dict[str, Any]]:
    """The rows of ``split`` ("train" or "validation"), new dicts on each call; ValueError otherwise."""
    if split not in SIZES:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SIZES)}")
    return [dict(pair.row) for pair in generate_pairs()[split]]


@cache
def generate_pairs() -> dict[str, list[Pair]]:
    """Both splits, with the facts behind each row; training avoids every event of the validation split."""
    rng = Random(SEED)
    validation = _split(rng, SIZES["validation"], frozenset())
    held_out = frozenset(_key(pair.kind, facts) for pair in validation for facts in pair.facts)
    return {"train": _split(rng, SIZES["train"], held_out), "validation": validation}


def _split(rng: Random, size: int, held_out: frozenset[tuple[str, ...]]) -> list[Pair]:
    positives = size * POSITIVE_PERCENT // 100
    pairs: dict[tuple[str, str], Pair] = {}
    for label in _shuffled(rng, [1] * positives + [0] * (size - positives)):
        kind = _pick(rng, tuple(KINDS))
        for _ in range(MOST_DRAWS):
            first = _event(rng, KINDS[kind])
            second = first if label else _changed(rng, KINDS[kind], first)
            texts = _sentences(rng, KINDS[kind], (first, second))
            if texts not in pairs and held_out.isdisjoint((_key(kind, first), _key(kind, second))):
                break
        else:
            raise AssertionError(f"no new pair of kind {kind!r} in {MOST_DRAWS} draws: POOLS are too small")
        row = {"sentence1": texts[0], "sentence2": texts[1], "label": label, "idx": len(pairs)}
        pairs[texts] = Pair(kind, (first, second), row)
    return list(pairs.values())


def _key(kind: str, event: Event) -> tuple[str, ...]:
    return (kind, *event.values())


def _sentences(rng: Random, kind: Kind, events: tuple[Event, Event]) -> tuple[str, str]:
    source = _pick(rng, ATTRIBUTIONS)
    one, other = _shuffled(rng, kind.wordings)[:2]
    return _sentence(rng, one, events[0], source), _sentence(rng, other, events[1], source)


def _event(rng: Random, kind: Kind) -> Event:
    """A value for each slot; slots that share a pool get different values."""
    event: Event = {}
    for slot in kind.slots:
        event[_name(slot)] = _pick(rng, [v for v in _pool(slot) if v not in event.values()])
    return event


def _changed(rng: Random, kind: Kind, event: Event) -> Event:
    """Another event of the kind, each changed slot drawn evenly from the values ``event`` does not hold."""
    way = _pick(rng, [way for way, weight in CHANGES.items() for _ in range(weight)])
    if way == "swap" and kind.swap:
        one, other = kind.swap
        return event | {one: event[other], other: event[one]}
    count = {"two": 2, "all": len(kind.slots)}.get(way, 1)
    changed = dict(event)
    for slot in _shuffled(rng, kind.slots)[:count]:
        taken = (*event.values(), *changed.values())
        changed[_name(slot)] = _pick(rng, [v for v in _pool(slot) if v not in taken])
    return changed


def _sentence(rng: Random, wording: str, facts: Event, source: tuple[str, ...]) -> str:
    def alternative(match: re.Match[str]) -> str:
        return _pick(rng, match[1].split("|"))

    def fact(match: re.Match[str]) -> str:
        value = facts[match[1]]
        return _pick(rng, SYNONYMS.get(value, (value,)))

    text = re.sub(r"\{(\w+)\}", fact, re.sub(r"\[([^]]+)\]", alternative, wording))
    speaker = _pick(rng, source)
    text = _pick(rng, (*[text] * 8, f"{speaker} said that {text}", f"{text} , {speaker} said"))
    return f"{text[0].upper()}{text[1:]} ."


def _name(slot: str) -> str:
    return slot.partition(":")[0]


def _pool(slot: str) -> tuple[str, ...]:
    return POOLS[slot.rpartition(":")[2]]


def _pick(rng: Random, choices: Sequence[T]) -> T:
    """One of ``choices``, through ``random()``: the one method whose stream Python promises to keep."""
    return choices[int(rng.random() * len(choices))]


def _shuffled(rng: Random, items: Iterable[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())
