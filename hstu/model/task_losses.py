"""Losses of ranking tasks: outputs float32 [M, width] and labels float32 [M] → loss per labelled item, float32 [M].

Labels are scaled (RankingTaskArgs.scale) and never missing. No function waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_GAMMA = 2.0
"""Exponent of the focal loss (Lin et al., ICCV 2017)."""


def bce(outputs: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy. outputs: a logit."""
    return F.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy times (1 - p)^2, where p is the predicted probability of the label (Lin et al., ICCV 2017)."""
    missed = torch.sigmoid(torch.where(labels > 0, -outputs[:, 0], outputs[:, 0]))
    return missed**FOCAL_GAMMA * bce(outputs, labels)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of classes. outputs: a logit per class."""
    return F.cross_entropy(outputs, labels.long(), reduction="none")


def mse(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared error."""
    return (outputs[:, 0] - labels).square()


def huber(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half the squared error, linear beyond an error of 1 (Huber, 1964)."""
    return F.huber_loss(outputs[:, 0], labels, reduction="none")


def pairwise_sum(outputs: Tensor, labels: Tensor, weights: Tensor, num_labels: Tensor, longest: int) -> Tensor:
    """RankNet's loss, log(1 + exp(negative - positive)) per pair (Burges et al., ICML 2005): float32 scalar.

    Sums over requests the number of items times the mean over pairs of a positive and a negative item. A request
    without both kinds has a loss of 0.

    Args:
        outputs: [M, 1], a score.
        labels: 0 or 1, [M].
        weights: [M]. A pair's weight is the product of its items' weights; a weight of 0 leaves an item out.
        num_labels: labelled items of each request, int64 [B], with the sum M.
        longest: at least the maximum of ``num_labels``.
    """
    scores, size = outputs[:, 0], len(labels)
    request = torch.repeat_interleave(num_labels, output_size=size)
    place = torch.arange(size, device=scores.device) - (num_labels.cumsum(0) - num_labels)[request]
    cells = request * longest + place

    def by_request(values: Tensor) -> Tensor:
        cleared = values.new_zeros(len(num_labels) * longest)
        return cleared.index_copy(0, cells, values).view(len(num_labels), longest)

    positive, negative, score = (by_request(values) for values in (labels * weights, (1 - labels) * weights, scores))
    of_pairs = positive[:, :, None] * negative[:, None, :]
    losses = F.softplus(score[:, None, :] - score[:, :, None]) * of_pairs
    total = of_pairs.sum((1, 2))
    means = losses.sum((1, 2)) / torch.where(total > 0, total, 1.0)
    return (means * num_labels).sum()
