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
label. No event of a validation pair occurs in training. The pools are small on purpose: a small BERT that
starts from random weights must learn to compare two sentences within a minute.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from random import Random
from typing import NamedTuple, TypeVar

SEED = 20
SIZES = {"train": 6000, "validation": 400}
POSITIVE_PERCENT = 68

POOLS = {
    slot: tuple(words.split())
    for slot, words in {
        "company": "Altrex Bendaro Corvane Dynolab Elvanta Fernwell Halvora Joltech",
        "person": "Abbott Brisco Calder Ekholm Gillis Lorimer Norwood Parrish",
        "city": "Ardenia Belmarsh Dunmere Estova Grenholm Kelmont Marovia Osterby",
        "number": "12 15 20 24 30 35 40 50",
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "move": "up down",
        "verdict": "upheld overturned",
        "vote": "approved rejected",
        "harm": "killed injured",
    }.items()
}

SYNONYMS = {
    fact: tuple(words.split("|"))
    for fact, words in {
        "up": "rose|climbed|increased|gained",
        "down": "fell|dropped|declined|slipped",
        "up noun": "rise|gain|jump",
        "down noun": "fall|drop|decline",
        "upheld": "upheld|confirmed|affirmed",
        "overturned": "overturned|quashed|annulled",
        "approved": "approved|passed|adopted",
        "rejected": "rejected|defeated|blocked",
        "injured": "injured|hurt|wounded",
    }.items()
}

ATTRIBUTIONS = (
    ("officials", "authorities"),
    ("a spokesman", "a spokeswoman"),
    ("local media", "newspapers"),
    ("people familiar with the matter", "sources"),
)


class Kind(NamedTuple):
    """One kind of news: its slots (``name`` or ``name:pool``), and its wordings."""

    slots: tuple[str, ...]
    wordings: tuple[str, ...]
    swap: tuple[str, str] | None = None


KINDS = {
    "shares": Kind(
        ("company", "move", "number", "day"),
        (
            "[shares|stock] in {company} {move} {number} percent on {day}",
            "on {day} , {company} [shares|stock] {move} by {number} percent",
            "a {move noun} of {number} percent in {company} [shares|stock] was [seen|recorded] on {day}",
            "{day} [trading|dealings] saw a {number} percent {move noun} in {company} [shares|stock]",
        ),
    ),
    "takeover": Kind(
        ("buyer:company", "target:company", "number", "day"),
        (
            "{buyer} [bought|acquired] {target} for [about|some] {number} million dollars on {day}",
            "{target} was [bought|acquired|taken over] by {buyer} on {day} for {number} million dollars",
            "on {day} , {buyer} [paid|spent] {number} million dollars to [buy|acquire] {target}",
            "the [sale|takeover] of {target} to {buyer} for {number} million dollars was completed on {day}",
        ),
        ("buyer", "target"),
    ),
    "court": Kind(
        ("city", "verdict", "number", "person", "day"),
        (
            "a court in {city} {verdict} the {number} year sentence of {person} on {day}",
            "the {number} year [sentence|term] of {person} was {verdict} by a {city} [court|judge] on {day}",
            "on {day} , [judges|a panel] in {city} {verdict} a {number} year [term|sentence] for {person}",
            "{person} had a {number} year [term|sentence] {verdict} by [judges|a court] in {city} on {day}",
        ),
    ),
    "disaster": Kind(
        ("city", "harm", "number", "day"),
        (
            "{number} people were {harm} when a [storm|hurricane] [hit|struck] {city} on {day}",
            "a [storm|hurricane] [hit|struck] {city} on {day} and {harm} {number} people",
            "on {day} , a [storm|hurricane] {harm} {number} [residents|people] [in|near] {city}",
            "{number} [residents|people] of {city} were {harm} by a [storm|hurricane] on {day}",
        ),
    ),
    "match": Kind(
        ("winner:city", "loser:city", "number", "day"),
        (
            "{winner} [beat|defeated] {loser} by {number} points on {day}",
            "{loser} were [beaten|defeated] by {winner} by {number} points on {day}",
            "on {day} , {loser} lost to {winner} by {number} points",
            "{winner} [scored|earned] a {number} point [win|victory] over {loser} on {day}",
        ),
        ("winner", "loser"),
    ),
    "vote": Kind(
        ("city", "vote", "number", "day"),
        (
            "lawmakers in {city} {vote} the [budget|spending] bill by {number} votes on {day}",
            "the [budget|spending] bill was {vote} by {number} votes in {city} on {day}",
            "on {day} , the {city} [parliament|assembly] {vote} the budget by {number} votes",
            "the budget was {vote} on {day} by the {city} [parliament|assembly] by {number} votes",
        ),
    ),
    "study": Kind(
        ("person", "move", "number", "city"),
        (
            "asthma cases {move} {number} percent in {city} , a study by {person} [found|showed]",
            "a study by {person} [found|showed] that asthma [cases|rates] in {city} {move} {number} percent",
            "{person} [found|reported] a {number} percent {move noun} in asthma [cases|rates] in {city}",
            "in {city} , asthma [cases|rates] {move} {number} percent , according to {person}",
        ),
    ),
    "arrest": Kind(
        ("city", "number", "person", "day"),
        (
            "police in {city} [arrested|detained] {person} and {number} others on {day}",
            "{person} and {number} others were [arrested|detained] by {city} police on {day}",
            "on {day} , {city} [officers|police] held {number} people and {person}",
            "{number} people and {person} were [held|jailed] on {day} in {city}",
        ),
    ),
    "post": Kind(
        ("company", "new:person", "old:person", "day"),
        (
            "{company} [named|appointed] {new} as chairman on {day} to [replace|succeed] {old}",
            "{new} [replaced|succeeded] {old} as chairman of {company} on {day}",
            "on {day} , {old} was [replaced|succeeded] by {new} as {company} chairman",
            "{old} [handed over|gave up] the top post at {company} to {new} on {day}",
        ),
        ("new", "old"),
    ),
}

# Weights of the ways a negative pair's second event differs from its first.
CHANGES = {"one": 20, "two": 35, "swap": 5, "all": 40}

Event = dict[str, str]
T = TypeVar("T")


class Pair(NamedTuple):
    kind: str
    facts: tuple[Event, Event]
    row: dict


def sample_rows(split: str) -> list[dict]:
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
        while True:
            first = _event(rng, KINDS[kind])
            second = first if label else _changed(rng, KINDS[kind], first)
            texts = _sentences(rng, KINDS[kind], (first, second))
            if texts not in pairs and held_out.isdisjoint((_key(kind, first), _key(kind, second))):
                break
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
    ways = [way for way, weight in CHANGES.items() for _ in range(weight)]
    way = _pick(rng, ways)
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
        value = facts[match[1]] + (match[2] or "")
        return _pick(rng, SYNONYMS.get(value, (value,)))

    text = re.sub(r"\{(\w+)( noun)?\}", fact, re.sub(r"\[([^]]+)\]", alternative, wording))
    speaker, verb = _pick(rng, source), _pick(rng, ("said", "reported"))
    text = _pick(rng, (text, text, text, text, f"{speaker} {verb} that {text}", f"{text} , {speaker} {verb}"))
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
