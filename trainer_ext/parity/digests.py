"""Digests: of tensors by their bytes, and of a batch's rows by a few tensor operations, cheap enough for every step.

A row's digest is a random linear hash, `sum_i k_i (v_i + 1) mod 2^64`, of which the upper 32 bits are kept: two
different rows collide with a probability of about 2^-32 (Carter and Wegman, 1979, universal hashing).
"""

import hashlib
import math
from collections.abc import Mapping
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")
IGNORED = -100
SMALL = 1 << 13  # elements of a micro-batch
Rows = dict[str, Tensor] | Tensor
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and bytes, by name, in the order of the names."""
    return {name: digest(tensors[name]) for name in sorted(tensors)}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, 16 hex digits of it."""
    plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + plain.tobytes()).hexdigest()[:16]


def row_digests(batch: Any) -> Tensor:
    """Two hashes of each of a micro-batch's B rows, of its inputs and of its labels: shape (2, B), int64, on the
    batch's device, without waiting for it.

    A row counts with the positions that its attention mask keeps, and with every label that is not -100: it has one
    digest however long the batch it was padded into.

    Args:
        batch: A mapping from names to tensors of B rows, or a sequence of them; what is no such tensor is left out.
    """
    columns = _columns(batch)
    if not columns:
        return torch.zeros(2, 0, dtype=torch.int64)
    first = next(iter(columns.values()))
    keys = _keys(max(math.prod(column.shape[1:]) for column in columns.values()) + 1, first.device)
    mask = columns.get("attention_mask")
    mask = mask.long() if mask is not None and mask.ndim == 2 else None
    places = None if mask is None else keys[mask.cumsum(1)]
    masked: Tensor | int = 0  # sum_c m_c (v_c + 1) over the input columns c of the mask's shape, (B, T)
    sums: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, column in columns.items():
        is_label, in_mask = name in LABELS, mask is not None and column.shape == mask.shape
        values = _integers(column)
        if in_mask and not is_label:
            masked = torch.add(masked + _multiplier(name), values, alpha=_multiplier(name))
            continue
        values = values.flatten(1) if values.ndim > 1 else values[:, None]
        weights = keys[1 : values.shape[1] + 1]
        if in_mask and mask is not None:
            weights = keys[(mask | (values != IGNORED)).cumsum(1)]
        if is_label and not column.is_floating_point():
            weights = weights * (values != IGNORED)
        sums[is_label].append((values + 1).mul_(weights).sum(1).mul_(_multiplier(name)))
    if mask is not None and places is not None:
        sums[False].append((places * mask).mul_(masked).sum(1))
    zeros = [first.new_zeros(len(first), dtype=torch.int64)]
    return torch.stack([sum(parts[1:], parts[0]) for parts in (sums[False] or zeros, sums[True] or zeros)])


def kept_rows(batch: Any) -> Rows:
    """What `as_text` makes a micro-batch's digests of later: a copy where it is small, else the hashes at once.

    A copy costs a fraction of the hashes in the midst of training, and many batches are hashed at the price of one.
    """
    columns = _columns(batch)
    if sum(map(Tensor.numel, columns.values())) > SMALL:
        return row_digests(columns)
    return {
        name: column.detach().clone() if column.requires_grad else column.clone() for name, column in columns.items()
    }


def as_text(batches: list[Rows]) -> list[tuple[str, str]]:
    """The digests of each micro-batch's inputs and labels, from what `kept_rows` kept: 8 hex digits a row."""
    if not batches:
        return []
    hashes = _hashed(batches)
    both = torch.cat([one.cpu() for one in hashes], dim=1)
    words = ((both ^ (both >> 29)) * _multiplier("")) >> 32 & 0xFFFFFFFF
    inputs, labels = (part.numpy().astype(">u4").tobytes().hex() for part in words)
    ends = [8 * end for end in accumulate(one.shape[1] for one in hashes)]
    return [(inputs[start:end], labels[start:end]) for start, end in pairwise([0, *ends])]


def _hashed(batches: list[Rows]) -> list[Tensor]:
    """The hashes of each micro-batch; those whose columns are alike are hashed as one."""
    found = {place: rows for place, rows in enumerate(batches) if isinstance(rows, Tensor)}
    alike: dict[Any, list[tuple[int, dict[str, Tensor]]]] = {}
    for place, rows in enumerate(batches):
        if not isinstance(rows, Tensor):
            kind = tuple((name, column.dtype, column.shape[1:]) for name, column in rows.items())
            alike.setdefault(kind, []).append((place, rows))
    for members in alike.values():
        whole = {name: torch.cat([rows[name] for _, rows in members]) for name in members[0][1]}
        sizes = [next(iter(rows.values())).shape[0] if rows else 0 for _, rows in members]
        found |= zip((place for place, _ in members), row_digests(whole).split(sizes, dim=1), strict=True)
    return [found[place] for place in range(len(batches))]


def each_row(text: str) -> list[str]:
    """The rows' digests in such a text."""
    return [text[start : start + 8] for start in range(0, len(text), 8)]


def _columns(batch: Any) -> dict[str, Tensor]:
    named = (
        batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, list | tuple) else [batch]))
    )
    found = {str(name): value for name, value in named.items() if isinstance(value, Tensor) and value.ndim}
    rows = max(map(len, found.values()), default=0)
    return {name: found[name] for name in sorted(found) if len(found[name]) == rows}


def _integers(values: Tensor) -> Tensor:
    if values.is_floating_point():
        values = values.contiguous().view(_AS_INTEGERS[values.element_size()])
    return values.long()


@cache
def _multiplier(name: str) -> int:
    """An odd number below 2^63."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1 | 1


_drawn: dict[torch.device, Tensor] = {}


def _keys(count: int, device: torch.device) -> Tensor:
    """The first `count` of a fixed sequence of random numbers, or more."""
    if device not in _drawn or len(_drawn[device]) < count:
        size = 1 << max(10, count.bit_length())
        generator = torch.Generator().manual_seed(0)
        _drawn[device] = torch.randint(-(2**62), 2**62, (size,), generator=generator).to(device)
    return _drawn[device]
