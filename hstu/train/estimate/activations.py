"""Bytes that a training step needs besides what is kept: activations, looked-up rows, batches, working memory.

The formulas follow what autograd keeps with the PyTorch kernels; docs/distributed.md explains them line by line.
"""

from __future__ import annotations

import dataclasses

from hstu.config.args import NetworkArgs, RankingArgs, RetrievalArgs
from hstu.train.estimate.parameters import NUMBER, projected_roles
from hstu.train.estimate.situation import Batch, Situation

ID = 8
"""ids, lengths, labels and times are int64."""
_BATCHES_IN_FLIGHT = {"none": 1, "native": 3, "prefetch": 4}


def layer_bytes(situation: Situation, tokens: int) -> tuple[int, int]:
    """(kept in the forward, alive while the layer's backward runs) of one layer.

    They differ under recompute_layer alone, which makes again in backward what it has not kept.
    """
    network, tp, between = situation.config.network, situation.tp_size, residual_bytes(situation)
    kept = kept_by_layer(network, tokens, tp, situation.compute_bytes, between)
    if network.recompute_layer:
        network = dataclasses.replace(
            network, recompute_layer=False, recompute_input_layernorm=False, recompute_input_silu=False
        )
    return kept, kept_by_layer(network, tokens, tp, situation.compute_bytes, between)


def kept_by_layer(network: NetworkArgs, tokens: int, ranks: int, c: int, r: int) -> int:
    """Bytes that a layer keeps of ``tokens``, to the byte (hstu/ops/layer.py: its input and the fields of ``Kept``).

    ``ranks``: of its tensor-parallel group; ``c``: bytes of a number in the compute type, ``r``: between the layers.
    """
    width, inner = network.hidden_size, network.num_attention_heads * network.kv_channels // ranks
    own = -(-tokens // ranks) if network.sequence_parallel else tokens
    given = own * r * width
    if network.recompute_layer:
        return given
    statistics = 2 * NUMBER * (own + tokens)
    normalised = 0 if network.recompute_input_layernorm else own * c * width
    activated = 0 if network.recompute_input_silu else 4 * c * inner
    pattern = inner if network.hidden_dropout > 0 else 0
    return given + statistics + normalised + tokens * (4 * c * inner + activated + c * inner + pattern)


def residual_bytes(situation: Situation) -> int:
    """Bytes of a number between the layers: float32 unless all that goes in comes out of half-precision products."""
    network, roles = situation.config.network, situation.roles
    kinds = 1 + (roles.action is not None) + bool(roles.contextual)
    all_projected = len(projected_roles(situation)) == kinds
    return situation.compute_bytes if all_projected and network.position_encoding != "absolute" else NUMBER


def input_bytes(situation: Situation, batch: Batch, tokens: int) -> int:
    """What is kept of making tokens of table rows."""
    network, c = situation.config.network, situation.compute_bytes
    rows = {"item": batch.items, "action": batch.items, "contextual": batch.sequences * len(situation.roles.contextual)}
    kept = 2 * ID * tokens  # the permutation and its inverse
    for role, width in projected_roles(situation).items():
        kept += rows[role] * c * (width + 2 * network.hidden_size)
    if network.position_encoding == "absolute":
        kept += ID * tokens
    dropout = network.hidden_dropout if network.input_dropout is None else network.input_dropout
    return kept + (tokens * network.hidden_size if dropout > 0 else 0)


def task_bytes(situation: Situation, batch: Batch, pool: int) -> tuple[int, int]:
    """(kept for backward, working memory while the loss is computed) of the head or the softmax over ``pool`` rows."""
    network, args, c = situation.config.network, situation.config.task_args, situation.compute_bytes
    labels, hidden, item_width = batch.labels, network.hidden_size, network.item_width
    if isinstance(args, RankingArgs):
        *widths, last = args.prediction_head_arch
        per_hidden = c if args.prediction_head_act_type == "relu" else 2 * c
        loss = NUMBER * (2 * last if args.num_tasks == last else last) + ID
        return labels * (ID + c * hidden + per_hidden * sum(widths) + loss), labels * (NUMBER * last + NUMBER * hidden)
    query = NUMBER * (2 * item_width if item_width == hidden else hidden + 2 * item_width)
    kept = labels * (query + 2 * NUMBER * item_width + 4 * ID) + pool * 2 * NUMBER * item_width
    if args.num_negatives > 0 and not args.shared_negatives:  # scores, weights, and the draws sorted by row
        return kept, labels * args.num_negatives * (2 * NUMBER + 4 * ID) + 4 * labels * NUMBER * item_width
    return kept, 4 * labels * NUMBER * item_width + pool * NUMBER * item_width


def looked_up_bytes(situation: Situation, batch: Batch) -> int:
    """Rows of the tables for one rank's samples and, under tensor parallelism, those of its group."""
    own = situation.own_ids(batch)
    dims = {feature: (spec.dim, spec.replicated) for spec in situation.specs for feature in spec.features}
    total = 0
    for feature, count in own.items():
        dim, replicated = dims.get(feature, (0, True))
        copies = situation.tp_size + (0 if replicated or situation.tp_size == 1 else 1)
        total += count * dim * NUMBER * copies
    return total


def batch_bytes(situation: Situation, batch: Batch) -> int:
    """The batches that a pipeline holds at once, on the device."""
    args, tp = situation.config.task_args, situation.tp_size
    own = situation.own_ids(batch)
    ids = sum(own.values())
    sequences = situation.config.trainer.sequences_per_iteration
    labels = -(-batch.labels // tp)
    numbers = ids + labels + sequences * (len(own) + 3)
    if situation.config.network.position_encoding == "relative_bias":
        numbers += own[situation.roles.item]
    one = numbers * ID
    if isinstance(args, RetrievalArgs):
        if args.num_negatives > 0 and not args.shared_negatives:
            one += labels * args.num_negatives * NUMBER
        if args.negatives == "in_batch":
            one += situation.negatives(labels, own[situation.roles.item]) * ID
    group = tp if tp > 1 else 0  # the batch of the group besides the rank's own
    micro = tp if situation.config.trainer.gradient_accumulation_steps > 1 else 0  # and its parts
    return one * (1 + group + micro) * _BATCHES_IN_FLIGHT[situation.config.trainer.pipeline_type]


def backward_bytes(situation: Situation, tokens: int) -> int:
    """Working memory of a layer's backward beyond what is kept, at its peak: in the attention.

    Alive are float32 copies of q, k, v and of the output's gradient, the gradients of q, k and v; the gradients of the
    attention's output, of U, V, Q and K and of the residual; and, where it is made again, SiLU of the projection.
    The attention's output and the dropout's pattern are gone.
    """
    network, c = situation.config.network, situation.compute_bytes
    inner = network.num_attention_heads * network.kv_channels // situation.tp_size
    again = 4 * c * inner if network.recompute_input_silu and not network.recompute_layer else 0
    gone = c * inner + (inner if network.hidden_dropout > 0 else 0)
    return tokens * (NUMBER * network.hidden_size + 7 * NUMBER * inner + 5 * c * inner + again - gone)
