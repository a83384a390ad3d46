"""The HSTU stack, and the encoder that ranking and retrieval share."""

from __future__ import annotations

from torch import Tensor, nn
from torchrec import JaggedTensor

from hstu.config.args import NetworkArgs
from hstu.data.batch import HSTUBatch
from hstu.model.inputs import SequenceFeatures, SequenceInputs
from hstu.model.layer import HSTULayer
from hstu.model.precision import mixed_precision
from hstu.ops.backends import Backend
from hstu.ops.layout import JaggedLayout


class HSTUStack(nn.Module):
    """``num_layers`` HSTU layers, one after another."""

    def __init__(
        self,
        network: NetworkArgs,
        max_tokens: int,
        backend: Backend = Backend.PYTORCH,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(network, max_tokens, backend) for _ in range(network.num_layers))

    def forward(self, x: Tensor, layout: JaggedLayout) -> Tensor:
        """x: [T, D] → [T, D]."""
        for layer in self.layers:
            x = layer(x, layout)
        return x


class SequenceEncoder(nn.Module):
    """Table rows of a batch → encoded tokens: the inputs and the stack, in the network's compute type.

    Args:
        network: the model.
        features: what a sequence is made of.
        backend: kernels, from :func:`hstu.ops.backends.select_backend`.
    """

    def __init__(
        self,
        network: NetworkArgs,
        features: SequenceFeatures,
        backend: Backend = Backend.PYTORCH,
    ) -> None:
        super().__init__()
        self.network = network
        self.features = features
        self.inputs = SequenceInputs(network, features, backend)
        self.stack = HSTUStack(network, features.max_tokens(network), backend)

    def forward(self, embeddings: dict[str, JaggedTensor], batch: HSTUBatch) -> tuple[Tensor, JaggedLayout]:
        """Returns tokens float32 [T, D] and their layout."""
        with mixed_precision(self.network.dtype_str, batch.num_candidates.device.type):
            x, layout = self.inputs(embeddings, batch)
            return self.stack(x, layout).float(), layout
