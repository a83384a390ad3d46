"""The dense part of a trained model as one function of tensors, which torch.export can trace for any batch.

It runs copies of the trained modules in float32. torch.export cannot trace host integers, so the caller passes the
layout as tensors, and attention pads sequences to one length (hstu/ops/pytorch/attention.py).
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.func import functional_call
from torch.fx import GraphModule

from hstu.base.files import digest_of
from hstu.config.args.network import SIDE_WIDTH
from hstu.model.factors import Told
from hstu.model.heads import MultiTaskHead
from hstu.model.ranking import MultiTaskDense, RankingModel, RankingTask
from hstu.model.retrieval import RetrievalDense
from hstu.ops.kernels import AttentionInputs
from hstu.ops.layout import JaggedLayout
from hstu.ops.pytorch.attention import PaddedLayout, padded_forward
from hstu.ops.pytorch.operators import REFERENCE_KERNELS

_SIZES = {
    "items": (("items", 3), ("item_width", None)),
    "actions": (("items", 3), ("item_width", None)),
    "side": (("items", 3), ("side_width", None)),
    "known_after": (("items", 3), ("known_after_width", None)),
    "numbers": (("items", 3), ("number_width", None)),
    "is_history": (("items", 3),),
    "action_ids": (("items", 3),),
    "item_places": (("items", 3),),
    "item_padded": (("sequences", 2), ("most_items", 4)),
    "context": (("contexts", 4), ("contextual_width", None)),
    "order": (("tokens", 6),),
    "positions": (("tokens", 6),),
    "places": (("tokens", 6),),
    "token_times": (("tokens", 6),),
    "query_times": (("tokens", 6),),
    "padded": (("sequences", 2), ("longest", 5)),
    "history_ends": (("sequences", 2),),
    "prefix": (("sequences", 2), ("layers", None), ("pair", None), ("heads", None), ("earlier", 4), ("channels", None)),
    "prefix_lengths": (("sequences", 2),),
    "prefix_times": (("sequences", 2), ("earlier", 4)),
    "outputs": (("outputs", 3),),
    "kept": (("kept_tokens", 4),),
    "kept_places": (("kept_tokens", 4),),
    "kept_padded": (("sequences", 2), ("longest_kept", 4)),
    "kept_history_ends": (("sequences", 2),),
}
"""Input → its dimensions as (name, size in the traced example). Size None: fixed by the model."""
_END = 2**63 - 1
"""Traced end of a slice that has none."""


class ServingProgram(nn.Module):
    """Maps table rows and a layout to the predictions of the task at chosen tokens.

    The input is a dict of the tensors in ``input_names``:

    items, actions: float32 [I, E], rows of the item and the action table, sequence after sequence.
    side, known_after: float32 [I, .], concatenated rows of the side features; the mean row of a list.
    numbers: float32 [I, W], as ItemColumns.numbers.
    is_history: float32 [I], 1 for history, 0 for candidates, whose action is hidden.
    action_ids: int64 [I], -1 for unknown ones; item_padded, item_places: int64 [S, .], [I], as padded and places, of
        items. With NetworkArgs.num_factors.
    context: float32 [C · S, .], rows of all S sequences for the first contextual feature, then for the second, ….
    order: int64 [T], row of each token in the concatenation of context, items and actions.
    positions: int64 [T], position of each token in its sequence; all candidates have the position of the first.
    padded, places, history_ends: int64 [S, N], [T], [S], see PaddedLayout.
    token_times, query_times: int64 [T], in seconds, see JaggedLayout.
    prefix, prefix_lengths, prefix_times: float32 [S, L, 2, H, P, d], int64 [S], int64 [S, P]: cached keys and values of
        tokens before these, of which the layout counts all. Absent if ``whole_because`` says why.
    kept, kept_padded, kept_places, kept_history_ends: with NetworkArgs.truncate_to_items, the tokens that the later
        layers compute, and their layout.
    outputs: int64 [M], the tokens from which to predict.

    Returns unit vectors, float32 [M, E], for retrieval, and ModelOutput.logits, float32 [M, P], for ranking; then the
    keys and values, float32 [T, H, d], of the first layer, then of the second, …, if it reads a prefix.
    """

    def __init__(self, task: RetrievalDense | RankingModel) -> None:
        super().__init__()
        task = copy.deepcopy(task).cpu().eval().requires_grad_(False)
        self.network = task.encoder.network
        self._truncates = self.network.whole_layers < self.network.num_layers
        self.whole_because = _whole_because(task)
        """Why a new event changes the keys and values of earlier ones, so that none are cached. None: it does not."""
        self.inputs, self.layers = task.encoder.inputs, task.encoder.layers
        self.head = task.head if isinstance(task, RankingModel) else None
        self.tasks = task.tasks if isinstance(task, MultiTaskDense) else None
        if isinstance(task, RetrievalDense):
            self.query_projection, self.l2_norm_eps = task.query_projection, task.args.l2_norm_eps

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that this model reads."""
        features, network = self.inputs.features, self.network
        hides = features.action is not None and self.inputs.tokens_per_item == 1 and self.head is not None
        needed = {
            "actions": features.action is not None,
            "side": bool(self.inputs.side["side"]),
            "known_after": bool(self.inputs.side["known_after"]),
            "numbers": bool(features.numbers),
            "is_history": hides or network.num_factors,
            **dict.fromkeys(("action_ids", "item_places", "item_padded"), network.num_factors),
            "context": bool(features.contextual),
            "token_times": network.needs_times,
            "query_times": network.needs_times,
            "prefix": self.whole_because is None,
            "prefix_lengths": self.whole_because is None,
            "prefix_times": self.whole_because is None and network.needs_times,
            **dict.fromkeys((name for name in _SIZES if name.startswith("kept")), self._truncates),
        }
        return tuple(name for name in _SIZES if needed.get(name, True))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Predict; see the class for inputs and outputs."""
        x, computed = self._tokens(inputs), list[Tensor]()

        def attend(read: AttentionInputs) -> Tensor:
            if "prefix" not in inputs:
                return padded_forward(read)
            earlier = inputs["prefix"].select(1, len(computed) // 2)
            computed.extend([read.k, read.v])
            return padded_forward(read, earlier)

        for layers, tokens, layout in self._stages(inputs):
            own, update = x if tokens is None else x.index_select(0, tokens), None
            for layer in layers:
                own, update = layer(own, layout, update, attend)
            assert update is not None  # there is a layer
            x = own + update if tokens is None else x.index_copy(0, tokens, own + update)
        outputs = self._predicted(x.index_select(0, inputs["outputs"]))
        return (outputs, *computed) if computed else outputs

    def _predicted(self, tokens: Tensor) -> Tensor:
        if self.head is None:
            return REFERENCE_KERNELS.l2_normalize(self.query_projection(tokens), self.l2_norm_eps)
        outputs: Tensor = self.head(tokens)
        if self.tasks is None:
            return outputs
        each = outputs.split(cast(MultiTaskHead, self.head).task_widths, dim=1)
        tasks = (cast(RankingTask, task) for task in self.tasks)
        return torch.cat([task.predictions(own) for task, own in zip(tasks, each, strict=True)], dim=1)

    def _tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Input tokens [T, D] of the first layer, computed as in SequenceInputs."""
        module = self.inputs
        of_context = [module.project("contextual", inputs["context"])] if "context" in inputs else []
        actions = module.project("action", inputs["actions"]) if "actions" in inputs else None
        side = {
            role: module.project_side(role, inputs.get(role), inputs.get("numbers"))
            for role in module.side
            if role in module.projections
        }
        items = module.project("item", inputs["items"])
        if module.factors is not None and actions is not None:
            is_history, shape = inputs["is_history"] > 0, inputs["item_padded"].shape
            told = Told(inputs["action_ids"], is_history, inputs["item_places"], shape)
            items, actions = module.with_factors(items, actions, side, told)
        of_items = module.combined(items, actions, side, inputs.get("is_history"))
        x = torch.cat([*of_context, *of_items]).index_select(0, inputs["order"])
        if module.position_table is not None:
            x = REFERENCE_KERNELS.add_positions(x, module.position_table, inputs["positions"])
        return x

    def _stages(self, inputs: dict[str, Tensor]) -> Iterator[tuple[Sequence[nn.Module], Tensor | None, JaggedLayout]]:
        """Groups of layers, as in SequenceEncoder: (layers, tokens that they compute (None: all), layout)."""
        layers, whole = list(self.layers), self.network.whole_layers
        times = inputs.get("token_times"), inputs.get("query_times")
        yield layers[:whole], None, self._layout(inputs, "", *times)
        if self._truncates:
            kept = inputs["kept"]
            yield layers[whole:], kept, self._layout(inputs, "kept_", *(t if t is None else t[kept] for t in times))

    def _layout(
        self, inputs: dict[str, Tensor], kind: str, token_times: Tensor | None, query_times: Tensor | None
    ) -> JaggedLayout:
        module, nothing, ends = self.inputs, np.zeros(0, dtype=np.int64), inputs[f"{kind}history_ends"]
        # Without candidates, all sequences share one mask and position bias, if these depend on distances alone.
        depends = self.network.has_window and (self.network.min_full_attention_tokens or module.features.contextual)
        if is_shared := self.head is None and not depends:
            ends = ends.amax(0, keepdim=True)
        return PaddedLayout(
            seqlen_offsets=ends,  # placeholder: the program's kernels do not read it
            seqlens=nothing,
            num_candidate_tokens=None,
            num_candidate_tokens_host=nothing,
            positions=inputs[f"{kind}places"],  # placeholder, too
            num_contextuals=len(module.features.contextual),
            candidate_group_tokens=1,  # candidates that are apart come without their actions
            tokens_per_item=module.tokens_per_item,
            token_times=token_times,
            query_times=query_times,
            padded_tokens=inputs[f"{kind}padded"],
            places=inputs[f"{kind}places"],
            history_ends=ends,
            prefix_lengths=None if is_shared else inputs.get("prefix_lengths"),
            prefix_times=inputs.get("prefix_times"),
        )


