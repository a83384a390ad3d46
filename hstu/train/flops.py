"""Tokens and floating-point operations (FLOPs) of a training step, computed from integers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.data.batches.jagged import sequence_tokens
from hstu.data.features.roles import FeatureRoles
from hstu.data.sampling.sampler import Loads
from hstu.ops.costs import Window, sequence_flops


@dataclass(frozen=True)
class FlopCounter:
    """Counts the tokens and FLOPs of sequences in one network."""

    network: NetworkArgs
    roles: FeatureRoles

    def count(self, batch: HSTUBatch) -> tuple[int, float]:
        """(tokens, FLOPs of forward and backward) of a batch, without padding."""
        loads = self.per_sequence(batch.item_lengths, batch.num_candidates_host)
        return int(loads.tokens.sum()), float(loads.costs.sum())

    def per_sequence(self, item_lengths: np.ndarray, num_candidates: np.ndarray) -> Loads:
        """Tokens and FLOPs of each sequence. item_lengths, num_candidates: integers [S]."""
        candidates, whole = np.asarray(num_candidates, dtype=np.int64), self.network.whole_layers
        spans = self.network.attention_spans
        tokens, costs = self._layers(spans[:whole], np.asarray(item_lengths), candidates)
        if spans[whole:]:
            shorter = truncated_items(self.network, np.asarray(item_lengths), candidates)
            costs = costs + self._layers(spans[whole:], shorter, candidates)[1]
        return Loads(tokens, costs)

    def _layers(
        self, spans: Sequence[int | None], item_lengths: np.ndarray, num_candidates: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and FLOPs of each sequence in layers with these attention spans."""
        per_item = self.network.tokens_per_item(self.roles.action is not None)
        tokens = sequence_tokens(item_lengths, len(self.roles.contextual), per_item)
        full, contextuals = self.network.min_full_attention_tokens, len(self.roles.contextual)
        costs = sequence_flops(
            tokens,
            num_candidates * per_item,
            num_layers=len(spans),
            hidden_size=self.network.hidden_size,
            num_heads=self.network.num_attention_heads,
            head_dim=self.network.kv_channels,
            is_causal=self.network.is_causal,
            windows=[Window(span, full, contextuals) for span in spans],
        )
        return tokens, costs


def truncated_items(network: NetworkArgs, item_lengths: np.ndarray, num_candidates: np.ndarray) -> np.ndarray:
    """Items of each sequence in the layers after NetworkArgs.truncate_after_layer. All arrays are int64 [S]."""
    assert network.truncate_to_items is not None
    history = item_lengths - num_candidates
    return np.asarray(np.minimum(history, network.truncate_to_items) + num_candidates)
