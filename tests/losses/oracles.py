"""The losses once more, in plain Python from their papers, one item at a time; no code of the package is used.

An oracle takes one item's logits (a list of C floats) and its label, and gives the loss of that item in float64.
`sums` adds items up as the contract says. All of it is slow and meant to be read.
"""

import math


def log_softmax(row):
    top = max(row)
    whole = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - whole for x in row]


def cross_entropy(row, label):
    return -log_softmax(row)[label]


def smoothed(row, label, weights, epsilon):
    """Szegedy et al. 2016, with class weights on every term of the sum, label's weight included."""
    log_p = log_softmax(row)
    spread = sum(w * x for w, x in zip(weights, log_p, strict=True)) / len(row)
    return -(1 - epsilon) * weights[label] * log_p[label] - epsilon * spread


def focal(row, label, gamma=2.0):
    """Lin et al. 2017, equation 4."""
    log_p = log_softmax(row)[label]
    return -((1 - math.exp(log_p)) ** gamma) * log_p


def logit_adjusted(row, label, counts, tau=1.0):
    """Menon et al. 2021, equation 10."""
    prior = [n / sum(counts) for n in counts]
    moved = [x + tau * math.log(p) for x, p in zip(row, prior, strict=True)]
    return math.log(1 + sum(math.exp(moved[c] - moved[label]) for c in range(len(row)) if c != label))


def ldam(row, label, counts, max_margin=0.5, scale=1.0, exponent=0.25):
    """Cao et al. 2019, equations 10 and 13: margins of C / n^(1/4), where the rarest class has `max_margin`."""
    raw = [n**-exponent for n in counts]
    margins = [max_margin * m / max(raw) for m in raw]
    right = math.exp(scale * (row[label] - margins[label]))
    return -math.log(right / (right + sum(math.exp(scale * x) for c, x in enumerate(row) if c != label)))


def bce(x, target, pos_weight=1.0):
    p = 1 / (1 + math.exp(-x))
    return -pos_weight * target * math.log(p) - (1 - target) * math.log(1 - p)


def asymmetric(x, target, gamma_neg=4.0, gamma_pos=1.0, clip=0.05):
    """Ridnik et al. 2021, equations 4 to 7."""
    p = 1 / (1 + math.exp(-x))
    shifted = max(p - clip, 0.0)
    positive = (1 - p) ** gamma_pos * math.log(p)
    negative = shifted**gamma_neg * math.log(1 - shifted)
    return -target * positive - (1 - target) * negative


def mse(x, target):
    return (x - target) ** 2


def huber(x, target, delta=1.0):
    """Huber 1964."""
    error = abs(x - target)
    return error**2 / 2 if error <= delta else delta * (error - delta / 2)


def class_sums(logits, labels, item_loss, class_weights=None, sample_weights=None):
    """`sum v_i w[y_i] l_i` and `sum v_i w[y_i]` over labels that are not -100; lists of B rows, or of B lists of T."""
    numerator = denominator = 0.0
    for i, (rows, targets) in enumerate(zip(logits, labels, strict=True)):
        pairs = [(rows, targets)] if isinstance(targets, int) else list(zip(rows, targets, strict=True))
        for row, label in pairs:
            if label == -100:
                continue
            weight = 1.0 if class_weights is None else class_weights[label]
            weight *= 1.0 if sample_weights is None else sample_weights[i]
            numerator += weight * item_loss(row, label)
            denominator += weight
    return numerator, denominator


def element_sums(logits, labels, item_loss, class_weights=None, sample_weights=None, ignored=None):
    """`sum v_i w[c] l_ic` and `sum v_i` over elements, lists of B rows of C; a label of `ignored` does not count."""
    numerator = denominator = 0.0
    for i, (row, targets) in enumerate(zip(logits, labels, strict=True)):
        sample = 1.0 if sample_weights is None else sample_weights[i]
        for c, (x, target) in enumerate(zip(row, targets, strict=True)):
            if target == ignored:
                continue
            column = 1.0 if class_weights is None else class_weights[c]
            numerator += sample * column * item_loss(x, target)
            denominator += sample
    return numerator, denominator