def _whole_because(task: RetrievalDense | RankingModel) -> str | None:
    network = task.encoder.network
    if network.truncate_after_layer is not None:
        return "NetworkArgs.truncate_after_layer: each event moves the place where later layers cut histories"
    if not network.is_causal:
        return "NetworkArgs.is_causal = False: events see later ones"
    if network.num_factors:
        return "NetworkArgs.num_factors: the factors of a user are estimated from the whole history"
    if task.encoder.features.contextual and not network.disable_contextual_mask:
        return "NetworkArgs.disable_contextual_mask = False: context sees the whole history, which sees the context"
    return None


class _OfInputsAndWeights(nn.Module):
    """Makes the weights an input of the program, so that models of one configuration have equal graphs."""

    def __init__(self, program: ServingProgram) -> None:
        super().__init__()
        self._program = (program,)  # a tuple, so that its parameters are not registered here

    def forward(self, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        return functional_call(self._program[0], weights, (inputs,))


def key_of(program: ServingProgram, *options: object) -> str:
    """Digest of all that ``trace`` depends on: the code, the version of torch, the options of the model, and shapes."""
    shapes = {name: (weight.shape, weight.dtype) for name, weight in program.state_dict().items()}
    sources = Path(__file__).parents[1].rglob("*.py")
    return digest_of(sources, torch.__version__, repr(program), repr(shapes), *map(repr, options))


def trace(program: ServingProgram) -> ExportedProgram:
    """Trace the program for any number of sequences, items and tokens. Its arguments: inputs, weights by name."""
    sizes = {
        "item_width": program.network.item_width,
        "contextual_width": program.network.contextual_width,
        "number_width": sum(program.inputs.features.number_widths),
        "layers": program.network.num_layers,
        "pair": 2,
        "heads": program.network.num_attention_heads,
        "channels": program.network.kv_channels,
        **{f"{role}_width": len(n) * SIDE_WIDTH for role, n in program.inputs.side.items()},
    }
    dims = {axis: Dim(axis) for axes in _SIZES.values() for axis, size in axes if size is not None}
    example, shapes = {}, {}
    for name in program.input_names:
        is_float = name in ("items", "actions", "side", "known_after", "numbers", "is_history", "context", "prefix")
        size = [sizes[axis] if given is None else given for axis, given in _SIZES[name]]
        example[name] = torch.zeros(size, dtype=torch.float32 if is_float else torch.int64)
        shapes[name] = {place: dims[axis] for place, (axis, given) in enumerate(_SIZES[name]) if given is not None}
    # The file of a program contains the traced example. Zero weights keep files of equal graphs equal.
    weights = {name: torch.zeros_like(weight) for name, weight in sorted(program.state_dict().items())}
    with torch.no_grad():
        traced = torch.export.export(
            _OfInputsAndWeights(program), (example, weights), dynamic_shapes=(shapes, dict.fromkeys(weights))
        )
    _simplify(traced.graph_module)
    for spec, node in zip(traced.graph_signature.output_specs, traced.graph.output_node().args[0], strict=True):
        spec.arg = TensorArgument(node.name)  # the removed operators may have been outputs
    return traced


def _simplify(module: GraphModule) -> None:
    """Remove operators that change no number: half of them, which a small request pays for in full."""
    graph, aten, autocast = module.graph, torch.ops.aten, torch.ops.higher_order.wrap_with_autocast
    for block in graph.find_nodes(op="call_function", target=autocast):  # float32 needs none
        inner = getattr(module, block.args[4].target).graph
        with graph.inserting_before(block):
            given = dict(zip(inner.find_nodes(op="placeholder"), block.args[5:], strict=True))
            found: Any = graph.graph_copy(inner, given)
        for output in list(block.users):
            output.replace_all_uses_with(found[output.args[1]])
            graph.erase_node(output)
        graph.erase_node(block)
    for node in list(graph.nodes):
        is_own_type = node.target is aten.to.dtype and node.args[1:] == (node.args[0].meta["val"].dtype,)
        if is_own_type or (node.target is aten.slice.Tensor and node.args[2:] == (0, _END)):
            node.replace_all_uses_with(node.args[0])
        if is_own_type or node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
