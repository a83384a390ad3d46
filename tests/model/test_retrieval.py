"""The retrieval model around a small encoder: which query meets which item, negatives, ranks, empty batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hstu.config.args import RetrievalArgs
from hstu.data.batches.batch import NEGATIVES, PADDING_ID
from hstu.model.inputs import SequenceFeatures
from hstu.model.retrieval import RetrievalDense
from hstu.model.stack import SequenceEncoder
from hstu.ops.comm import LayerComm
from hstu.ops.layout import build_layout
from tests.helpers import make_batch
from tests.model.examples import make_network

NUM_ITEMS, DIM = 12, 6
HISTORIES = [[3, 1, 4, 1], [5, 9, 2], [6], [5, 3, 5, 8, 9], []]
ARGS = RetrievalArgs(temperature=0.2)


class RunningSum(nn.Module):
    """A causal encoder: one context token (zero), then a token is a linear map of the sum of what came before it."""

    def __init__(self, hidden_size: int, interleaved: bool) -> None:
        super().__init__()
        self.map = nn.Linear(DIM, hidden_size)
        self.tokens_per_item = 2 if interleaved else 1
        self.comm = LayerComm()

    def forward(self, embeddings, batch):
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


def make_model(hidden_size=DIM, interleaved=False, **options) -> tuple[RetrievalDense, nn.Parameter]:
    torch.manual_seed(0)
    encoder = RunningSum(hidden_size, interleaved)
    model = RetrievalDense(encoder, item_feature="item", hidden_size=hidden_size, item_dim=DIM, args=ARGS, **options)
    return model, nn.Parameter(torch.randn(NUM_ITEMS, DIM))


def look_up(table, batch) -> dict[str, torch.Tensor]:
    features = batch.features.to_dict()
    return {key: table[ids.values()] for key, ids in features.items()}


def run(model, table, batch):
    return model(look_up(table, batch), batch)


def loss_by_loop(model, table, histories, negatives_of_step) -> torch.Tensor:
    """One step after another; ``negatives_of_step(k)``: the item ids that the k-th step of the batch meets."""
    total, step = torch.zeros(()), 0
    for items in filter(None, histories):
        batch = make_batch([items], task="retrieval_eval", labels=[0])
        tokens, _ = model.encoder(look_up(table, batch), batch)
        for place, target in enumerate(items[1:]):
            token = tokens[1 + (place + 1) * model.encoder.tokens_per_item - 1]
            query = F.normalize(model.query_projection(token), dim=0)
            rivals = [i for i in negatives_of_step(step) if i != target]
            logits = F.normalize(table[[target, *rivals]], dim=1) @ query / ARGS.temperature
            total = total + logits.logsumexp(0) - logits[0]
            step += 1
    return total


def assert_same_loss_and_gradients(actual, expected, leaves):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(actual, leaves, retain_graph=True), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("hidden_size", [DIM, 10])
@pytest.mark.parametrize("negatives", ["in_batch", "full", "shared", "uniform"])
def test_loss_and_gradients_equal_a_loop_over_steps(negatives, hidden_size, interleaved):
    model, table = make_model(hidden_size, interleaved)
    num_steps = 9
    draws = torch.randint(4, (num_steps, 5), generator=torch.Generator().manual_seed(1)).tolist()
    options, ids_of_step = {
        "in_batch": ({"in_batch_pool": True}, lambda _: sorted({i for row in HISTORIES for i in row})),
        "full": ({"negatives": range(NUM_ITEMS)}, lambda _: range(NUM_ITEMS)),
        "shared": ({"negatives": [7, 7, 3, 0]}, lambda _: [7, 7, 3, 0]),
        "uniform": ({"negatives": [0, 3, 9, 11], "draws": draws}, lambda k: [[0, 3, 9, 11][d] for d in draws[k]]),
    }[negatives]
    output = run(model, table, make_batch(HISTORIES, task="retrieval", **options))
    assert output.num_labels == num_steps
    assert output.queries is None
    expected = loss_by_loop(model, table, HISTORIES, ids_of_step)
    assert_same_loss_and_gradients(output.loss_sum, expected, [table, *model.parameters()])


def test_in_batch_draws_choose_among_the_distinct_items_of_the_batch():
    model, table = make_model()
    distinct = sorted({i for row in HISTORIES for i in row})
    draws = torch.randint(2**31, (9, 6), generator=torch.Generator().manual_seed(2)).int()
    batch = make_batch(HISTORIES, task="retrieval", in_batch_pool=True, draws=draws.tolist())
    chosen = [[distinct[d * len(distinct) >> 31] for d in row] for row in draws.tolist()]
    expected = loss_by_loop(model, table, HISTORIES, lambda k: chosen[k])
    assert_same_loss_and_gradients(run(model, table, batch).loss_sum, expected, [table, *model.parameters()])


@pytest.mark.parametrize("drawn", [False, True], ids=["whole_pool", "draws"])
def test_two_ranks_together_equal_one_process(drawn):
    """Pools of different sizes with items in common, padded as the collective pads them."""
    draws = torch.randint(2**31, (9, 6), generator=torch.Generator().manual_seed(3)).int().tolist()
    ranks = [(HISTORIES[:2], draws[:5]), (HISTORIES[2:], draws[5:])]
    batches = [
        make_batch(rows, task="retrieval", in_batch_pool=True, draws=own if drawn else None) for rows, own in ranks
    ]
    model, table = make_model()
    pools = []
    model.gather_pool = lambda rows, ids: pools.append((rows, ids)) or (rows, ids)
    for batch in batches:
        run(model, table, batch)
    longest = max(len(ids) for _, ids in pools)
    gathered = (
        torch.cat([F.pad(rows, (0, 0, 0, longest - len(rows))) for rows, _ in pools]),
        torch.cat([F.pad(ids, (0, longest - len(ids)), value=PADDING_ID) for _, ids in pools]),
    )
    assert len(pools[0][1]) != len(pools[1][1]) and set(pools[0][1].tolist()) & set(pools[1][1].tolist())
    model.gather_pool = lambda rows, ids: gathered
    together = sum(run(model, table, batch).loss_sum for batch in batches)

    model.gather_pool = lambda rows, ids: (rows, ids)
    union = make_batch(HISTORIES, task="retrieval", in_batch_pool=True, draws=draws if drawn else None)
    assert_same_loss_and_gradients(together, run(model, table, union).loss_sum, [table, *model.parameters()])


@pytest.mark.parametrize("histories", [[[], []], [[4], []]], ids=["padding_only", "one_item"])
@pytest.mark.parametrize("pool", ["in_batch", "in_batch_draws", "uniform"])
def test_a_rank_without_labels_gives_zero_gradients_to_everything(histories, pool):
    options = {
        "in_batch": {"in_batch_pool": True},
        "in_batch_draws": {"in_batch_pool": True},
        "uniform": {"negatives": [1, 2]},
    }[pool]
    batch = make_batch(histories, task="retrieval", **options)
    if pool != "in_batch":
        batch.negatives.draws = torch.zeros((0, 3), dtype=torch.int32)
    model, table = make_model(hidden_size=10)
    output = run(model, table, batch)
    output.loss_sum.backward()
    assert output.loss_sum == 0 and output.num_labels == 0
    for parameter in (table, *model.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("interleaved", [False, True])
def test_evaluation_gives_the_query_at_the_newest_token_and_zeros_for_padding(interleaved):
    model, table = make_model(hidden_size=10, interleaved=interleaved)
    model.eval()
    batch = make_batch(HISTORIES, task="retrieval_eval", labels=[0, 0, 0, 0, -1])
    output = run(model, table, batch)
    tokens, layout = model.encoder(look_up(table, batch), batch)
    newest = layout.seqlen_offsets[1:5] - 1
    expected = F.normalize(model.query_projection(tokens[newest]), dim=1)
    torch.testing.assert_close(output.queries[:4], expected)
    assert output.queries.dtype == torch.float32
    assert not output.queries[4].any()
    assert output.loss_sum == 0 and output.num_labels == 0


def test_the_loss_is_float32_under_autocast():
    model, table = make_model(hidden_size=10)
    batch = make_batch(HISTORIES, task="retrieval", negatives=range(NUM_ITEMS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, table, batch)
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, run(model, table, batch).loss_sum, rtol=0.02, atol=0)


@pytest.mark.parametrize("interleave_actions", [True, False])
def test_training_asks_the_same_queries_as_evaluation_does_of_each_prefix(interleave_actions):
    """With the real encoder: a query sees all up to its step, its action included, and nothing of its target."""
    torch.manual_seed(0)
    features = SequenceFeatures("item", "action", ("age",), max_items=8)
    network = make_network(interleave_actions=interleave_actions, disable_contextual_mask=True)
    encoder = SequenceEncoder(network, features)
    model = RetrievalDense(encoder, item_feature="item", hidden_size=8, item_dim=8, args=ARGS)
    tables = {name: torch.randn(NUM_ITEMS, 8) for name in ("item", "action", "age")}
    tables[NEGATIVES] = tables["item"]

    def look_up(batch):
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


def test_fewer_labels_than_steps_are_the_newest_items():
    model, table = make_model()
    whole = make_batch([[7, 3, 1, 4]], task="retrieval", negatives=range(NUM_ITEMS))
    newest = make_batch([[7, 3, 1, 4]], task="retrieval", num_labels=[1], labels=[4], negatives=range(NUM_ITEMS))
    shorter = make_batch([[7, 3, 1]], task="retrieval", negatives=range(NUM_ITEMS))
    difference = run(model, table, whole).loss_sum - run(model, table, shorter).loss_sum
    torch.testing.assert_close(run(model, table, newest).loss_sum, difference)
