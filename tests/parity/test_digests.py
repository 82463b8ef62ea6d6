"""Digests: the same row has the same one however it was padded or split, and any other row another."""

import math

import torch

from trainer_ext.parity.digests import as_text, digests, each_row, kept_rows, row_digests


def text_of(window):
    """Of a step's rows: the digests of their inputs, and of their labels."""
    texts = as_text([kept_rows(batch) for batch in window])
    assert texts == [as_text([row_digests(batch)])[0] for batch in window], "hashed now or later, alone or together"
    return ["".join(part) for part in zip(*texts, strict=True)]


def batch(rows, length, *, left=False):
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows))}


ONE = batch([[5, 6], [7, 8, 9]], 3)


def test_padding_and_splits_do_not_show():
    assert (
        text_of([ONE])
        == text_of([batch([[5, 6], [7, 8, 9]], 6)])
        == text_of([batch([[5, 6], [7, 8, 9]], 5, left=True)])
    )
    halves = [{name: value[i : i + 1] for name, value in ONE.items()} for i in range(2)]
    assert text_of(halves) == text_of([ONE])
    assert text_of(halves[::-1])[0] == "".join(reversed(each_row(text_of([ONE])[0])))


def test_all_else_shows_in_the_right_part():
    inputs, labels = text_of([ONE])
    other = text_of([batch([[5, 6], [7, 8, 4]], 3)])
    assert other[0] != inputs
    assert other[1] == labels
    relabelled = text_of([{**ONE, "labels": torch.tensor([1, 1])}])
    assert relabelled[0] == inputs
    assert [x == y for x, y in zip(each_row(relabelled[1]), each_row(labels), strict=True)] == [False, True]
    longer = text_of([batch([[5, 6, 0], [7, 8, 9]], 3)])  # a token 0 that the mask keeps is no padding
    assert each_row(longer[0])[0] != each_row(inputs)[0]
    swapped = text_of([batch([[6, 5], [7, 8, 9]], 3)])
    assert each_row(swapped[0])[0] != each_row(inputs)[0]
    renamed = text_of([{"token_type_ids": ONE["input_ids"], "attention_mask": ONE["attention_mask"]}])
    assert renamed[0] != text_of([{"input_ids": ONE["input_ids"], "attention_mask": ONE["attention_mask"]}])[0]


def test_token_labels():
    def of(*labels):
        return text_of([{**batch([[5, 6, 7]], 4), "labels": torch.tensor([labels])}])[1]

    assert len({of(1, 1, 1, -100), of(1, 1, 0, -100), of(1, 1, -100, 1), of(-100, 1, 1, -100)}) == 4
    wide = text_of([{**batch([[5, 6, 7]], 6), "labels": torch.tensor([[1, 1, 1, -100, -100, -100]])}])[1]
    assert wide == of(1, 1, 1, -100)


def test_other_batches():
    """Images, tuples of tensors, and what is no tensor of rows."""
    pixels = torch.randn(3, 2, 4, 4)
    one = text_of([{"pixel_values": pixels, "meta": "x", "scale": torch.tensor(2.0)}])
    assert len(each_row(one[0])) == 3
    changed = pixels.clone()
    changed[1, 0, 0, 0] = torch.nextafter(changed[1, 0, 0, 0], torch.tensor(9.0))
    other = text_of([{"pixel_values": changed}])
    assert [x == y for x, y in zip(each_row(one[0]), each_row(other[0]), strict=True)] == [True, False, True]
    assert text_of([(pixels, torch.arange(3))]) == text_of([[pixels, torch.arange(3)]])
    assert text_of([{"none": None}]) == ["", ""]
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool):
        assert len(each_row(text_of([{"x": torch.ones(3, 2).to(dtype)}])[0])) == 3


def test_rows_rarely_collide():
    ids = torch.randint(0, 1000, (20_000, 16), generator=torch.Generator().manual_seed(0))
    found = each_row(text_of([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])[0])
    assert len(set(found)) >= 20_000 - 3  # 0.05 expected


def test_digests_see_a_bit_a_shape_and_a_dtype():
    one = torch.tensor([1.0, 2.0])
    others = [torch.tensor([1.0, math.nextafter(2.0, 3.0)], dtype=torch.float64), one.double(), one[None], one + 1]
    assert len({digests({"x": tensor})["x"] for tensor in [one, *others]}) == 5
