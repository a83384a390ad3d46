"""The encoder of ranking and retrieval: inputs, and HSTU layers on kernels. Also what the models on it share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.model.inputs import SequenceFeatures, SequenceInputs
from hstu.model.layer import HSTULayer
from hstu.ops.comm import LayerComm
from hstu.ops.kernels import AttentionForward, Kernels, KernelShapes
from hstu.ops.layer import HSTULayerConfig, HSTULayerFunction, LayerWeights
from hstu.ops.layout import JaggedLayout, TokenRuns, truncate_history
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""NetworkArgs.dtype_str → dtype."""


@dataclass
class ModelOutput:
    """Loss and predictions of one rank's batch. The trainer divides the global loss sum by the global label count."""

    loss_sum: Tensor
    """float32 scalar: loss summed over the labelled tokens of this batch, and over tasks."""
    logits: Tensor | None = None
    """Ranking: float32 [M, last width of the head], in the order of ``batch.labels``; of all tasks side by side."""
    queries: Tensor | None = None
    """Retrieval evaluation: float32 [B, E], normalised, at each sequence's newest token; zeros for padding."""
    task_losses: Tensor | None = None
    """float32 [tasks], without gradients: the parts of ``loss_sum``. None if there is one task."""

    @property
    def loss_sums(self) -> Tensor:
        """float32 [1 + tasks], without gradients: ``loss_sum`` and its parts."""
        total = self.loss_sum.detach().float()[None]
        return total if self.task_losses is None else torch.cat([total, self.task_losses])


def mixed_precision(dtype_str: str, device_type: str) -> torch.autocast:
    """Run matrix products in this dtype; "float32" disables an enclosing autocast. Parameters stay float32."""
    return torch.autocast(device_type, dtype=DTYPES[dtype_str], enabled=dtype_str != "float32")


def kernel_shapes(network: NetworkArgs, tp_size: int = 1, cp_size: int = 1) -> KernelShapes:
    """Model properties on one of tp_size · cp_size ranks of a layer that determine which kernels support it."""
    heads = network.num_attention_heads // tp_size
    return KernelShapes(
        head_dim=network.kv_channels,
        num_heads=heads,
        hidden_size=network.hidden_size,
        item_dim=network.item_width,
        dtype=DTYPES[network.dtype_str],
        has_bias=network.has_relative_bias,
        has_window=network.has_window,
        has_ranges=heads % cp_size > 0,
    )


ROUNDED_WEIGHTS = "uvqk.weight", "uvqk.bias", "out.weight"
"""Weights of a layer that it rounds to the dtype of its matrix products before every use."""


