"""The work in a batch: its tokens and the floating-point operations of its training step, from host integers."""

from __future__ import annotations

from dataclasses import dataclass

from hstu.config.args import NetworkArgs
from hstu.data.batch import HSTUBatch
from hstu.data.collate import FeatureRoles
from hstu.observe.flops import sequence_tokens, step_flops


@dataclass(frozen=True)
class StepWork:
    """Counts what one rank's batch asks of the network."""

    network: NetworkArgs
    roles: FeatureRoles

    @property
    def interleaved(self) -> bool:
        """Actions are tokens of their own."""
        return self.network.interleave_actions and self.roles.action is not None

    def of(self, batch: HSTUBatch) -> tuple[int, float]:
        """(tokens, floating-point operations of forward and backward); padding has none."""
        tokens, candidate_tokens = sequence_tokens(
            batch.item_lengths, batch.num_candidates_host, len(self.roles.contextual), self.interleaved
        )
        flops = step_flops(
            tokens,
            candidate_tokens,
            num_layers=self.network.num_layers,
            hidden_size=self.network.hidden_size,
            num_heads=self.network.num_attention_heads,
            head_dim=self.network.kv_channels,
            is_causal=self.network.is_causal,
        )
        return int(tokens.sum()), flops
