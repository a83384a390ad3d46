"""HSTU retrieval in plain PyTorch, the baseline of the benchmarks: padded batches, masks and biases for all pairs.

Sequences are [B, N, D], scores, biases and masks [B, N, N], and the negatives of every label are gathered and
normalised, [M, R, D]. The mathematics is that of hstu.model for causal sequences of items without context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import NEGATIVES, HSTUBatch
from hstu.model.gr_model import GRModel
from hstu.model.stack import SequenceEncoder


@dataclass
class PaddedBatch:
    """A batch of B sequences padded to N, with M labels that have R negatives each."""

    ids: Tensor
    """int64 [B, N]."""
    times: Tensor
    """int64 [B, N], seconds."""
    valid: Tensor
    """bool [B, N]: False for padding."""
    labelled: Tensor
    """bool [B, N]: positions at which the next item is predicted."""
    targets: Tensor
    """int64 [M]."""
    negatives: Tensor
    """int64 [M, R]."""


def pad_batch(batch: HSTUBatch, item_feature: str) -> PaddedBatch:
    """Pad one of our batches. It must have drawn negatives, and a label for each item that another follows."""
    assert batch.items.timestamps is not None and batch.negatives.draws is not None
    lengths = torch.from_numpy(batch.item_lengths)
    shape = (len(lengths), int(lengths.max()))
    valid = torch.arange(shape[1]) < lengths[:, None]
    labelled = valid.roll(-1, dims=1)
    labelled[:, -1] = False
    assert int(labelled.sum()) == batch.num_labels_total
    ids, times = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    ids[valid] = batch.features[item_feature].values()
    times[valid] = batch.items.timestamps
    negatives = batch.features[NEGATIVES].values()[batch.negatives.draws.long()]
    return PaddedBatch(ids, times, valid, labelled, batch.labels, negatives)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alpha: float, divisor: int, bias: Tensor | None = None
) -> Tensor:
    """q, k, v [B, N, H, d]; mask [N, N], 1 where the query may see the key; bias [B, 1, N, N]. Returns [B, N, H, d]."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * alpha
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bhij,bjhd->bihd", F.silu(scores) / divisor * mask, v)


def gathered_loss(
    queries: Tensor, targets: Tensor, negatives: Tensor, hit: Tensor, temperature: float, eps: float
) -> Tensor:
    """Mean −log softmax of the targets [M, D] among their gathered negatives [M, R, D], none of them normalised yet.

    hit: bool [M, R], where a negative is the target.
    """

    def normalise(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps)

    queries, targets, negatives = normalise(queries), normalise(targets), normalise(negatives)
    positive_logits = (queries * targets).sum(-1, keepdim=True) / temperature
    negative_logits = torch.einsum("md,mrd->mr", queries, negatives) / temperature
    negative_logits = negative_logits.masked_fill(hit, -5e4)
    logits = torch.cat([positive_logits, negative_logits], dim=1)
    return -F.log_softmax(logits, dim=1)[:, 0].mean()


class PaddedLayer(nn.Module):
    """One layer on [B, N, D]."""

    def __init__(self, network: NetworkArgs, max_items: int) -> None:
        super().__init__()
        inner = network.num_attention_heads * network.kv_channels
        self.network, self.max_items = network, max_items
        self.input_norm = nn.LayerNorm(network.hidden_size, eps=network.norm_epsilon)
        self.uvqk = nn.Linear(network.hidden_size, 4 * inner)
        self.output_norm = nn.LayerNorm(inner, eps=network.norm_epsilon)
        self.out = nn.Linear(inner, network.hidden_size, bias=False)
        if network.has_relative_bias:
            self.position_weight = nn.Parameter(torch.zeros(2 * max_items - 1))
            self.time_weight = nn.Parameter(torch.zeros(128))

    def forward(self, x: Tensor, times: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, D]; times int64 [B, N], for a relative bias; mask [N, N], 1 where the query may see the key."""
        network = self.network
        projected = F.silu(self.uvqk(self.input_norm(x)))
        u, v, q, k = projected.unflatten(2, (network.num_attention_heads, 4, network.kv_channels)).unbind(3)
        bias = self._bias(times).unsqueeze(1) if network.has_relative_bias else None
        attended = padded_attention(q, k, v, mask, network.score_factor, self.max_items, bias)
        gate = self.output_norm(attended.flatten(2)) * u.flatten(2)
        gated = F.dropout(gate, network.hidden_dropout, self.training)
        return x + self.out(gated)

    def _bias(self, times: Tensor) -> Tensor:
        """[B, N, N]."""
        length = times.shape[1]
        next_times = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
        delta = (next_times[:, :, None] - times[:, None, :]).abs().clamp(min=1)
        buckets = (delta.double().log() / 0.301).clamp(max=127).long()
        place = torch.arange(length, device=times.device)
        distance = place[:, None] - place[None, :] + self.max_items - 1
        return self.position_weight[distance] + self.time_weight[buckets.view(-1)].view(delta.shape)


class PaddedModel(nn.Module):
    """Item table, layers and sampled softmax."""

    def __init__(
        self, network: NetworkArgs, num_items: int, max_items: int, temperature: float, l2_norm_eps: float
    ) -> None:
        super().__init__()
        self.network = network
        self.items = nn.Embedding(num_items, network.hidden_size)
        self.layers = nn.ModuleList(PaddedLayer(network, max_items) for _ in range(network.num_layers))
        self.temperature, self.eps = temperature, l2_norm_eps
        self.positions: nn.Parameter | None = None
        if "absolute" in network.position_encoding:
            self.positions = nn.Parameter(torch.zeros(network.num_position_buckets, network.hidden_size))
        self.mask = torch.ones(max_items, max_items).tril()

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Mean loss of the labels."""
        length = batch.ids.shape[1]
        valid = batch.valid[:, :, None].float()
        x = self.items(batch.ids) * math.sqrt(self.network.hidden_size)
        x = (x if self.positions is None else x + self.positions[:length]) * valid
        x = F.dropout(x, self.network.hidden_dropout, self.training)
        mask = self.mask[:length, :length]
        # The query time of the last item is its own time. Padding must not look like a next item.
        times = torch.where(batch.valid, batch.times, batch.times.amax(dim=1, keepdim=True))
        for layer in self.layers:
            x = layer(x, times, mask) * valid
        hit = batch.negatives == batch.targets[:, None]
        targets, negatives = self.items(batch.targets), self.items(batch.negatives)
        return gathered_loss(x[batch.labelled], targets, negatives, hit, self.temperature, self.eps)

    @torch.no_grad()
    def copy_weights(self, model: GRModel) -> None:
        """Copy the weights of our model."""
        self.items.weight.copy_(model.embed_items(torch.arange(self.items.num_embeddings)))
        encoder = next(module for module in model.modules() if isinstance(module, SequenceEncoder))
        if self.positions is not None and encoder.inputs.position_table is not None:
            self.positions.copy_(encoder.inputs.position_table)
        for mine, theirs in zip(self.layers, encoder.layers, strict=True):
            state = {name.removeprefix("bias."): weight for name, weight in theirs.state_dict().items()}
            mine.load_state_dict(state)
