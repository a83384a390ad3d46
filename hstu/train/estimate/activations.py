"""Bytes that a training step needs besides what is kept: activations, looked-up rows, batches, working memory.

The formulas follow what autograd keeps with the PyTorch kernels; docs/distributed.md explains them line by line.
Per token of a layer of width D with H heads of width d, I = H·d, in a compute type of c bytes:

    4 D           input of the layer, for its norm and the residual
    c D           normalised, for the weight of W_uvqk        (not with recompute_input_layernorm)
    4 I c         W_uvqk's output, for SiLU
    4 I c         SiLU of it: U, V, Q, K                       (not with recompute_input_silu)
    4 I + 4 I     the attention's output in float32, and normalised
    I + c I       which elements dropout keeps; what W_o multiplies
    16            means and deviations of two norms

and with recompute_layer only the 4 D.
"""

from __future__ import annotations

from hstu.config.args import RankingArgs, RetrievalArgs
from hstu.train.estimate.parameters import NUMBER, projected_roles
from hstu.train.estimate.situation import Batch, Situation

ID = 8
"""ids, lengths, labels and times are int64."""
_BATCHES_IN_FLIGHT = {"none": 1, "native": 3, "prefetch": 4}


def layer_bytes(situation: Situation, tokens: int) -> tuple[int, int]:
    """(kept in the forward, alive while the layer's backward runs) of one layer.

    They differ under recompute_layer alone, which makes again in backward what it has not kept.
    """
    network, tp, c = situation.config.network, situation.tp_size, situation.compute_bytes
    hidden, inner = network.hidden_size, network.num_attention_heads * network.kv_channels // tp
    between = -(-tokens // tp) if network.sequence_parallel else tokens
    given = residual_bytes(situation) * between * hidden
    normalised = 0 if network.recompute_input_layernorm and not network.recompute_layer else c * between * hidden
    activated = 0 if network.recompute_input_silu and not network.recompute_layer else 4 * c * inner
    dropped = inner if network.hidden_dropout > 0 else 0
    gate = 2 * NUMBER * inner + dropped + c * inner
    norms = 2 * NUMBER * (between + tokens)
    weights = c * 5 * inner * hidden if c < NUMBER else 0  # autocast's copies of W_uvqk and W_o
    whole = given + normalised + tokens * (4 * c * inner + activated + gate) + norms + weights
    return (given, whole) if network.recompute_layer else (whole, whole)


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
    """Working memory of backward beyond what is kept, at its peak: in the attention of the last layer.

    Alive are float32 copies of q, k, v and of the output's gradient, the gradients of q, k and v, those of U and of
    the residual; what the layer's gate had kept is gone.
    """
    network, c = situation.config.network, situation.compute_bytes
    inner = network.num_attention_heads * network.kv_channels // situation.tp_size
    gone = 2 * NUMBER * inner + c * inner + (inner if network.hidden_dropout > 0 else 0)
    return tokens * (NUMBER * network.hidden_size + 7 * NUMBER * inner + 5 * c * inner - gone)
