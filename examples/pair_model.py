"""A classifier of sentence pairs that is told which words the two sentences share; `paraphrases.py` trains it.

Each pair is read in both orders. To the embedding of each word is added whether the other sentence has it, and how near its
nearest word there is; and each attention head may look for such words. What is added is zero before the first step, and the
attention leans to them by a number a head, 1 at first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification, initialization
from transformers.modeling_outputs import SequenceClassifierOutput


class SharedWords(nn.Module):
    """What a word is to the other sentence, learnt: from its `kind`, (B, T), and the similarity of all pairs, (B, T, T)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.kinds = nn.Parameter(torch.zeros(4, hidden))  # no word; not shared, shared, shared with its neighbour
        self.nearest = nn.Parameter(torch.zeros(hidden))
        self.pull = nn.Parameter(torch.ones(heads))

    def forward(self, kind: Tensor, similar: Tensor) -> tuple[Tensor, Tensor]:
        near = similar.max(dim=-1).values * (kind == 1)
        return self.kinds[kind] + near[..., None] * self.nearest, self.pull[:, None, None] * similar[:, None].square()


class PairClassifier(BertForSequenceClassification):
    """A BERT over sentence pairs `[CLS] a [SEP] b [SEP]`; in training its logits are those of both orders, (B, 2, C)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shared = SharedWords(config.hidden_size, config.num_attention_heads)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SharedWords):
            initialization.zeros_(module.kinds)
            initialization.zeros_(module.nearest)
            initialization.ones_(module.pull)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        length, of_a = (
            attention_mask.sum(1, keepdim=True),
            (attention_mask * (1 - token_type_ids)).sum(1, keepdim=True),
        )
        of_b = length - of_a  # with the last [SEP], as `of_a` is with [CLS] and the first
        order = torch.where(
            position < of_b, of_a + position - 1, torch.where(position == of_b, of_a - 1, position - of_b)
        )
        order = torch.where((position == 0) | (position >= length - 1), position, order)
        orders = [(input_ids, of_a), (input_ids.gather(1, order), of_b + 1)]
        ids, first = (torch.cat(parts) for parts in zip(*orders, strict=True))
        logits = self._logits(ids, first, length.repeat(2, 1), position).unflatten(0, (2, -1)).transpose(0, 1)
        mean = logits.mean(1)
        loss = None if labels is None else F.cross_entropy(mean.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits if self.training else mean)

    def _logits(self, ids: Tensor, first: Tensor, length: Tensor, position: Tensor) -> Tensor:
        a, b = (position > 0) & (position < first - 1), (first <= position) & (position < length - 1)
        words = self.bert.embeddings.word_embeddings(ids)
        with torch.no_grad():
            across = (a[:, :, None] & b[:, None]) | (b[:, :, None] & a[:, None])
            same = across & (ids[:, :, None] == ids[:, None])
            two = (same[:, 1:, 1:] & same[:, :-1, :-1]).any(-1)
            kind = (a | b).long() + same.any(-1).long() + (F.pad(two, (0, 1)) | F.pad(two, (1, 0))).long()
            unit = F.normalize(words - self._centre(), dim=-1)
            similar = (unit @ unit.transpose(1, 2)).float().clamp(min=0).masked_fill(~across, 0).masked_fill(same, 1)
        added, pull = self.shared(kind, similar)
        hidden = (position >= length).float()[:, None, None] * torch.finfo(torch.float32).min
        types = (position >= first) & (position < length)
        read = self.bert(inputs_embeds=words + added, attention_mask=pull + hidden, token_type_ids=types.long())
        return self.classifier(self.dropout(read.pooler_output))

    def _centre(self) -> Tensor:
        if not hasattr(self, "_mean_word"):  # of words that do not change
            self._mean_word = self.bert.embeddings.word_embeddings.weight.detach().mean(0)
        return self._mean_word
