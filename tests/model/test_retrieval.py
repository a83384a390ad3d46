"""The retrieval model around a small encoder: which query meets which item, negatives, ranks, empty batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import RetrievalArgs
from hstu.data.batches.batch import NEGATIVES, HSTUBatch
from hstu.model.inputs import SequenceFeatures
from hstu.model.retrieval import RetrievalDense
from hstu.model.stack import ModelOutput, SequenceEncoder
from hstu.ops.comm import LayerComm
from hstu.ops.kernels import Kernels
from hstu.ops.layout import JaggedLayout, build_layout
from hstu.ops.pytorch.operators import REFERENCE_KERNELS
from tests.helpers import make_batch
from tests.model.examples import make_network

NUM_ITEMS, DIM = 12, 6
HISTORIES = [[3, 1, 4, 1], [5, 9, 2], [6], [5, 3, 5, 8, 9], []]
ARGS = RetrievalArgs(temperature=0.2)
FEATURES = SequenceFeatures("item", None, (), max_items=8)
NUM_STEPS = 9
DISTINCT = sorted({item for row in HISTORIES for item in row})
DRAWS = torch.randint(4, (NUM_STEPS, 5), generator=torch.Generator().manual_seed(1)).tolist()
RAW = torch.randint(2**31, (NUM_STEPS, 6), generator=torch.Generator().manual_seed(2)).int().tolist()
NegativesOfStep = Callable[[int], Sequence[int]]
"""Index of a step of the batch → the item ids that it meets."""
KINDS: dict[str, tuple[dict[str, Any], NegativesOfStep]] = {
    "in_batch": ({"in_batch_pool": True}, lambda _: DISTINCT),
    "in_batch, draws": (
        {"in_batch_pool": True, "draws": RAW},
        lambda k: [DISTINCT[raw * len(DISTINCT) >> 31] for raw in RAW[k]],
    ),
    "per position": ({"negatives": [0, 3, 9, 11], "draws": DRAWS}, lambda k: [[0, 3, 9, 11][d] for d in DRAWS[k]]),
    "shared": ({"negatives": [7, 7, 3, 0]}, lambda _: [7, 7, 3, 0]),
    "mixed": ({"negatives": [7, 7, 3, 0], "in_batch_pool": True}, lambda _: [7, 7, 3, 0, *DISTINCT]),
    "full": ({"negatives": range(NUM_ITEMS)}, lambda _: range(NUM_ITEMS)),
}
"""Kind of negatives → arguments of make_batch, and the negatives of each step."""


class RunningSum(SequenceEncoder):
    """A causal encoder: one context token (zero), then a token is a linear map of the sum of what came before it."""

    def __init__(
        self,
        hidden_size: int,
        interleaved: bool,
        features: SequenceFeatures = FEATURES,
        kernels: Kernels = REFERENCE_KERNELS,
    ) -> None:
        nn.Module.__init__(self)
        self.network = make_network(hidden_size=hidden_size, item_embedding_dim=DIM)
        self.features = features
        self.inputs = cast(Any, SimpleNamespace(kernels=kernels))
        self.map = nn.Linear(DIM, hidden_size)
        self.tokens_per_item = 2 if interleaved else 1
        self.comm = LayerComm()

    def forward(self, embeddings: Mapping[str, Tensor], batch: HSTUBatch) -> tuple[Tensor, JaggedLayout]:
        layout = build_layout(
            item_lengths=batch.item_lengths,
            num_sequences=batch.real_batch_size,
            num_contextuals=1,
            num_candidates=None,
            tokens_per_item=self.tokens_per_item,
            target_group_size=1,
            device=torch.device("cpu"),
        )
        parts = [torch.zeros(0, DIM)]
        real_lengths = batch.item_lengths[: batch.real_batch_size].tolist()
        for items in embeddings["item"].split(real_lengths):
            steps = items.repeat_interleave(self.tokens_per_item, dim=0)
            if self.tokens_per_item == 2:  # the action's token is another one than the item's
                steps = steps + (torch.arange(len(steps)) % 2)[:, None]
            parts.append(torch.cat([torch.zeros(1, DIM), steps]).cumsum(dim=0))
        return self.map(torch.cat(parts)), layout


def make_model(
    hidden_size: int = DIM, interleaved: bool = False, kernels: Kernels = REFERENCE_KERNELS, **options: Any
) -> tuple[RetrievalDense, nn.Parameter]:
    torch.manual_seed(0)
    model = RetrievalDense(RunningSum(hidden_size, interleaved, kernels=kernels), ARGS, **options)
    return model, nn.Parameter(torch.randn(NUM_ITEMS, DIM))


def run(model: RetrievalDense, table: Tensor, batch: HSTUBatch) -> ModelOutput:
    output: ModelOutput = model({key: table[ids.values()] for key, ids in batch.features.to_dict().items()}, batch)
    return output


def loss_by_loop(
    model: RetrievalDense, table: Tensor, negatives_of_step: NegativesOfStep, log_counts: Tensor | None = None
) -> Tensor:
    """One step after another in float64. ``log_counts``: of all items, for the logQ correction."""
    total, step = torch.zeros((), dtype=torch.float64), 0
    assert isinstance(model.encoder, RunningSum)
    for items in filter(None, HISTORIES):
        batch = make_batch([items], task="retrieval_eval", labels=[0])
        tokens, _ = model.encoder({"item": table[items]}, batch)
        for place, target in enumerate(items[1:], 1):
            token = tokens[place * model.encoder.tokens_per_item]
            query = F.normalize(model.query_projection(token).double(), dim=0)
            rivals = [i for i in negatives_of_step(step) if i != target]
            logits = F.normalize(table[[target, *rivals]].double(), dim=1) @ query / ARGS.temperature
            if log_counts is not None:
                logits = logits - F.pad(log_counts[rivals], (1, 0))
            targets = F.normalize(table[items[place:]].double(), dim=1) @ query / ARGS.temperature
            weights = torch.tensor([1.0, *model.args.later_target_weights], dtype=torch.float64)[: len(targets)]
            total = total + logits.logsumexp(0) - targets[: len(weights)] @ weights / weights.sum()
            step += 1
    return total.float()


def assert_same_loss_and_gradients(actual: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(actual, leaves, retain_graph=True), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("hidden_size", [DIM, 10])
@pytest.mark.parametrize("later", [[], [0.5, 0.25]], ids=["next", "three"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_a_loop_over_steps(
    kind: str, later: list[float], hidden_size: int, interleaved: bool
) -> None:
    model, table = make_model(hidden_size, interleaved)
    model.args = dataclasses.replace(model.args, later_target_weights=later)
    options, negatives_of_step = KINDS[kind]
    output = run(model, table, make_batch(HISTORIES, task="retrieval", **options))
    assert output.queries is None
    expected = loss_by_loop(model, table, negatives_of_step)
    assert_same_loss_and_gradients(output.loss_sum, expected, [table, *model.parameters()])


@pytest.mark.parametrize("histories", [[[], []], [[4], []]], ids=["padding_only", "one_item"])
@pytest.mark.parametrize(("negatives", "drawn"), [(None, False), (None, True), ([1, 2], True)])
def test_a_rank_without_labels_gives_zero_gradients_to_everything(
    histories: list[list[int]], negatives: list[int] | None, drawn: bool
) -> None:
    batch = make_batch(histories, task="retrieval", in_batch_pool=negatives is None, negatives=negatives)
    if drawn:
        batch.negatives.draws = torch.zeros((0, 3), dtype=torch.int32)
    model, table = make_model(hidden_size=10)
    output = run(model, table, batch)
    output.loss_sum.backward()
    assert output.loss_sum == 0
    for parameter in (table, *model.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_evaluation_gives_the_query_at_the_newest_token_and_zeros_for_padding(interleaved: bool) -> None:
    model, table = make_model(hidden_size=10, interleaved=interleaved)
    model.eval()
    batch = make_batch(HISTORIES, task="retrieval_eval", labels=[0, 0, 0, 0, -1])
    output = run(model, table, batch)
    tokens, layout = model.encoder({"item": table[batch.features["item"].values()]}, batch)
    newest = layout.seqlen_offsets[1:5] - 1
    expected = F.normalize(model.query_projection(tokens[newest]), dim=1)
    assert output.queries is not None
    torch.testing.assert_close(output.queries[:4], expected)
    assert output.queries.dtype == torch.float32
    assert not output.queries[4].any()
    assert output.loss_sum == 0


def test_the_loss_is_float32_under_autocast() -> None:
    model, table = make_model(hidden_size=10)
    batch = make_batch(HISTORIES, task="retrieval", negatives=range(NUM_ITEMS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, table, batch)
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, run(model, table, batch).loss_sum, rtol=0.02, atol=0)


@pytest.mark.parametrize("interleave_actions", [True, False])
def test_training_asks_the_same_queries_as_evaluation_does_of_each_prefix(interleave_actions: bool) -> None:
    """With the real encoder: a query sees all up to its step, its action included, and nothing of its target."""
    torch.manual_seed(0)
    features = SequenceFeatures("item", "action", ("age",), max_items=8)
    network = make_network(interleave_actions=interleave_actions, disable_contextual_mask=True)
    encoder = SequenceEncoder(network, features)
    model = RetrievalDense(encoder, ARGS)
    tables = {name: torch.randn(NUM_ITEMS, 8) for name in ("item", "action", "age")}
    tables[NEGATIVES] = tables["item"]

    def look_up(batch: HSTUBatch) -> dict[str, Tensor]:
        return {name: tables[name][ids.values()] for name, ids in batch.features.to_dict().items()}

    items, actions, ages = [[3, 1, 4, 1], [5, 9]], [[1, 0, 2, 1], [2, 2]], [4, 6]
    batch = make_batch(items, actions, {"age": ages}, task="retrieval", negatives=range(NUM_ITEMS))
    loss = model(look_up(batch), batch).loss_sum

    prefixes = [(user, length) for user in range(2) for length in range(1, len(items[user]))]
    batch = make_batch(
        [items[user][:length] for user, length in prefixes],
        [actions[user][:length] for user, length in prefixes],
        {"age": [ages[user] for user, _ in prefixes]},
        task="retrieval_eval",
        labels=[items[user][length] for user, length in prefixes],
    )
    queries = model.eval()(look_up(batch), batch).queries
    logits = queries @ F.normalize(tables["item"], dim=1).t() / ARGS.temperature
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.labels, reduction="sum"))


def test_fewer_labels_than_steps_are_the_newest_items() -> None:
    model, table = make_model()
    whole = make_batch([[7, 3, 1, 4]], task="retrieval", negatives=range(NUM_ITEMS))
    newest = make_batch([[7, 3, 1, 4]], task="retrieval", num_labels=[1], labels=[4], negatives=range(NUM_ITEMS))
    shorter = make_batch([[7, 3, 1]], task="retrieval", negatives=range(NUM_ITEMS))
    difference = run(model, table, whole).loss_sum - run(model, table, shorter).loss_sum
    torch.testing.assert_close(run(model, table, newest).loss_sum, difference)
