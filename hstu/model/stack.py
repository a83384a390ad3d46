"""The encoder of ranking and retrieval: inputs, and HSTU layers on kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from hstu.config.args import NetworkArgs
from hstu.data.batches.batch import HSTUBatch
from hstu.model.inputs import SequenceFeatures, SequenceInputs
from hstu.model.layer import HSTULayer
from hstu.model.precision import DTYPES, mixed_precision
from hstu.model.truncation import Truncation
from hstu.ops.comm import LayerComm
from hstu.ops.kernels import AttentionForward, Kernels, KernelShapes
from hstu.ops.layer import HSTULayerConfig, HSTULayerFunction, LayerWeights
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS


def kernel_shapes(network: NetworkArgs, tp_size: int = 1) -> KernelShapes:
    """Model properties on one of ``tp_size`` tensor-parallel ranks that determine which kernels support it."""
    return KernelShapes(
        head_dim=network.kv_channels,
        num_heads=network.num_attention_heads // tp_size,
        hidden_size=network.hidden_size,
        item_dim=network.item_width,
        dtype=DTYPES[network.dtype_str],
        has_bias=network.has_relative_bias,
        has_window=network.has_window,
    )


class FusedHSTULayer(HSTULayer):
    """An HSTU layer as one autograd function over kernels, on one rank or with heads or tokens split over several."""

    def __init__(
        self, network: NetworkArgs, max_tokens: int, kernels: Kernels = REFERENCE_KERNELS, index: int = 0
    ) -> None:
        super().__init__(network, max_tokens, index)
        self.kernels = kernels
        self.comm = LayerComm()
        """Communication with the ranks that hold the other heads."""

    def forward(
        self,
        x: Tensor,
        layout: JaggedLayout,
        update: Tensor | None = None,
        attend: AttentionForward | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`HSTULayer`.

        ``attend``: replaces the attention kernel in inference, for tokens that attend to tokens outside ``layout``.
        """
        network, bias, kernels = self.network, self.bias, self.kernels
        if attend is not None:
            kernels = replace(kernels, attention=replace(kernels.attention, forward=attend))
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
        )
        config = HSTULayerConfig(
            head_dim=network.kv_channels,
            attention=self.attention_config,
            eps=network.norm_epsilon,
            kernels=kernels,
            dropout=network.hidden_dropout if self.training else 0.0,
            recompute_normalized=network.recompute_input_layernorm,
            recompute_activated=network.recompute_input_silu,
            recompute_all=network.recompute_layer,
            comm=self.comm,
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
            if self.network.bfloat16_residual:
                x = x.bfloat16()
            for layers, part, cut in self._stages(layout):
                uncut, own = (None, x) if cut is None else (x, cut.shorten(x))
                del x  # frees the whole tokens where the layers pad or split them
                own, split = self.comm.split_tokens(own, part)
                update: Tensor | None = None
                for layer in layers:
                    own, update = layer(own, split, update)
                assert update is not None  # there is a layer
                x = self.comm.join_tokens(own + update, part.num_tokens)
                if cut is not None and uncut is not None:
                    x = cut.restore(uncut, x)
            return x.float(), layout

    def _stages(self, layout: JaggedLayout) -> Iterator[tuple[Sequence[nn.Module], JaggedLayout, Truncation | None]]:
        """Yield groups of layers in order, each with the layout and the truncation of its tokens."""
        layers, whole = list(self.layers), self.network.whole_layers
        yield layers[:whole], layout, None
        if layers[whole:]:
            assert self.network.truncate_to_items is not None
            cut = Truncation.of(layout, self.network.truncate_to_items, self.comm)
            yield layers[whole:], cut.layout, cut

    @property
    def layers(self) -> nn.ModuleList:
        """The HSTU layers in order."""
        layers = self.stack["layers"]
        assert isinstance(layers, nn.ModuleList)
        return layers
