"""Item vectors made of ids and features: the loss of retrieval against one written down item by item."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config.args import EmbeddingArgs, RetrievalArgs
from hstu.config.args.network import SIDE_WIDTH
from hstu.data.batches.batch import NEGATIVES, HSTUBatch, ItemColumns, keyed_jagged, of_negatives
from hstu.data.batches.train_batch import split_micro_batches
from hstu.data.features.roles import FeatureRoles
from hstu.model.embedding import ReplicatedTables, table_specs
from hstu.model.gr_model import DenseModel
from hstu.model.inputs import SequenceFeatures
from hstu.model.retrieval import RetrievalDense
from tests.helpers import make_batch
from tests.model.examples import make_network
from tests.model.test_retrieval import DIM, HISTORIES, KINDS, NUM_ITEMS, NegativesOfStep, RunningSum

ROLES = FeatureRoles("item", None, (), ("tags", "hour", "colour"), lists=("tags",), tower=("tags", "colour"))
NETWORK = make_network(hidden_size=DIM, num_attention_heads=1, kv_channels=DIM)
RNG = np.random.default_rng(5)
TAGS = [RNG.integers(0, 7, RNG.integers(1, 4)).tolist() for _ in range(NUM_ITEMS)]
COLOURS = RNG.integers(0, 5, NUM_ITEMS).tolist()
ROWS = {"item": NUM_ITEMS, "tags": 7, "hour": 24, "colour": 5}
ARGS = RetrievalArgs(temperature=0.2, item_tower=True)


def of_items(items: Sequence[int]) -> dict[str, np.ndarray]:
    return {
        "tags": np.array([tag for item in items for tag in TAGS[item]], dtype=np.int64),
        "colour": np.array([COLOURS[item] for item in items], dtype=np.int64),
    }


def with_features(batch: HSTUBatch) -> HSTUBatch:
    """The batch with the features of its items and of its negatives, and an hour for each event."""
    keyed = batch.features.to_dict()
    values = {"item": keyed["item"].values().numpy()}
    lengths = {"item": keyed["item"].lengths().numpy()}
    rows = [row.tolist() for row in keyed["item"].to_dense()]
    tag_counts = np.array([sum(len(TAGS[item]) for item in row) for row in rows])
    for name in ROLES.side:
        hours = np.zeros(len(values["item"]), dtype=np.int64)
        values[name] = hours if name == "hour" else of_items(values["item"].tolist())[name]
        lengths[name] = tag_counts if name == "tags" else lengths["item"]
    scored = None
    if NEGATIVES in keyed:
        negatives = keyed[NEGATIVES].values().tolist()
        found = {NEGATIVES: np.array(negatives)} | {of_negatives(k): v for k, v in of_items(negatives).items()}
        values |= found
        lengths |= {key: np.array([len(ids)] + [0] * (len(rows) - 1)) for key, ids in found.items()}
        scored = torch.tensor([[len(TAGS[item]) for item in negatives]])
    return dataclasses.replace(
        batch,
        features=keyed_jagged(values, lengths),
        items=ItemColumns(list_lengths=torch.tensor([[len(TAGS[item]) for row in rows for item in row]])),
        negatives=dataclasses.replace(batch.negatives, list_lengths=scored),
    )


def make_model() -> tuple[RetrievalDense, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    model = RetrievalDense(RunningSum(DIM, False, SequenceFeatures(**vars(ROLES), max_items=8)), ARGS)
    tables = {
        name: nn.Parameter(torch.randn(rows, DIM if name == "item" else SIDE_WIDTH, dtype=torch.float64))
        for name, rows in ROWS.items()
    }
    return model.double(), tables


def vector(model: RetrievalDense, tables: dict[str, nn.Parameter], item: int) -> Tensor:
    assert model.tower is not None
    of_tags = tables["tags"][TAGS[item]].mean(0)
    features = torch.cat([of_tags, tables["colour"][COLOURS[item]]])
    made: Tensor = tables["item"][item] * DIM**0.5 + model.tower.projection(features * DIM**0.5)
    return F.normalize(made, dim=0)


def loss_item_by_item(
    model: RetrievalDense, tables: dict[str, nn.Parameter], negatives_of_step: NegativesOfStep
) -> Tensor:
    total, step = torch.zeros((), dtype=torch.float64), 0
    for items in filter(None, HISTORIES):
        batch = make_batch([items], task="retrieval_eval", labels=[0])
        tokens, _ = model.encoder({"item": tables["item"][torch.tensor(items)]}, batch)
        for place, target in enumerate(items[1:]):
            query = F.normalize(tokens[1 + place], dim=0)
            rivals = [item for item in negatives_of_step(step) if item != target]
            scores = torch.stack([vector(model, tables, item) @ query for item in [target, *rivals]])
            logits = scores / ARGS.temperature
            total = total + logits.logsumexp(0) - logits[0]
            step += 1
    return total


@pytest.mark.parametrize("kind", ["in_batch", "full", "shared", "per position"])
def test_loss_and_gradients_equal_those_of_vectors_made_one_by_one(kind: str) -> None:
    model, tables = make_model()
    options, negatives_of_step = KINDS[kind]
    batch = with_features(make_batch(HISTORIES, task="retrieval", **options))
    rows = {
        key: tables[key.removeprefix(f"{NEGATIVES}.").replace(NEGATIVES, "item")][ids.values()]
        for key, ids in batch.features.to_dict().items()
    }
    loss = model(rows, batch).loss_sum
    expected = loss_item_by_item(model, tables, negatives_of_step)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    trained = [weight for name, weight in tables.items() if name != "hour"]
    leaves = [*trained, *model.parameters()]
    found, wanted = (torch.autograd.grad(each, leaves) for each in (loss, expected))
    for got, want in zip(found, wanted, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["in_batch", "full", "shared", "per position"])
def test_micro_batches_give_the_loss_of_the_whole_batch_with_replicated_tables(kind: str) -> None:
    model, _ = make_model()
    arguments = [
        EmbeddingArgs(feature_names=[name], table_name=name, item_vocab_size_or_capacity=rows,
                      sharding_type="data_parallel", init_std=1.0)
        for name, rows in ROWS.items()
    ]  # fmt: skip
    batch = with_features(make_batch([*HISTORIES, []], task="retrieval", **KINDS[kind][0]))
    specs = table_specs(arguments, NETWORK, ROLES, lookup_negatives=kind != "in_batch")
    dense = DenseModel(ReplicatedTables(specs, 0, "item"), model.float(), batch.features.keys())
    whole = dense({}, batch).loss_sum
    parts = [dense({}, part).loss_sum for part in split_micro_batches(batch, 3, ROLES)]
    assert sum(part != 0 for part in parts) >= 2
    torch.testing.assert_close(sum(parts), whole)


def test_without_the_option_nothing_of_a_tower_is_there() -> None:
    torch.manual_seed(0)
    model = RetrievalDense(RunningSum(DIM, False), ARGS)
    assert sorted(dict(model.named_parameters())) == ["encoder.map.bias", "encoder.map.weight"]
