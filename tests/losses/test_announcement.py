"""Announced denominators: kept, missed, and not finite."""

import pytest
import torch

from trainer_ext.losses.announcement import Announcement


def test_the_total_is_the_sum_and_every_micro_batch_may_come_again():
    announcement = Announcement()
    assert announcement.make([torch.tensor(3.0), torch.tensor(5.0)]) == 8
    for value in (5.0, 3.0, 3.0, 5.0 + 1e-7):
        announcement.hold(torch.tensor(value), now=True)


@pytest.mark.parametrize("value", [4.0, 8.0, 0.0, float("nan"), float("inf")])
def test_another_denominator_is_an_error(value):
    announcement = Announcement()
    announcement.make([torch.tensor(3.0), torch.tensor(5.0)])
    with pytest.raises(RuntimeError, match="off every one announced"):
        announcement.hold(torch.tensor(value), now=False)
    with pytest.raises(RuntimeError):  # and it is not forgotten
        announcement.check()


def test_nothing_announced_is_nothing_to_hold_to():
    assert Announcement().hold(torch.tensor(1.0), now=True) is None