class FusedHSTULayer(HSTULayer):
    """An HSTU layer as one autograd function over kernels, on one rank or with heads or tokens split over several."""

    def __init__(
        self, network: NetworkArgs, max_tokens: int, kernels: Kernels = REFERENCE_KERNELS, index: int = 0
    ) -> None:
        super().__init__(network, max_tokens, index)
        self.config = HSTULayerConfig(
            head_dim=network.kv_channels,
            attention=self.attention_config,
            eps=network.norm_epsilon,
            kernels=kernels,
            dropout=network.hidden_dropout,
            recompute_normalized=network.recompute_input_layernorm,
            recompute_activated=network.recompute_input_silu,
            recompute_all=network.recompute_layer,
        )

    def forward(
        self, x: Tensor, layout: JaggedLayout, update: Tensor | None = None, attend: AttentionForward | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`HSTULayer`.

        ``attend``: replaces the attention kernel in inference, for tokens that attend to tokens outside ``layout``.
        """
        config, bias = self.config if self.training else replace(self.config, dropout=0.0), self.bias
        if attend is not None:
            attention = replace(config.kernels.attention, forward=attend)
            config = replace(config, kernels=replace(config.kernels, attention=attention))
        weights = LayerWeights(
            input_norm_weight=self.input_norm.weight,
            input_norm_bias=self.input_norm.bias,
            uvqk_weight=self.uvqk.weight,
            uvqk_bias=self.uvqk.bias,
            position_weight=None if bias is None else bias.position_weight,
            time_weight=None if bias is None else bias.time_weight,
            output_norm_weight=self.output_norm.weight,
            output_norm_bias=self.output_norm.bias,
            out_weight=self.out.weight,
            out_bias=self.out.bias,
        )
        x, update = HSTULayerFunction.apply(x, update, layout, config, *weights)
        return x, update


class SequenceEncoder(nn.Module):
    """Table rows of a batch → encoded tokens: inputs and HSTU layers, in the network's compute dtype."""

    def __init__(self, network: NetworkArgs, features: SequenceFeatures, kernels: Kernels = REFERENCE_KERNELS) -> None:
        super().__init__()
        self.network = network
        self.features = features
        self.inputs = SequenceInputs(network, features, kernels)
        max_tokens = features.max_tokens(network)
        layers = nn.ModuleList(
            FusedHSTULayer(network, max_tokens, kernels, index) for index in range(network.num_layers)
        )
        self.stack = nn.ModuleDict({"layers": layers})  # this prefix is part of checkpoint keys
        self.comm = LayerComm()
        """Communication with the ranks that share the tokens."""

    def forward(self, embeddings: Mapping[str, Tensor], batch: HSTUBatch) -> tuple[Tensor, JaggedLayout]:
        """Returns the tokens of this rank's range, float32 [., D], and the layout of all tokens of the batch."""
        with mixed_precision(self.network.dtype_str, batch.num_candidates.device.type):
            x, layout = self.inputs(embeddings, batch, self.comm)
            own, part = self.comm.split_tokens(x, layout)
            del x  # frees the whole tokens where the layers pad or split them
            update: Tensor | None = None
            remaining, restore = layout, None
            for index, layer in enumerate(self.layers, 1):
                own, update = layer(own, part, update)
                assert update is not None
                if index == self.network.whole_layers < self.network.num_layers:
                    assert self.network.truncate_to_items is not None
                    x = self.comm.join_tokens(own + update, layout.num_tokens)
                    x, remaining, restore = truncate(x, layout, self.network.truncate_to_items, self.comm)
                    own, part = self.comm.split_tokens(x, remaining)
                    del x
                    update = None
            assert update is not None  # there is a layer
            x = self.comm.join_tokens(own + update, remaining.num_tokens)
            return (x if restore is None else restore(x)).float(), layout

    @property
    def layers(self) -> Sequence[FusedHSTULayer]:
        """The HSTU layers in order."""
        return cast(Sequence[FusedHSTULayer], self.stack["layers"])


def truncate(
    x: Tensor, layout: JaggedLayout, items: int, comm: LayerComm
) -> tuple[Tensor, JaggedLayout, Callable[[Tensor], Tensor]]:
    """Truncate the sequences of ``layout`` to their newest ``items`` items. x: this rank's tokens, [., D].

    Context-parallel ranks share the remaining tokens evenly again. Returns (those of this rank; layout of all; function
    from the outputs of the later layers to ``x`` with these in place of the remaining tokens).
    """
    shorter, tokens, left_of = truncate_history(layout, items)
    ranges = comm.token_ranges(layout.num_tokens)
    left = [left_of(of_rank) for of_rank in ranges]
    own = left[comm.cp_rank]
    indices = tokens[own.start : own.stop] - ranges[comm.cp_rank].start
    counts, shares = ([*map(len, each)] for each in (left, comm.token_ranges(shorter.num_tokens)))

    def restore(rows: Tensor) -> Tensor:
        return x.index_copy(0, indices, comm.take_rows(comm.gather_rows(rows, shares), counts))

    return comm.take_rows(comm.gather_rows(x.index_select(0, indices), counts), shares), shorter, restore


class OwnRows(NamedTuple):
    """This rank's slice of a selection of the batch's tokens."""

    own: slice
    counts: list[int]
    """Number of selected tokens on each context-parallel rank."""
    first_token: int
    """Index in the batch of this rank's first token."""


def own_rows(runs: TokenRuns, layout: JaggedLayout, comm: LayerComm) -> OwnRows:
    """Select the tokens of ``runs`` that belong to this rank."""
    ranges = comm.token_ranges(layout.num_tokens)
    of_ranks = [runs.within(of_rank) for of_rank in ranges]
    own = of_ranks[comm.cp_rank]
    return OwnRows(slice(own.start, own.stop), [len(each) for each in of_ranks], ranges[comm.cp_rank].start)


def labelled_rows(
    tokens: Tensor, layout: JaggedLayout, batch: HSTUBatch, comm: LayerComm, shift: int = 0
) -> tuple[Tensor, OwnRows]:
    """Rows [m, D] of this rank's ``tokens`` [., D] that lie ``shift`` after labelled items, and their labels' slice."""
    places = layout.newest_item_tokens(batch.num_labels, total=batch.num_labels_total) + shift
    if comm.cp_size == 1:
        return tokens.index_select(0, places), OwnRows(slice(None), [batch.num_labels_total], 0)
    labels = own_rows(layout.newest_item_runs(batch.num_labels_host, shift), layout, comm)
    return tokens.index_select(0, places[labels.own] - labels.first_token), labels
