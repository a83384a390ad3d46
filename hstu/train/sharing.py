"""How the configuration wants global batches shared out over the data-parallel ranks."""

from __future__ import annotations

import logging

import numpy as np

from hstu.config.errors import ConfigError
from hstu.config.run_config import RunConfig
from hstu.data.balance import Sharing
from hstu.data.collate import FeatureRoles
from hstu.model.inputs import SequenceFeatures
from hstu.train.work import StepWork

log = logging.getLogger(__name__)


def choose_sharing(
    config: RunConfig, roles: FeatureRoles, max_items: int, item_lengths: np.ndarray, num_candidates: np.ndarray
) -> Sharing | None:
    """The sharing of training samples of these lengths, integers [S]; None for contiguous slices of equal counts.

    Raises ConfigError where the longest sequence that ``max_items`` allows has more tokens than a rank may have.
    """
    trainer, network = config.trainer, config.network
    if trainer.tokens_per_rank is None and not trainer.enable_balanced_shuffler:
        return None
    longest = SequenceFeatures(roles.item, roles.action, roles.contextual, max_items).max_tokens(network)
    if trainer.tokens_per_rank is not None and trainer.tokens_per_rank < longest:
        raise ConfigError(
            f"TrainerArgs.tokens_per_rank = {trainer.tokens_per_rank} is less than the longest possible sequence: "
            f"{max_items} items and {len(roles.contextual)} context features are {longest} tokens; set it to at least "
            f"{longest}, or lower max_sequence_length"
        )
    loads = StepWork(network, roles).loads(item_lengths, num_candidates)
    if trainer.tokens_per_rank is not None:
        log.info(
            "dynamic batching: at most %d tokens a rank, of sequences of %.1f tokens on average",
            trainer.tokens_per_rank,
            float(loads.tokens.mean()) if len(loads.tokens) else 0.0,
        )
    return Sharing(loads, trainer.enable_balanced_shuffler, trainer.tokens_per_rank)
