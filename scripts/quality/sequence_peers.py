"""Small networks that read a history: SASRec (arXiv 1808.09781) and one like GRU4Rec (arXiv 1511.06939, 1706.03847).

Both predict the next item at every place and score items by the product with their input embeddings. Histories are
padded on the right, so a causal model never reads the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.data.batches.jagged import ranges, run_indices, run_offsets
from scripts.quality.leave_one_out import Histories, Score

_ROWS = 512
"""Rows of scores that are computed together."""
Loss = Literal["one_negative", "softmax", "softmax_unseen"]
"""one_negative: binary cross entropy of the next item and one uniform item that is not in the history, as in SASRec's
paper. softmax: cross entropy over all items. softmax_unseen: over those that the sequence has not had until then."""


class SASRec(nn.Module):
    """Embeddings with learnt positions, and blocks of causal attention and a feed-forward part, normalised first.

    As in the paper, but without dropout of the attention's weights, which would double the time of a step on a CPU.
    """

    def __init__(self, num_items: int, length: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, width, padding_idx=num_items)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Items int64 [B, L] and lengths int64 [B] → a vector per place, float32 [B, L, width].

        Positions count from the end, as with padding on the left: the last item always has the last one.
        """
        places = torch.arange(items.shape[1]) + (self.positions.num_embeddings - lengths)[:, None]
        x = self.items(items) * self.items.embedding_dim**0.5
        x = self.dropout(x + self.positions(places.clamp(max=self.positions.num_embeddings - 1)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.first, self.second = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, L, width] → the same shape."""
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(attended.transpose(1, 2).flatten(2))
        return x + self.dropout(self.second(self.dropout(F.relu(self.first(self.norms[1](x))))))


class GRU4Rec(nn.Module):
    """Gated recurrent layers over item embeddings; the last state is projected to the width of an item."""

    def __init__(self, num_items: int, length: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, width, padding_idx=num_items)
        self.gru = nn.GRU(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)
        nn.init.normal_(self.items.weight, std=width**-0.5)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """As SASRec's."""
        return self.out(self.dropout(self.gru(self.dropout(self.items(items)))[0]))


MODELS: Mapping[str, type[SASRec] | type[GRU4Rec]] = {"sasrec": SASRec, "gru4rec": GRU4Rec}


def train_sequences(
    train: Histories,
    seed: int,
    model: str,
    loss: Loss,
    length: int = 200,
    random_windows: bool = False,
    batch: int = 128,
    learning_rate: float = 1e-3,
    max_epochs: int = 200,
    epochs_per_round: int = 2,
    **sizes: float,
) -> Iterator[tuple[int, Score]]:
    """Train, and yield (epochs so far, the model's scores) after each round of epochs.

    The items are the newest ``length`` of a history, and one more as the last label. ``random_windows``: a longer
    history gives so many in a row from any place instead, drawn in each epoch.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = MODELS[model](train.num_items, length, **sizes)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    bounds = run_offsets(train.lengths)
    users = np.flatnonzero(train.lengths >= 2)
    for epoch in range(1, max_epochs + 1):
        network.train()
        for rows in _batches(rng, users, train.lengths, batch):
            kept = np.minimum(train.lengths[rows], length + 1)
            excess = train.lengths[rows] - kept
            start = bounds[rows] + (rng.integers(0, excess + 1) if random_windows else excess)
            window = _padded(train.items[ranges(start, kept)], kept, train.num_items)
            optimizer.zero_grad()
            next_item_loss(network, window, torch.from_numpy(kept), train.num_items, loss).backward()
            optimizer.step()
        if epoch % epochs_per_round == 0 or epoch == max_epochs:
            yield epoch, partial(_scores, network, length)


def _batches(rng: np.random.Generator, users: np.ndarray, lengths: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """All users in random batches of about equally long histories: neighbours among eight batches of random users."""
    order = rng.permutation(users)
    order = order[np.lexsort((lengths[order], np.arange(len(order)) // (8 * batch)))]
    parts = np.array_split(order, max(-(-len(order) // batch), 1))
    return (parts[each] for each in rng.permutation(len(parts)))


def next_item_loss(network: nn.Module, window: Tensor, lengths: Tensor, num_items: int, loss: Loss) -> Tensor:
    """Mean loss of the items after the first of each row of ``window``, int64 [B, L], padded with num_items."""
    inputs, labels = window[:, :-1], window[:, 1:]
    rows, places = torch.nonzero(labels < num_items, as_tuple=True)
    vectors, labels = network(inputs, lengths - 1)[rows, places], labels[rows, places]
    items = network.items.weight[:num_items]  # type: ignore[union-attr,index]
    if loss == "one_negative":
        negatives = draw_unseen(window, num_items)[rows, places]
        scores = [(vectors * items[each]).sum(dim=-1) for each in (labels, negatives)]
        return F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
    hidden = torch.zeros(0, 2, dtype=torch.int64)
    if loss == "softmax_unseen":
        earlier = inputs[rows]
        seen = (torch.arange(inputs.shape[1]) <= places[:, None]) & (earlier != labels[:, None])
        hidden = torch.stack([seen.nonzero()[:, 0], earlier[seen]], dim=1)
    return _CrossEntropy.apply(vectors, items, labels, hidden)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross entropy over all items, some rows at a time: one large matrix of scores would take longer."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, items: Tensor, labels: Tensor, hidden: Tensor) -> Tensor:
        """vectors [M, D], items [I, D], labels [M]; hidden: int64 [n, 2], pairs (row, item) that are left out."""
        total = vectors.new_zeros(())
        slopes = torch.empty_like(vectors), torch.zeros_like(items)
        for part in torch.arange(len(vectors)).split(_ROWS):
            first, own = int(part[0]), torch.arange(len(part))
            logits = vectors[part] @ items.T
            bounds = torch.searchsorted(hidden[:, 0].contiguous(), torch.tensor([first, first + len(part)]))
            row, item = hidden[bounds[0] : bounds[1]].T
            logits[row - first, item] = -torch.inf
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += (norm[:, 0] - logits[own, labels[part]]).sum()
            slope = logits.sub_(norm).exp_()
            slope[own, labels[part]] -= 1
            slopes[0][part] = slope @ items
            slopes[1].addmm_(slope.T, vectors[part])
        ctx.save_for_backward(*slopes)
        return total / len(vectors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Both gradients are known since forward."""
        of_vectors, of_items = ctx.saved_tensors
        scale = grads[0] / len(of_vectors)
        return of_vectors * scale, of_items * scale, None, None


def draw_unseen(window: Tensor, num_items: int) -> Tensor:
    """Uniform items that are not in the row of ``window``, int64 [B, L]; any items in a row that has all of them."""
    unseen = torch.ones(len(window), num_items + 1).scatter_(1, window, 0.0)[:, :num_items]
    unseen[unseen.sum(dim=1) == 0] = 1.0
    return torch.multinomial(unseen, window.shape[1], replacement=True)


def _scores(network: nn.Module, length: int, histories: Histories) -> np.ndarray:
    """Score: the product of the vector after the newest ``length`` items with every item."""
    network.eval()
    kept = np.minimum(histories.lengths, length)
    start = run_offsets(histories.lengths)[1:] - kept
    lengths = torch.from_numpy(kept)
    with torch.no_grad():
        inputs = _padded(histories.items[ranges(start, kept)], kept, histories.num_items)
        last = network(inputs, lengths)[torch.arange(len(kept)), lengths - 1]
        return (last @ network.items.weight[: histories.num_items].T).numpy()  # type: ignore[union-attr,index]


def _padded(items: np.ndarray, lengths: np.ndarray, padding: int) -> Tensor:
    """int64 [U, longest]"""
    rows = np.full((len(lengths), lengths.max(initial=1)), padding)
    rows[run_indices(lengths)] = items
    return torch.from_numpy(rows)
