"""The oracle: a plain float64 loop on one process that says each group's norms at every step."""

import torch


def norms_by_hand(model, batches, groups, *, rate, clip):
    """What each step comes to, for each group: gradient before clipping, weights after, and their relative move.

    Args:
        model: Changed by it; in float64.
        batches: One global batch a step.
        groups: Lists of parameters.
    """
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=rate, weight_decay=0.0)
    model.train()
    steps = []
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        gradients = [norm([p.grad for p in group if p.grad is not None]) for group in groups]
        kept = [[p.detach().clone() for p in group] for group in groups]
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group], clip)
        optimizer.step()
        moved = [
            norm([p.detach() - old for p, old in zip(group, before, strict=True)]) / norm(before)
            for group, before in zip(groups, kept, strict=True)
        ]
        weights = [norm([p.detach() for p in group]) for group in groups]
        steps.append(list(zip(gradients, weights, moved, strict=True)))
    return steps


def norm(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()
