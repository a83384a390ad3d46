"""Masks under which a model can see what it is to predict: allowed, but its losses and metrics mean nothing."""

from __future__ import annotations

from hstu.config.args import NetworkArgs
from hstu.config.run_config import Task
from hstu.data.collate import FeatureRoles


def leak(task: Task, network: NetworkArgs, roles: FeatureRoles, max_num_candidates: int) -> str | None:
    """How labels can be seen, and the remedy; None where they cannot.

    Candidates are safe: no history or context token sees them. Without them every item is labelled, and what lets a
    token see later ones lets it see its label.
    """
    if max_num_candidates > 0:
        return None
    label = "the next item, its target" if task == "retrieval" else "its own action, its label"
    remedy = "" if task == "retrieval" else " or DatasetArgs.max_num_candidates > 0"
    if not network.is_causal:
        return f"with NetworkArgs.is_causal = False every item sees {label}; set is_causal = True{remedy}"
    if roles.contextual and network.num_layers > 1 and not network.disable_contextual_mask:
        return (
            "context tokens see the whole history and items see them: from the second layer on an item can see "
            f"{label}, through the context; set NetworkArgs.disable_contextual_mask = True{remedy}"
        )
    return None
