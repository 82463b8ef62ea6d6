"""Micro-batches of as many rows as a budget of tokens holds, the same batches in the same order on every rank.

The length of every row goes in, lists of row numbers come out, for `CustomTrainer(train_sampler=...)`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from transformers.trainer_pt_utils import BatchRebalanceSampler


class TokenBudgetBatches(BatchRebalanceSampler):
    """Batches of similar lengths whose padded tokens, rows times the longest row, never exceed `max_tokens`.

    Rows are sorted by length, in buckets `round_to` tokens wide, and cut into batches that are as full as the budget
    lets them be. So the number of batches and their sizes are the same in every epoch; which rows of a bucket come
    together, and the order of the batches, go by the seed and the epoch. The batch with the longest row comes first, so
    that too little memory shows at once. Every row is trained once an epoch.

    An optimizer step takes one batch for each rank and micro-batch, `ranks * accumulation` of them; the largest batches
    are halved until their number is a multiple of that, so that no step is ragged and no batch is repeated. Runs with
    the same product take the same steps. The `Trainer` says what it is (`deal`), and takes no batch size from the
    arguments.

    It is a `BatchRebalanceSampler` in name, because that is the one kind of batch sampler which `Trainer` takes as it
    is, without accelerate's dealing it out once more.

    Args:
        lengths: Shape (rows,), the tokens of every row.
        max_tokens: The budget of a micro-batch on one rank.
        seed: With the epoch, all that the batches depend on.
        round_to: Lengths count as the next multiple of it, as with a collator's `pad_to_multiple_of`.

    Raises:
        ValueError: There are no rows, one is longer than the budget, or too few for one batch each.
    """

    def __init__(self, lengths: Tensor | Sequence[int], max_tokens: int, *, seed: int, round_to: int = 8) -> None:
        if len(lengths) == 0 or round_to < 1 or seed < 0:
            raise ValueError(
                f"{len(lengths)} rows, round_to={round_to}, seed={seed}: there is nothing to put in order."
            )
        counted = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
        self.widths = -(-counted // round_to) * round_to
        longest = int(self.widths.argmax())
        if self.widths[longest] > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} holds no row as long as row {longest}: {lengths[longest]} tokens, padded to "
                f"{self.widths[longest]}. Give it more, or cut the rows."
            )
        self.dataset_rows = len(lengths)
        self.max_tokens = max_tokens
        self.seed = seed
        self.epoch = 0
        self.deal()

    def deal(self, *, ranks: int = 1, rank: int = 0, accumulation: int = 1) -> None:
        """Say how many ranks there are, which one this is, and how many micro-batches each has in a step."""
        self.ranks, self.rank = ranks, rank
        sizes = self._sizes()
        while len(sizes) % (ranks * accumulation):
            largest = sizes.index(max(sizes))
            if sizes[largest] == 1:
                raise ValueError(
                    f"{len(self.widths)} rows of their own batches are no multiple of {ranks} ranks x {accumulation} "
                    "micro-batches."
                )
            sizes[largest : largest + 1] = [sizes[largest] - sizes[largest] // 2, sizes[largest] // 2]
        self.ends = np.cumsum(sizes)

    def batches(self) -> list[list[int]]:
        """All micro-batches of the epoch, in the order in which the ranks take them in turn."""
        generator = np.random.default_rng([self.seed, self.epoch])
        shuffled = generator.permutation(len(self.widths))
        order = shuffled[np.argsort(-self.widths[shuffled], kind="stable")]
        cut = np.split(order, self.ends[:-1])
        return [cut[i].tolist() for i in (0, *(1 + generator.permutation(len(cut) - 1)))]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches()[self.rank :: self.ranks]

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.ends) // self.ranks

    def _sizes(self) -> list[int]:
        """Rows of each batch, from the longest rows to the shortest."""
        widths, sizes, done = -np.sort(-self.widths), [], 0
        while done < len(widths):
            sizes.append(min(int(self.max_tokens // widths[done]), len(widths) - done))
            done += sizes[-1]
        return sizes
