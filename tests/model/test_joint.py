"""Actions and next items learnt on one sequence: the sum of the two losses, and what an evaluation computes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec import JaggedTensor

from hstu.config.args import DatasetArgs, RankingArgs, RetrievalArgs
from hstu.data.batches.batch import NEGATIVES, HSTUBatch
from hstu.data.batches.collate import Assembler, Collator
from hstu.data.features.roles import FeatureRoles
from hstu.data.negatives import Negatives
from hstu.data.sampling.sampler import BatchPlan, SamplerPosition
from hstu.data.sampling.samples import build_samples
from hstu.data.store.reader import StoreReader
from hstu.model.inputs import SequenceFeatures
from hstu.model.joint import JointDense, next_items
from hstu.model.ranking import RankingDense
from hstu.model.retrieval import RetrievalDense
from hstu.model.stack import SequenceEncoder
from tests.data.toy_store import ToyStore
from tests.model.examples import make_network

WIDTH, ITEMS, ACTIONS, WEIGHT = 8, 11, 3, 0.25
ROLES = FeatureRoles("item", "action", ())
FEATURES = SequenceFeatures.of(ROLES, 6)
KINDS: dict[str, dict[str, Any]] = {
    "in_batch": {},
    "in_batch, draws": {"num_negatives": 4},
    "uniform": {"negatives": "uniform", "num_negatives": 4},
    "uniform, shared": {"negatives": "uniform", "num_negatives": 4, "shared_negatives": True},
    "full": {"negatives": "full"},
}


def read_batch(task: str, args: RetrievalArgs, labels: list[int], training: bool = True) -> HSTUBatch:
    """Users with 5, 1 and 3 events, so many of which are labelled, and an empty sequence."""
    items = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    store: Any = ToyStore(
        items, actions=[[(item + place) % ACTIONS for place, item in enumerate(row)] for row in items]
    )
    options = DatasetArgs(dataset_name="toy", max_sequence_length=6)
    samples = build_samples(store, options, "ranking", "all", 1)
    samples = samples.__class__(**{**vars(samples), "num_labels": np.array(labels)})
    negatives = Negatives.of(args)
    assembler = Assembler(4, task, ROLES, ITEMS, 7, negatives, draws_negatives=training)  # type: ignore[arg-type]
    places = np.arange(3)
    return Collator(StoreReader(store, samples, ROLES), assembler)(BatchPlan(places, places, 0, 0, SamplerPosition()))


def look_up(tables: dict[str, Tensor], batch: HSTUBatch) -> dict[str, JaggedTensor]:
    of_feature = tables | {NEGATIVES: tables["item"]}
    ids = batch.features.to_dict()
    return {
        key: JaggedTensor(of_feature[key][jagged.values()], lengths=jagged.lengths()) for key, jagged in ids.items()
    }


def make_model(args: RetrievalArgs, item_dim: int = WIDTH) -> tuple[JointDense, dict[str, Tensor]]:
    torch.manual_seed(0)
    network = make_network(hidden_size=WIDTH, item_embedding_dim=item_dim)
    encoder = SequenceEncoder(network, FEATURES)
    ranking = RankingDense(encoder, RankingArgs(prediction_head_arch=[6, ACTIONS]))
    retrieval = RetrievalDense(encoder, item_feature="item", hidden_size=WIDTH, item_dim=item_dim, args=args)
    rows = {"item": ITEMS, "action": ACTIONS}
    tables = {name: torch.randn(count, item_dim, requires_grad=True) for name, count in rows.items()}
    return JointDense(ranking, retrieval, WEIGHT), tables


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_both_tasks(kind: str) -> None:
    args = RetrievalArgs(**KINDS[kind])
    model, tables = make_model(args, item_dim=4)
    batch = read_batch("ranking", args, [5, 1, 2])
    of_items = read_batch("retrieval", args, [4, 0, 2])  # what has an item before it
    output = model(look_up(tables, batch), batch)
    actions = model.ranking(look_up(tables, batch), batch)
    items = model.retrieval(look_up(tables, of_items), of_items)
    assert output.num_labels == 8 and items.num_labels == 6
    expected = actions.loss_sum + WEIGHT * items.loss_sum
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=0)
    parameters = [*model.parameters(), *tables.values()]
    found, wanted = (torch.autograd.grad(loss, parameters) for loss in (output.loss_sum, expected))
    torch.testing.assert_close(found, wanted)
    assert all(gradient.any() for gradient in found)


def test_items_without_an_item_before_them_are_not_sought() -> None:
    args = RetrievalArgs()
    batch = next_items(read_batch("ranking", args, [5, 1, 2]), "item")
    assert batch.labels.tolist() == [1, 4, 1, 5, 6, 5]
    assert batch.num_labels.tolist() == [4, 0, 2, 0] and batch.num_labels_total == 6
    model, tables = make_model(args, item_dim=4)
    lonely = read_batch("ranking", args, [0, 1, 0])
    output = model(look_up(tables, lonely), lonely)
    torch.testing.assert_close(output.loss_sum, model.ranking(look_up(tables, lonely), lonely).loss_sum)
    gradients = torch.autograd.grad(output.loss_sum, [*model.parameters()])  # every weight has one
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_predicts_actions_and_draws_nothing(kind: str) -> None:
    args = RetrievalArgs(**KINDS[kind])
    model, tables = make_model(args)
    model.eval()
    batch = read_batch("ranking", args, [5, 1, 2], training=False)
    assert batch.negatives.draws is None and batch.negatives.pool_positions is None
    keys = batch.features.keys()
    assert keys == ["item", "action", *([NEGATIVES] if "negatives" in KINDS[kind] else [])]
    assert NEGATIVES not in keys or not len(batch.features[NEGATIVES].values())
    output, alone = (part(look_up(tables, batch), batch) for part in (model, model.ranking))
    assert output.logits is not None and torch.equal(output.logits, alone.logits)
    assert torch.equal(output.loss_sum, alone.loss_sum)


def test_weights_have_the_names_of_either_task() -> None:
    model, _ = make_model(RetrievalArgs(), item_dim=4)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for part in (model.ranking, model.retrieval) for name, _ in part.named_parameters()}
    assert {"head.0.weight", "query_projection.weight"} <= names
    assert len(list(model.parameters())) == len(model.state_dict()) == len(names)
