"""Tokens and floating-point operations of a training step, computed from integers on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.config.args import NetworkArgs
from hstu.data.batch import HSTUBatch
from hstu.data.jagged import sequence_tokens
from hstu.data.roles import FeatureRoles
from hstu.data.sampler import Loads
from hstu.ops.costs import Window, sequence_flops


@dataclass(frozen=True)
class FlopCounter:
    """Counts the tokens and floating-point operations that sequences cost in one network."""

    network: NetworkArgs
    roles: FeatureRoles

    def count(self, batch: HSTUBatch) -> tuple[int, float]:
        """(tokens, floating-point operations of forward and backward) of a batch. Padding counts as zero."""
        loads = self.per_sequence(batch.item_lengths, batch.num_candidates_host)
        return int(loads.tokens.sum()), float(loads.costs.sum())

    def per_sequence(self, item_lengths: np.ndarray, num_candidates: np.ndarray) -> Loads:
        """Tokens and floating-point operations of each sequence. item_lengths, num_candidates: integers [S]."""
        per_item = self.network.tokens_per_item(self.roles.action is not None)
        tokens = sequence_tokens(item_lengths, len(self.roles.contextual), per_item)
        full, contextuals = self.network.min_full_attention_tokens, len(self.roles.contextual)
        costs = sequence_flops(
            tokens,
            np.asarray(num_candidates, dtype=np.int64) * per_item,
            num_layers=self.network.num_layers,
            hidden_size=self.network.hidden_size,
            num_heads=self.network.num_attention_heads,
            head_dim=self.network.kv_channels,
            is_causal=self.network.is_causal,
            windows=[Window(span, full, contextuals) for span in self.network.attention_spans],
        )
        return Loads(tokens, costs)
