"""The work in a batch: its tokens and the floating-point operations of its training step, from host integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hstu.config.args import NetworkArgs
from hstu.data.balance import Loads
from hstu.data.batch import HSTUBatch
from hstu.data.collate import FeatureRoles
from hstu.observe.flops import sequence_flops, sequence_tokens


@dataclass(frozen=True)
class StepWork:
    """Counts what sequences ask of the network, before or after they are in a batch."""

    network: NetworkArgs
    roles: FeatureRoles

    @property
    def interleaved(self) -> bool:
        """Actions are tokens of their own."""
        return self.network.interleave_actions and self.roles.action is not None

    def of(self, batch: HSTUBatch) -> tuple[int, float]:
        """(tokens, floating-point operations of forward and backward); padding has none."""
        loads = self.loads(batch.item_lengths, batch.num_candidates_host)
        return int(loads.tokens.sum()), float(loads.costs.sum())

    def loads(self, item_lengths: np.ndarray, num_candidates: np.ndarray) -> Loads:
        """Tokens and floating-point operations of each sequence. item_lengths, num_candidates: integers [S]."""
        tokens, candidate_tokens = sequence_tokens(
            item_lengths, num_candidates, len(self.roles.contextual), self.interleaved
        )
        costs = sequence_flops(
            tokens,
            candidate_tokens,
            num_layers=self.network.num_layers,
            hidden_size=self.network.hidden_size,
            num_heads=self.network.num_attention_heads,
            head_dim=self.network.kv_channels,
            is_causal=self.network.is_causal,
        )
        return Loads(tokens, costs)
